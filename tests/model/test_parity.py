"""D-FINE of all five sizes answers what `transformers` answers at the same random weights."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finedetr.model.zoo import variant
from tests.model.oracle import pair

pytest.importorskip("transformers")


def nearest(ours: Tensor, theirs: Tensor) -> tuple[Tensor, Tensor]:
    """For each of our queries, theirs with the closest initial box, and how far apart they are."""
    distance, index = torch.cdist(ours, theirs, p=torch.inf).min(dim=-1)
    return index, distance


def largest_differences(name: str, size: tuple[int, int], classes: int = 80) -> tuple[float, float, float]:
    """Share of common queries, and the largest differences of their logits and boxes."""
    ours, theirs = pair(variant(name), classes, size)
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        mine = ours(images, all_stages=True).matching
        other = theirs(pixel_values=images)
    index, distance = nearest(mine.boxes[0, 0], other.enc_topk_bboxes[0])
    common = distance < 1e-5  # ties of the top-k may choose a few other tokens
    logits = (mine.logits[-1, 0] - other.logits[0][index])[common].abs().max().item()
    boxes = (mine.boxes[-1, 0] - other.pred_boxes[0][index])[common].abs().max().item()
    return common.float().mean().item(), logits, boxes


@pytest.mark.parametrize("name", ["dfine-n", "dfine-s", "dfine-m", "dfine-l", "dfine-x"])
def test_logits_and_boxes_equal_transformers_at_640(name: str) -> None:
    common, logits, boxes = largest_differences(name, (640, 640))
    assert common > 0.97
    assert logits < 1e-4
    assert boxes < 1e-4


@pytest.mark.parametrize("name", ["dfine-n", "dfine-s"])
def test_logits_and_boxes_equal_transformers_at_a_rectangle(name: str) -> None:
    common, logits, boxes = largest_differences(name, (320, 448), classes=7)
    assert common > 0.97
    assert logits < 1e-4
    assert boxes < 1e-4
