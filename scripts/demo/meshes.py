"""Triangle meshes of simple parts, and their rendering by z-buffer.

Axes of a mesh: x to the right, y up, z towards the viewer in the front view.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ELEVATION = math.radians(27)  # of the camera above the horizon
_DISTANCE = 5.0  # from the camera to the middle of the mesh, whose radius is 1
_MARGIN = 0.94  # share of half a side that the bounding sphere covers
_LIGHT = np.array([-0.3, 0.5, 0.8124])  # direction to the light in camera axes, of length 1
_AMBIENT = 0.5  # brightness of a surface that the light does not reach
_SEGMENTS = 28  # of a full circle


@dataclass(frozen=True)
class Mesh:
    """Triangles with their normals and materials.

    Attributes:
        corners: positions, counter-clockwise as seen from outside. Shapes: (T, 3 corners, 3).
        normals: unit vectors that point outwards, one a corner. Shapes: (T, 3 corners, 3).
        materials: index of the colour of each triangle. Shapes: (T,).
    """

    corners: np.ndarray
    normals: np.ndarray
    materials: np.ndarray

    def moved(self, x: float = 0, y: float = 0, z: float = 0) -> "Mesh":
        """The mesh shifted by a vector."""
        return Mesh(self.corners + np.array([x, y, z]), self.normals, self.materials)

    def turned(self, matrix: np.ndarray) -> "Mesh":
        """The mesh turned by a rotation matrix. Shapes: (3, 3)."""
        return Mesh(self.corners @ matrix.T, self.normals @ matrix.T, self.materials)

    def stretched(self, x: float = 1, y: float = 1, z: float = 1) -> "Mesh":
        """The mesh with each axis multiplied by a positive number."""
        factors = np.array([x, y, z])
        return Mesh(self.corners * factors, _unit(self.normals / factors), self.materials)


def about_x(degrees: float) -> np.ndarray:
    """Rotation matrix about the x axis; 90 turns y to z."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[1, 0, 0], [0, c, -s], [0, s, c]])


def about_y(degrees: float) -> np.ndarray:
    """Rotation matrix about the vertical axis; 90 turns z to x."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]])


def about_z(degrees: float) -> np.ndarray:
    """Rotation matrix about the z axis; 90 turns x to y."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]])


def joined(parts: Sequence[Mesh]) -> Mesh:
    """All parts in one mesh."""
    fields = ([getattr(part, name) for part in parts] for name in ("corners", "normals", "materials"))
    return Mesh(*(np.concatenate(field) for field in fields))


def box(
    size: tuple[float, float, float], center: tuple[float, float, float] = (0, 0, 0), material: int = 0, sides=None
) -> Mesh:
    """A cuboid.

    Args:
        size: lengths along x, y, z.
        sides: materials of the sides (right, left, top, bottom, front, back), if they differ.
    """
    faces = []
    for number, (axis, sign) in enumerate((axis, sign) for axis in range(3) for sign in (1, -1)):
        u, v = (axis + 1) % 3, (axis + 2) % 3
        corners = np.zeros((4, 3))
        corners[:, axis] = sign
        corners[:, u], corners[:, v] = (-1, sign, 1, -sign), (-1, -sign, 1, sign)
        faces.append(_quads(corners[None] / 2 * size, material if sides is None else sides[number]))
    return joined(faces).moved(*center)


def prism(outline: Sequence[tuple[float, float]], depth: float, material: int = 0) -> Mesh:
    """A convex polygon in the plane of x and y, counter-clockwise, extruded from -depth / 2 to depth / 2 along z."""
    flat = np.array([(x, y, 0) for x, y in outline])
    front, back = flat + (0, 0, depth / 2), flat - (0, 0, depth / 2)
    count = len(flat)
    fan = [(0, n, n + 1) for n in range(1, count - 1)]
    caps = np.concatenate([front[fan], back[[(a, c, b) for a, b, c in fan]]])
    after = np.roll(np.arange(count), -1)
    walls = np.stack([back, back[after], front[after], front], 1)
    return joined([_flat(caps, material), _quads(walls, material)])


