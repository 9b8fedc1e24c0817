"""Denoising queries: exact tensors against the specification's text, masks, assignment, dense and empty batches."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finedetr.errors import ConfigError
from finedetr.records import QueryGroup, Targets
from finedetr.supervise.denoising import Denoising


def batch(counts: tuple[int, ...], classes: int = 7, seed: int = 0) -> Targets:
    generator = torch.Generator().manual_seed(seed)
    return Targets.from_lists(
        [torch.randint(classes, (n,), generator=generator) for n in counts],
        [torch.rand(n, 4, generator=generator) * 0.4 + 0.3 for n in counts],
    )


def by_the_text(targets: Targets, classes: int, queries: int) -> tuple[Tensor, Tensor, Tensor, list[list[int]]]:
    """Section 1.8 of the specification, slot by slot: labels, boxes, mask, and the positives of each picture."""
    pictures, m = targets.pictures, max(targets.counts)
    g = max(1, queries // m)
    total = 2 * m * g
    hit, label = torch.rand(pictures, total), torch.randint(0, classes, (pictures, total))
    sign, u = torch.randint(0, 2, (pictures, total, 4)), torch.rand(pictures, total, 4)
    labels = torch.full((pictures, total), classes)
    boxes = torch.zeros(pictures, total, 4)
    for b, (start, count) in enumerate(zip(targets.starts, targets.counts, strict=True)):
        for i in range(total):
            group, within = divmod(i, 2 * m)
            negative, slot = divmod(within, m)
            assert 0 <= group < g
            if slot >= count:
                continue
            labels[b, i] = label[b, i] if hit[b, i] < 0.25 else targets.labels[start + slot]
            x, y, w, h = targets.boxes[start + slot].unbind()
            edges = torch.stack((x - 0.5 * w, y - 0.5 * h, x + 0.5 * w, y + 0.5 * h))
            reach = (u[b, i] + 1 if negative else u[b, i]) * torch.stack((w, h, w, h)) * 0.5
            left, top, right, bottom = (edges + (sign[b, i] * 2 - 1) * reach).clamp(0, 1).unbind()
            box = [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]
            boxes[b, i] = torch.stack((box[0], box[1], abs(box[2]), abs(box[3])))
    blocked = torch.tensor([[i // (2 * m) != j // (2 * m) for j in range(total)] for i in range(total)])
    positives = [[group * 2 * m + j for group in range(g) for j in range(count)] for count in targets.counts]
    return labels, boxes, blocked, positives


def pairs_of(group: QueryGroup) -> list[tuple[int, int, int]]:
    pairs = group.assignment
    assert pairs is not None
    return list(zip(pairs.image.tolist(), pairs.query.tolist(), pairs.target.tolist(), strict=True))


@pytest.mark.parametrize("counts", [(3, 0, 5), (1,), (12, 12), (60, 2)])
def test_equal_random_streams_give_equal_tensors(counts: tuple[int, ...]) -> None:
    targets = batch(counts)
    torch.manual_seed(7)
    labels, boxes, blocked, positives = by_the_text(targets, classes=7, queries=100)
    torch.manual_seed(7)
    group = Denoising()(targets, classes=7)
    assert torch.equal(group.labels, labels)
    torch.testing.assert_close(group.boxes, boxes, atol=1e-7, rtol=0)
    assert torch.equal(group.blocked, blocked)
    wanted = [
        (image, query, targets.starts[image] + place % targets.counts[image])
        for image, rows in enumerate(positives)
        for place, query in enumerate(rows)
    ]
    assert sorted(pairs_of(group)) == sorted(wanted)
    assert group.assignment.count.tolist() == [sum(counts) * max(1, 100 // max(counts))]
    assert group.assignment.sizes == (len(wanted),)
    assert (group.name, group.sees_matching, group.weight) == ("denoising", True, 1.0)


def test_a_generator_is_used_instead_of_the_global_stream() -> None:
    targets = batch((4, 2))
    torch.manual_seed(3)
    expected = Denoising()(targets, classes=7)
    torch.manual_seed(4)
    state = torch.get_rng_state()
    group = Denoising()(targets, 7, torch.Generator().manual_seed(3))
    assert torch.equal(group.boxes, expected.boxes)
    assert torch.equal(group.labels, expected.labels)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_noise_positives_are_the_targets() -> None:
    targets = batch((2, 3))
    group = Denoising(label_noise=0.0, box_noise=0.0)(targets, classes=7)
    image, query, target = torch.tensor(pairs_of(group)).T
    assert torch.equal(group.boxes[image, query], targets.boxes[target])
    assert torch.equal(group.labels[image, query], targets.labels[target])


@pytest.mark.parametrize(("most", "queries"), [(150, 300), (200, 400), (201, 400), (700, 400)])
def test_dense_pictures_are_bounded(most: int, queries: int) -> None:
    targets = batch((most, 3, 0))
    group = Denoising(max_queries=400)(targets, classes=7, generator=torch.Generator().manual_seed(0))
    assert group.boxes.shape == (3, queries, 4)
    pairs = pairs_of(group)
    assert len(pairs) == len(set(pairs)) == min(most, 200) + 3
    assert all(targets.image[target] == image for image, _, target in pairs)
    assert [(query, target - most) for image, query, target in pairs if image == 1] == [(0, 0), (1, 1), (2, 2)]


def test_a_dense_picture_gives_a_random_subset_that_the_seed_repeats() -> None:
    targets = batch((50, 40))
    source = Denoising(queries=10, max_queries=40, box_noise=0.0, label_noise=0.0)
    chosen = []
    for seed in (0, 0, 1):
        group = source(targets, 7, torch.Generator().manual_seed(seed))
        image, query, target = torch.tensor(pairs_of(group)).T
        assert torch.equal(group.boxes[image, query], targets.boxes[target])
        assert [image.tolist().count(picture) for picture in (0, 1)] == [20, 20]
        chosen.append(target.tolist())
    assert chosen[0] == chosen[1] != chosen[2]


def test_slots_can_be_rounded_up() -> None:
    targets = batch((5, 2))
    group = Denoising(queries=24, multiple=4)(targets, classes=7)
    assert group.boxes.shape == (2, 2 * 8 * 3, 4)
    assert len(pairs_of(group)) == 7 * 3
    assert bool((group.labels[0].view(6, 8)[:, 5:] == 7).all())


def test_a_batch_without_targets_gets_padding_of_no_weight() -> None:
    group = Denoising()(batch((0, 0)), classes=7)
    assert group.labels.tolist() == [[7, 7], [7, 7]]
    assert group.boxes.shape == (2, 2, 4)
    assert group.weight == 0
    assert len(group.assignment) == 0


@pytest.mark.parametrize(
    "wrong", [{"queries": 0}, {"label_noise": 1.5}, {"box_noise": -1.0}, {"max_queries": 1}, {"multiple": 0}]
)
def test_numbers_that_cannot_be_are_told_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"Denoising.{next(iter(wrong))}"):
        Denoising(**wrong)
