"""Simple coloured solids and their eight views around the vertical axis. No two views of a solid look alike."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import cv2
import numpy as np
from emoji import COLORS
from meshes import Mesh, about_x, about_y, about_z, ball, box, fitted, joined, lathe, prism, rendered, tube
from PIL import Image
from scenes import background, to_image

SIDE = 64  # pixels of a side of a view
VIEWS = 8  # views of a full turn
_FINER = 3  # rendered pixels along each pixel of a view, for anti-aliasing
_CONTRAST = 0.45  # least distance of a background from the colour of the solid, as vectors of RGB in [0, 1]

SOLID_COLORS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "red": (225, 40, 45), "orange": (250, 135, 20), "yellow": (250, 215, 40), "green": (50, 170, 60),
        "turquoise": (50, 215, 205), "blue": (45, 85, 225), "purple": (135, 50, 175), "pink": (250, 130, 190),
    }
)  # fmt: skip
_OWN, _DARK, _LIGHT, _GREY, _BEAK, _FLAME, _GRASS, _SEA = range(8)  # materials; _OWN is the named colour
_FIXED = ((45, 45, 50), (245, 245, 240), (150, 155, 165), (255, 120, 0), (255, 215, 0), (30, 150, 70), (20, 70, 200))


def _mug() -> Mesh:
    handle = [(0.5 + 0.72 * math.sin(t), 0.58 - 0.4 * math.cos(t), 0) for t in np.linspace(0, math.pi, 15)]
    outside = lathe([(0, 0), (0.57, 0), (0.62, 0.08), (0.62, 1.15), (0.52, 1.15)])
    inside = lathe([(0.52, 1.15), (0.52, 0.6), (0, 0.6)], _LIGHT)
    return joined([outside, inside, tube(handle, 0.14).turned(about_y(-90))])  # the handle points to the viewer


def _wedge() -> Mesh:
    return prism([(-0.9, 0), (0.9, 0), (-0.9, 1.2)], 1.2).turned(about_y(-90))  # the slope faces the viewer


def _chair() -> Mesh:
    legs = [box((0.16, 0.7, 0.16), (x, 0.35, z), _DARK) for x in (-0.42, 0.42) for z in (-0.42, 0.42)]
    return joined([box((1.05, 0.16, 1.05), (0, 0.76, 0)), box((1.05, 1.1, 0.16), (0, 1.35, -0.45)), *legs])


def _arrow() -> Mesh:
    head = prism([(-0.75, 0), (0.75, 0), (0, 0.9)], 0.4)
    flat = joined([head, prism([(-0.3, -1.1), (0.3, -1.1), (0.3, 0), (-0.3, 0)], 0.4)])
    return flat.turned(about_x(90))


def _cube() -> Mesh:
    return box((1, 1, 1), sides=(_DARK, _FLAME, _OWN, _GREY, _LIGHT, _SEA))  # the top is seen in all views


def _l_shape() -> Mesh:
    return joined([box((0.55, 1.7, 0.55), (-0.4, 0.85, 0)), box((0.85, 0.55, 0.55), (0.3, 0.275, 0))])


def _teapot() -> Mesh:
    body = ball(0.75).stretched(y=0.85).moved(y=0.62)
    spout = tube([(0.5, 0.45, 0), (0.95, 0.6, 0), (1.15, 0.9, 0), (1.4, 1.12, 0)], (0.3, 0.22, 0.16, 0.14))
    handle = [(-0.6 - 0.48 * math.sin(t), 0.68 - 0.4 * math.cos(t), 0) for t in np.linspace(0, math.pi, 15)]
    lid = joined([lathe([(0.42, 0), (0.4, 0.08), (0, 0.16)], _DARK).moved(y=1.17), ball(0.13, _DARK).moved(y=1.4)])
    return joined([body, spout, tube(handle, 0.1, _DARK), lid])


def _house() -> Mesh:
    walls = box((1.2, 0.8, 1.5), (0, 0.4, 0), _LIGHT)
    roof = prism([(-0.8, 0.75), (0.8, 0.75), (0, 1.45)], 1.7)
    door = box((0.36, 0.6, 0.06), (0, 0.3, 0.76), _DARK)
    window = box((0.06, 0.34, 0.5), (0.61, 0.42, 0.1), _SEA)
    return joined([walls, roof, door, window, box((0.24, 0.6, 0.24), (0.4, 1.35, -0.45), _GREY)])


def _car() -> Mesh:
    wheel = lathe([(0, -0.12), (0.3, -0.12), (0.3, 0.12), (0, 0.12)], _DARK).turned(about_z(90))
    wheels = [wheel.moved(x, 0.3, z) for x in (-0.5, 0.5) for z in (-0.65, 0.65)]
    lights = [box((0.22, 0.18, 0.06), (x, 0.62, 1.13), _FLAME) for x in (-0.32, 0.32)]
    cabin = box((0.86, 0.36, 0.95), (0, 1.0, -0.35), _LIGHT)
    top = box((0.9, 0.1, 1.0), (0, 1.2, -0.35))
    return joined([box((1.04, 0.5, 2.25), (0, 0.57, 0)), cabin, top, *wheels, *lights])


def _key() -> Mesh:
    ring = [(0.45 * math.sin(t), 0.45 * math.cos(t), 0) for t in np.linspace(0, 2 * math.pi, 33)]
    shaft = box((0.24, 1.5, 0.24), (0, -1.2, 0))
    teeth = [box((0.42, 0.2, 0.22), (0.3, y, 0)) for y in (-1.4, -1.8)]
    return joined([tube(ring, 0.17), shaft, *teeth]).turned(about_x(-90))  # lies flat, its end to the viewer


def _boat() -> Mesh:
    hull = prism([(-0.45, -0.9), (0.45, -0.9), (0.5, 0.2), (0, 1.1), (-0.5, 0.2)], 0.5).turned(about_x(90))
    sail = prism([(-0.85, 0), (0, 0), (0, 1.2)], 0.12, _LIGHT).turned(about_y(-90))  # behind the mast
    mast = lathe([(0.08, 0.2), (0.08, 1.75), (0, 1.75)], _DARK)
    return joined([hull, mast.moved(z=0.1), sail.moved(y=0.45)])


def _stairs() -> Mesh:
    steps = [box((1.1, 0.4 * n, 0.45), (0, 0.2 * n, 0.9 - 0.45 * n)) for n in (1, 2, 3, 4)]
    return joined([*steps, box((0.06, 0.5, 1.8), (0.58, 0.25, -0.225), _DARK)])


def _duck() -> Mesh:
    body = ball(0.7).stretched(0.85, 0.7, 1.15).moved(y=0.5)
    tail = ball(0.3).stretched(0.8, 0.6, 1.2).moved(0, 0.75, -0.75)
    head = ball(0.45).moved(0, 1.2, 0.4)
    beak = ball(0.24, _BEAK).stretched(1, 0.45, 1.3).moved(0, 1.12, 0.9)
    eyes = [ball(0.09, _DARK).moved(x, 1.33, 0.75) for x in (-0.2, 0.2)]
    return joined([body, tail, head, beak, *eyes])


def _airplane() -> Mesh:
    body = lathe([(0, -1.2), (0.18, -1.0), (0.3, 0.3), (0.24, 0.9), (0, 1.15)], smooth=True).turned(about_x(90))
    nose = ball(0.2, _DARK).moved(z=1.05)
    wings = prism([(-1.25, -0.3), (1.25, -0.3), (1.25, 0.0), (0, 0.45), (-1.25, 0.0)], 0.1).turned(about_x(90))
    tail = prism([(-0.5, 0), (0.5, 0), (0.35, 0.3), (-0.35, 0.3)], 0.1).turned(about_x(90)).moved(z=-1.15)
    fin = prism([(-0.25, 0), (0.2, 0), (-0.2, 0.6)], 0.12).turned(about_y(-90)).moved(y=0.1, z=-0.95)
    window = ball(0.2, _LIGHT).stretched(z=1.3).moved(0, 0.2, 0.55)
    return joined([body, nose, wings, tail, fin, window])


SOLIDS: Mapping[str, Callable[[], Mesh]] = MappingProxyType(
    {
        "mug": _mug, "wedge": _wedge, "chair": _chair, "arrow": _arrow, "cube": _cube, "l-shape": _l_shape,
        "teapot": _teapot, "house": _house, "car": _car, "key": _key, "boat": _boat, "stairs": _stairs, "duck": _duck,
        "airplane": _airplane,
    }
)  # fmt: skip


@dataclass(frozen=True)
class View:
    """One view of a solid, for any colour of it.

    Attributes:
        own: brightness of the part that has the named colour, times its opacity. Shapes: (side, side).
        fixed: RGB of the other parts, times their opacity. Shapes: (side, side, 3).
        opacity: share of each pixel that the solid covers. Shapes: (side, side).
        nearness: position towards the camera, from -1 to 1, times the opacity. Shapes: (side, side).
        normal: unit normals towards the camera: x right, y up, z towards the viewer; 0 where less than half of the
            pixel is covered. Shapes: (side, side, 3).
    """

    own: np.ndarray
    fixed: np.ndarray
    opacity: np.ndarray
    nearness: np.ndarray
    normal: np.ndarray


@lru_cache(maxsize=len(SOLIDS))
def _mesh(solid: str) -> Mesh:
    return fitted(SOLIDS[solid]())


@lru_cache(maxsize=2 * len(SOLIDS) * VIEWS)
def view_of(solid: str, number: int, side: int = SIDE) -> View:
    """A view of a solid in a square of `side` pixels. The arrays are shared and must not be changed.

    Args:
        number: 0 is the front; each further one turns the solid by 45 degrees, its front first to the right.
    """
    seen = rendered(_mesh(solid), number * 360 / VIEWS, side * _FINER)

    def smaller(values: np.ndarray) -> np.ndarray:
        return cv2.resize(values.astype(np.float32), (side, side), interpolation=cv2.INTER_AREA)

    palette = np.array([(0, 0, 0), *_FIXED, (0, 0, 0)], np.float32) / 255  # the last one is the background
    shade, opacity = seen.shade, smaller(seen.material >= 0)
    normal = smaller(seen.normal)
    length = np.maximum(np.linalg.norm(normal, axis=-1), 1e-6)
    return View(
        smaller(shade * (seen.material == _OWN)),
        smaller(palette[seen.material] * shade[..., None]),
        opacity,
        smaller(seen.nearness * (seen.material >= 0)),
        normal / length[..., None] * (opacity >= 0.5)[..., None],
    )


def cutout(solid: str, color: str, number: int, side: int = SIDE) -> np.ndarray:
    """A view as RGB, multiplied by its opacity, and opacity. Shapes: (side, side, 4) float32. Ranges: [0, 1]."""
    view = view_of(solid, number, side)
    colored = view.fixed + view.own[..., None] * np.asarray(SOLID_COLORS[color], np.float32) / 255
    return np.concatenate([colored, view.opacity[..., None]], -1)


def draw(solid: str, color: str, number: int, backdrop: str, side: int = SIDE) -> Image.Image:
    """RGB picture of a view on a background of a CSS colour, side x side."""
    part = cutout(solid, color, number, side)
    return to_image(part[..., :3] + background(backdrop) * (1 - part[..., 3:]))


def depth_map(solid: str, number: int, side: int = SIDE) -> Image.Image:
    """Depth map: white is near, the background is black. The solid has grey values of 64 to 255."""
    view = view_of(solid, number, side)
    grey = 0.25 * view.opacity + 0.75 * (view.nearness + view.opacity) / 2
    return to_image(grey[..., None].repeat(3, -1))


def backdrops(color: str) -> list[str]:
    """Names of the background colours that differ enough from a solid of this colour."""
    own = np.array(SOLID_COLORS[color]) / 255
    return [name for name in COLORS if np.linalg.norm(background(name) - own) >= _CONTRAST]
