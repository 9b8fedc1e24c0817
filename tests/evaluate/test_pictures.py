"""Sheets: truth and detections stand where they belong, odd pictures do not stop a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finedetr.data.dataset import Dataset
from finedetr.detections import class_color
from finedetr.errors import RunError, UsageError
from finedetr.evaluate.coco import Evaluator
from finedetr.evaluate.pictures import TRUTH, batch_sheet, is_ours, prediction_sheet, save_picture
from finedetr.records import Targets
from tests.evaluate.cases import make_dataset, solid_pictures


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return solid_pictures(tmp_path)


def pixels_of(image: Image.Image, color: tuple[int, int, int]) -> np.ndarray:
    """Rows and columns in which a color stands."""
    return np.argwhere((np.asarray(image) == color).all(axis=2))


def test_truth_stands_left_and_detections_right_over_the_dashed_truth(tmp_path: Path) -> None:
    Image.new("RGB", (100, 100), (40, 40, 40)).save(tmp_path / "a.png")
    dataset = make_dataset(
        [(100, 100)], [[[10, 20, 50, 60]]], [[1]], names=("a", "b", "c"), files=[str(tmp_path / "a.png")]
    )
    evaluator = Evaluator(dataset)
    evaluator.add(0, [[60, 60, 90, 95], [0, 0, 5, 5]], [0.9, 0.1], [2, 0])
    sheet = prediction_sheet(dataset, evaluator, tile=200)
    truth, dashes, found = (pixels_of(sheet, color) for color in (class_color(1), TRUTH, class_color(2)))
    assert truth[:, 1].max() < 8 + 200
    assert dashes[:, 1].min() >= 8 + 204 + 20
    assert found[:, 1].min() >= 8 + 204 + 100
    assert found[:, 0].max() == pytest.approx(34 + 190, abs=3)
    assert len(pixels_of(sheet, class_color(0))) == 0  # below the threshold


def test_the_pictures_are_spread_and_always_the_same(dataset: Dataset) -> None:
    sheets = [prediction_sheet(dataset, Evaluator(dataset), count=3, tile=64) for _ in range(2)]
    assert sheets[0].tobytes() == sheets[1].tobytes()
    assert prediction_sheet(dataset, Evaluator(dataset), [4, 0], tile=64).size[0] > 4 * 64
    assert prediction_sheet(dataset, Evaluator(dataset), count=100, tile=64).size[1] > 3 * 32


def test_a_file_that_has_gone_leaves_its_place_out(dataset: Dataset) -> None:
    for file in dataset.files:
        Path(file).unlink()
    assert prediction_sheet(dataset, Evaluator(dataset)).size[1] < 100


def test_a_batch_is_shown_with_its_boxes() -> None:
    images = torch.zeros(3, 3, 32, 64, dtype=torch.uint8)
    empty = torch.zeros(0, 4)
    boxes = torch.tensor([[0.25, 0.5, 0.25, 0.5]])
    targets = Targets.from_lists(
        [torch.tensor([0]), torch.zeros(0, dtype=torch.long), torch.tensor([1])], [boxes, empty, boxes]
    )
    sheet = batch_sheet(images, targets, ("a", "b"), titles=("x/one.jpg", "two.jpg", "three.jpg"), columns=3, tile=256)
    first, third = pixels_of(sheet, class_color(0)), pixels_of(sheet, class_color(1))
    assert first[:, 1].min() == pytest.approx(8 + 32, abs=2)
    assert third[:, 1].min() == pytest.approx(8 + 2 * 264 + 32, abs=2)
    assert third[:, 0].max() == pytest.approx(34 + 96, abs=2)
    none = batch_sheet(images[:0], Targets.from_lists([], []), ("a",))
    assert none.size[1] < 100
    with pytest.raises(UsageError, match="got 2 and 3"):
        batch_sheet(images[:2], targets, ("a", "b"))


def test_pictures_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20))
    for name in ("a.png", "b.JPG", "deep/c.jpeg"):
        with Image.open(save_picture(image, tmp_path / name)) as written:
            assert written.size == (20, 20)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "b.JPG", "deep"]
    with pytest.raises(UsageError, match=r"\.jpg or \.png"):
        save_picture(image, tmp_path / "a.tiff")
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        save_picture(image, tmp_path / "file" / "a.png")


def test_our_own_pictures_are_known_again(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 10))
    assert is_ours(save_picture(image, tmp_path / "a.jpg"))
    image.save(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").write_text("no picture")
    assert not any(is_ours(tmp_path / name) for name in ("b.jpg", "c.jpg", "absent.jpg"))
