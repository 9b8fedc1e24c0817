"""What happens to a training picture, decided before any pixel is read: random numbers and boxes in, a plan out.

All geometry is one matrix for each source picture. Boxes go through the very matrix that the pixels are sampled with,
so they agree to the rounding of a pixel (`sampling.py` draws what is planned here).

Probabilities and ranges are those of D-FINE (Peng et al., 2024) and DEIM (Huang et al., 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from finedetr.data.dataset import Dataset
from finedetr.errors import ConfigError

__all__ = [
    "STRONG",
    "Active",
    "Augmentation",
    "Color",
    "Plan",
    "Tile",
    "Truth",
    "Windows",
    "plan_plain",
    "plan_standard",
]

Rect = tuple[float, float, float, float]  # left, top, right, bottom
Matrix = NDArray[np.float64]  # [2, 3]: (x, y, 1) -> (x, y)
STRONG = ("mosaic", "mixup", "copy_blend", "zoom_out")  # make objects smaller or pictures denser
REDUCTIONS = (8, 4, 2)  # what a JPEG can be reduced by while it is decoded


@dataclass(frozen=True)
class Augmentation:
    """Every published probability and range. The defaults are DEIM's; D-FINE never enters the mosaic window."""

    mosaic: float = 0.5
    mosaic_degrees: float = 10.0
    mosaic_translate: float = 0.1
    mosaic_scale: tuple[float, float] = (0.5, 1.5)
    photometric: float = 0.5  # of each of brightness, contrast, saturation, hue, exchange of channels
    brightness: tuple[float, float] = (0.875, 1.125)
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: tuple[float, float] = (-0.05, 0.05)  # in turns of the color circle
    zoom_out: float = 0.5
    zoom_out_side: tuple[float, float] = (1.0, 4.0)
    crop: float = 0.8
    crop_scale: tuple[float, float] = (0.3, 1.0)
    crop_aspect: tuple[float, float] = (0.5, 2.0)
    crop_overlaps: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
    crop_trials: int = 40
    flip: float = 0.5
    quarter_turns: float = 0.0  # for pictures that have no up, such as cells or views from above
    min_size: float = 1.0  # boxes thinner than this many pixels are dropped, on the canvas and in the network's input
    mixup: float = 0.5  # of a batch, in the mosaic window
    mixup_share: tuple[float, float] = (0.45, 0.55)
    copy_blend: float = 0.0  # of a batch without mixup, while strong augmentation is on; DEIMv2: 0.5
    copy_blend_objects: int = 3  # pasted into each picture
    copy_blend_area: float = 100.0  # pixels that an object must have to be pasted
    copy_blend_margin: tuple[float, float] = (0.1, 0.25)  # of its surroundings, as a share of its size
    multi_scale_repeat: int | None = 3  # how often the base size stands in the list of sizes; None: one size only

    def __post_init__(self) -> None:
        for name in ("mosaic", "photometric", "zoom_out", "crop", "flip", "quarter_turns", "mixup", "copy_blend"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"augmentation.{name}: wanted a probability in 0..1; got {getattr(self, name)}")
        for name in ("mosaic_scale", "zoom_out_side", "crop_scale", "crop_aspect"):
            low, high = getattr(self, name)
            if not 0 < low <= high:
                raise ConfigError(f"augmentation.{name}: wanted 0 < low <= high; got {(low, high)}")
        if self.zoom_out_side[0] < 1 or self.crop_scale[1] > 1:
            raise ConfigError("augmentation: zoom_out_side starts at 1 or above, crop_scale ends at 1 or below")

    def milder(self, share: float) -> Augmentation:
        """With this share of the chances of all that makes objects smaller or pictures denser."""
        if share == 1:
            return self
        chances = {name: round(share * getattr(self, name), 6) for name in STRONG}
        return replace(self, **chances)


@dataclass(frozen=True, slots=True)
class Active:
    """Which augmentations are on in an epoch. Flip and resize always are."""

    name: str
    mosaic: bool = False
    standard: bool = False  # photometric distortion, zoom-out, IoU crop
    mixup: bool = False
    copy_blend: bool = False
    multi_scale: bool = False


