"""Repeat-factor sampling: its formula, its unbiased rounding, and that batches stay functions of their place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from finedetr.data.balance import draw_epoch, repeat_factors
from finedetr.data.dataset import Categories, Dataset
from finedetr.data.loader import TrainingLoader
from finedetr.data.transforms import Augmentation, Windows
from finedetr.records import Batch


def data(tmp_path: Path, *pictures: tuple[int, ...], crowd: tuple[int, ...] = ()) -> Dataset:
    """Pictures with boxes of these classes; `crowd` has the numbers of crowd boxes."""
    from PIL import Image

    files = []
    for number in range(len(pictures)):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (40, 40), (number * 9, 99, 50)).save(path)
        files.append(str(path))
    labels = np.array([label for picture in pictures for label in picture], dtype=np.int64)
    boxes = len(labels)
    return Dataset(
        split="train",
        layout="coco",
        evidence="",
        files=tuple(files),
        ids=np.arange(len(pictures)),
        sizes=np.full((len(pictures), 2), 40, dtype=np.int32),
        starts=np.cumsum([0, *map(len, pictures)]).astype(np.int64),
        labels=labels,
        boxes=np.tile(np.array([5, 5, 20, 20], dtype=np.float32), (boxes, 1)),
        crowd=np.isin(np.arange(boxes), crowd),
        area=np.full(boxes, 225, dtype=np.float32),
        annotation_ids=np.arange(boxes),
        categories=Categories((1, 2, 3), ("hen", "egg", "fox")),
        notes=(),
    )


def loader(dataset: Dataset, **changes: Any) -> TrainingLoader:
    settings: dict[str, Any] = {"size": (32, 32), "batch": 2, "workers": 0, "seed": 3, "balance": 0.5} | changes
    return TrainingLoader(dataset, Augmentation(), Windows(0, 0, 9), **settings)


@pytest.fixture
def rare(tmp_path: Path) -> Dataset:
    """Eight pictures with hens, one of them with an egg as well, and one without anything."""
    return data(tmp_path, *[(0,)] * 7, (0, 0, 1), ())


def test_factors_are_the_published_ones(tmp_path: Path, rare: Dataset) -> None:
    share = 1 / 9  # of pictures with an egg; 8 / 9 have hens
    expected = [1.0] * 7 + [np.sqrt(0.5 / share), 1.0]
    assert repeat_factors(rare, 0.5) == pytest.approx(expected)
    assert repeat_factors(rare, share) == pytest.approx([1.0] * 9)
    assert repeat_factors(rare, 0.0) == pytest.approx([1.0] * 9)
    assert repeat_factors(rare, 1.0)[0] == pytest.approx(np.sqrt(9 / 8))


def test_boxes_of_one_picture_count_once_and_crowds_not_at_all(tmp_path: Path) -> None:
    many = data(tmp_path, (0, 0, 0, 0), (1,), (1, 2), crowd=(6,))
    assert repeat_factors(many, 0.6) == pytest.approx([np.sqrt(0.6 * 3), 1.0, 1.0])


def test_each_picture_comes_as_often_as_its_factor_says_and_epochs_are_long_enough() -> None:
    factors = np.array([1.0, 2.3, 1.0, 1.7, 3.0, 1.25])
    total = np.zeros(len(factors))
    for epoch in range(2000):
        drawn = draw_epoch(np.random.default_rng((0, epoch)), factors)
        counts = np.bincount(drawn, minlength=len(factors))
        assert (counts >= np.floor(factors)).all()
        assert (counts <= np.ceil(factors)).all()
        assert len(drawn) in (10, 11)  # the factors' sum is 10.25
        total += counts
    assert total / 2000 == pytest.approx(factors, abs=0.04)


def test_no_epoch_is_too_short_for_its_steps() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        factors = np.sqrt(rng.uniform(1, 30, size=int(rng.integers(1, 400))))
        assert len(draw_epoch(rng, factors)) >= int(factors.sum())


def same(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.targets.boxes, b.targets.boxes) and a.names == b.names


def test_batches_depend_neither_on_workers_nor_on_where_an_epoch_was_resumed(rare: Dataset) -> None:
    alone, helped = loader(rare), loader(rare, workers=2)
    try:
        assert alone.steps == int(8 + np.sqrt(4.5)) // 2 == 5
        for epoch in (0, 1):
            whole = list(alone.epoch(epoch))
            assert all(same(a, b) for a, b in zip(whole, helped.epoch(epoch), strict=True))
            assert all(same(a, b) for a, b in zip(whole[3:], helped.epoch(epoch, first_step=3), strict=True))
    finally:
        helped.close()


def test_ranks_share_the_batches_of_one_process(rare: Dataset) -> None:
    whole = [batch.names for batch in loader(rare, batch=4).epoch(0)]
    parts = [[batch.names for batch in loader(rare, rank=rank, world=2).epoch(0)] for rank in (0, 1)]
    assert whole == [a + b for a, b in zip(*parts, strict=True)]


def test_the_rare_picture_comes_more_often_and_a_small_set_fills_a_batch(rare: Dataset) -> None:
    def share(balance: float) -> float:
        names = [
            name for epoch in range(40) for batch in loader(rare, balance=balance).epoch(epoch) for name in batch.names
        ]
        return names.count(rare.files[7]) / len(names)

    assert share(0.0) == pytest.approx(1 / 9, abs=0.03)
    assert share(0.5) == pytest.approx(np.sqrt(4.5) / (8 + np.sqrt(4.5)), abs=0.03)
    big = list(loader(rare, batch=32).epoch(0))
    assert [len(batch.names) for batch in big] == [32]
