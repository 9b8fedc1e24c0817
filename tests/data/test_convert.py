"""A data set in another layout says the same again; what the layout cannot hold is counted; nothing is overwritten."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finedetr.cli import main
from finedetr.data.convert import convert, deal
from finedetr.data.dataset import Dataset
from finedetr.data.formats import list_splits, open_dataset
from finedetr.errors import DataError, RunError, UsageError
from tests.data.test_formats import picture, write


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Two splits in COCO: a crowd, an outline's area, a fraction, a background, ids with gaps, equal stems."""
    root = tmp_path / "source"
    categories = [{"id": 18, "name": "dog, wet"}, {"id": 5, "name": "Fluß <&>"}]
    for split, base in (("train", 7), ("val", 100)):
        names = ["a b.jpg", "a b.png", "ü.jpg"]
        for name in names:
            picture(root / split / name, 100, 80, orientation=6 if name == "ü.jpg" else 1)
        sizes = [(100, 80), (100, 80), (80, 100)]
        images = [
            {"id": base + i, "file_name": n, "width": w, "height": h}
            for i, (n, (w, h)) in enumerate(zip(names, sizes, strict=True))
        ]
        boxes = [
            (base, 18, [10.25, 20.5, 30.125, 40], 900, 0),
            (base, 5, [0, 0, 100, 80], 8000, 1),
            (base + 2, 5, [3, 4, 50, 60], 3000, 0),
            (base + 2, 18, [70, 90, 0.5, 10], 5, 0),
        ]
        annotations = [
            {"id": 11 + i, "image_id": image, "category_id": category, "bbox": box, "area": area, "iscrowd": crowd}
            for i, (image, category, box, area, crowd) in enumerate(boxes)
        ]
        content = {"images": images, "annotations": annotations, "categories": categories}
        write(root / "annotations" / f"instances_{split}.json", json.dumps(content))
    return root


def splits(root: Path) -> list[Dataset]:
    return [open_dataset(root, split) for split in list_splits(root)]


def by_picture(data: Dataset, *, crowd: bool = True) -> dict[str, list[tuple[str, bool, list[float]]]]:
    """Stem -> sorted boxes, with their class names."""
    found: dict[str, list[tuple[str, bool, list[float]]]] = {}
    for index, file in enumerate(data.files):
        rows = range(*data.rows(index).indices(len(data.labels)))
        found[Path(file).name] = sorted(
            (data.categories.names[data.labels[r]], bool(data.crowd[r]), data.boxes[r].round(2).tolist())
            for r in rows
            if crowd or not data.crowd[r]
        )
    return found


@pytest.mark.parametrize("to", ["coco", "yolo", "voc", "csv"])
def test_there_and_back_gives_the_same_boxes(source: Path, tmp_path: Path, to: str) -> None:
    before = splits(source)
    lost = convert(before, tmp_path / to, to)
    notes = {note.code: note.count for note in lost}
    middle = splits(tmp_path / to)
    assert [data.layout for data in middle] == [to, to]
    convert(middle, tmp_path / "back", "coco")
    after = splits(tmp_path / "back")
    assert [data.split for data in after] == ["train", "val"]
    for old, new in zip(before, after, strict=True):
        there, here = by_picture(old, crowd=to != "yolo"), by_picture(new)
        assert [len(boxes) for boxes in there.values()] == [1, 0, 2] if to == "yolo" else [2, 0, 2]
        if to == "voc":  # a box of half a pixel is told as lost
            there = {name: [box for box in boxes if box[2] != [70, 90, 70.5, 100]] for name, boxes in there.items()}
        assert sorted(here.values()) == sorted(there.values())
        if to in ("coco", "csv"):
            assert here == there
    if to != "coco":
        why = "numbers classes from 0" if to == "yolo" else "numbers classes in the order of their names"
        assert any(note.message == f"category ids 5, 18 are lost: {to} {why}" for note in lost)
    expected = {
        "coco": {},
        "yolo": {"data.crowd": 2, "data.class_gap": 2, "data.area": 2, "data.renamed": 2},
        "voc": {"data.class_gap": 2, "data.area": 2, "data.degenerate": 2, "data.renamed": 4},
        "csv": {"data.class_gap": 2, "data.area": 2},
    }
    assert notes == expected[to]


def test_coco_keeps_ids_crowd_and_areas(source: Path, tmp_path: Path) -> None:
    before = splits(source)
    convert(before, tmp_path / "out", "coco", link=True)
    for old, new in zip(before, splits(tmp_path / "out"), strict=True):
        for name in ("ids", "labels", "boxes", "crowd", "area", "annotation_ids", "sizes", "starts"):
            np.testing.assert_array_equal(getattr(old, name), getattr(new, name), err_msg=name)
        assert new.categories == old.categories
        assert all(Path(file).is_symlink() for file in new.files)


