"""Classes for `transformers`: configuration, model and processor. The import registers them with the Auto classes.

    from lumina_mgpt.hf import LuminaMGPTForConditionalGeneration, LuminaMGPTProcessor

They are adapters: the model is the project's `Transformer`, and `generate` runs the samplers of `Pipeline`.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from lumina_mgpt.hf.configuration import LuminaMGPTConfig
from lumina_mgpt.hf.modeling import LuminaMGPTForConditionalGeneration
from lumina_mgpt.hf.processing import LuminaMGPTProcessor

__all__ = ["LuminaMGPTConfig", "LuminaMGPTForConditionalGeneration", "LuminaMGPTProcessor"]

AutoConfig.register(LuminaMGPTConfig.model_type, LuminaMGPTConfig, exist_ok=True)
AutoProcessor.register(LuminaMGPTConfig, LuminaMGPTProcessor, exist_ok=True)
for _auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto.register(LuminaMGPTConfig, LuminaMGPTForConditionalGeneration, exist_ok=True)
