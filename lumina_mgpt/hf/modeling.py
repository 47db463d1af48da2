"""The model for transformers: the project's `Transformer`, with the names of the files on disk."""

import copy
import os
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from lumina_mgpt.checks import require, whole_number
from lumina_mgpt.devices import resolve_device, resolve_dtype
from lumina_mgpt.errors import InputError
from lumina_mgpt.hf import files
from lumina_mgpt.hf.body import Body
from lumina_mgpt.hf.configuration import LuminaMGPTConfig
from lumina_mgpt.hf.generation import generate
from lumina_mgpt.hf.ids import decode_last_image, require_shapes
from lumina_mgpt.model.names import UNUSED_PREFIX, listed
from lumina_mgpt.model.reading import weight_shapes
from lumina_mgpt.model.transformer import Head, HeadNorm, Transformer
from lumina_mgpt.preparation import Checkpoint
from lumina_mgpt.training.loss import WHOLE_LOGITS, ChunkedLoss, token_losses
from lumina_mgpt.unirep import IGNORED
from lumina_mgpt.vqgan.tokenizer import ImageTokenizer


class LuminaMGPTForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Lumina-mGPT of either generation.

    The ids of the model hold the codes of all images: `LuminaMGPTProcessor` makes them.

    Attributes:
        checkpoint: the files that the model was loaded from. Generation needs them. For a model that was made from a
            configuration, set `model.checkpoint = processor.checkpoint`.
    """

    config_class = LuminaMGPTConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = "text"  # pictures come as ids; with "image", pipelines would need torchvision
    output_modalities: Any = ("image", "text")
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = True
    _no_split_modules = ["Layer"]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _keys_to_ignore_on_load_unexpected = [rf"^{UNUSED_PREFIX}"]
    _supports_sdpa = True
    _supports_flash_attn = True

    def __init__(self, config: LuminaMGPTConfig) -> None:
        super().__init__(config)
        if getattr(config, "quantization_config", None) is not None:
            rule = "must be absent, because int4 weights are for the command line and `lumina_mgpt.Pipeline`"
            raise InputError(f"{rule}; give the checkpoint that they were made from", "quantization_config")
        attn = "flash" if str(config._attn_implementation).startswith("flash") else "sdpa"
        self.model = Body(config.model_config, attn)
        if getattr(config, "norms_per_head", False):
            _one_row_per_head(self.model)
        self.lm_head = self.model.give_head()
        self.checkpoint: Checkpoint | None = None
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Does nothing: `Body` has initialized all weights, and `from_pretrained` refuses files that lack some."""

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.lm_head = new_embeddings

    @property
    def transformer(self) -> Body:
        """The project's transformer, joined with the head."""
        self.model.see_head(self.lm_head)
        return self.model

    # -- files ---------------------------------------------------------------------------------------------------------

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, movqgan_path: Any = None, **kwargs: Any
    ) -> Any:
        """Loads a released checkpoint, or one that `save_pretrained` wrote.

        Args:
            pretrained_model_name_or_path: a local folder, or a hub id.
            movqgan_path: file of the image tokenizer, if it is not beside the weights.
            kwargs: arguments of `PreTrainedModel.from_pretrained`. The default of `dtype` is the command line's:
                float32 on a CPU, unless that takes more than half of the memory; bfloat16 on a CUDA GPU.

        Raises:
            InputError: a file is missing, damaged or of another model, or the weights are int4.
        """
        folder = files.folder_of(pretrained_model_name_or_path, kwargs)
        checkpoint = files.open_checkpoint(folder, movqgan_path)
        config, with_info = copy.deepcopy(kwargs.pop("config", None)), kwargs.pop("output_loading_info", False)
        if not isinstance(config, LuminaMGPTConfig):
            config = LuminaMGPTConfig.from_pretrained(folder)
        if _has_norms_per_head(folder, config):
            config.norms_per_head = True
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None)
        if dtype in (None, "auto"):
            device = resolve_device("auto" if kwargs.get("device_map") is not None else "cpu")
            dtype = resolve_dtype("auto", device, checkpoint.config)
        kwargs |= {"config": config, "dtype": dtype, "output_loading_info": True}
        loaded: Any = super().from_pretrained(folder, *args, **kwargs)
        model, info = loaded
        _require_all(folder, info)
        model.checkpoint = checkpoint
        return (model, info) if with_info else model

    def save_pretrained(
        self, save_directory: str | os.PathLike, is_main_process: bool = True, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """Writes config.json, weights, and copies of tokenizer and image tokenizer, in the released layout.

        The folder loads here, by the Auto classes, and with `--model_path` of the commands.

        Raises:
            InputError: a file cannot be written, or `push_to_hub` is set.
        """
        require(not push_to_hub, "push_to_hub", True, "must be False; call push_to_hub(), which uploads all files")
        self.config.auto_map = dict(files.AUTO_MAP)
        try:
            super().save_pretrained(save_directory, is_main_process=is_main_process, **kwargs)
        except (OSError, SafetensorError) as error:
            raise files.unwritable(save_directory, error) from None
        if is_main_process:
            files.drop_stale_index(save_directory)
        if is_main_process and self.checkpoint is not None:
            files.copy_files(self.checkpoint, save_directory)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Does nothing: `save_pretrained` always writes an `auto_map`, and no copy of this module."""

    # -- logits and loss -----------------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        **others: Any,
    ) -> CausalLMOutput | tuple:
        """Returns logits, and with labels the loss: mean cross-entropy, and `config.z_loss_weight` times the z-loss.

        Pads may be at either side. The other ids of a row get the logits of the row without pads; logits at pads have
        no meaning.

        Args:
            input_ids: ids of text and images.
            attention_mask: 0 at pads, 1 elsewhere (default: no pads).
            labels: label of each id, -100 for none. The label of an id is compared with the logits before it.
            num_items_in_batch: number of labels by which the sum of the losses is divided (default: of this call).
            logits_to_keep: return the logits of the last so many ids only; 0 for all.

        Shapes: input_ids, attention_mask, labels (B, T); logits (B, T, V). In training, with more logits than memory
            should hold, the loss is computed in chunks and there are no logits.

        Raises:
            InputError: an argument is not supported, or has another shape.
        """
        for name, value in others.items():
            if value is not None and value is not False and name != "use_cache":
                raise InputError("is no argument of this model; leave it out", name)
        input_ids = require_shapes(input_ids, attention_mask=attention_mask, labels=labels)
        rule = "must be a whole number of at least 0; give 0 for the logits of all ids"
        logits_to_keep = whole_number("logits_to_keep", logits_to_keep, 0, None, rule)
        transformer = self.transformer
        input_ids = input_ids.to(transformer.device)
        order = None if attention_mask is None else _real_first(attention_mask.to(transformer.device))
        hidden = transformer(input_ids if order is None else input_ids.gather(1, order))  # (B, T, D)
        loss, chunked = None, False
        if labels is not None:
            labels = labels.to(hidden.device)
            if attention_mask is not None:
                labels = labels.masked_fill(attention_mask.to(labels.device) == 0, IGNORED)
            labels = labels if order is None else labels.gather(1, order)
            chunked = self.training and labels.numel() * self.config.vocab_size > WHOLE_LOGITS
            loss = self._loss(hidden, labels, chunked and isinstance(self.lm_head, Head), num_items_in_batch)
        logits = None
        if not chunked:
            hidden = hidden if order is None else hidden.gather(1, order.argsort(1)[..., None].expand_as(hidden))
            logits = transformer.project(hidden[:, -logits_to_keep:])
        output = CausalLMOutput(loss=loss, logits=logits)
        return output.to_tuple() if return_dict is False else output

    def _loss(self, hidden: Tensor, labels: Tensor, chunked: bool, count: Tensor | int | None) -> Tensor:
        """Returns the loss per label. Shapes: hidden (B, T, D), labels (B, T)."""
        targets = labels[:, 1:].flatten()
        labelled = (targets != IGNORED).nonzero()[:, 0]
        rows, targets, weight = hidden[:, :-1].flatten(0, 1)[labelled], targets[labelled], self.config.z_loss_weight
        if chunked:
            total = ChunkedLoss.apply(rows, self.lm_head.weight, targets, weight, 0.0)[0]
        else:
            cross, z = token_losses(self.transformer.project(rows), targets)
            total = cross + weight * z
        return total / (max(1, len(labelled)) if count is None else count)

    # -- generation ----------------------------------------------------------------------------------------------------

    def image_tokenizer(self) -> ImageTokenizer:
        """Returns the image tokenizer of the checkpoint, on the device of the first layer.

        Raises:
            InputError: the model has no checkpoint, or the image tokenizer cannot be read.
        """
        return files.image_tokenizer(self.require_checkpoint(), self.transformer.device)

    def require_checkpoint(self) -> Checkpoint:
        """Returns the checkpoint.

        Raises:
            InputError: the model has none.
        """
        if self.checkpoint is None:
            raise InputError("must be set, as for a model from from_pretrained; set processor.checkpoint", "checkpoint")
        return self.checkpoint

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **settings: Any
    ) -> Tensor:
        """Returns ids of images or answers, sampled by the project's samplers, without dropout.

        Arguments and errors: see `generation.generate`.
        """
        input_ids = settings.pop("inputs", None) if input_ids is None else input_ids
        checkpoint, training = self.require_checkpoint(), [module for module in self.modules() if module.training]
        for module in training:
            module.training = False
        try:
            return generate(self.transformer, checkpoint, self.image_tokenizer, input_ids, attention_mask, **settings)
        finally:
            for module in training:
                module.training = True

    @torch.no_grad()
    def decode_image_tokens(self, image_tokens: Tensor, panels: int = 1) -> Tensor:
        """Returns the pixels of the images that end rows of ids. All images have one size.

        Args:
            image_tokens: what `generate(generation_mode="image")` returns.
            panels: number of panels of an image, as the task has them.

        Shapes: image_tokens (B, T) -> (B, height, width, 3), uint8.
        """
        tokenizer, checkpoint = self.image_tokenizer(), self.require_checkpoint()
        images = [decode_last_image(row, checkpoint, tokenizer, panels) for row in image_tokens.tolist()]
        return torch.stack([_pixels(image) for image in images])


def _pixels(image: Image.Image) -> Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(image.height, image.width, 3)


def _real_first(mask: Tensor) -> Tensor | None:
    """Returns the columns of each row with pads last, else in their order; None if pads are last already.

    Causal attention then hides the pads from all other ids, and positions begin at 0. Shapes: mask (B, T) -> (B, T).
    """
    real = mask != 0
    if bool((real[:, :-1] >= real[:, 1:]).all()):
        return None
    return real.logical_not().to(torch.uint8).argsort(dim=1, stable=True)


def _has_norms_per_head(folder: Path, config: LuminaMGPTConfig) -> bool:
    """Returns whether head norms on disk have one row per head, as in files of transformers' own class."""
    shape = weight_shapes(folder).get("model.layers.0.self_attn.q_norm.weight", (0,))
    return shape[0] == config.num_attention_heads != config.model_parallel_size


def _one_row_per_head(model: Transformer) -> None:
    for module in model.modules():
        if isinstance(module, HeadNorm):
            module.weight, module.bias = (
                nn.Parameter(part.detach().repeat_interleave(module.heads // len(part), 0))
                for part in (module.weight, module.bias)
            )


def _require_all(folder: Path, info: dict[str, Any]) -> None:
    """Raises InputError if weights on disk are not those of the model."""
    kinds = {"missing keys": "missing_keys", "unknown keys": "unexpected_keys", "wrong shapes": "mismatched_keys"}
    found = {kind: sorted(map(str, info.get(key) or ())) for kind, key in kinds.items()}
    faults = [f"{len(names)} {kind}: {listed(names)}" for kind, names in found.items() if names]
    if faults:
        raise InputError(f"{folder}: weights do not fit config.json: {'; '.join(faults)}; fetch the checkpoint again")
