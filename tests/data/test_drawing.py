"""Drawn sets: the same seed gives the same files, boxes are tight around what can be seen, the layout is COCO's."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from finedetr.data import drawing
from finedetr.data.drawing import CATEGORY_IDS, SHAPES, draw_dataset, draw_picture
from finedetr.errors import UsageError


def digest(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


def test_the_same_seed_gives_the_same_bytes_and_another_seed_other_pictures(tmp_path: Path) -> None:
    one = digest(draw_dataset(tmp_path / "one", train=3, val=2, size=(64, 80), seed=4))
    same = digest(draw_dataset(tmp_path / "same", train=3, val=2, size=(64, 80), seed=4))
    other = digest(draw_dataset(tmp_path / "other", train=3, val=2, size=(64, 80), seed=5))
    assert one == same
    assert len(one) == 7
    assert all(one[name] != other[name] for name in one)


def test_pixels_are_the_ones_recorded_on_another_machine() -> None:
    image = np.concatenate([draw_picture(np.random.default_rng([7, 0, i]), (96, 96)).image for i in range(8)])
    assert hashlib.sha256(image.tobytes()).hexdigest()[:16] == "bc3d7ae5e26ff32e"


def test_a_longer_set_begins_with_the_shorter_one_and_val_differs_from_train(tmp_path: Path) -> None:
    short = digest(draw_dataset(tmp_path / "short", train=2, val=1, size=(64, 64)))
    long = digest(draw_dataset(tmp_path / "long", train=4, val=3, size=(64, 64)))
    for name in ("train/000001.jpg", "train/000002.jpg", "val/000001.jpg"):
        assert short[name] == long[name]
    assert short["train/000001.jpg"] != short["val/000001.jpg"]


def test_the_annotation_file_is_what_coco_writes(tmp_path: Path) -> None:
    draw_dataset(tmp_path, train=6, val=0, size=(64, 96), classes=4)
    document = json.loads((tmp_path / "annotations" / "instances_train.json").read_text())
    assert [image["id"] for image in document["images"]] == [1, 2, 3, 4, 5, 6]
    assert [c["id"] for c in document["categories"]] == [1, 2, 3, 5]
    assert [c["name"] for c in document["categories"]] == ["disc", "square", "triangle", "star"]
    assert [a["id"] for a in document["annotations"]] == list(range(1, len(document["annotations"]) + 1))
    for row in document["annotations"]:
        x, y, width, height = row["bbox"]
        assert min(x, y) >= 0
        assert x + width <= 96.001
        assert y + height <= 64.001
        assert 0 < row["area"] <= width * height + 0.01
        assert row["iscrowd"] == 0
        assert row["category_id"] in (1, 2, 3, 5)
    for image in document["images"]:
        with Image.open(tmp_path / "train" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"]) == (96, 64)
    assert json.loads((tmp_path / "annotations" / "instances_val.json").read_text())["images"] == []


def test_category_ids_have_gaps() -> None:
    assert len(CATEGORY_IDS) == len(SHAPES)
    assert max(CATEGORY_IDS) > len(CATEGORY_IDS)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_fit_the_unit_circle_and_know_their_area(name: str) -> None:
    line = np.linspace(-1, 1, 801, dtype=np.float32)
    u, v = np.meshgrid(line, line)
    inside = SHAPES[name].inside(u, v)
    assert not (inside & (u * u + v * v > 1.001)).any()
    assert inside.mean() * 4 == pytest.approx(SHAPES[name].area, rel=0.01)


def test_boxes_are_tight_around_the_visible_part(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = []
    keep = drawing._truth

    def spy(scene: drawing._Scene, image: np.ndarray) -> drawing.Drawing:
        scenes.append(scene)
        return keep(scene, image)

    monkeypatch.setattr(drawing, "_truth", spy)
    hidden = 0
    for i in range(30):
        drawn = draw_picture(np.random.default_rng([1, i]), (96, 128))
        owner = scenes[-1].owner
        assert set(np.unique(owner)) <= set(range(len(drawn.labels) + 1))
        for index, (box, area) in enumerate(zip(drawn.boxes, drawn.areas, strict=True)):
            rows, columns = np.nonzero(owner == index + 1)
            expected = np.array([columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]) / 3
            np.testing.assert_allclose(box, expected, rtol=1e-6)
            assert area == pytest.approx(len(rows) / 9, rel=1e-6)
            visible = len(rows) / scenes[-1].whole[index]
            assert visible > 0.34
            hidden += visible < 0.9
    assert hidden > 5  # shapes do hide one another


def test_every_class_small_shapes_and_full_pictures_occur() -> None:
    drawn = [draw_picture(np.random.default_rng([2, i])) for i in range(60)]
    counts = [len(d.labels) for d in drawn]
    assert min(counts) >= 1
    assert 7 <= max(counts) <= 10
    assert set(np.concatenate([d.labels for d in drawn]).tolist()) == set(range(6))
    boxes = np.concatenate([d.boxes for d in drawn])
    assert (boxes[:, 2:] - boxes[:, :2]).prod(1).min() < 16**2


def test_a_class_has_no_color_of_its_own() -> None:
    """The mean color under the shapes of each class spreads over the cube."""
    found: dict[int, list[np.ndarray]] = {}
    for i in range(80):
        d = draw_picture(np.random.default_rng([3, i]))
        for label, box in zip(d.labels.tolist(), d.boxes.round().astype(int), strict=True):
            left, top, right, bottom = box
            found.setdefault(label, []).append(d.image[top:bottom, left:right].mean(axis=(0, 1)))
    for colors in found.values():
        assert np.std(colors, axis=0).min() > 25


def test_pictures_are_jpegs_that_keep_their_color_edges(tmp_path: Path) -> None:
    draw_dataset(tmp_path, train=1, val=0, size=(64, 64))
    data = (tmp_path / "train" / "000001.jpg").read_bytes()
    with Image.open(io.BytesIO(data)) as picture:
        assert picture.format == "JPEG"
        decoded = np.asarray(picture).astype(int)
    original = draw_picture(np.random.default_rng([0, 0, 0]), (64, 64)).image.astype(int)
    assert np.abs(decoded - original).mean() < 5


def test_numbers_that_cannot_be_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="classes is 1 to 6"):
        draw_dataset(tmp_path, classes=7)
    with pytest.raises(UsageError, match="at least 32"):
        draw_dataset(tmp_path, size=(16, 64))
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        draw_dataset(tmp_path)


def test_drawing_again_into_the_same_folder_leaves_no_stale_pictures(tmp_path: Path) -> None:
    draw_dataset(tmp_path, train=3, val=1, size=(64, 64))
    draw_dataset(tmp_path, train=1, val=1, size=(64, 64))
    assert [p.name for p in (tmp_path / "train").iterdir()] == ["000001.jpg"]