def lathe(profile: Sequence[tuple[float, float]], material: int = 0, smooth: bool = False) -> Mesh:
    """A surface of revolution about the y axis.

    Args:
        profile: (radius, y) of points from the bottom to the top along the outside.
        smooth: whether normals change gradually along the profile, as on a ball, and not at its corners.
    """
    points = np.array(profile, float)
    along = np.diff(points, axis=0)
    slopes = _unit(np.stack([along[:, 1], -along[:, 0]], 1))  # outward normals (radius, y) of the segments
    ends = np.stack([slopes, slopes], 1)  # of the lower and upper end of each segment
    if smooth:
        means = _unit(np.concatenate([slopes[:1], slopes[1:] + slopes[:-1], slopes[-1:]]))
        ends = np.stack([means[:-1], means[1:]], 1)
    turn = np.linspace(0, 2 * math.pi, _SEGMENTS + 1)
    around = np.stack([np.sin(turn), np.cos(turn)], 1)  # (x, z)

    def spun(pairs: np.ndarray) -> np.ndarray:
        """(segments, 2, (radius, y)) -> (segments * steps, 4 corners, 3)."""
        grid = np.empty((len(pairs), 2, len(turn), 3))
        grid[..., 0], grid[..., 2] = (pairs[..., 0, None] * around[:, n] for n in (0, 1))
        grid[..., 1] = pairs[..., 1, None]
        low, high = grid[:, 0], grid[:, 1]
        return np.stack([low[:, :-1], low[:, 1:], high[:, 1:], high[:, :-1]], 2).reshape(-1, 4, 3)

    return _quads(spun(np.stack([points[:-1], points[1:]], 1)), material, spun(ends))


def ball(radius: float, material: int = 0) -> Mesh:
    """A sphere about the origin."""
    turn = np.linspace(-math.pi / 2, math.pi / 2, _SEGMENTS // 2 + 1)
    return lathe([(radius * max(math.cos(t), 0), radius * math.sin(t)) for t in turn], material, smooth=True)


def tube(path: Sequence[tuple[float, float, float]], radius: float | Sequence[float], material: int = 0) -> Mesh:
    """A round tube along a path that does not run along the z axis; `radius` is one number, or one a point.

    The ends are open; hide them in another part. A path that ends where it begins is a ring.
    """
    points = np.array(path, float)
    closed = np.allclose(points[0], points[-1])
    ahead = np.gradient(points, axis=0)
    if closed:
        ahead[0] = ahead[-1] = points[1] - points[-2]
    ahead = _unit(ahead)
    side = _unit(np.cross(ahead, (0.0, 0.0, 1.0)))
    up = np.cross(side, ahead)
    turn = np.linspace(0, 2 * math.pi, _SEGMENTS // 2 + 1)
    normals = side[:, None] * np.cos(turn)[:, None] - up[:, None] * np.sin(turn)[:, None]  # (points, steps, 3)
    radii = np.broadcast_to(np.asarray(radius, float), len(points))
    rings = points[:, None] + normals * radii[:, None, None]

    def wrapped(grid: np.ndarray) -> np.ndarray:
        low, high = grid[:-1], grid[1:]
        return np.stack([low[:, :-1], low[:, 1:], high[:, 1:], high[:, :-1]], 2).reshape(-1, 4, 3)

    return _quads(wrapped(rings), material, wrapped(normals))


def _unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def _flat(corners: np.ndarray, material: int) -> Mesh:
    """Triangles (T, 3, 3) with the normals of their planes."""
    normals = _unit(np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]))
    return Mesh(corners, np.repeat(normals[:, None], 3, 1), np.full(len(corners), material))


def _quads(corners: np.ndarray, material: int, normals: np.ndarray | None = None) -> Mesh:
    """Quadrilaterals (Q, 4, 3), each as two triangles; without `normals`, those of their planes."""
    pairs = [(0, 1, 2), (0, 2, 3)]
    if normals is None:
        return joined([_flat(corners[:, pair], material) for pair in pairs])
    return joined([Mesh(corners[:, p], _unit(normals[:, p]), np.full(len(corners), material)) for p in pairs])


# -- rendering ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """What each pixel of a square picture shows, before anti-aliasing.

    Attributes:
        material: index of the colour; -1 where there is only background. Shapes: (side, side).
        normal: unit vectors in camera axes: x right, y up, z towards the viewer; 0 on the background.
            Shapes: (side, side, 3).
        nearness: position towards the camera; 1 and -1 are the ends of the bounding sphere, also of the background -1.
            Shapes: (side, side).
    """

    material: np.ndarray
    normal: np.ndarray
    nearness: np.ndarray

    @property
    def shade(self) -> np.ndarray:
        """Brightness by Lambert's law. Shapes: (side, side). Ranges: [0.5, 1]."""
        return _AMBIENT + (1 - _AMBIENT) * np.clip(self.normal @ _LIGHT, 0, 1)