def test_nothing_is_overwritten_and_nothing_is_left_half_done(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = splits(source)
    write(tmp_path / "full" / "mine.txt", "mine")
    for place in (tmp_path / "full", tmp_path / "full" / "mine.txt"):
        with pytest.raises(UsageError) as caught:
            convert(data, place, "yolo")
        assert caught.value.code == "use.exists"
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    monkeypatch.setattr("finedetr.data.convert.write_yaml", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        convert(data, tmp_path / "new", "yolo")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "source"]


def test_one_split_is_dealt_the_same_way_for_a_seed(source: Path) -> None:
    data = splits(source)[0]
    train, val = deal(data, (0.67, 0.33), seed=1)
    again, _ = deal(data, (0.67, 0.33), seed=1)
    assert (train.split, val.split) == ("train", "val")
    assert train.files == again.files
    assert sorted(train.files + val.files) == sorted(data.files)
    assert len(train.labels) + len(val.labels) == len(data.labels)
    with pytest.raises(DataError, match="too few"):
        deal(data, (0.99, 0.01))
    for shares in ((0.5, 0.2), (1.0,), (1.5, -0.5)):
        with pytest.raises(UsageError, match="add up to 1"):
            deal(data, shares)


def test_a_union_of_splits_is_not_written_twice_and_a_lone_split_is_trained_on(source: Path, tmp_path: Path) -> None:
    data = splits(source)
    convert(data, tmp_path / "voc", "voc")
    lists = tmp_path / "voc" / "ImageSets" / "Main"
    write(lists / "trainval.txt", "".join((lists / f"{s}.txt").read_text() for s in ("train", "val")))
    notes = convert(splits(tmp_path / "voc"), tmp_path / "yolo", "yolo")
    assert [n.message for n in notes if n.code == "data.split"] == [
        "trainval is left out: its 6 pictures stand in train, val"
    ]
    lone = open_dataset(tmp_path / "voc", "trainval")
    convert([lone], tmp_path / "lone", "yolo")
    assert list_splits(tmp_path / "lone") == ("train",)


def test_the_command_converts_says_what_is_lost_and_refuses_what_cannot_be(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["data", "convert", str(source), out, "--to", "yolo"]) == 0
    said = capsys.readouterr()
    assert said.out == f"train: 3 pictures, 3 boxes\nval: 3 pictures, 3 boxes\nyolo: {out}\n"
    assert "warn: data.crowd: 2 crowd or difficult boxes are left out" in said.err
    assert main(["data", "convert", str(source), out, "--to", "yolo"]) == 2
    assert "use.exists" in capsys.readouterr().err
    assert main(["data", "convert", str(source), f"{out}2", "--to", "yolo", "--split", "0.5/0.5"]) == 2
    assert "deals the pictures of one split" in capsys.readouterr().err
    one = str(source / "annotations" / "instances_train.json")
    assert main(["data", "convert", one, f"{out}2", "--to", "csv", "--split", "0.6/0.4", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)["result"]["splits"]
    assert {name: split["pictures"] for name, split in counts.items()} == {"train": 2, "val": 1}
    assert main(["data", "convert", one, f"{out}3", "--to", "csv", "--split", "a"]) == 2
    assert main(["data", "convert", one, f"{out}3", "--to", "tfrecord"]) == 2
    assert "Traceback" not in capsys.readouterr().err


LABELS: dict[str, list[dict[str, Any]]] = {
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 5, 30, 30]}],
    "categories": [{"id": 1, "name": "a"}],
}


def shared(root: Path, *entries: tuple[str, int, list[int]]) -> Path:
    """One picture, listed with one box for each (split, class, box)."""
    picture(root / "images" / "p.png")
    for split in dict.fromkeys(split for split, _, _ in entries):
        own = [(label, box) for name, label, box in entries if name == split]
        content = {
            "images": [{"id": i, "file_name": "p.png"} for i in range(len(own))],
            "annotations": [
                {"id": i, "image_id": i, "category_id": label, "bbox": box} for i, (label, box) in enumerate(own)
            ],
            "categories": [{"id": 0, "name": "a"}, {"id": 1, "name": "b"}],
        }
        write(root / "annotations" / f"instances_{split}.json", json.dumps(content))
    return root


