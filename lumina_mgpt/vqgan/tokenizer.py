"""The image tokenizer: finds and loads a VQGAN or MoVQGAN file, converts images to codes and codes to images."""

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.families import VQGAN_ENCODER
from lumina_mgpt.images import to_images, to_pixels, upright
from lumina_mgpt.io import cause, remedy, require_readable
from lumina_mgpt.vqgan.model import VQGAN

# Full-size feature maps that are in memory together, measured: 5.5 when encoding, 7.5 when decoding.
_FEATURE_MAPS = 8


@dataclass(frozen=True)
class Names:
    """Names of one kind of image tokenizer: in messages, of its files, and of the released places.

    Attributes:
        title: name of the kind.
        option: parameter that names a file.
        patterns: names of its files in a checkpoint's folder.
        inner: path below a checkpoint's folder, looked at after the folder itself.
        elsewhere: paths looked at last. A relative one is below the working folder.
        download: what a user does who has no file. `{folder}` stands for the checkpoint's folder.
    """

    title: str
    option: str
    patterns: tuple[str, str]
    inner: str | None
    elsewhere: tuple[Path, ...]
    download: str


_PACKAGE = Path(__file__).parent.parent
_CHAMELEON = Path("ckpts", "chameleon", "tokenizer", "vqgan.ckpt")
# Places as in the released repositories; `original_tokenizers` as in the hub's Alpha-VLLM/Chameleon_7B_mGPT.
KINDS: dict[str, Names] = {
    "movqgan": Names(
        "MoVQGAN",
        "movqgan_path",
        ("movqgan*.safetensors", "movqgan*.ckpt"),
        None,
        (_PACKAGE / "movqgan" / "270M" / "movqgan_270M.ckpt",),
        "download movqgan_270M.ckpt (linked from the Alpha-VLLM/Lumina-mGPT-2.0 page) to that path",
    ),
    "vqgan": Names(
        "VQGAN",
        "vqgan_path",
        ("vqgan*.safetensors", "vqgan*.ckpt"),
        "original_tokenizers/vqgan.ckpt",
        (_CHAMELEON, _PACKAGE / _CHAMELEON),
        "download original_tokenizers/vqgan.ckpt of Alpha-VLLM/Chameleon_7B_mGPT into {folder}",
    ),
}


def look_for_image_tokenizer(
    model_folder: str | Path, explicit: str | Path | None = None, kind: str = "movqgan"
) -> Path | None:
    """Returns the path of the image tokenizer's file, None if there is none.

    Args:
        model_folder: folder of the checkpoint.
        explicit: file that the user named.
        kind: `movqgan` or `vqgan`, as `config.family.image_tokenizer` says.

    It is `explicit` if given. Otherwise it is the file in the model folder. If there is none, it is the first that
    exists of the places in which the released code of that kind has it.

    Raises:
        InputError: the model folder holds several such files, or `explicit` cannot be read.
    """
    names = KINDS[kind]
    if explicit is not None:
        require_readable(explicit, names.option)
        return Path(explicit)
    folder = Path(model_folder)
    found = sorted(path for pattern in names.patterns for path in folder.glob(pattern))
    if len(found) > 1:  # an encoder alone serves only if there is nothing else
        found = [path for path in found if path.name != VQGAN_ENCODER]
    if len(found) > 1:  # sizes with equal numbers of codes cannot be told apart, and the wrong one decodes to noise
        listed = ", ".join(path.name for path in found)
        raise InputError(f"must name one file, because {model_folder} holds {listed}", names.option)
    if found:
        return found[0]
    inner = [folder / names.inner] if names.inner else []
    return next((path for path in (*inner, *names.elsewhere) if path.is_file()), None)