@dataclass(frozen=True)
class Windows:
    """The epochs at which the augmentation changes.

    `[0, start)` none, `[start, mosaic_end)` mosaic and mixup with their probabilities (else standard),
    `[mosaic_end, plain_from)` standard, then plain; objects are pasted in `[start, plain_from)`. D-FINE's form has no
    mosaic: `Windows(0, 0, plain_from)`.
    """

    start: int
    mosaic_end: int
    plain_from: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.mosaic_end <= self.plain_from:
            raise ConfigError(
                f"windows: wanted 0 <= start <= mosaic_end <= plain_from; got {self.start}, {self.mosaic_end}, "
                f"{self.plain_from}"
            )

    @classmethod
    def dfine(cls, plain_from: int) -> Windows:
        """Standard augmentation until the given epoch, then none."""
        return cls(0, 0, plain_from)

    def kind(self, epoch: int) -> Active:
        """What is on in an epoch (counted from 0)."""
        if epoch >= self.plain_from:
            return Active("plain")
        if epoch < self.start:
            return Active("start", multi_scale=True)
        if epoch < self.mosaic_end:
            return Active("mosaic", mosaic=True, standard=True, mixup=True, copy_blend=True, multi_scale=True)
        return Active("standard", standard=True, copy_blend=True, multi_scale=True)


@dataclass(frozen=True, slots=True)
class Truth:
    """The boxes of one picture: `boxes` float32 [t, 4] xyxy, `labels` int64 [t], `area` float32 [t]."""

    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    area: NDArray[np.float32]

    @classmethod
    def of(cls, dataset: Dataset, index: int) -> Truth:
        """What training sees of a picture: crowd regions are left out."""
        rows = dataset.rows(index)
        keep = ~dataset.crowd[rows]
        boxes = dataset.boxes[rows][keep].astype(np.float64)
        return cls(boxes, dataset.labels[rows][keep], dataset.area[rows][keep])

    def pick(self, keep: NDArray[np.bool_]) -> Truth:
        """Boxes, labels and areas of the same rows."""
        return Truth(self.boxes[keep], self.labels[keep], self.area[keep])

    @classmethod
    def join(cls, parts: Sequence[Truth]) -> Truth:
        """One after the other."""
        return cls(
            np.concatenate([part.boxes for part in parts]).reshape(-1, 4),
            np.concatenate([part.labels for part in parts]),
            np.concatenate([part.area for part in parts]),
        )


@dataclass(frozen=True, slots=True)
class Color:
    """Drawn factors of a photometric distortion; None: that step is off."""

    brightness: float | None = None
    contrast: float | None = None
    saturation: float | None = None
    hue: float | None = None
    contrast_first: bool = True
    channels: tuple[int, int, int] | None = None

    @classmethod
    def draw(cls, rng: np.random.Generator, augmentation: Augmentation) -> Color | None:
        """Each step with its probability; None where nothing is to be done."""
        chances, shares = rng.random(6), rng.random(4)
        a, p = augmentation, augmentation.photometric
        factors: list[float | None] = [
            low + (high - low) * share if chance < p else None
            for chance, share, (low, high) in zip(
                chances[:4], shares, (a.brightness, a.contrast, a.saturation, a.hue), strict=True
            )
        ]
        channels = None
        if chances[4] < p:
            order = rng.permutation(3)
            channels = (int(order[0]), int(order[1]), int(order[2]))
        if channels in (None, (0, 1, 2)) and not any(factor is not None for factor in factors):
            return None
        return cls(*factors, contrast_first=bool(chances[5] < 0.5), channels=channels)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Tile:
    """One source picture on the canvas, axis-aligned: its rectangle `source` fills the rectangle `target`.

    `source` is in pixels of the picture as seen, on multiples of `reduce`; `target` in whole pixels of the canvas.
    """

    index: int
    source: tuple[int, int, int, int]
    target: tuple[int, int, int, int]
    reduce: int = 1

    @property
    def matrix(self) -> Matrix:
        """Source pixels to canvas pixels."""
        (sx0, sy0, sx1, sy1), (tx0, ty0, tx1, ty1) = self.source, self.target
        kx, ky = (tx1 - tx0) / (sx1 - sx0), (ty1 - ty0) / (sy1 - sy0)
        return np.array([[kx, 0, tx0 - kx * sx0], [0, ky, ty0 - ky * sy0]])


@dataclass(frozen=True, slots=True)
class Plan:
    """A training picture before its pixels: tiles on a canvas, how the canvas turns into the output, color, truth.

    `turn` maps canvas pixels to output pixels; None: the canvas is the output, mirrored if `flip`. At the very end the
    output makes so many `quarters` of a turn to the left. `truth` holds boxes in output pixels, clipped.
    """

    size: tuple[int, int]  # (H, W) of the output
    canvas: tuple[int, int]  # (H, W)
    tiles: tuple[Tile, ...]
    truth: Truth
    color: Color | None = None
    flip: bool = False
    turn: Matrix | None = None
    quarters: int = 0


# ------------------------------------------------------------------------------------------------------------ geometry


