"""Mixup, multi-scale and floats on the batch."""

from __future__ import annotations

import pytest
import torch

from finedetr.data.device import OnDevice, base_sizes, mix
from finedetr.data.transforms import Augmentation, Windows
from finedetr.errors import ConfigError
from finedetr.records import Batch, Targets

WINDOWS = Windows(1, 3, 5)


def batch() -> Batch:
    labels = [torch.tensor([1]), torch.tensor([], dtype=torch.long), torch.tensor([2, 3])]
    boxes = [torch.full((1, 4), 0.1), torch.zeros(0, 4), torch.full((2, 4), 0.3)]
    images = torch.randint(0, 256, (3, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    return Batch(images, Targets.from_lists(labels, boxes), ("a", "b", "c"))


def test_sizes_are_the_published_ones_at_640() -> None:
    sizes = base_sizes((640, 640), 3)
    sides = [480, 512, 544, 576, 608, 640, 640, 640, 800, 768, 736, 704, 672]
    assert sizes == [(side, side) for side in sides]


@pytest.mark.parametrize("size", [(320, 320), (384, 640), (640, 384), (256, 256), (32, 32), (96, 640)])
def test_sizes_of_any_base_are_multiples_of_32(size: tuple[int, int]) -> None:
    sizes = base_sizes(size, 2)
    assert sizes.count(size) >= 2
    assert all(height % 32 == 0 and width % 32 == 0 and min(height, width) >= 32 for height, width in sizes)
    if size == (384, 640):
        assert (288, 480) in sizes


def test_mixup_blends_with_the_picture_before_and_joins_targets() -> None:
    b = batch()
    images = b.images.float() / 255
    mixed, targets = mix(images, b.targets, 0.46)
    assert torch.allclose(mixed[0], 0.46 * images[0] + 0.54 * images[2])
    assert torch.allclose(mixed[2], 0.46 * images[2] + 0.54 * images[1])
    assert targets.counts == (3, 1, 2)
    assert targets.labels.tolist() == [1, 2, 3, 1, 2, 3]
    assert targets.image.tolist() == [0, 0, 0, 1, 2, 2]
    assert targets.boxes.shape == (6, 4)


def test_mixup_of_a_batch_without_targets() -> None:
    empty = Targets.from_lists([torch.zeros(0, dtype=torch.long)] * 2, [torch.zeros(0, 4)] * 2)
    _, targets = mix(torch.rand(2, 3, 8, 8), empty, 0.5)
    assert targets.counts == (0, 0)
    assert targets.boxes.shape == (0, 4)


def test_random_numbers_follow_from_epoch_and_step_alone() -> None:
    on = OnDevice(Augmentation(), WINDOWS, (64, 96), seed=7)
    once = [on(batch(), epoch=1, step=step) for step in range(12)]
    again = [on(batch(), epoch=1, step=step) for step in reversed(range(12))][::-1]
    assert all(torch.equal(a[0], b[0]) and a[1].counts == b[1].counts for a, b in zip(once, again, strict=True))
    assert {a[1].counts for a in once} == {(1, 0, 2), (3, 1, 2)}, "mixup is on for some steps only"
    assert len({tuple(a[0].shape) for a in once}) > 1


def test_windows_switch_mixup_and_scales_off() -> None:
    on = OnDevice(Augmentation(mixup=1), WINDOWS, (64, 96))
    assert [on(batch(), epoch=e, step=0)[1].counts == (3, 1, 2) for e in range(6)] == [False, True, True] + [False] * 3
    assert all(on(batch(), epoch=5, step=step)[0].shape == (3, 3, 64, 96) for step in range(8))


def test_floats_are_bytes_over_255_and_normalized_on_request() -> None:
    plain, _ = OnDevice(Augmentation(), WINDOWS, (64, 96))(batch(), epoch=9, step=0)
    assert torch.equal(plain, batch().images.float() / 255)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    scaled, _ = OnDevice(Augmentation(), WINDOWS, (64, 96), mean=mean, std=std)(batch(), epoch=9, step=0)
    expected = (plain - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(scaled, expected)


def test_half_a_normalization_is_refused() -> None:
    with pytest.raises(ConfigError, match="both mean and std"):
        OnDevice(Augmentation(), WINDOWS, (64, 96), mean=(0, 0, 0))
