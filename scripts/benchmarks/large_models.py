"""Models of the 7B's sizes with random weights, for benchmarks."""

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from lumina_mgpt.config import ModelConfig, int4_recipe
from lumina_mgpt.model import quantization
from lumina_mgpt.model.kv_cache import KVCache
from lumina_mgpt.model.transformer import Transformer

PROJECT = Path(__file__).resolve().parent.parent.parent
SEVEN_B = PROJECT / "configs" / "model" / "7B.yaml"
FORMS = {  # dtype of activations, and weights in an int4 group
    "fp32": (torch.float32, None),
    "bf16": (torch.bfloat16, None),
    "int4": (torch.bfloat16, 128),
    "int4-fp32": (torch.float32, 128),
}


def random_model(
    config: ModelConfig, dtype: torch.dtype, group: int | None = None, device: torch.device | str = "cpu"
) -> Transformer:
    """A model with random weights, made on the device. With `group`, the layers' matrices are int4, without a search.

    Weights have a standard deviation of 0.02, norms are 1.
    """
    generator = torch.Generator(device).manual_seed(0)
    with torch.device("meta"):
        model = Transformer(config)
    if group:
        quantization.replace_linears(model, group)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fresh = torch.full(parameter.shape, float(name == "weight"), dtype=dtype, device=device)
            if isinstance(module, nn.Linear | nn.Embedding):
                fresh.normal_(0, 0.02, generator=generator)
            setattr(module, name, nn.Parameter(fresh, requires_grad=False))
        if isinstance(module, quantization.Int4Linear):
            shape, scale = module.weight_int4.shape, 0.02 / 4.61  # numbers 0 ... 15 have a standard deviation of 4.61
            bytes_ = torch.randint(0, 256, shape, dtype=torch.uint8, device=device, generator=generator)
            scales = torch.full(module.weight_scale.shape, scale, dtype=torch.bfloat16, device=device)
            for leaf, tensor in (("int4", bytes_), ("scale", scales), ("zero", scales / 2)):  # zero: a mean of 0
                module.load(f"weight_{leaf}", tensor, device)
    if group:
        model.config = replace(config, quantization_config=int4_recipe(group))
        quantization.pack_weights(model, dtype)
    return model.eval()


def stored_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(t.nbytes for t in (*module.parameters(), *module.buffers()))


def fill_cache(cache: KVCache) -> None:
    """Fills the cache with random numbers, as if all its slots were written."""
    for tensor in cache.tensors():
        if tensor.dtype == torch.int8:
            tensor.random_(-127, 128)
        elif cache.layers[0].scales is not None:  # the scales of int8 numbers
            tensor.fill_(0.02)
        else:
            tensor.normal_()
