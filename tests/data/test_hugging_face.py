"""Data sets of Hugging Face's library become files: with a stand-in for the library, which tests do not install."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from finedetr.cli import main
from finedetr.data.formats import list_splits, open_dataset
from tests.data.test_formats import write


class ClassLabel:
    names = ("cat", "dog")


class Column:
    """`Sequence` or `List`: what it wraps is its `feature`."""

    def __init__(self, feature: Any) -> None:
        self.feature = feature


class Rows:
    """A table as the library gives it."""

    def __init__(self, features: dict[str, Any], rows: list[dict[str, Any]]) -> None:
        self.features, self.rows = features, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.rows)

    def __getitem__(self, column: str) -> list[Any]:
        return [row[column] for row in self.rows]

    def cast_column(self, name: str, feature: Any) -> Rows:
        assert (name, feature) == ("image", "undecoded")
        return self


def encoded(kind: str = "JPEG") -> dict[str, Any]:
    stream = BytesIO()
    Image.new("RGB", (100, 80), (9, 8, 7)).save(stream, kind)
    return {"bytes": stream.getvalue(), "path": None}


def columns(boxes: list[list[float]], categories: list[Any]) -> dict[str, Any]:
    return {"bbox": boxes, "category": categories, "is_crowd": [False] * len(boxes), "area": [9] * len(boxes)}


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    fake = types.ModuleType("datasets")
    fake.Image = lambda decode: "undecoded"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_tables_become_coco_with_the_names_of_their_class_label(
    library: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = {"image_id": 1, "image": 1, "objects": {"bbox": Column(1), "category": Column(ClassLabel())}}
    one = {"image_id": 7, "image": encoded(), "objects": columns([[1, 2, 30, 40.5]], [1])}
    two = {"image_id": 5, "image": encoded("PNG"), "objects": columns([], [])}
    library.load_from_disk = lambda folder: {"train": Rows(features, [one, two]), "validation": Rows(features, [one])}
    saved = tmp_path / "saved"
    write(saved / "dataset_dict.json", {"splits": ["train", "validation"]})
    assert main(["data", "check", str(saved)]) == 3
    assert "finedetr data convert" in capsys.readouterr().err
    assert main(["data", "convert", str(saved), str(tmp_path / "out"), "--to", "coco"]) == 0
    assert list_splits(tmp_path / "out") == ("train", "val")
    data = open_dataset(tmp_path / "out", "train")
    assert data.ids.tolist() == [7, 5]
    assert data.categories.names == ("cat", "dog")
    assert data.labels.tolist() == [1]
    assert data.boxes.tolist() == [[1, 2, 31, 42.5]]
    assert data.area.tolist() == [9]
    assert [Path(file).suffix for file in data.files] == [".jpeg", ".png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "saved"], "what was unpacked on the way is gone"


def test_words_as_categories_and_objects_as_a_list(
    library: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, Any]] = []
    objects = [{"bbox": [1, 2, 3, 4], "label": "emu"}, {"bbox": [5, 6, 7, 8], "label": "ant"}]
    rows = Rows({"image": 1, "objects": Column({"bbox": 1, "label": 1})}, [{"image": encoded(), "objects": objects}])

    def load_dataset(name: str, revision: str | None) -> dict[str, Rows]:
        asked.append((name, revision))
        return {"train": rows}

    library.load_dataset = load_dataset
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert main(["data", "convert", "hf://owner/birds@v2", ".", "--to", "yolo"]) == 0
    assert asked == [("owner/birds", "v2")]
    data = open_dataset(tmp_path / "out")
    assert [data.categories.names[label] for label in data.labels] == ["emu", "ant"]


@pytest.mark.parametrize(
    ("features", "row", "status", "message"),
    [
        ({"image": 1, "label": 1}, {}, 3, "wanted the features image and objects; got image, label"),
        ({"image": 1, "objects": {}}, {"bbox": [[1, 2, 3]], "category": [0]}, 3, "row 0: wanted bbox as four numbers"),
        ({"image": 1, "objects": {}}, {"bbox": [], "category": [0]}, 3, "different lengths"),
        (
            {"image": 1, "objects": {"category": ClassLabel()}},
            {"bbox": [[1, 2, 3, 4]], "category": [2]},
            3,
            "category 2 has no name (0..1)",
        ),
    ],
)
def test_other_features_are_one_clear_message(
    library: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    features: dict[str, Any],
    row: dict[str, Any],
    status: int,
    message: str,
) -> None:
    library.load_dataset = lambda name, revision: Rows(features, [{"image": encoded(), "objects": row}])
    assert main(["data", "convert", "hf://owner/birds", str(tmp_path / "out"), "--to", "yolo"]) == status
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_without_the_library_and_without_a_network_the_message_says_so(
    library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def load_dataset(name: str, revision: str | None) -> None:
        raise ConnectionError("no route")

    library.load_dataset = load_dataset
    words = ["data", "convert", "hf://owner/birds", str(tmp_path / "out"), "--to", "yolo"]
    assert main(words) == 1
    assert "run.download: hf://owner/birds: cannot be loaded (ConnectionError: no route)" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert main(words) == 2
    assert 'pip install "finedetr[hf]"' in capsys.readouterr().err
