"""The static checks find what was seeded, and nothing in a healthy set."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finedetr.cli import main
from finedetr.data.dataset import Categories, Dataset
from finedetr.data.doctor import check
from finedetr.data.formats import open_dataset
from tests.data.test_formats import picture, write
from tests.data.test_geometry import painted


def splits(folder: Path) -> tuple[Dataset, Dataset]:
    made = []
    for split, sizes in (("train", [(300, 240), (280, 260), (320, 200)]), ("val", [(310, 250), (200, 200)])):
        (folder / split).mkdir()
        made.append(replace(painted(folder / split, sizes, each=2), split=split))
    return made[0], made[1]


def found(*datasets: Dataset, **options: object) -> dict[str, tuple[str, int]]:
    report = check(*datasets, **options)  # type: ignore[arg-type]
    return {note.code: (note.level, note.count) for note in report.notes}


def test_a_healthy_set_has_no_notes(tmp_path: Path) -> None:
    train, val = splits(tmp_path)
    report = check(train, val)
    assert report.notes == ()
    assert report.facts[0].pictures == 3
    assert report.facts[0].boxes == 6
    assert report.facts[0].per_class == (1,) * 6
    json.dumps(report.to_json())


def test_a_leak_is_found_by_bytes_and_is_an_error_when_strict(tmp_path: Path) -> None:
    train, val = splits(tmp_path)
    shutil.copy(train.files[1], val.files[0])
    assert found(train, val) == {"data.leak": ("warn", 1)}
    assert found(train, val, strict=True) == {"data.leak": ("error", 1)}
    assert found(train, val, bytes_too=False) == {}


def test_a_union_of_splits_leaks_nothing_but_a_split_of_its_own_does(tmp_path: Path) -> None:
    train, val = splits(tmp_path)
    union = replace(train.subset([0, 1]), split="trainval")
    assert found(train, val, union, strict=True) == {}
    stranger = tmp_path / "copy.jpg"
    shutil.copy(train.files[0], stranger)
    minival = replace(train.subset([0]), split="minival", files=(str(stranger),))
    assert found(train, val, union, minival, strict=True) == {"data.leak": ("error", 1)}


def test_a_picture_that_is_cut_off_is_found_by_decoding_it(tmp_path: Path) -> None:
    train, val = splits(tmp_path)
    file = Path(train.files[1])
    file.write_bytes(file.read_bytes()[:-400])
    assert found(train, val) == {"data.corrupt_image": ("warn", 1)}
    assert found(train, val, bytes_too=False) == {}


def test_repeated_pictures_within_a_split(tmp_path: Path) -> None:
    train, val = splits(tmp_path)
    shutil.copy(train.files[0], train.files[2])
    assert found(train, val) == {"data.duplicate_image": ("warn", 1)}


def test_a_split_without_boxes_is_an_error(tmp_path: Path) -> None:
    train, val = splits(tmp_path)
    val.crowd[:] = True
    report = check(train, val)
    assert [note.code for note in report.errors] == ["data.empty_split"]
    assert report.notes[0].level == "error"


def test_backgrounds_dense_and_tiny(tmp_path: Path) -> None:
    train, val = splits(tmp_path)
    assert found(train, val, queries=1)["data.dense"] == ("info", 2)
    assert found(train, val, size=(32, 32))["data.tiny"][0] == "warn"
    lonely = train.subset([0] * 1 + [1] * 19)
    kept = replace(lonely, crowd=np.arange(len(lonely.crowd)) >= 2)
    assert found(kept, bytes_too=False)["data.all_background"] == ("warn", 19)


def test_classes_that_differ_between_splits_are_compared(tmp_path: Path) -> None:
    train, val = splits(tmp_path)
    other = replace(val, categories=Categories(val.categories.ids, ("R", *val.categories.names[1:])))
    (note,) = check(train, other).errors
    assert note.code == "data.class_names"
    assert 'train has "r", val has "R"' in note.message


def test_real_sets(real_data: Path) -> None:
    bccd = [open_dataset(real_data / "bccd", split) for split in ("train", "val")]
    report = check(*bccd)
    assert not report.errors
    assert "data.degenerate" in {note.code for note in report.notes}
    assert sum(f.boxes for f in report.facts) == 2804 + 1137


def test_the_command_gives_the_whole_report_whatever_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "val"):
        picture(tmp_path / "images" / split / "a.jpg")
        write(tmp_path / "labels" / split / "a.txt", "0 0.5 0.5 0.4 0.4\n")
    write(tmp_path / "data.yaml", "train: images/train\nval: images/val\nnames: {3: hen, 0: egg}\n")
    assert main(["data", "check", str(tmp_path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)["result"]
    assert report["classes"] == [{"id": 0, "index": 0, "name": "egg"}, {"id": 3, "index": 1, "name": "hen"}]
    assert "data.yaml has names" in report["evidence"]
    write(tmp_path / "labels" / "val" / "a.txt", "")
    assert main(["data", "check", str(tmp_path), "--json", "--deep", "--strict"]) == 3
    error = json.loads(capsys.readouterr().out)["error"]
    assert error["message"].endswith("(and 1 more)")
    assert [n["code"] for n in error["report"]["notes"] if n["level"] == "error"] == ["data.empty_split", "data.leak"]
    assert [split["boxes"] for split in error["report"]["splits"]] == [1, 0]
