"""Lumina-mGPT 2.0: autoregressive image generation with one decoder-only transformer."""

__version__ = "0.1.0"
__all__ = ["Checkpoint", "GenerationRequest", "Pipeline"]


def __getattr__(name: str) -> object:
    """Imports the public classes at their first use: torch takes seconds, and `--help` does not need it."""
    if name in __all__:
        from lumina_mgpt import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