def fitted(mesh: Mesh) -> Mesh:
    """The mesh with its middle at the origin and a radius of 1 about it, so that it fits the picture at each angle."""
    low, high = mesh.corners.min((0, 1)), mesh.corners.max((0, 1))
    centered = mesh.corners - (low + high) / 2
    return Mesh(centered / np.linalg.norm(centered, axis=-1).max(), mesh.normals, mesh.materials)


def rendered(mesh: Mesh, degrees: float, side: int) -> Surface:
    """A fitted mesh as the camera sees it, after the mesh turned by an angle about the vertical axis.

    Args:
        degrees: 90 turns the front to the right.
        side: pixels of a side.
    """
    view = about_x(math.degrees(ELEVATION)) @ about_y(degrees)
    corners, normals = mesh.corners @ view.T, mesh.normals @ view.T
    inverse = 1 / (_DISTANCE - corners[..., 2])  # (T, 3); affine in the picture, unlike the distance itself
    half = side / 2
    scale = half * _MARGIN * math.sqrt(_DISTANCE**2 - 1)
    flat = np.stack([half + scale * corners[..., 0] * inverse, half - scale * corners[..., 1] * inverse], -1)
    index, near = _z_buffer(flat, inverse, side)
    shown = index >= 0
    normal, material = np.zeros((side, side, 3)), np.full((side, side), -1)
    rows, columns = np.nonzero(shown)
    triangles = index[shown]
    weights = _weights(flat[triangles], columns + 0.5, rows + 0.5)
    normal[shown] = _unit((weights[..., None] * normals[triangles]).sum(1))
    material[shown] = mesh.materials[triangles]
    nearness = np.where(shown, _DISTANCE - 1 / np.maximum(near, 1e-9), -1)
    return Surface(material, normal, nearness)


def _weights(flat: np.ndarray, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Barycentric coordinates of points in triangles. Shapes: (P, 3, 2), (P,), (P,) -> (P, 3)."""
    (ax, ay), (bx, by), (cx, cy) = (flat[:, n].T for n in range(3))
    area = (bx - ax) * (cy - ay) - (cx - ax) * (by - ay)
    second = ((x - ax) * (cy - ay) - (cx - ax) * (y - ay)) / area
    third = ((bx - ax) * (y - ay) - (x - ax) * (by - ay)) / area
    return np.stack([1 - second - third, second, third], 1)


def _z_buffer(flat: np.ndarray, inverse: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Index of the nearest triangle of each pixel, -1 for none, and its inverse distance.

    Args:
        flat: corners in pixels. Shapes: (T, 3, 2).
        inverse: inverse distances of the corners. Shapes: (T, 3).
    """
    index, near = np.full((side, side), -1), np.zeros((side, side))
    edge, other = flat[:, 1] - flat[:, 0], flat[:, 2] - flat[:, 0]
    areas = edge[:, 0] * other[:, 1] - edge[:, 1] * other[:, 0]  # negative for front faces: rows count downwards
    low = np.clip(np.floor(flat.min(1) - 0.5).astype(int), 0, side)
    high = np.clip(np.ceil(flat.max(1) + 0.5).astype(int), 0, side)
    for number in np.nonzero(areas < -1e-6)[0]:
        (left, top), (right, bottom) = low[number], high[number]
        if left >= right or top >= bottom:
            continue
        (ax, ay), area = flat[number, 0], areas[number]
        x, y = np.arange(left, right) + 0.5 - ax, (np.arange(top, bottom) + 0.5 - ay)[:, None]
        second = (x * other[number, 1] - y * other[number, 0]) / area
        third = (y * edge[number, 0] - x * edge[number, 1]) / area
        a, b, c = inverse[number]
        value = a + (b - a) * second + (c - a) * third
        part = np.s_[top:bottom, left:right]
        seen = (second >= 0) & (third >= 0) & (second + third <= 1) & (value > near[part])
        near[part][seen] = value[seen]
        index[part][seen] = number
    return index, near
