"""Draws a detection set: textured shapes that turn, hide one another and lie on noisy ground, with exact boxes.

For demos, tests and measurements where no data set is at hand. Numpy and PIL only. The random numbers are uniform ones
and all arithmetic is of the kind that IEEE 754 rounds the same way everywhere (no sine, no normal distribution, no
matrix product), so that a seed gives the same pixels on every machine; each picture has its own seed, so that a longer
set begins with the shorter one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finedetr.errors import DataError, UsageError
from finedetr.files import write_text

__all__ = ["CATEGORY_IDS", "SHAPES", "Drawing", "draw_dataset", "draw_picture"]

Field = NDArray[np.float32]
Mask = NDArray[np.bool_]

SUPERSAMPLES = 3  # sub-pixels along each side: edges are anti-aliased and boxes exact to a third of a pixel
SMALLEST_VISIBLE = 0.35  # a shape keeps at least this fraction of itself in sight
TRIES = 12  # places tried for a shape before it is left out

# The corners of a five-pointed star of radius 1, written out because sine and cosine differ between machines.
_OUTER = ((0.0, -1.0), (0.951057, -0.309017), (0.587785, 0.809017), (-0.587785, 0.809017), (-0.951057, -0.309017))
_INNER = ((0.264503, -0.364058), (0.427975, 0.139057), (0.0, 0.45), (-0.427975, 0.139057), (-0.264503, -0.364058))
_STAR = tuple(corner for pair in zip(_OUTER, _INNER, strict=True) for corner in pair)


def _star(u: Field, v: Field) -> Mask:
    """Even-odd rule over the ten edges."""
    inside = np.zeros(u.shape, dtype=bool)
    for (x1, y1), (x2, y2) in zip(_STAR, _STAR[1:] + _STAR[:1], strict=True):
        crosses = (y1 > v) != (y2 > v)
        if y1 != y2:
            inside ^= crosses & (u < (x2 - x1) * ((v - y1) / (y2 - y1)) + x1)
    return inside


def _cross(u: Field, v: Field) -> Mask:
    u, v = np.abs(u), np.abs(v)
    return (np.minimum(u, v) <= 0.3) & (np.maximum(u, v) <= 0.9)


@dataclass(frozen=True)
class Shape:
    """Which points (u, v) belong to a shape that fits into the unit circle, and its area there."""

    inside: Callable[[Field, Field], Mask]
    area: float


SHAPES: dict[str, Shape] = {
    "disc": Shape(lambda u, v: u * u + v * v <= 0.81, 2.545),
    "square": Shape(lambda u, v: np.maximum(np.abs(u), np.abs(v)) <= 0.7, 1.96),
    "triangle": Shape(lambda u, v: (v <= 0.5) & (1.732051 * np.abs(u) - v <= 1.0), 1.299),
    "star": Shape(_star, 1.323),
    "ring": Shape(lambda u, v: (u * u + v * v <= 0.81) & (u * u + v * v >= 0.27), 1.696),
    "cross": Shape(_cross, 1.8),
}

CATEGORY_IDS: tuple[int, ...] = (1, 2, 3, 5, 8, 13)
"""The ids in the annotation file have gaps, as COCO's have, so that nobody takes an id for an index."""


