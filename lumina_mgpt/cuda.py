"""Attention on CUDA without the cuDNN kernel; shared by the transformer and the image tokenizer."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

_WITHOUT_CUDNN = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def torch_attention(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """Returns torch's `scaled_dot_product_attention`. On CUDA, torch does not choose the cuDNN kernel.

    Since torch 2.11, H100 and B200 prefer that kernel. It builds a plan for each new shape, which takes tens of
    milliseconds, and never frees one: a prompt, a training batch and each part of the cache has its own shape. It is
    also reported to be wrong on B200 with fewer than eight key heads.

    The setting belongs to the process. It is changed during the call only, so other code that uses torch keeps its
    choice. The change costs about a microsecond and starts no kernel.

    Shapes: q (B, N, T, H); k, v (B, K, S, H); returns (B, N, T, H).
    """
    if q.device.type != "cuda":
        return F.scaled_dot_product_attention(q, k, v, **options)
    if torch.compiler.is_compiling():  # a compiler can trace this form only
        with sdpa_kernel(_WITHOUT_CUDNN):
            return F.scaled_dot_product_attention(q, k, v, **options)
    if not torch.backends.cuda.cudnn_sdp_enabled():
        return F.scaled_dot_product_attention(q, k, v, **options)
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        return F.scaled_dot_product_attention(q, k, v, **options)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
