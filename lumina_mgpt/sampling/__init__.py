"""Samplers: they own the law a code is drawn from and the order of steps, and know the model only as a `step`."""

from lumina_mgpt.sampling.autoregressive import Step, sample

__all__ = ["Step", "sample"]
