"""Finds the box that a model drew into a picture: the answer of the first generation to `Detect: ...`."""

import numpy as np
from PIL import Image

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels; right and bottom are the first outside the box

_CHANGED = 48  # least difference of a color channel, in 0 ... 255: above what encoding and decoding change
_LINES = 48  # number of columns, and of rows, that may be sides of the box: those with the most changed pixels
_COVERED = 0.5  # least share of changed pixels of each side
_SMALLEST = 8  # pixels: shorter sides are specks
# Largest share of changed pixels of the whole image: else it is another image, not the picture and a box. The demo's
# lines of 4 pixels around all of a picture of 96 x 96 change up to 36 %, with the blur of the image tokenizer.
_MOST = 0.4
_INSIDE = 0.5  # largest share of changed pixels in the middle, relative to the sides: else all of the picture differs


def changed_pixels(image: Image.Image, reference: Image.Image) -> np.ndarray:
    """Returns where two images differ by more than encoding and decoding change. Shapes: (height, width) bool.

    Raises:
        ValueError: the sizes differ.
    """
    if image.size != reference.size:
        raise ValueError(f"the images must have one size, got {image.size} and {reference.size}")
    pixels, before = (np.asarray(picture.convert("RGB"), np.int16) for picture in (image, reference))
    return np.abs(pixels - before).max(-1) >= _CHANGED


def find_box(image: Image.Image, reference: Image.Image) -> Box | None:
    """Returns the rectangle whose outline differs between two images of the same size; None if there is none.

    Each of its four sides has at least 50 % changed pixels, and its middle has a share of at most half of that of the
    outline. At most 40 % of the pixels of the image are changed. Of all such rectangles, it is the one with the most
    changed pixels on its outline, less the unchanged ones.

    Args:
        image: a picture with a box drawn in.
        reference: the picture without the box, after the same encoding and decoding.

    Raises:
        ValueError: the sizes differ.
    """
    changed = changed_pixels(image, reference)
    if changed.mean() > _MOST:
        return None
    left, right = _pairs(changed.sum(0))
    top, bottom = _pairs(changed.sum(1))
    if not len(left) or not len(top):
        return None
    left, right, top, bottom = left[None], right[None], top[:, None], bottom[:, None]  # (pairs of rows or 1, ...)
    along_rows = np.pad(changed.cumsum(1), ((0, 0), (1, 0)))  # changed pixels of a row before a column
    along_columns = np.pad(changed.cumsum(0), ((1, 0), (0, 0)))
    shape = len(top), left.shape[1]
    score, covered = np.zeros(shape, np.int64), np.ones(shape, bool)
    for row in (top, bottom):
        count, length = along_rows[row, right + 1] - along_rows[row, left], right + 1 - left
        score, covered = score + 2 * count - length, covered & (count >= _COVERED * length)
    for column in (left, right):
        count, length = along_columns[bottom + 1, column] - along_columns[top, column], bottom + 1 - top
        score, covered = score + 2 * count - length, covered & (count >= _COVERED * length)
    length = 2 * (right + 1 - left) + 2 * (bottom + 1 - top)
    covered &= _middle(changed, (left, right), (top, bottom)) <= _INSIDE * (score + length) / (2 * length)
    if not covered.any():
        return None
    rows, columns = np.unravel_index(np.where(covered, score, -(1 << 30)).argmax(), shape)
    return int(left[0, columns]), int(top[rows, 0]), int(right[0, columns]) + 1, int(bottom[rows, 0]) + 1


def _middle(
    changed: np.ndarray, across: tuple[np.ndarray, np.ndarray], down: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Returns the share of changed pixels in the middle of rectangles: the half of each side about the center.

    Args:
        across: left and right columns (1, pairs of columns).
        down: top and bottom rows (pairs of rows, 1).
    """
    sums = np.pad(changed.cumsum(0).cumsum(1), ((1, 0), (1, 0)))  # changed pixels above a row and before a column
    (left, right), (top, bottom) = across, down
    inset = (right - left) // 4, (bottom - top) // 4
    left, right, top, bottom = left + inset[0], right - inset[0], top + inset[1], bottom - inset[1]
    count = sums[bottom, right] - sums[top, right] - sums[bottom, left] + sums[top, left]
    return count / ((right - left) * (bottom - top))


def _pairs(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and second lines of all pairs that may be opposite sides of a box.

    Args:
        counts: number of changed pixels of each column, or of each row.
    """
    lines = np.sort(np.argsort(-counts, kind="stable")[:_LINES])
    lines = lines[counts[lines] > 0]
    first, second = (grid.ravel() for grid in np.meshgrid(lines, lines, indexing="ij"))
    apart = second - first + 1 >= _SMALLEST
    return first[apart], second[apart]
