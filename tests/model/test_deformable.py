"""Deformable DETR: the answers of `transformers` at the same random weights, in one stage, refined, in two stages."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finedetr.model.zoo import variant
from tests.model.classic import classic_pair, small, stages_of

pytest.importorskip("transformers")


@pytest.mark.parametrize("suffix", ["", "-refine", "-two-stage", "-single", "-single-dc5"])
def test_logits_and_boxes_of_all_stages_equal_transformers(suffix: str) -> None:
    ours, theirs = classic_pair(small(f"deformable-detr-r50{suffix}"))
    images = torch.rand(2, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        mine, (logits, boxes) = ours(images, all_stages=True).matching, stages_of(theirs, images)
    assert mine.stages == ("layer0", "layer1", "layer2")
    torch.testing.assert_close(mine.logits, logits, atol=2e-5, rtol=0)
    torch.testing.assert_close(mine.boxes, boxes, atol=2e-5, rtol=0)


def test_the_published_size_answers_as_transformers() -> None:
    config = variant("deformable-detr-r50-two-stage")
    ours, theirs = classic_pair(replace(config, decoder=replace(config.decoder, queries=50)))
    images = torch.rand(1, 3, 128, 160, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        mine, other = ours(images).matching, theirs(pixel_values=images)
    torch.testing.assert_close(mine.logits[-1], other.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(mine.boxes[-1], other.pred_boxes, atol=1e-4, rtol=0)