def snap(index: int, visible: Rect, target: tuple[int, int, int, int], picture: tuple[int, int]) -> Tile:
    """A tile on whole pixels. The JPEG is to be decoded at the smallest scale that still has all the detail.

    Args:
        index: The picture's number.
        visible: Left, top, right, bottom of the part that is seen, in source pixels.
        target: Where it goes.
        picture: (width, height) of the source.
    """
    scale = max(
        (target[2] - target[0]) / (visible[2] - visible[0]), (target[3] - target[1]) / (visible[3] - visible[1])
    )
    reduce = next((factor for factor in REDUCTIONS if factor * scale <= 1), 1)
    edges = []
    for axis in (0, 1):
        last = -(-picture[axis] // reduce)
        low = min(max(round(visible[axis] / reduce), 0), last - 1)
        high = min(max(round(visible[axis + 2] / reduce), low + 1), last)
        if visible[axis + 2] >= picture[axis]:
            high = last
        edges.append((low * reduce, high * reduce))
    return Tile(index, (edges[0][0], edges[1][0], edges[0][1], edges[1][1]), target, reduce)


def transform_boxes(boxes: NDArray[np.float64], matrix: Matrix) -> NDArray[np.float64]:
    """Upright hulls of boxes (xyxy) after an affine map."""
    center, half = (boxes[:, :2] + boxes[:, 2:]) / 2, (boxes[:, 2:] - boxes[:, :2]) / 2
    center = center @ matrix[:, :2].T + matrix[:, 2]
    half = half @ np.abs(matrix[:, :2]).T
    return np.concatenate((center - half, center + half), 1)


def settle(truth: Truth, size: tuple[int, int], thinnest: tuple[float, float]) -> Truth:
    """Clips boxes to (H, W) and drops those thinner than (x, y) pixels, with their labels and areas."""
    height, width = size
    boxes = np.clip(truth.boxes, 0, (width, height, width, height))
    extent = boxes[:, 2:] - boxes[:, :2]
    return Truth(boxes, truth.labels, truth.area).pick(np.all(extent >= thinnest, axis=1))


def mirror(boxes: NDArray[np.float64], width: int) -> NDArray[np.float64]:
    """Boxes of a picture flipped left to right."""
    return np.stack((width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]), 1)


def turn_quarters(rng: np.random.Generator, plan: Plan) -> Plan:
    """The plan with its output turned by 90, 180 or 270 degrees; by 180 alone where it is not square."""
    quarters = int(rng.integers(1, 4)) if plan.size[0] == plan.size[1] else 2
    height, width = plan.size
    boxes = plan.truth.boxes
    for _ in range(quarters):  # to the left: (x, y) -> (y, width - x)
        boxes = np.stack((boxes[:, 1], width - boxes[:, 2], boxes[:, 3], width - boxes[:, 0]), 1)
        height, width = width, height
    return replace(plan, truth=Truth(boxes, plan.truth.labels, plan.truth.area), quarters=quarters)


def limits(augmentation: Augmentation, size: tuple[int, int], canvas: tuple[float, float]) -> tuple[float, float]:
    """The thinnest box in output pixels: it has to hold on the canvas (w, h) and again after the resize to (H, W)."""
    least = augmentation.min_size
    return max(least, least * size[1] / canvas[0]), max(least, least * size[0] / canvas[1])


# --------------------------------------------------------------------------------------------------------------- plans


def plan_plain(
    rng: np.random.Generator, dataset: Dataset, index: int, augmentation: Augmentation, size: tuple[int, int]
) -> Plan:
    """Flip and squash: the first epochs of DEIM and the last of both."""
    width, height = (int(v) for v in dataset.sizes[index])
    whole = (0.0, 0.0, float(width), float(height))
    return place(rng, dataset, index, augmentation, size, whole, Truth.of(dataset, index), None)


def plan_standard(
    rng: np.random.Generator, dataset: Dataset, index: int, augmentation: Augmentation, size: tuple[int, int]
) -> Plan:
    """Photometric distortion, zoom-out, IoU crop, flip, squash: D-FINE's augmentation."""
    width, height = (int(v) for v in dataset.sizes[index])
    color = Color.draw(rng, augmentation)
    view = (0, 0, width, height)
    if rng.random() < augmentation.zoom_out:
        view = zoom_out(rng, width, height, augmentation)
    truth = Truth.of(dataset, index)
    if rng.random() < augmentation.crop:
        cropped = iou_crop(rng, truth.boxes, view, augmentation)
        if cropped is not None:
            view = cropped
            center = (truth.boxes[:, :2] + truth.boxes[:, 2:]) / 2
            truth = truth.pick(np.all((center > view[:2]) & (center < view[2:]), axis=1))
    return place(rng, dataset, index, augmentation, size, view, truth, color)


