"""From the model's logits to the law a code is drawn from: guidance, temperature, top-k, softmax, in that order.

Pure functions of tensors, for any number of positions at once. They compute in float32, or in float64 where that is
what they are given (so that samplers can be compared for equality without near ties).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina_mgpt.config import SamplingConfig

COLDEST = 1e-30  # lower temperatures count as this one: it leaves the largest alone, too, and overflows no logits


def guide(logits: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance: uncond + scale · (cond - uncond).

    Shapes: logits (2B, ..., C), conditional rows first -> (B, ..., C).
    Differs from the reference: the scale stays what it is; there it is rewritten while sampling.
    """
    cond, uncond = _wide(logits).chunk(2)
    return uncond + scale * (cond - uncond)


def truncate(logits: Tensor, top_k: int) -> Tensor:
    """Keeps the `top_k` largest logits, counted from the least of them, and puts the others to -inf.

    Exactly min(top_k, C) are kept. Of equal logits at the border those with the lower index are, on every device:
    what a library's own top-k does with ties is not specified.

    Shapes: (..., C) -> (..., C); top_k >= 1.
    """
    if top_k >= logits.shape[-1]:
        return logits
    border = logits.topk(top_k, dim=-1, sorted=False).values.amin(-1, keepdim=True)  # (..., 1)
    ahead = logits - border
    if logits.device.type == "cpu":  # elsewhere asking would wait for the device, and summing is cheap
        if int((ahead >= 0).sum()) == top_k * border.numel():
            # 0.2 ms on a core for 64 laws of 16,384 codes, where a mask takes 5; the rest lies below zero by more.
            return F.threshold_(ahead, -torch.finfo(ahead.dtype).smallest_normal, -torch.inf)
    level = ahead == 0
    places = top_k - (ahead > 0).sum(-1, keepdim=True)  # left for the equal ones; at least 1
    kept = (ahead > 0) | (level & (level.cumsum(-1) <= places))
    return ahead.masked_fill_(~kept, -torch.inf)


def log_probs(logits: Tensor, temperature: float, top_k: int) -> Tensor:
    """Log of the law: softmax of the `top_k` largest of logits / temperature.

    Shapes: (..., C) -> (..., C) in float32 or float64; -inf where the law is 0. Ranges: temperature > 0, top_k >= 1.
    """
    return (truncate(_wide(logits), top_k) / max(temperature, COLDEST)).log_softmax(-1)


def code_log_probs(logits: Tensor, settings: SamplingConfig) -> Tensor:
    """The whole way for one `step`'s answer: the law of the code at each position read.

    Shapes: logits (R, Q, C) -> (B, Q, C), with R = 2B where `settings.cfg` asks for guidance and R = B where it is 1.
    """
    if settings.cfg != 1.0:
        logits = guide(logits, settings.cfg)
    return log_probs(logits, settings.temperature, settings.top_k)


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
