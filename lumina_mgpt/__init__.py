"""Lumina-mGPT 2.0: autoregressive image generation with one decoder-only transformer."""

__version__ = "0.1.0"
__all__ = ["Checkpoint", "Pipeline"]


def __getattr__(name: str):
    """Loads the pipeline, and torch with it, only when it is asked for: the scripts' `--help` must not wait for it."""
    if name in __all__:
        from lumina_mgpt import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