@dataclass(frozen=True)
class Drawing:
    """One picture and its truth.

    Attributes:
        image: uint8 [H, W, 3], RGB.
        labels: int64 [t], indices into `SHAPES`.
        boxes: float32 [t, 4], (left, top, right, bottom) in pixels, tight around the visible part.
        areas: float32 [t], the visible part in pixels.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.int64]
    boxes: Field
    areas: Field


def draw_dataset(
    folder: str | Path,
    train: int = 200,
    val: int = 60,
    size: tuple[int, int] = (192, 192),
    classes: int = len(SHAPES),
    seed: int = 0,
) -> Path:
    """Draws a detection set in COCO's layout: `annotations/instances_{train,val}.json`, `train/`, `val/`.

    Boxes and areas are those of the *visible* part of a shape, as an annotator would draw them. Every shape in the
    pictures is annotated: one that would hide another almost wholly is not drawn.

    Args:
        folder: Where to; made if absent, refused if it holds something else.
        train: Pictures for training.
        val: Pictures held out.
        size: (height, width) of the pictures.
        classes: How many of `SHAPES` to use, 1 to 6.
        seed: The same seed gives the same files.

    Returns:
        The folder.

    Raises:
        UsageError: For numbers that cannot be, or a folder that is in use.
        DataError: Where the folder cannot be written.
    """
    if not 1 <= classes <= len(SHAPES):
        raise UsageError(f"classes is 1 to {len(SHAPES)} ({', '.join(SHAPES)}); got {classes}", code="range")
    if min(train, val) < 0 or min(size) < 32:
        raise UsageError(
            f"a set has no negative number of pictures and its pictures at least 32 pixels a side; "
            f"got train={train}, val={val}, size={size}",
            code="range",
        )
    folder = Path(folder)
    known = {"annotations", "train", "val"}
    try:
        if folder.is_dir() and (strange := sorted({entry.name for entry in folder.iterdir()} - known)):
            raise UsageError(
                f"{folder} holds {strange[0]}, which is no part of a drawn set", code="exists", hint="Choose another."
            )
        for part in known:
            (folder / part).mkdir(parents=True, exist_ok=True)
        for number, (split, count) in enumerate((("train", train), ("val", val))):
            _write_split(folder, split, count, size, classes, (seed, number))
    except OSError as error:
        raise DataError(f"{folder}: the pictures cannot be written ({error})", code="io") from error
    return folder


def _write_split(
    folder: Path, split: str, count: int, size: tuple[int, int], classes: int, seed: tuple[int, int]
) -> None:
    """The pictures of one split, then its annotation file: a set that is cut short has none."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    path = folder / "annotations" / f"instances_{split}.json"
    for stale in (path, *(folder / split).glob("*.jpg")):
        stale.unlink(missing_ok=True)
    for index in range(count):
        drawing = draw_picture(np.random.default_rng([*seed, index]), size, classes)
        name = f"{index + 1:06d}.jpg"
        # without chroma subsampling color edges stay where the boxes say they are
        Image.fromarray(drawing.image).save(folder / split / name, quality=92, subsampling=0)
        images.append({"id": index + 1, "file_name": name, "height": size[0], "width": size[1]})
        columns = (drawing.labels.tolist(), drawing.boxes.tolist(), drawing.areas.tolist())
        for label, (left, top, right, bottom), area in zip(*columns, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": CATEGORY_IDS[label],
                    "bbox": [round(value, 3) for value in (left, top, right - left, bottom - top)],
                    "area": round(area, 3),
                    "iscrowd": 0,
                }
            )
    categories = zip(CATEGORY_IDS[:classes], SHAPES, strict=False)
    document = {
        "info": {"description": "Textured shapes drawn by finedetr", "seed": seed[0]},
        "licenses": [{"id": 1, "name": "CC0 1.0"}],
        "images": images,
        "annotations": annotations,
        "categories": [{"id": number, "name": name, "supercategory": "shape"} for number, name in categories],
    }
    write_text(path, json.dumps(document, separators=(",", ":")))


@dataclass
class _Scene:
    """The picture while it is being drawn, with a map that says which shape owns each sub-pixel."""

    random: np.random.Generator
    canvas: Field  # [H, W, 3], 0..255
    owner: NDArray[np.int8]  # [H·s, W·s], 0 ground, else the number of the shape from 1
    labels: list[int] = field(default_factory=list)
    places: list[tuple[slice, slice]] = field(default_factory=list)  # the part of `owner` that each shape may touch
    whole: list[float] = field(default_factory=list)  # sub-pixels of each shape, those outside the picture included

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self.random.random()

    def integer(self, low: int, high: int) -> int:
        """A whole number from low to high - 1."""
        return min(low + int(self.random.random() * (high - low)), high - 1)


def draw_picture(
    random: np.random.Generator, size: tuple[int, int] = (192, 192), classes: int = len(SHAPES)
) -> Drawing:
    """Draws one picture of up to 10 shapes, of which those without a free place are left out.

    Args:
        random: Where all its random numbers come from.
        size: (height, width).
        classes: How many of `SHAPES` to use.
    """
    height, width = size
    owner = np.zeros((height * SUPERSAMPLES, width * SUPERSAMPLES), dtype=np.int8)
    scene = _Scene(random, np.zeros((height, width, 3), dtype=np.float32), owner)
    scene.canvas[:] = _ground(scene, height, width)
    _clutter(scene)
    count = scene.integer(3, 11)
    for _ in range(count):
        _add_shape(scene, scene.integer(0, classes))
    _light(scene)
    image = np.clip(scene.canvas + 0.5, 0, 255).astype(np.uint8)
    return _truth(scene, image)