@pytest.mark.parametrize("to", ["coco", "yolo", "voc", "csv"])
def test_a_picture_under_two_ids_keeps_the_boxes_of_both(tmp_path: Path, to: str) -> None:
    source = shared(tmp_path / "source", ("train", 0, [5, 5, 30, 30]), ("train", 1, [40, 20, 30, 30]))
    (data,) = splits(source)
    assert [note.message for note in data.notes if note.code == "data.duplicate_image"] == [
        f"1 pictures of train are listed more than once: {data.files[0]}"
    ]
    told = {note.code: note.count for note in convert([data], tmp_path / to, to)}
    (after,) = splits(tmp_path / to)
    assert after.labels.tolist() == [0, 1]
    assert np.allclose(after.boxes, data.boxes, atol=1e-4)
    assert len(after) == (2 if to == "coco" else 1)
    assert told.get("data.duplicate_image") == (1 if to in ("yolo", "voc") else None)


def test_a_picture_with_other_boxes_in_another_split_gets_a_name_of_its_own_in_voc(tmp_path: Path) -> None:
    same = [("trainval", 0, [5, 5, 30, 30]), ("train", 0, [5, 5, 30, 30])]
    source = shared(tmp_path / "source", *same, ("val", 1, [40, 20, 30, 30]))
    notes = convert(splits(source), tmp_path / "voc", "voc")
    assert [note.count for note in notes if note.code == "data.renamed"] == [1]
    found = {data.split: by_picture(data) for data in splits(tmp_path / "voc")}
    first, other = ("a", False, [5.0, 5.0, 35.0, 35.0]), ("b", False, [40.0, 20.0, 70.0, 50.0])
    assert found == {"train": {"p.png": [first]}, "trainval": {"p.png": [first]}, "val": {"p-2.png": [other]}}


@pytest.mark.parametrize("to", ["coco", "yolo", "voc", "csv"])
def test_names_with_backslashes_are_read_and_written_so_that_they_can_be_read(tmp_path: Path, to: str) -> None:
    picture(tmp_path / "images" / "a\\b.png")
    write(tmp_path / "train.json", json.dumps({"images": [{"id": 1, "file_name": "a\\b.png"}], **LABELS}))
    convert(splits(tmp_path / "train.json"), tmp_path / to, to)
    (data,) = splits(tmp_path / to)
    assert [Path(file).name for file in data.files] == ["a_b.png"]


@pytest.mark.parametrize("to", ["coco", "voc", "csv"])
def test_a_split_may_be_called_by_a_number(tmp_path: Path, to: str) -> None:
    picture(tmp_path / "images" / "p.png")
    source = write(tmp_path / "2017.json", json.dumps({"images": [{"id": 1, "file_name": "p.png"}], **LABELS}))
    convert(splits(source), tmp_path / to, to)
    assert list_splits(tmp_path / to) == ("2017",)


def test_an_empty_folder_is_filled_even_where_one_stands_in_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert main(["data", "convert", str(source), ".", "--to", "yolo"]) == 0
    assert sorted(path.name for path in Path().iterdir()) == ["data.yaml", "images", "labels"]


def test_a_full_disk_names_the_target(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: str, target: Path) -> None:
        raise OSError(28, "No space left on device", file, None, str(target))

    monkeypatch.setattr("shutil.copyfile", full)
    for place in ("new", "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(RunError, match=f"{place} cannot be written .*No space left"):
            convert(splits(source), tmp_path / place, "coco")
    assert not list((tmp_path / "empty").iterdir())


def test_what_is_not_read_is_told_where_it_is_lost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture(tmp_path / "images" / "p.png")
    row = LABELS["annotations"][0] | {"segmentation": [[1, 2, 3, 4, 5, 6]]}
    content = {"images": [{"id": 1, "file_name": "p.png"}], **LABELS, "annotations": [row]}
    source = write(tmp_path / "train.json", json.dumps(content))
    assert main(["data", "convert", str(source), str(tmp_path / "out"), "--to", "coco"]) == 0
    assert "data.left_out: annotations say more than is read: segmentation of 1" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["voc", "csv"])
def test_names_that_differ_in_spaces_become_one_and_are_told(tmp_path: Path, to: str) -> None:
    picture(tmp_path / "images" / "p.png")
    names = [{"id": 1, "name": "car"}, {"id": 2, "name": "car "}]
    content = {"images": [{"id": 1, "file_name": "p.png"}], **LABELS, "categories": names}
    notes = convert(splits(write(tmp_path / "train.json", json.dumps(content))), tmp_path / to, to)
    assert [note.message for note in notes if note.code == "data.class_names"] == [
        "1 names stand for several classes, which become one: car"
    ]
