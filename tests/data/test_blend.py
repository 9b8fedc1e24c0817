"""CopyBlend: what is pasted where, and which boxes follow."""

from __future__ import annotations

import numpy as np
import torch

from finedetr.data.blend import Paste, paste, plan_pastes
from finedetr.data.device import OnDevice
from finedetr.data.transforms import Augmentation, Windows
from finedetr.records import Batch, Targets

SHAPE = (64, 96)


def targets() -> Targets:
    labels = [torch.tensor([1, 2]), torch.tensor([], dtype=torch.long), torch.tensor([3])]
    boxes = [
        torch.tensor([[0.25, 0.5, 0.25, 0.5], [0.9, 0.9, 0.05, 0.05]]),  # 24x32 pixels, and one that is too small
        torch.zeros(0, 4),
        torch.tensor([[0.95, 0.5, 0.25, 0.5]]),  # beyond the right border
    ]
    return Targets.from_lists(labels, boxes)


def test_objects_are_pasted_inside_every_picture_with_their_boxes() -> None:
    before = targets()
    for seed in range(20):
        pastes, after = plan_pastes(before, SHAPE, Augmentation(copy_blend=1), np.random.default_rng(seed))
        assert after.counts == (4, 2, 3)  # two objects are large enough
        assert after.labels[:2].tolist() == [1, 2]
        assert torch.equal(after.boxes[:2], before.boxes[:2])
        assert sorted(after.labels[2:4].tolist()) == [1, 3]
        assert after.image.tolist() == [0, 0, 0, 0, 1, 1, 2, 2, 2]
        for p in pastes:
            assert min(p.x, p.y, p.left, p.top) >= 0
            assert p.x + p.width <= 96 >= p.left + p.width
            assert p.y + p.height <= 64 >= p.top + p.height
            assert p.height >= 32
            assert p.width <= 24 * 1.5


def test_the_margin_is_the_same_on_both_sides_of_a_copy() -> None:
    pastes, after = plan_pastes(targets(), SHAPE, Augmentation(copy_blend_objects=1), np.random.default_rng(3))
    first = pastes[0]
    box = after.boxes[2] * torch.tensor([96, 64, 96, 64])
    left, top = (box[:2] - box[2:] / 2).tolist()
    own = {0: (12.0, 16.0), 2: (79.0, 16.0)}[first.source]  # the left upper corner of the object
    assert (left - first.x, top - first.y) == (own[0] - first.left, own[1] - first.top)


def test_what_is_pasted_is_blended() -> None:
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    out = paste(images, [Paste(1, 2, 3, 0, 4, 5, 2, 1)], 0.45)
    assert torch.allclose(out[0, :, 5, 4:6], 0.45 * images[0, :, 5, 4:6] + 0.55 * images[1, :, 3, 2:4])
    out[0, :, 5, 4:6] = images[0, :, 5, 4:6]
    assert torch.equal(out, images)


def test_a_batch_without_objects_stays_as_it_is() -> None:
    empty = Targets.from_lists([torch.tensor([], dtype=torch.long)] * 2, [torch.zeros(0, 4)] * 2)
    pastes, after = plan_pastes(empty, SHAPE, Augmentation(copy_blend=1), np.random.default_rng(0))
    assert (pastes, after.counts) == ([], (0, 0))


def test_copies_come_while_augmentation_is_strong_and_never_with_mixup() -> None:
    batch = Batch(torch.randint(0, 256, (3, 3, *SHAPE), dtype=torch.uint8), targets(), ("a", "b", "c"))
    settings = Augmentation(mixup=0.5, copy_blend=1, multi_scale_repeat=None)
    device = OnDevice(settings, Windows(1, 3, 5), SHAPE)
    counts = {epoch: {device(batch, epoch=epoch, step=step)[1].counts for step in range(8)} for epoch in (0, 1, 4, 5)}
    assert counts == {0: {(2, 0, 1)}, 1: {(4, 2, 3), (3, 2, 1)}, 4: {(4, 2, 3)}, 5: {(2, 0, 1)}}
