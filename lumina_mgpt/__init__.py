"""Lumina-mGPT 2.0: autoregressive image generation with one decoder-only transformer."""
