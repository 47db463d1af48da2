"""How much memory a training takes on each device, reckoned from the sizes of the model.

Confirmed on a CPU only (tests/test_memory.py): what a layer saves for its backward, and the peak of whole steps.
"""

from dataclasses import dataclass

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.training.loss import CHUNK_LOGITS, MIN_ROWS, MIN_ROWS_ON_GPU

# Bytes that one layer saves for its backward, for each id and channel of the model's width, or of the inner one:
# 12 and 4 tensors in float32; in bfloat16 half of it, but for the norms (and the inputs of adapters), which stay wide.
SAVED_WIDE, SAVED_NARROW = (48, 16), (34, 9)
_LOGIT_WIDE, _LOGIT_NARROW = 4, 8  # bytes of one logit of a chunk: float32 in place; bfloat16, float32, narrow again
_RUNTIME = 1.2e9  # CUDA's context and kernels, NCCL's buffers: a usual size, not measured here


@dataclass(frozen=True)
class Plan:
    """A training as far as memory goes; `ids` are those of a micro-batch on one device.

    `wide`: all is float32. Else products are bfloat16, weights and optimizer state float32; with `lora_rank` weights
    that stay as they are, are bfloat16 too. `offload`: shares of weights and optimizer lie in the CPU's memory (FSDP).
    """

    config: ModelConfig
    ids: int
    devices: int = 1
    wide: bool = False
    checkpointing: bool = True
    lora_rank: int = 0
    offload: bool = False
    gpu: bool = True

    @property
    def sharded(self) -> bool:
        return self.devices > 1 or self.offload

    @property
    def matrix(self) -> int:
        """Weights of the embedding, and of the head."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def layer(self) -> int:
        """Weights of one layer's matrices."""
        return self.config.layer_weight_count

    @property
    def weights(self) -> int:
        return self.config.weight_count

    @property
    def adapters(self) -> int:
        c, inner = self.config, self.config.intermediate_size
        q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        ends = 2 * (c.hidden_size + q) + 2 * (c.hidden_size + k) + 3 * (c.hidden_size + inner)
        return c.num_hidden_layers * self.lora_rank * ends

    def state(self, gradients: bool) -> float:
        """Weights and optimizer state between steps, of which each device has its share; with or without gradients."""
        trained = 16 if gradients else 12  # float32: weight, two moments of AdamW, gradient
        if self.offload:
            return 0
        if self.lora_rank:
            return ((4 if self.wide else 2) * self.weights + trained * self.adapters) / self.devices
        return trained * self.weights / self.devices

    def saved(self) -> tuple[float, float]:
        """What layers keep for the backward: all of them together, and what the one at work has beside that."""
        c = self.config
        width, inner = SAVED_WIDE if self.wide else SAVED_NARROW
        one = self.ids * (width * c.hidden_size + inner * c.intermediate_size)
        if not self.checkpointing:
            return c.num_hidden_layers * one, 0
        stream = 2 if not self.wide and (self.sharded or self.lora_rank) else 4
        return c.num_hidden_layers * self.ids * c.hidden_size * stream, one

    def moments(self) -> dict[str, float]:
        """Bytes in use when the loss is made, in the first layer of the backward, and at its end."""
        c, product = self.config, 4 if self.wide else 2
        whole = 0 if self.lora_rank else product * self.matrix  # the head's gradient before it is shared out
        kept, one = self.saved()
        rows = max(MIN_ROWS_ON_GPU if self.gpu else MIN_ROWS, CHUNK_LOGITS // c.vocab_size)
        logits = min(rows, self.ids) * c.vocab_size * (_LOGIT_WIDE if self.wide else _LOGIT_NARROW)
        if not self.sharded:
            copies = 0 if self.wide or self.lora_rank else 2 * c.num_hidden_layers * self.layer  # autocast's
            gradient = 0 if self.lora_rank else 4 * self.matrix
            narrow_head = 0 if self.wide or self.lora_rank else 2 * self.matrix
            return {
                "loss": self.state(False) + copies + kept + gradient + narrow_head + logits,
                "backward": self.state(False) + copies + kept + gradient + one,
                "end": self.state(True) + copies,
            }
        gathered = product * self.matrix  # the head, from its use to the end of the step
        layers = 2 * product * self.layer  # the one at work and the next
        summed = 0 if self.lora_rank else (product + 4) * self.layer  # a layer's gradient, and wide for the sum
        last = 0 if self.lora_rank else 2 * product * self.matrix + 4 * self.matrix  # embedding: weights, gradient, sum
        return {
            "loss": self.state(False) + gathered + whole + kept + logits,
            "backward": self.state(False) + gathered + whole + layers + summed + kept + one,
            "end": self.state(True) + gathered + whole + last,
        }

    def peak(self) -> float:
        """Bytes on each device."""
        return max(self.moments().values()) + (_RUNTIME if self.gpu else 0)
