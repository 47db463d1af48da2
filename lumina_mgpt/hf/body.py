"""The project's transformer inside the model for transformers, also where accelerate spreads its layers."""

from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from torch import Tensor, nn

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.model.transformer import Head, Transformer


class Body(Transformer):
    """The transformer inside the model for transformers, which owns the head, as the names on disk say.

    Where accelerate put layers on several devices, hidden states and logits return to the device of the ids.
    """

    def __init__(self, config: ModelConfig, attn: str) -> None:
        super().__init__(config, attn)
        if not self.lm_head.weight.is_meta:
            self.init_weights()

    def give_head(self) -> Head:
        """Removes the head from this module's own parameters, and returns it."""
        return self._modules.pop("lm_head")  # type: ignore[return-value]

    def see_head(self, head: nn.Module) -> None:
        """Uses a head that another module owns; peft may have replaced the first one."""
        if not isinstance(head, Head):
            head.columns = None  # type: ignore[assignment]
        self.__dict__["lm_head"] = head

    @property
    def device(self) -> torch.device:
        return _device(self.embed_tokens)

    @property
    def layer_devices(self) -> list[torch.device]:
        return [_device(layer) for layer in self.layers]

    @property
    def dispatched(self) -> bool:
        """Whether accelerate moves weights or inputs of a part of this module."""
        return any(hasattr(part, "_hf_hook") for part in (*self.modules(), *self.lm_head.modules()))

    def forward(self, ids: Tensor, **arguments: Any) -> Tensor:
        return super().forward(ids, **arguments).to(self.device)

    def project(self, hidden: Tensor, columns: slice | None = None) -> Tensor:
        if isinstance(self.lm_head, Head):
            return self.lm_head(hidden, columns).to(hidden.device)
        logits = self.lm_head(hidden).to(hidden.device)
        return logits if columns is None else logits[..., columns]


def _device(module: nn.Module) -> torch.device:
    """Returns the device on which a module runs. accelerate may keep its weights elsewhere."""
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
            if isinstance(one, AlignDevicesHook) and one.execution_device is not None:
                return torch.device(one.execution_device)
    return next(module.parameters()).device
