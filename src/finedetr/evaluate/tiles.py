"""Large pictures in pieces: overlapping tiles and the whole, and one answer out of theirs.

A box that touches an inner border of its tile is cut: it is left to the neighbor, which overlaps, or, where it is
larger than the overlap, to the whole picture. What then remains twice is suppressed by overlap, class by class.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from finedetr.detections import Detections
from finedetr.errors import UsageError

__all__ = ["cut", "merge"]

OVERLAP = 0.25  # of a tile's side, at least
BORDER = 0.01  # of a tile's side: a box that comes so near to an inner border is cut by it
SAME = 0.5  # boxes of one class that overlap more are one object
SMALLEST = 32  # pixels

Region = tuple[int, int, int, int]


def cut(width: int, height: int, side: int) -> list[Region]:
    """Corners (left, top, right, bottom) of the whole picture and of square tiles that cover it.

    The tiles overlap by a quarter of their side or more; a picture that is no larger than a tile is only the whole.

    Raises:
        UsageError: The side is too small.
    """
    if side < SMALLEST:
        raise UsageError(f"a tile's side is at least {SMALLEST} pixels; got {side}", code="range")
    whole = (0, 0, width, height)
    if width <= side and height <= side:
        return [whole]
    across, down = _starts(width, side), _starts(height, side)
    return [whole, *((x, y, min(x + side, width), min(y + side, height)) for y in down for x in across)]


def _starts(length: int, side: int) -> list[int]:
    """Where tiles begin along one axis: evenly spread, the last one ending where the picture ends."""
    if length <= side:
        return [0]
    count = 1 + -(-(length - side) // round(side * (1 - OVERLAP)))
    return [round(start) for start in np.linspace(0, length - side, count)]


def merge(answers: Sequence[Detections], regions: Sequence[Region], size: tuple[int, int]) -> Detections:
    """One answer for a picture out of those for its regions.

    Args:
        answers: For each region, with boxes in pixels of the region.
        regions: As `cut` gives them.
        size: (width, height) of the picture.
    """
    kept = [_uncut(answer, region, size) for answer, region in zip(answers, regions, strict=True)]
    boxes: NDArray[np.float32] = np.concatenate([answer.xyxy for answer in kept])
    score = np.concatenate([answer.score for answer in kept])
    label = np.concatenate([answer.label for answer in kept])
    return Detections(boxes, score, label, answers[0].names, size).nms(SAME)


def _uncut(answer: Detections, region: Region, size: tuple[int, int]) -> Detections:
    """The boxes of a region that no inner border cuts, in pixels of the picture."""
    left, top, right, bottom = region
    boxes = answer.xyxy + np.array((left, top, left, top), dtype=np.float32)
    near = BORDER * max(right - left, bottom - top)
    inner = np.array((left > 0, top > 0, right < size[0], bottom < size[1]))
    distance = np.abs(boxes - np.array(region, dtype=np.float32))
    keep = ~((distance < near) & inner).any(axis=1)
    return Detections(boxes[keep], answer.score[keep], answer.label[keep], answer.names, size)
