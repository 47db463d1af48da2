"""What the last code of an image attends to: the paper's figure 5 (Lumina-mGPT, arXiv 2408.02657)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lumina_mgpt.model.attention_weights import last_query_weights
from lumina_mgpt.model.transformer import Transformer
from lumina_mgpt.unirep import HEADER, ImageLayout
from lumina_mgpt.vocabulary import Vocabulary

KINDS = ("text", "image start", "grid ids", "codes", "row ends", "bos and turn end")
_SHADES = ((0, 0, 0), (90, 0, 110), (220, 40, 60), (250, 160, 30), (255, 255, 230))  # of a heat map, from low to high
_HEIGHT, _LINE, _LABEL = 384, 22, 150  # pixels of a drawing: height of the image, of a bar, width of a label


@dataclass(frozen=True)
class AttentionMap:
    """Attention weights of the last code of an image, averaged over heads.

    Attributes:
        layers: weights of each layer over all ids up to the last code (L, S).
        kinds: index in KINDS of each id (S,).
        layout: layout of the image, which ends the ids.
    """

    layers: Tensor
    kinds: Tensor
    layout: ImageLayout

    @property
    def weights(self) -> Tensor:
        """Weights averaged over the layers, too. Shapes: (S,). They sum to 1."""
        return self.layers.mean(0)

    @property
    def grid(self) -> Tensor:
        """The weights of the codes. Shapes: (rows, cols)."""
        layout = self.layout
        start = len(self.kinds) - layout.offset_of(layout.num_codes - 1) - 1
        return self.weights[start + layout.code_offsets].view(layout.rows, layout.cols)

    def shares(self, weights: Tensor | None = None) -> dict[str, float]:
        """Returns the sum of the weights for each of KINDS.

        Args:
            weights: weights over all ids (S,) (default: the averages).
        """
        weights = self.weights if weights is None else weights
        return {kind: float(weights[self.kinds == index].sum()) for index, kind in enumerate(KINDS)}

    @property
    def counts(self) -> dict[str, int]:
        """The number of ids of each of KINDS."""
        return {kind: int((self.kinds == index).sum()) for index, kind in enumerate(KINDS)}


@torch.inference_mode()
def attention_map(model: Transformer, vocabulary: Vocabulary, start: Sequence[int], codes: Tensor) -> AttentionMap:
    """Returns what the last code of an image attends to.

    Args:
        start: ids of the prompt, up to image start.

    Shapes: codes (rows, cols).
    """
    rows, cols = (side // vocabulary.cells for side in codes.shape)
    layout = ImageLayout(vocabulary, rows, cols)
    length = layout.offset_of(layout.num_codes - 1) + 1  # up to the last code
    ids = torch.tensor([*start, *layout.fill(codes.flatten())[:length].tolist()])
    with last_query_weights(model) as recorded:
        model(ids[None].to(next(model.parameters()).device))
    layers = torch.stack([weights[0].mean(0) for weights in recorded]).cpu()
    return AttentionMap(
        layers, torch.cat([_kinds_of_prompt(start, vocabulary), _kinds_of_image(layout, length)]), layout
    )


def _kinds_of_prompt(start: Sequence[int], vocabulary: Vocabulary) -> Tensor:
    separators = (vocabulary.bos_id, vocabulary.turn_end_id)
    return torch.tensor([KINDS.index("bos and turn end" if id_ in separators else "text") for id_ in start])


def _kinds_of_image(layout: ImageLayout, length: int) -> Tensor:
    """Returns the kinds of an image's first ids."""
    kinds = torch.full((length,), KINDS.index("row ends"))
    kinds[layout.code_offsets] = KINDS.index("codes")
    kinds[0] = KINDS.index("image start")
    kinds[1:HEADER] = KINDS.index("grid ids")
    return kinds


def draw(attention: AttentionMap, image: Image.Image) -> Image.Image:
    """Returns a picture: the image, the weights of its codes as a heat map, and the share of each kind as a bar.

    The brightness of a square grows with the square root of its weight, since few codes have most of the weight.
    """
    width = max(1, round(image.width * _HEIGHT / image.height))
    heat = (attention.grid / attention.grid.max()).sqrt().numpy()
    shades = np.stack([np.interp(heat, np.linspace(0, 1, len(_SHADES)), band) for band in np.array(_SHADES).T], -1)
    squares = Image.fromarray(shades.round().astype(np.uint8)).resize((width, _HEIGHT), Image.Resampling.NEAREST)
    full = max(2 * width, _LABEL + 250)
    drawing = Image.new("RGB", (full, _HEIGHT + _LINE * (len(KINDS) + 1)), "white")
    drawing.paste(image.convert("RGB").resize((width, _HEIGHT)), (0, 0))
    drawing.paste(squares, (width, 0))
    pen = ImageDraw.Draw(drawing)
    for line, (kind, share) in enumerate(attention.shares().items()):
        top = _HEIGHT + _LINE // 2 + line * _LINE
        pen.text((6, top + 4), f"{kind}: {100 * share:.1f} %", fill="black")
        pen.rectangle((_LABEL, top + 3, _LABEL + share * (full - _LABEL - 6), top + _LINE - 4), fill=_SHADES[2])
    return drawing
