"""The image tokenizer: finds and loads a MoVQGAN file, encodes images to codes and decodes codes to images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from lumina_mgpt.config import ModelConfig
from lumina_mgpt.errors import InputError
from lumina_mgpt.images import to_images, to_pixels, upright
from lumina_mgpt.io import cause, remedy, require_readable
from lumina_mgpt.vqgan.model import VQGAN

RELEASED_NAME = "movqgan_270M.ckpt"
_RELEASED_PATH = Path(__file__).parent.parent / "movqgan" / "270M" / RELEASED_NAME  # as in the released repository
# Full-size feature maps that are in memory together, measured: 5.5 when encoding, 7.5 when decoding.
_FEATURE_MAPS = 8
_PATTERNS = ("movqgan*.safetensors", "movqgan*.ckpt")


def find_image_tokenizer(model_folder: str | Path, explicit: str | Path | None = None) -> Path:
    """Returns the path of the MoVQGAN file to load.

    It is `explicit` if given. Otherwise it is the MoVQGAN file in the model folder. If there is none, it is the
    released file at `movqgan/270M` in this package.

    Raises:
        InputError: no file is found, the model folder holds several, or `explicit` cannot be read.
    """
    if explicit is not None:
        require_readable(explicit, "movqgan_path")
        return Path(explicit)
    found = sorted(path for pattern in _PATTERNS for path in Path(model_folder).glob(pattern))
    if len(found) > 1:  # sizes with equal numbers of codes cannot be told apart, and the wrong one decodes to noise
        names = ", ".join(path.name for path in found)
        raise InputError(f"must name one file, because {model_folder} holds {names}", "movqgan_path")
    if found:
        return found[0]
    if _RELEASED_PATH.is_file():
        return _RELEASED_PATH
    raise InputError(
        f"no MoVQGAN weights in {model_folder} and no {_RELEASED_PATH}: download {RELEASED_NAME} "
        f"(linked from the Alpha-VLLM/Lumina-mGPT-2.0 page) to that path, or set movqgan_path"
    )


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
        raise InputError(f"{path} is damaged, or not a MoVQGAN file ({cause(error)}); download it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(f"{path} must hold a state dict of tensors; give a MoVQGAN file")
    return state


class ImageTokenizer:
    """A MoVQGAN on a device, which encodes PIL images to codes and decodes codes to PIL images."""

    def __init__(self, model: VQGAN) -> None:
        self.model = model

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
    ) -> "ImageTokenizer":
        """Loads the MoVQGAN file at `path`. Infers the sizes of the model from its tensors.

        Raises:
            InputError: the file cannot be read, or is not a VQGAN.
        """
        try:
            model = VQGAN.from_state_dict(load_state_dict(path))
        except InputError as error:
            raise InputError(str(error) if str(path) in str(error) else f"{path}: {error}") from None
        return cls(model.to(device=device, dtype=dtype))

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
        """Side of the square that one code stands for, in pixels. It is 8 in all released files."""
        return self.model.config.cell

    def require_codes(self, config: ModelConfig, path: str | Path) -> None:
        """Raises an error if the number of codes differs between this image tokenizer and the transformer.

        Args:
            config: configuration of the transformer.
            path: file of this image tokenizer, for the message.

        Raises:
            InputError: the numbers of codes differ.
        """
        if self.num_codes != config.num_image_codes:
            rule = f"must have the model's {config.num_image_codes} codes, but {path} has {self.num_codes}"
            raise InputError(f"{rule}; give the MoVQGAN that the model was trained with", "movqgan_path")

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

    def decode(self, codes: Tensor, parts: int = 1) -> list[Image.Image]:
        """Returns the RGB images that the codes stand for. Each code covers a square of side `cell`.

        Args:
            parts: number of equal parts, stacked from top to bottom, that are decoded on their own, as in `encode`.

        Shapes: codes (B, rows, cols).

        Raises:
            InputError: a code is outside the codebook.
        """
        codes = rearrange(codes, "B (P rows) cols -> (B P) rows cols", P=parts)
        with full_precision(self.model):
            pixels = self.model.decode(codes.to(self.model.quantize.embedding.weight.device))
        return to_images(rearrange(pixels, "(B P) C H W -> B C (P H) W", P=parts))


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
