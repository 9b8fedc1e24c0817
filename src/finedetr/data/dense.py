"""Dense one-to-one targets (DEIM, Huang et al., 2025): four pictures in one, turned, shifted and scaled together."""

from __future__ import annotations

import math

import numpy as np

from finedetr.data.dataset import Dataset
from finedetr.data.transforms import (
    Active,
    Augmentation,
    Color,
    Matrix,
    Plan,
    Tile,
    Truth,
    limits,
    plan_plain,
    plan_standard,
    settle,
    snap,
    transform_boxes,
    turn_quarters,
    whole_edges,
)

__all__ = ["plan_mosaic", "plan_sample"]


def plan_sample(
    rng: np.random.Generator,
    dataset: Dataset,
    index: int,
    augmentation: Augmentation,
    active: Active,
    size: tuple[int, int],
) -> Plan:
    """The plan of one training picture of size (H, W) in a window of the schedule."""
    if active.mosaic and rng.random() < augmentation.mosaic:
        plan = plan_mosaic(rng, dataset, index, augmentation, size)
    elif active.standard:
        plan = plan_standard(rng, dataset, index, augmentation, size)
    else:
        plan = plan_plain(rng, dataset, index, augmentation, size)
    if augmentation.quarter_turns and rng.random() < augmentation.quarter_turns:
        plan = turn_quarters(rng, plan)
    return plan


def plan_mosaic(
    rng: np.random.Generator, dataset: Dataset, index: int, augmentation: Augmentation, size: tuple[int, int]
) -> Plan:
    """Mosaic: the picture and three others (drawn with replacement) in the quadrants of a black canvas.

    Each is scaled so that its shorter side is half of the input's shorter side (320 for 640, 208 for 416, as
    published) and stands at the top left of its quadrant. The canvas is then turned, shifted and scaled about its
    center, flipped with its probability, and squashed into the output. Zoom-out and crop are skipped.

    The tiles are drawn on a canvas whose scale is already the output's, so that what is left to do is a rotation at
    scale one; of that canvas only the part that the output shows is drawn.
    """
    members = (index, *(int(i) for i in rng.integers(len(dataset), size=3)))
    color = Color.draw(rng, augmentation)
    side = min(size) // 2
    extents = [fit_shorter(dataset.sizes[i], side) for i in members]
    wide, tall = max(w for w, _ in extents), max(h for _, h in extents)
    canvas = (2 * wide, 2 * tall)
    matrix = random_affine(rng, canvas, augmentation)
    flip = bool(rng.random() < augmentation.flip)
    matrix = np.array([[size[1] / canvas[0]], [size[0] / canvas[1]]]) * matrix  # the squash
    if flip:
        matrix[0] = -matrix[0]
        matrix[0, 2] += size[1]

    scale = np.linalg.norm(matrix[:, :2], axis=0)
    inverse = invert(matrix)
    corners = np.array([[0.0, 0], [size[1], 0], [0, size[0]], [size[1], size[0]]]) @ inverse[:, :2].T + inverse[:, 2]
    low = np.maximum(np.floor(corners.min(0) * scale) - 1, 0)
    high = np.minimum(np.ceil(corners.max(0) * scale) + 1, np.ceil(np.array(canvas) * scale))
    high = np.maximum(high, low + 1)
    shown = (int(high[0] - low[0]), int(high[1] - low[1]))  # the part of the scaled canvas that is drawn

    tiles, truths = [], []
    for quadrant, (member, extent) in enumerate(zip(members, extents, strict=True)):
        corner = np.array((quadrant % 2 * wide, quadrant // 2 * tall))
        tile = visible_tile(member, dataset, corner * scale - low, np.array(extent) * scale, shown)
        if tile is not None:
            tiles.append(tile)
            truth = Truth.of(dataset, member)
            truths.append(Truth(transform_boxes(truth.boxes, tile.matrix), truth.labels, truth.area))
    turn = np.column_stack((matrix[:, :2] / scale, matrix[:, 2] + matrix[:, :2] @ (low / scale)))
    none = Truth(np.zeros((0, 4)), np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.float32))
    truth = Truth.join([none, *truths])
    truth = Truth(transform_boxes(truth.boxes, turn), truth.labels, truth.area)
    truth = settle(truth, size, limits(augmentation, size, canvas))
    return Plan(size, (shown[1], shown[0]), tuple(tiles), truth, color, turn=turn)


def fit_shorter(picture: np.ndarray[tuple[int], np.dtype[np.int32]], side: int) -> tuple[int, int]:
    """(width, height) of a picture whose shorter side becomes `side`."""
    width, height = int(picture[0]), int(picture[1])
    if width <= height:
        return side, max(1, int(side * height / width))
    return max(1, int(side * width / height)), side


def random_affine(rng: np.random.Generator, canvas: tuple[int, int], augmentation: Augmentation) -> Matrix:
    """A rotation, shift (in whole pixels) and scaling of a canvas (w, h) about its center."""
    a = augmentation
    angle = math.radians(rng.uniform(-a.mosaic_degrees, a.mosaic_degrees))
    shift = [round(rng.uniform(-a.mosaic_translate * side, a.mosaic_translate * side)) for side in canvas]
    scale = rng.uniform(*a.mosaic_scale)
    cosine, sine = scale * math.cos(angle), scale * math.sin(angle)
    linear = np.array([[cosine, -sine], [sine, cosine]])
    center = np.array(canvas) / 2
    return np.column_stack((linear, center + shift - linear @ center))


def invert(matrix: Matrix) -> Matrix:
    """The inverse of an affine map."""
    linear = np.linalg.inv(matrix[:, :2])
    return np.column_stack((linear, -linear @ matrix[:, 2]))


def visible_tile(index: int, dataset: Dataset, corner: Matrix, extent: Matrix, shown: tuple[int, int]) -> Tile | None:
    """The part of a scaled picture (at `corner`, `extent` large) that lies within (0, 0, *shown); None: nothing."""
    low, high = np.maximum(corner, 0), np.minimum(corner + extent, shown)
    if (high - low < 0.5).any():
        return None
    picture = (int(dataset.sizes[index][0]), int(dataset.sizes[index][1]))
    left, right = whole_edges(low[0], high[0], shown[0])
    top, bottom = whole_edges(low[1], high[1], shown[1])
    ratio = np.array(picture) / extent
    # an edge of the picture stays its edge; a cut through it is where the whole pixels of the canvas are
    first = np.where(corner < 0, (np.array((left, top)) - corner) * ratio, 0)
    last = np.where(corner + extent > shown, (np.array((right, bottom)) - corner) * ratio, picture)
    return snap(index, (first[0], first[1], last[0], last[1]), (left, top, right, bottom), picture)