def find_image_tokenizer(model_folder: str | Path, explicit: str | Path | None = None, kind: str = "movqgan") -> Path:
    """Returns the path that `look_for_image_tokenizer` returns, and requires that there is one.

    Raises:
        InputError: as there, or no file is found.
    """
    path = look_for_image_tokenizer(model_folder, explicit, kind)
    if path is None:
        raise InputError(missing_file(model_folder, kind))
    return path


def missing_file(model_folder: str | Path, kind: str) -> str:
    """Returns the message that no image tokenizer's file was found, with the places looked at and a remedy."""
    names = KINDS[kind]
    places = " and no ".join(dict.fromkeys(str(path) for path in names.elsewhere))
    download = names.download.format(folder=model_folder)
    return f"no {names.title} weights in {model_folder} and no {places}: {download}, or give {names.option}=FILE"


def load_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Returns the tensors of a `.safetensors` file or of a pickled state dict. Runs no code from a pickle.

    Raises:
        InputError: the file cannot be read, is damaged, or holds anything but tensors.
    """
    path = Path(path)
    require_readable(path)
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # the older format, without zip, cannot be mapped
            state = torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # arbitrary bytes make the unpickler raise any type
        if remedy(error, ""):
            raise InputError(f"{path} cannot be read ({cause(error)}); {remedy(error)}") from None
        # The message of an unpickler advises to load without weights_only, which would let the file run code.
        why = "it holds something else than tensors" if isinstance(error, pickle.UnpicklingError) else cause(error)
        raise InputError(f"{path} is damaged, or not an image tokenizer's file ({why}); download it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} must hold a state dict of tensors; give a VQGAN or MoVQGAN file")
    return state


class ImageTokenizer:
    """A VQGAN on a device, which encodes PIL images to codes and decodes codes to PIL images.

    Args:
        source: file or folder of the weights, for messages.
    """

    def __init__(self, model: VQGAN, source: str | Path = "") -> None:
        self.model = model
        self.source = str(source)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "ImageTokenizer":
        """Loads the VQGAN or MoVQGAN file at `path`. Infers sizes and kind of the model from its tensors.

        Args:
            dtype: type of the decoder. Encoder and codebook are at least float32, since half types change codes.

        Raises:
            InputError: the file cannot be read, or is not a VQGAN.
        """
        return cls.from_state(load_state_dict(path), device, dtype, path)

    @classmethod
    def from_state(
        cls, state: dict[str, Tensor], device: str | torch.device, dtype: torch.dtype, source: str | Path
    ) -> "ImageTokenizer":
        """Returns the image tokenizer with the tensors of a state dict, which may lack a decoder.

        Args:
            dtype: as in `from_checkpoint`.
            source: where the tensors are from, for messages.

        Raises:
            InputError: the tensors are not those of a VQGAN.
        """
        try:
            model = VQGAN.from_state_dict(state)
        except InputError as error:
            raise InputError(f"{source}: {error}") from None
        return cls(model.place(device, dtype), source)

    @property
    def kind(self) -> str:
        """The kind of image tokenizer. One without a decoder counts as VQGAN."""
        return self.model.config.kind

    @property
    def can_decode(self) -> bool:
        """Whether the weights have a decoder. Those inside a language model's files have none."""
        return self.model.config.decoder

    @property
    def num_codes(self) -> int:
        """Size of the codebook."""
        return self.model.config.num_codes

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.model.quantize.embedding.weight.device

    def working_bytes(self, pixels: int) -> int:
        """Returns the bytes of temporaries that encoding or decoding one image takes.

        Args:
            pixels: number of pixels of the image.
        """
        return _FEATURE_MAPS * self.model.config.ch * self.model.encoder.conv_in.weight.element_size() * pixels

    @property
    def cell(self) -> int:
        """Side of the square that one code stands for, in pixels. It is 8 in MoVQGAN and 16 in Chameleon's VQGAN."""
        return self.model.config.cell

    def require_codes(self, config: ModelConfig, path: str | Path) -> None:
        """Raises an error if the codes of this image tokenizer are not those of the transformer.

        Args:
            config: configuration of the transformer.
            path: file of this image tokenizer, for the message.

        Raises:
            InputError: the numbers of codes differ, or the squares of pixels that one code stands for.
        """
        names, cell = KINDS[config.family.image_tokenizer], config.family.cell
        advice = f"give the {names.title} that the model was trained with"
        if self.num_codes != config.num_image_codes:
            rule = f"must have the model's {config.num_image_codes} codes, but {path} has {self.num_codes}"
            raise InputError(f"{rule}; {advice}", names.option)
        if self.cell != cell:
            rule = f"must have codes of {cell} x {cell} pixels for {config.family.name}, but those of {path} have "
            raise InputError(f"{rule}{self.cell} x {self.cell}; {advice}", names.option)

    def require_decoder(self) -> None:
        """Raises an error if this image tokenizer cannot turn codes into images.

        Raises:
            InputError: the weights have no decoder.
        """
        if not self.can_decode:
            names = KINDS[self.kind]
            rule = f"must name a {names.title} file to make images, because {self.source} has the encoder only"
            remedy = names.download.format(folder="the checkpoint's folder")
            raise InputError(f"{rule}; {remedy}, or give its path", names.option)

    def encode(self, images: Sequence[Image.Image], parts: int = 1) -> Tensor:
        """Returns the codes of images on the CPU. The images may have any PIL mode.

        Args:
            images: images that have equal sizes once their EXIF rotation is applied. Widths are multiples of `cell`,
                heights multiples of `parts * cell`.
            parts: number of equal parts, stacked from top to bottom, into which each image is cut. Each part is
                encoded on its own.

        Shapes: -> (B, rows, cols) int64.

        Raises:
            InputError: the sizes differ, or a side is not such a multiple.
        """
        images = [upright(image) for image in images]
        sizes = {image.size for image in images}
        if len(sizes) != 1:
            raise InputError(f"images of one batch must have one size, got {sorted(sizes)}")
        width, height = sizes.pop()
        if width % self.cell or height % (parts * self.cell):
            rule = f"multiples of {self.cell}" + (f" and {parts * self.cell}" if parts > 1 else "")
            raise InputError(f"width and height must be {rule}, got {width}x{height}; crop the image")
        pixels = rearrange(to_pixels(images), "B C (P H) W -> (B P) C H W", P=parts)
        with full_precision(self.model):
            codes = self.model.encode(pixels.to(self.model.encoder.conv_in.weight)).cpu()
        return rearrange(codes, "(B P) rows cols -> B (P rows) cols", P=parts)

    def decode(self, codes: Tensor, parts: int = 1, truncate: bool = False) -> list[Image.Image]:
        """Returns the RGB images that the codes stand for. Each code covers a square of side `cell`.

        Args:
            parts: number of equal parts, stacked from top to bottom, that are decoded on their own, as in `encode`.
            truncate: cut off the fractions of colors, as the released code of the first generation does, instead of
                rounding them.

        Shapes: codes (B, rows, cols).

        Raises:
            InputError: a code is outside the codebook, or there is no decoder.
        """
        self.require_decoder()
        codes = rearrange(codes, "B (P rows) cols -> (B P) rows cols", P=parts)
        with full_precision(self.model):
            pixels = self.model.decode(codes.to(self.device))
        return to_images(rearrange(pixels, "(B P) C H W -> B C (P H) W", P=parts), truncate)


@contextmanager
def full_precision(model: VQGAN) -> Iterator[None]:
    """Computes the float32 convolutions of a CUDA GPU in float32 within the block.

    cuDNN rounds their inputs to TF32 by default, with 10 bits of mantissa. This changes 0.28 % of the codes (simulated
    on a CPU), and the codes of one image would differ between a GPU and a CPU. Models in half precision are unaffected.
    The setting is that of the process; it is restored afterwards.
    """
    if model.encoder.conv_in.weight.device.type != "cuda":
        yield
        return
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before
