"""Batches: the same whatever the workers, the ranks, or where a run was resumed; and no broken file ends a run."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from finedetr.data.dataset import Dataset
from finedetr.data.images import read_image, resize
from finedetr.data.loader import EvaluationLoader, TrainingLoader
from finedetr.data.transforms import Augmentation, Windows
from finedetr.errors import ConfigError, DataError
from finedetr.records import Batch
from tests.data.test_geometry import painted

MOSAIC = Windows(0, 5, 9)


def training(dataset: Dataset, **changes: object) -> TrainingLoader:
    settings: dict[str, object] = {"size": (64, 96), "batch": 2, "workers": 0, "seed": 3} | changes
    return TrainingLoader(dataset, Augmentation(), MOSAIC, **settings)  # type: ignore[arg-type]


def same(a: Batch, b: Batch) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.targets.boxes, b.targets.boxes)
        and torch.equal(a.targets.labels, b.targets.labels)
        and a.targets.counts == b.targets.counts
        and a.names == b.names
    )


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return painted(
        tmp_path, [(120, 90), (80, 130), (100, 100), (97, 61), (150, 70), (64, 64), (90, 90)], ".jpg", each=2
    )


def test_batches_do_not_depend_on_the_number_of_workers(dataset: Dataset) -> None:
    alone, helped = training(dataset), training(dataset, workers=2)
    try:
        for epoch in (0, 1, 7):
            pairs = list(zip(alone.epoch(epoch), helped.epoch(epoch), strict=True))
            assert len(pairs) == alone.steps == 3
            assert all(same(a, b) for a, b in pairs)
    finally:
        helped.close()


def test_an_epoch_can_be_resumed_in_its_middle(dataset: Dataset) -> None:
    loader = training(dataset, workers=1)
    try:
        whole = list(loader.epoch(2))
        for batch in loader.epoch(3):
            assert batch.images.shape == (2, 3, 64, 96)
            break  # an epoch that is left early must not leak into the next one
        rest = list(loader.epoch(2, first_step=1))
    finally:
        loader.close()
    assert len(rest) == 2
    assert all(same(a, b) for a, b in zip(whole[1:], rest, strict=True))


def test_epochs_and_seeds_differ(dataset: Dataset) -> None:
    first = next(training(dataset).epoch(0))
    assert not same(first, next(training(dataset).epoch(1)))
    assert not same(first, next(training(dataset, seed=4).epoch(0)))


def test_the_ranks_together_see_the_global_batch(dataset: Dataset) -> None:
    whole = list(training(dataset, batch=2).epoch(1))
    halves = [list(training(dataset, batch=1, rank=rank, world=2).epoch(1)) for rank in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == len(whole)
    for step, batch in enumerate(whole):
        parts = [half[step] for half in halves]
        assert torch.equal(batch.images, torch.cat([part.images for part in parts]))
        assert torch.equal(batch.targets.boxes, torch.cat([part.targets.boxes for part in parts]))
        assert batch.names == tuple(name for part in parts for name in part.names)


def test_a_set_smaller_than_a_batch_is_repeated_to_fill_one(dataset: Dataset) -> None:
    small = dataset.subset([0, 1, 2])
    loader = training(small, batch=8)
    (batch,) = loader.epoch(0)
    assert loader.steps == 1
    assert batch.images.shape[0] == 8


def test_no_picture_stands_twice_in_an_epoch(dataset: Dataset) -> None:
    names = [name for batch in training(dataset).epoch(0) for name in batch.names]
    assert len(names) == len(set(names)) == 6


def test_targets_are_normalized_and_inside(dataset: Dataset) -> None:
    for batch in training(dataset).epoch(0):
        boxes = batch.targets.boxes
        corners = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), 1)
        assert batch.images.dtype == torch.uint8
        assert (corners > -1e-6).all()
        assert (corners < 1 + 1e-6).all()
        assert sum(batch.targets.counts) == len(boxes)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_is_replaced_and_counted(
    dataset: Dataset, workers: int, caplog: pytest.LogCaptureFixture
) -> None:
    Path(dataset.files[2]).write_bytes(Path(dataset.files[2]).read_bytes()[:400])
    loader = training(dataset, workers=workers)
    with caplog.at_level(logging.WARNING, "finedetr.data"):
        try:
            batches = [batch for epoch in range(3) for batch in loader.epoch(epoch)]
        finally:
            loader.close()
    assert len(batches) == 9
    assert list(loader.broken) == [dataset.files[2]]
    assert loader.broken[dataset.files[2]] >= 1
    assert sum("corrupt_image" in record.message for record in caplog.records) == 1
    assert dataset.files[2] not in {name for batch in batches for name in batch.names}


def test_a_broken_picture_is_named_whole_whatever_its_name_holds(dataset: Dataset) -> None:
    odd = str(Path(dataset.files[2]).with_name("odd: name.jpg"))
    Path(odd).write_bytes(b"no picture")
    loader = training(replace(dataset, files=(*dataset.files[:2], odd, *dataset.files[3:])))
    for _ in loader.epoch(0):
        pass
    assert list(loader.broken) == [odd]


def test_a_set_of_nothing_but_broken_pictures_is_an_error(dataset: Dataset) -> None:
    for file in dataset.files:
        Path(file).write_bytes(b"no picture")
    with pytest.raises(DataError, match="in a row cannot be read"):
        next(training(dataset).epoch(0))


def test_a_picture_that_changed_its_size_is_not_trained_on(dataset: Dataset) -> None:
    changed = replace(dataset, sizes=dataset.sizes + 10)
    with pytest.raises(DataError, match="in a row"):
        next(training(changed).epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_each_picture_once_as_published(dataset: Dataset, workers: int) -> None:
    seen: list[int] = []
    for rank in (0, 1):
        loader = EvaluationLoader(dataset, (64, 96), batch=3, workers=workers, rank=rank, world=2)
        try:
            for batch, indices in loader:
                seen.extend(indices)
                for image, index in zip(batch.images, indices, strict=True):
                    assert torch.equal(image, resize(read_image(dataset.files[index]), (64, 96)))
        finally:
            loader.close()
    assert sorted(seen) == list(range(len(dataset)))


def test_evaluation_leaves_a_broken_picture_out(dataset: Dataset) -> None:
    Path(dataset.files[0]).write_bytes(b"")
    loader = EvaluationLoader(dataset, (32, 32), batch=4, workers=0)
    seen = [index for _, indices in loader for index in indices]
    assert seen == list(range(1, len(dataset)))
    assert list(loader.broken) == [dataset.files[0]]


def test_settings_that_cannot_be_are_named(dataset: Dataset) -> None:
    for name, changes in {
        "rank: wanted 0 to 1 of 2 processes; got 2": {"rank": 2, "world": 2},
        "workers: wanted 0 or more": {"workers": -1},
        "batch: wanted 1 or more; got 0": {"batch": 0},
        "size: wanted 1 or more; got 64 and 0": {"size": (64, 0)},
        "seed: wanted 0 or more": {"seed": -1},
    }.items():
        with pytest.raises(ConfigError, match=name) as caught:
            training(dataset, **changes)
        assert caught.value.code == "use.range"
    with pytest.raises(ConfigError, match="batch: wanted 1 or more; got 0"):
        EvaluationLoader(dataset, (64, 64), batch=0)


def test_the_order_is_a_permutation_that_changes(dataset: Dataset) -> None:
    pictures = training(dataset).pictures
    orders = [pictures.order(epoch).tolist() for epoch in range(6)]
    assert all(sorted(order) == list(range(7)) for order in orders)
    assert len({tuple(order) for order in orders}) > 3
    assert np.array_equal(pictures.order(2), orders[2])


def without_labels(dataset: Dataset, count: int) -> Dataset:
    """The first pictures, as if nobody had annotated them."""
    few, row = dataset.subset(range(count)), ("labels", "boxes", "crowd", "area", "annotation_ids")
    nothing = {name: getattr(few, name)[:0] for name in row}
    return replace(few, starts=np.zeros(count + 1, dtype=np.int64), **nothing)


def test_pictures_without_truth_stand_last_in_turn_and_change_nothing_else(dataset: Dataset) -> None:
    """Three of five beside each batch of two: all of them in turn, whatever the workers, the ranks or the start."""
    five, four = (without_labels(dataset, count) for count in (5, 4))
    plain, beside = training(dataset), training(dataset, others=five, beside=3)
    halves = [training(dataset, batch=1, others=four, beside=1, rank=r, world=2) for r in (0, 1)]
    whole = training(dataset, others=four, beside=2)
    assert plain.steps == beside.steps
    order = [beside.pictures.other(place) for place in range(20)]
    assert [sorted(order[first : first + 5]) for first in range(0, 20, 5)] == [[0, 1, 2, 3, 4]] * 4
    assert len({tuple(order[first : first + 5]) for first in range(0, 20, 5)}) > 1
    seen = []
    for epoch in (0, 1, 9):
        batches = list(beside.epoch(epoch))
        for before, after in zip(plain.epoch(epoch), batches, strict=True):
            assert after.images.shape[0] == 5
            assert torch.equal(after.images[:2], before.images)
            assert after.targets.with_truth == after.targets.annotated == 2
            assert after.targets.counts[:2] == before.targets.counts
            seen += [Path(name).name for name in after.names[2:]]
        resumed = list(beside.epoch(epoch, first_step=1))
        assert all(same(a, b) for a, b in zip(resumed, batches[1:], strict=True))
        for full, *parts in zip(whole.epoch(epoch), *(half.epoch(epoch) for half in halves), strict=True):
            joined = [part.images[row] for row in (0, 1) for part in parts]
            assert torch.equal(full.images, torch.stack(joined))
    assert len(seen) == 3 * 3 * 3
