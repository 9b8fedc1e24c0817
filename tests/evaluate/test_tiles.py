"""Tiles cover a picture and overlap; cut objects are left to who sees them whole; nothing is told twice."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from finedetr.detections import Detections
from finedetr.errors import UsageError
from finedetr.evaluate.predictor import Predictor
from finedetr.evaluate.tiles import OVERLAP, cut, merge
from finedetr.model.weights import Card
from finedetr.model.zoo import variant
from finedetr.records import Output, Prediction


@pytest.mark.parametrize("size", [(640, 480), (641, 640), (1920, 1080), (3000, 100), (20_000, 30)])
def test_tiles_cover_the_picture_and_overlap_by_a_quarter(size: tuple[int, int]) -> None:
    whole, *tiles = cut(*size, 640)
    assert whole == (0, 0, *size)
    if max(size) <= 640:
        assert not tiles
        return
    for axis in (0, 1):
        spans = sorted({(tile[axis], tile[axis + 2]) for tile in tiles})
        assert (spans[0][0], spans[-1][1]) == (0, size[axis])
        assert {end - start for start, end in spans} == {min(640, size[axis])}
        for one, other in itertools.pairwise(spans):
            assert one[1] - other[0] >= 640 * OVERLAP - 1
    with pytest.raises(UsageError, match="at least 32"):
        cut(*size, 8)


def answer(boxes: list[list[float]], score: float = 0.9, label: int = 0) -> Detections:
    n = len(boxes)
    return Detections(
        np.array(boxes, dtype=np.float32), np.full(n, score), np.full(n, label, dtype=np.int64), ("a", "b"), (100, 100)
    )


def test_a_cut_box_is_left_to_the_whole_and_doubles_are_suppressed() -> None:
    regions = [(0, 0, 175, 100), (0, 0, 100, 100), (75, 0, 175, 100)]
    whole = answer([[40, 10, 160, 90], [80, 40, 90, 51]], score=0.6)
    left = answer([[40, 10, 100, 90], [80, 40, 90, 50], [0, 0, 5, 5]])
    right = answer([[0, 10, 85, 90], [5, 40, 15, 50]], score=0.8)
    merged = merge([whole, left, right], regions, (175, 100))
    assert merged.size == (175, 100)
    assert merged.xyxy.tolist() == [[80, 40, 90, 50], [0, 0, 5, 5], [40, 10, 160, 90]]
    assert len(merge([answer([]), answer([]), answer([])], regions, (175, 100))) == 0


class Spotter(nn.Module):
    """Finds all that is bright as one box; is sure of it only where it is small."""

    def forward(self, images: torch.Tensor) -> Output:
        logits, boxes = [], []
        for image in images:
            ys, xs = (image[0] > 0.9).nonzero(as_tuple=True)
            if not len(xs):
                xs = ys = torch.tensor([0])
            low, high = torch.stack((xs.min(), ys.min())), torch.stack((xs.max(), ys.max())) + 1
            sure = bool((image[0] > 0.9).any()) and int((high - low).max()) < 20
            boxes.append(torch.cat((low + high, 2 * (high - low))) / (2 * images.shape[-1]))
            logits.append(torch.tensor([3.0 if sure else -3.0]))
        return Output(Prediction(torch.stack(logits)[None, :, None], torch.stack(boxes)[None, :, None], ("layer",)))


def test_small_objects_of_a_large_picture_are_found_in_tiles() -> None:
    pixels = np.zeros((150, 200, 3), np.uint8)
    objects = [[10, 10, 22, 22], [58, 100, 70, 112], [150, 130, 162, 142]]  # the second one is cut by the first tile
    for x1, y1, x2, y2 in objects:
        pixels[y1:y2, x1:x2] = 255
    predictor = Predictor(Spotter(), Card(variant("dfine-n"), ("spot",), (1,), size=(64, 64)))
    assert len(predictor(pixels)) == 0  # type: ignore[arg-type]
    for batch in (1, 3, 100):
        found: Any = predictor(pixels, tile=64, batch=batch)
        assert sorted(found.xyxy.tolist()) == objects
        assert found.size == (200, 150)
        assert found.draw().size == (200, 150)
    with pytest.raises(UsageError, match="at least 32"):
        predictor(pixels, tile=3)


def test_thresholds_of_the_weights_hold_where_none_is_given() -> None:
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[5:15, 5:15] = 255
    for kept, count in ((0.9, 1), (0.99, 0)):  # the score is .953
        card = Card(variant("dfine-n"), ("spot",), (1,), size=(64, 64), thresholds=(kept,))
        predictor = Predictor(Spotter(), card)
        assert len(predictor(pixels)) == count  # type: ignore[arg-type]
        assert len(predictor(pixels, threshold=0.4)) == 1  # type: ignore[arg-type]
