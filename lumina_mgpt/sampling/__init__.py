"""Samplers, which draw image codes from a model's logits. They call the model only through a `step` function."""

from lumina_mgpt.sampling.autoregressive import Step, sample

__all__ = ["Step", "sample"]
