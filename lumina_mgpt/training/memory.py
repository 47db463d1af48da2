"""Estimates the memory that a training needs on each device, from the sizes of the model.

tests/training/test_memory.py compares two estimates with measurements, on a CPU only: the tensors that a layer saves
for its backward pass, and the peak of whole steps.
"""

from dataclasses import dataclass

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.training.loss import CHUNK_LOGITS, chunk_rows

# Bytes that one layer saves for its backward pass, per id: (per channel of the model's width, per channel of the inner
# width). In float32 12 and 3 tensors; in bfloat16 half of that, except for the norms and the inputs of adapters.
SAVED_WIDE, SAVED_NARROW = (48, 12), (34, 7)
_LOGIT_WIDE, _LOGIT_NARROW = 4, 2  # bytes of one logit of a chunk, whose gradient overwrites it
_RUNTIME = 1.2e9  # CUDA's context and kernels, NCCL's buffers: a usual size, not measured here


def layer_weights(config: ModelConfig) -> int:
    """Returns the number of weights in the matrices of all layers, without embedding and head."""
    ends = 1 if config.tie_word_embeddings else 2
    return config.weight_count - ends * config.vocab_size * config.hidden_size


@dataclass(frozen=True)
class Plan:
    """Holds the properties of a training on which its memory depends, and estimates the memory of one device.

    `matrix`, `layer`, `weights` and `adapters` are numbers of weights before sharding. The methods return bytes on each
    device.

    Args:
        ids: number of ids in one micro-batch on one device.
        devices: number of devices that share weights and optimizer state (FSDP).
        wide: whether everything is float32. Otherwise products are bfloat16, and weights and optimizer state float32.
        checkpointing: whether the backward pass recomputes activations.
        lora_rank: rank of the adapters, 0 to train all weights. Frozen weights are bfloat16 unless `wide` is set.
        offload: whether weights and optimizer state are in the CPU's memory.
        gpu: whether the devices are GPUs.
        distills: whether the training distills guidance, see `distillation.GuidanceLoss`. This part of the estimate is
            not compared with measurements.
    """

    config: ModelConfig
    ids: int
    devices: int = 1
    wide: bool = False
    checkpointing: bool = True
    lora_rank: int = 0
    offload: bool = False
    gpu: bool = True
    distills: bool = False

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered for each layer (FSDP)."""
        return self.devices > 1 or self.offload

    @property
    def matrix(self) -> int:
        """Number of weights of the embedding; the head has the same number."""
        return self.config.vocab_size * self.config.hidden_size

    @property
    def layer(self) -> int:
        """Number of weights in the matrices of one layer."""
        return layer_weights(self.config) // self.config.num_hidden_layers

    @property
    def weights(self) -> int:
        """Number of weights in all matrices of the model, with embedding and head."""
        return self.config.weight_count

    @property
    def adapters(self) -> int:
        """Number of weights of all adapters: the sum of rank * (input width + output width) over all matrices."""
        c, inner = self.config, self.config.intermediate_size
        q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        widths = 2 * (c.hidden_size + q) + 2 * (c.hidden_size + k) + 3 * (c.hidden_size + inner)
        return c.num_hidden_layers * self.lora_rank * widths

    @property
    def teacher(self) -> float:
        """Bytes of the frozen teacher, whose head holds the image codes alone; 0 if it has no weights of its own."""
        if not self.distills or self.lora_rank or self.offload:
            return 0
        unused = (self.config.vocab_size - self.config.num_image_codes) * self.config.hidden_size
        tied = self.config.tie_word_embeddings
        weights = (
            self.weights + self.config.num_image_codes * self.config.hidden_size if tied else self.weights - unused
        )
        return (4 if self.wide else 2) * weights / self.devices

    def state(self, gradients: bool) -> float:
        """Returns the bytes of weights and optimizer state, and of the weights' gradients if `gradients` is set."""
        trained = 16 if gradients else 12  # float32: weight, two moments of AdamW, gradient
        if self.offload:
            return 0
        if self.lora_rank:
            return ((4 if self.wide else 2) * self.weights + trained * self.adapters) / self.devices
        return trained * self.weights / self.devices

    def saved(self) -> tuple[float, float]:
        """Returns the bytes of the tensors that are saved for the backward pass, as two numbers.

        The first is for the tensors that all layers save. The second is for those that the current layer recomputes; it
        is 0 without checkpointing.
        """
        c = self.config
        width, inner = SAVED_WIDE if self.wide else SAVED_NARROW
        one = self.ids * (width * c.hidden_size + inner * c.intermediate_size)
        if not self.checkpointing:
            return c.num_hidden_layers * one, 0
        stream = 2 if not self.wide and (self.sharded or self.lora_rank) else 4
        return c.num_hidden_layers * self.ids * c.hidden_size * stream, one

    def moments(self) -> dict[str, float]:
        """Returns the bytes in use at three moments of a step: "loss", "backward" and "end".

        They are the computation of the loss, the first layer of the backward pass, and the end of the backward pass.
        """
        rows = chunk_rows(self.config.vocab_size, self.gpu)
        logits = min(rows, self.ids) * self.config.vocab_size * (_LOGIT_WIDE if self.wide else _LOGIT_NARROW)
        if self.distills:  # one chunk, float32; and what the teacher gives: inputs of its head, float32, of three kinds
            logits = 4 * CHUNK_LOGITS + 3 * 4 * self.ids * self.config.hidden_size
        found = self._sharded_moments(logits) if self.sharded else self._whole_moments(logits)
        return {moment: size + self.teacher for moment, size in found.items()}

    def _whole_moments(self, logits: int) -> dict[str, float]:
        """Of one device that holds all weights."""
        kept, one = self.saved()
        copies = 0 if self.wide or self.lora_rank else 2 * self.config.num_hidden_layers * self.layer  # autocast's
        gradient = 0 if self.lora_rank else 4 * self.matrix
        narrow_head = 0 if self.wide or self.lora_rank else 2 * self.matrix
        return {
            "loss": self.state(False) + copies + kept + gradient + narrow_head + logits,
            "backward": self.state(False) + copies + kept + gradient + one,
            "end": self.state(True) + copies,
        }

    def _sharded_moments(self, logits: int) -> dict[str, float]:
        """Of one device among several that share the weights."""
        product = 4 if self.wide else 2
        kept, one = self.saved()
        gathered = product * self.matrix  # the head, from its use to the end of the step
        whole = 0 if self.lora_rank else product * self.matrix  # the head's gradient before it is reduced
        layers = 2 * product * self.layer  # the current layer and the next
        summed = 0 if self.lora_rank else (product + 4) * self.layer  # a layer's gradient, and in float32 for the sum
        last = 0 if self.lora_rank else 2 * product * self.matrix + 4 * self.matrix  # embedding: weights, gradient, sum
        return {
            "loss": self.state(False) + gathered + whole + kept + logits,
            "backward": self.state(False) + gathered + whole + layers + summed + kept + one,
            "end": self.state(True) + gathered + whole + last,
        }

    def peak(self) -> float:
        """Returns the largest number of bytes in use during a step, on each device."""
        return max(self.moments().values()) + (_RUNTIME if self.gpu else 0)