def place(
    rng: np.random.Generator,
    dataset: Dataset,
    index: int,
    augmentation: Augmentation,
    size: tuple[int, int],
    view: Rect,
    truth: Truth,
    color: Color | None,
) -> Plan:
    """The plan that shows the rectangle `view` of a picture's plane (black beyond the picture), flipped or not."""
    picture = (int(dataset.sizes[index][0]), int(dataset.sizes[index][1]))
    kx, ky = size[1] / (view[2] - view[0]), size[0] / (view[3] - view[1])
    visible = (max(view[0], 0), max(view[1], 0), min(view[2], picture[0]), min(view[3], picture[1]))
    flip = bool(rng.random() < augmentation.flip)
    tiles: tuple[Tile, ...] = ()
    if visible[2] > visible[0] and visible[3] > visible[1]:
        left, right = whole_edges((visible[0] - view[0]) * kx, (visible[2] - view[0]) * kx, size[1])
        top, bottom = whole_edges((visible[1] - view[1]) * ky, (visible[3] - view[1]) * ky, size[0])
        tile = snap(index, visible, (left, top, right, bottom), picture)
        tiles = (tile,)
        truth = Truth(transform_boxes(truth.boxes, tile.matrix), truth.labels, truth.area)
    else:  # a crop of nothing but the black around a picture
        truth = truth.pick(np.zeros(len(truth.labels), dtype=bool))
    truth = settle(truth, size, limits(augmentation, size, (view[2] - view[0], view[3] - view[1])))
    if flip:
        truth = Truth(mirror(truth.boxes, size[1]), truth.labels, truth.area)
    return Plan(size, size, tiles, truth, color, flip)


def whole_edges(low: float, high: float, end: int) -> tuple[int, int]:
    """An interval on whole pixels within 0..end, never empty."""
    first = min(max(round(low), 0), end - 1)
    return first, min(max(round(high), first + 1), end)


def zoom_out(
    rng: np.random.Generator, width: int, height: int, augmentation: Augmentation
) -> tuple[int, int, int, int]:
    """The view of a picture that is put at a random place of a larger black canvas (SSD's expansion)."""
    low, high = augmentation.zoom_out_side
    ratio = low + (high - low) * rng.random()
    wide, tall = int(width * ratio), int(height * ratio)
    left, top = int((wide - width) * rng.random()), int((tall - height) * rng.random())
    return -left, -top, wide - left, tall - top


def iou_crop(
    rng: np.random.Generator,
    boxes: NDArray[np.float64],
    view: tuple[int, int, int, int],
    augmentation: Augmentation,
) -> tuple[int, int, int, int] | None:
    """A random crop of `view` that overlaps some box well enough (SSD, Liu et al., 2016); None: no crop.

    The least overlap is drawn from the options; 1 means no crop. Of so many trials the first is taken that has a
    permitted aspect, holds the center of a box, and overlaps one of those boxes by at least that IoU; after as many
    failures another overlap is drawn. Without boxes no trial can succeed, so 1 is drawn in the end: no crop.
    """
    if not len(boxes) or not any(option >= 1 for option in augmentation.crop_overlaps):
        return None
    a = augmentation
    width, height = view[2] - view[0], view[3] - view[1]
    center = (boxes[:, :2] + boxes[:, 2:]) / 2
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    while True:
        least = a.crop_overlaps[int(rng.integers(len(a.crop_overlaps)))]
        if least >= 1:
            return None
        draws = rng.random((a.crop_trials, 4))
        extent = ((a.crop_scale[0] + (a.crop_scale[1] - a.crop_scale[0]) * draws[:, :2]) * (width, height)).astype(int)
        low = ((np.array((width, height)) - extent) * draws[:, 2:]).astype(int) + view[:2]
        aspect = extent[:, 0] / np.maximum(extent[:, 1], 1)
        good = (extent > 0).all(1) & (aspect >= a.crop_aspect[0]) & (aspect <= a.crop_aspect[1])
        low, high = low[good], (low + extent)[good]
        within = ((center > low[:, None]) & (center < high[:, None])).all(2)
        shared = np.minimum(boxes[:, 2:], high[:, None]) - np.maximum(boxes[:, :2], low[:, None])
        inter = np.clip(shared, 0, None).prod(2)
        iou = inter / (area + (high - low).prod(1)[:, None] - inter)
        fits = np.flatnonzero(((iou >= least) & within).any(1))
        if len(fits):
            first = fits[0]
            return int(low[first, 0]), int(low[first, 1]), int(high[first, 0]), int(high[first, 1])
