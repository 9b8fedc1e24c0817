"""`finedetr eval`: thresholds belong to the weights that keep them; what cannot be is refused before the work."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from finedetr.cli import main
from finedetr.model.hub import OURS
from finedetr.model.weights import read_card
from tests.data.test_formats import picture, write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, a hen in each."""
    root = tmp_path_factory.mktemp("data")
    for name in "ab":
        picture(root / "images" / "val" / f"{name}.jpg")
        write(root / "labels" / "val" / f"{name}.txt", "0 0.5 0.5 0.4 0.4\n")
    write(root / "data.yaml", 'val: images/val\nnames: [hen, "egg, brown"]\n')
    return root


def words(weights: str | Path, data: Path, *more: str) -> list[str]:
    return ["eval", str(weights), "--data", str(data), "--device", "cpu", "--workers", "0", *more]


@pytest.mark.parametrize(
    "other", [("--queries", "5"), ("--size", "96"), ("--top", "3"), ("--max-detections", "7")], ids=lambda o: o[0]
)
def test_thresholds_are_kept_for_the_weights_as_they_are_only(
    other: tuple[str, str], weights: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = Path(weights).read_bytes()
    assert main(words(weights, data, "--thresholds", "f1", *other)) == 2
    assert f"{other[0]} would measure something else" in capsys.readouterr().err
    assert Path(weights).read_bytes() == before


def test_thresholds_are_never_written_into_the_cache_of_the_hub(
    weights: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(weights, tmp_path / OURS)
    monkeypatch.setattr("finedetr.train.folder.fetch", lambda name: tmp_path)
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / OURS).read_bytes()
    assert main(words("hf://me/mine", data, "--thresholds", "f1")) == 2
    assert "the Hub's cache" in capsys.readouterr().err
    assert (tmp_path / OURS).read_bytes() == before
    assert main(words("hf://me/mine", data)) == 0


def test_missing_pictures_are_left_out_when_asked(
    weights: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = Path(shutil.copytree(data, tmp_path / "data"))
    write(root / "list.txt", "images/val/a.jpg\nimages/val/absent.jpg\n")
    write(root / "data.yaml", 'val: list.txt\nnames: [hen, "egg, brown"]\n')
    assert main(words(weights, root, "--out", str(tmp_path))) == 3
    assert "data.missing_image" in capsys.readouterr().err
    assert main(words(weights, root, "--out", str(tmp_path), "--skip-missing")) == 0


def test_thresholds_change_nothing_but_the_card(weights: str, data: Path, tmp_path: Path) -> None:
    own = Path(shutil.copy(weights, tmp_path / "own.safetensors"))
    assert main(words(own, data, "--thresholds", "f1")) == 0
    assert len(read_card(own).thresholds or ()) == 2
    assert read_card(own).size == read_card(weights).size


@pytest.mark.parametrize(
    ("more", "status", "message"),
    [
        (("--costs", "5", "1"), 2, "use.conflict: --costs mean nothing without --thresholds cost"),
        (("--costs", "5", "1", "--thresholds", "f1"), 2, "use.conflict: --costs mean nothing"),
        (("--costs", "0", "0", "--thresholds", "cost"), 2, "use.range: costs are positive"),
        (("--out", "{file}/x"), 1, "run.io"),
    ],
)
def test_what_cannot_be_is_refused_before_the_work(
    more: tuple[str, ...],
    status: int,
    message: str,
    weights: str,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("finedetr.cli.eval.load_weights", lambda *_, **__: pytest.fail("the weights were read"))
    assert main(words(weights, data, *(word.replace("{file}", weights) for word in more))) == status
    assert message in capsys.readouterr().err