def _truth(scene: _Scene, image: NDArray[np.uint8]) -> Drawing:
    """Boxes and areas from the map of owners: what can be seen is what is annotated."""
    boxes, areas = [], []
    for index, (vertical, horizontal) in enumerate(scene.places):
        seen = scene.owner[vertical, horizontal] == index + 1
        rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
        left, top = horizontal.start + columns[0], vertical.start + rows[0]
        boxes.append([left, top, horizontal.start + columns[-1] + 1, vertical.start + rows[-1] + 1])
        areas.append(int(np.count_nonzero(seen)))
    return Drawing(
        image,
        np.array(scene.labels, dtype=np.int64),
        np.array(boxes, dtype=np.float32).reshape(-1, 4) / np.float32(SUPERSAMPLES),
        np.array(areas, dtype=np.float32) / np.float32(SUPERSAMPLES**2),
    )


def _add_shape(scene: _Scene, label: int) -> None:
    """Draws one shape where it hides no other almost wholly; leaves it out where no such place is found."""
    height, width, _ = scene.canvas.shape
    short = min(height, width)
    # Sizes are uniform in the square root: small ones are common, large ones not rare.
    root = scene.uniform(0.21, 0.54)
    radius = max(root * root * short, 5.0)
    squash = scene.uniform(0.75, 1.0)
    # A rotation by rational functions of t, (1-t²)/(1+t²) and 2t/(1+t²): a point on the unit circle without a sine.
    t = scene.uniform(-1.0, 1.0)
    cosine, sine = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    if scene.random.random() < 0.5:
        cosine, sine = -cosine, -sine
    shape = list(SHAPES.values())[label]
    for _ in range(TRIES):
        center = (scene.uniform(-0.02, 1.02) * width, scene.uniform(-0.02, 1.02) * height)
        window = _window(center, radius, height, width)
        if window is None:
            continue
        top, bottom, left, right = window
        s = SUPERSAMPLES
        y = (((np.arange(top * s, bottom * s) + 0.5) / s - center[1]) / radius).astype(np.float32)[:, None]
        x = (((np.arange(left * s, right * s) + 0.5) / s - center[0]) / radius).astype(np.float32)[None, :]
        u = x * cosine + y * sine
        v = (y * cosine - x * sine) / squash
        inside = shape.inside(u, v)
        place = (slice(top * s, bottom * s), slice(left * s, right * s))
        if _takes_place(scene, inside, place, shape.area * squash * (radius * s) ** 2):
            _paint(scene, window, inside, u[s // 2 :: s, s // 2 :: s], v[s // 2 :: s, s // 2 :: s], radius)
            scene.labels.append(label)
            return


def _window(center: tuple[float, float], radius: float, height: int, width: int) -> tuple[int, int, int, int] | None:
    """(top, bottom, left, right) of the whole pixels that a shape may touch; None where it lies outside."""
    left, right = max(0, int(center[0] - radius)), min(width, int(center[0] + radius) + 2)
    top, bottom = max(0, int(center[1] - radius)), min(height, int(center[1] + radius) + 2)
    return (top, bottom, left, right) if left < right and top < bottom else None


def _takes_place(scene: _Scene, inside: Mask, place: tuple[slice, slice], whole: float) -> bool:
    """Puts a shape on the map if enough of it lies in the picture and enough of all others stays in sight."""
    if np.count_nonzero(inside) < 0.5 * whole:  # the border would cut most of it off
        return False
    local = scene.owner[place]
    covered = np.bincount(local[inside], minlength=len(scene.labels) + 1)[1:]
    for index in np.flatnonzero(covered).tolist():
        seen = int(np.count_nonzero(scene.owner[scene.places[index]] == index + 1))
        if seen - int(covered[index]) < SMALLEST_VISIBLE * scene.whole[index]:
            return False
    scene.places.append(place)
    scene.whole.append(whole)
    local[inside] = len(scene.whole)
    return True


def _paint(scene: _Scene, window: tuple[int, int, int, int], inside: Mask, u: Field, v: Field, radius: float) -> None:
    """Blends a texture over the canvas, with a soft shadow on one side and a rim that is a little darker or lighter."""
    top, bottom, left, right = window
    s = SUPERSAMPLES
    hits = inside.reshape(bottom - top, s, right - left, s).sum(axis=(1, 3))
    coverage = hits.astype(np.float32) / np.float32(s**2)
    patch = scene.canvas[top:bottom, left:right]
    _shadow(scene, window, coverage)
    color = _far_from(scene, _mean_color(patch, hits))
    other = _random_color(scene)
    weight = _texture(scene, u, v, radius)[..., None]
    surface = color + (other - color) * (0.65 * weight)
    shade = 1 + scene.uniform(-0.22, 0.22) * u + scene.uniform(-0.22, 0.22) * v
    alpha = coverage[..., None]
    patch += (np.clip(surface * shade[..., None], 0, 255) - patch) * alpha


def _shadow(scene: _Scene, window: tuple[int, int, int, int], coverage: Field) -> None:
    """Darkens what lies a pixel or two beside the shape."""
    top, bottom, left, right = window
    shift_y, shift_x, depth = scene.integer(0, 3), scene.integer(-2, 3), scene.uniform(0.0, 0.45)
    height, width, _ = scene.canvas.shape
    rows = slice(min(top + shift_y, height), min(bottom + shift_y, height))
    columns = slice(max(left + shift_x, 0), min(right + shift_x, width))
    start = columns.start - left - shift_x
    part = coverage[: rows.stop - rows.start, start : start + columns.stop - columns.start]
    scene.canvas[rows, columns] *= 1 - depth * part[..., None]


def _random_color(scene: _Scene) -> Field:
    """Any color, the dull ones a little less often."""
    color = scene.random.random(3, dtype=np.float32) * 255
    middle = (float(color.min()) + float(color.max())) / 2
    return np.asarray(np.clip(color + scene.uniform(0.0, 0.6) * (color - middle), 0, 255))


def _mean_color(patch: Field, hits: NDArray[np.int64]) -> Field:
    """The color under a shape, in whole numbers: the order of a sum of integers does not matter."""
    total = (patch.astype(np.int64) * hits[..., None]).sum(axis=(0, 1))
    return np.asarray(total / max(int(hits.sum()), 1), dtype=np.float32)


def _far_from(scene: _Scene, ground: Field) -> Field:
    """A color that differs from the ground enough to be seen, if not always by much."""
    best, distance = ground, -1.0
    for _ in range(6):
        color = _random_color(scene)
        difference = np.abs(color - ground)
        apart = float(difference[0] + difference[1] + difference[2])
        if apart > 130:
            return color
        if apart > distance:
            best, distance = color, apart
    return best


def _texture(scene: _Scene, u: Field, v: Field, radius: float) -> Field:
    """How much of the second color each pixel has, 0..1: plain, gradient, stripes, checks, dots, rings or noise."""
    kind = scene.integer(0, 7)
    period = scene.uniform(4.0, 11.0) / radius  # in pixels, so that large shapes have more stripes, not broader ones
    strength = scene.uniform(0.5, 1.0)
    if kind == 0:
        return np.full(u.shape, scene.uniform(0, 0.3), dtype=np.float32)
    if kind == 1:
        return np.asarray(np.clip(0.5 + scene.uniform(0.4, 0.8) * u, 0, 1))
    if kind == 2:
        return strength * _wave(u / period)
    if kind == 3:
        return np.asarray(strength * np.abs(_wave(u / period) - _wave(v / period)))
    if kind == 4:
        du, dv = _triangle(u / period), _triangle(v / period)
        return np.asarray(strength * np.clip(2.2 - 4 * (du * du + dv * dv), 0, 1))
    if kind == 5:
        distance: Field = np.sqrt(u * u + v * v)
        return strength * _wave(distance / period)
    return strength * _noise(scene, u.shape[0], u.shape[1], max(2, int(period * radius / 2)))


def _triangle(x: Field) -> Field:
    """A triangle wave of period 1 between 0 and 1."""
    return np.asarray(np.abs(2 * (x - np.floor(x)) - 1))


def _wave(x: Field) -> Field:
    """A square wave of period 1 with soft flanks."""
    return np.asarray(np.clip(3 * _triangle(x) - 1, 0, 1))


def _noise(scene: _Scene, height: int, width: int, cell: int) -> Field:
    """Value noise: random numbers on a lattice of `cell` pixels, smoothly interpolated between."""
    lattice = scene.random.random((height // cell + 2, width // cell + 2), dtype=np.float32)
    y, x = (np.arange(height) / cell).astype(np.float32), (np.arange(width) / cell).astype(np.float32)
    row, column = y.astype(np.int64), x.astype(np.int64)
    y, x = y - row.astype(np.float32), x - column.astype(np.float32)
    y, x = (y * y * (3 - 2 * y))[:, None], (x * x * (3 - 2 * x))[None, :]
    lines = lattice[:, column] + (lattice[:, column + 1] - lattice[:, column]) * x
    return np.asarray(lines[row] + (lines[row + 1] - lines[row]) * y)


def _ground(scene: _Scene, height: int, width: int) -> Field:
    """Two or three colors that noise of several grains mixes."""
    first, second, third = (_random_color(scene) for _ in range(3))
    second = first + (second - first) * scene.uniform(0.3, 0.9)
    third = first + (third - first) * scene.uniform(0.1, 0.6)
    coarse = _noise(scene, height, width, max(2, int(min(height, width) * scene.uniform(0.2, 0.5))))
    middle = _noise(scene, height, width, scene.integer(7, 22))
    fine = _noise(scene, height, width, scene.integer(2, 5))
    share = scene.uniform(0.1, 0.5)
    mix = np.clip((1 - share) * coarse + share * middle, 0, 1)[..., None]
    picture = first + (second - first) * mix
    picture += (third - picture) * (fine * scene.uniform(0.2, 0.9))[..., None]
    return np.asarray(picture)


def _clutter(scene: _Scene) -> None:
    """Strokes, straight and bent, that are no shape of any class: not everything with an edge is an object."""
    height, width, _ = scene.canvas.shape
    for _ in range(scene.integer(0, 4)):
        color, strength, thick = _random_color(scene), scene.uniform(0.3, 0.9), scene.uniform(0.6, 3.0)
        x1, y1, x2, y2 = (scene.uniform(-0.2, 1.2) * side for side in (width, height, width, height))
        length = math.sqrt((x2 - x1) * (x2 - x1) + (y2 - y1) * (y2 - y1)) + 1.0
        bend = scene.uniform(-0.3, 0.3) * length
        reach = abs(bend) / 4 + thick + 1
        left, right = max(0, int(min(x1, x2) - reach)), min(width, int(max(x1, x2) + reach) + 1)
        top, bottom = max(0, int(min(y1, y2) - reach)), min(height, int(max(y1, y2) + reach) + 1)
        if left >= right or top >= bottom:
            continue
        y = (np.arange(top, bottom) + (0.5 - y1)).astype(np.float32)[:, None]
        x = (np.arange(left, right) + (0.5 - x1)).astype(np.float32)[None, :]
        cosine, sine = (x2 - x1) / length, (y2 - y1) / length
        along = (x * cosine + y * sine) / length
        beside = x * sine - y * cosine + bend * along * (1 - along)
        ends = np.clip(np.minimum(along, 1 - along) * length, 0, 1)
        alpha = (np.clip(thick + 0.5 - np.abs(beside), 0, 1) * ends * strength)[..., None]
        patch = scene.canvas[top:bottom, left:right]
        patch += (color - patch) * alpha


def _light(scene: _Scene) -> None:
    """Light from one side, and the noise of a camera: the difference of two uniform numbers."""
    height, width, _ = scene.canvas.shape
    y = (np.arange(height) / height - 0.5).astype(np.float32)[:, None]
    x = (np.arange(width) / width - 0.5).astype(np.float32)[None, :]
    light = 1 + scene.uniform(-0.35, 0.35) * x + scene.uniform(-0.35, 0.35) * y
    shape = (2, height, width, 3)
    noise = scene.random.random(shape, dtype=np.float32)
    scene.canvas *= light[..., None]
    scene.canvas += (noise[0] - noise[1]) * scene.uniform(2.0, 12.0)
