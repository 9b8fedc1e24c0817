"""`finedetr predict`: labels for other tools, videos, tiles; sources are never written over."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import pytest
from PIL import Image

from finedetr.cli import main
from finedetr.data.formats import open_dataset
from finedetr.evaluate.video import VideoWriter
from tests.data.test_formats import write


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures ü"
    for name in ("a.jpg", "deep/a.png", "b.jpg"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (90, 70), (100, 90, 20)).save(folder / name)
    return folder


def words(weights: str, source: Path, out: Path, *more: str) -> list[str]:
    return ["predict", weights, str(source), "--out", str(out), "--device", "cpu", "--threshold", "0", *more]


def test_labels_for_other_tools_read_as_data_sets(weights: str, pictures: Path, tmp_path: Path) -> None:
    for kind, file in (("coco", "predictions.json"), ("csv", "predictions.csv")):
        out = tmp_path / kind
        assert main(words(weights, pictures, out, "--format", kind, "--no-draw")) == 0
        data = open_dataset(out / file)
        assert [Path(name).name for name in data.files] == ["a.jpg", "b.jpg", "a.png"]
        assert set(data.categories.names) <= {"hen", "egg, brown"}
        lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
        assert len(data.labels) == sum(len(line["detections"]) for line in lines)
        assert data.boxes[0].tolist() == pytest.approx(lines[0]["detections"][0]["xyxy"], abs=2e-3)
    assert open_dataset(tmp_path / "coco" / "predictions.json").categories.ids == (3, 9)
    shutil.copytree(pictures, tmp_path / "yolo" / "images")
    assert main(words(weights, pictures, tmp_path / "yolo", "--format", "yolo", "--no-draw")) == 0
    assert sorted(p.name for p in (tmp_path / "yolo" / "labels").iterdir()) == ["a-2.txt", "a.txt", "b.txt"]
    write(tmp_path / "yolo" / "data.yaml", "train: images\nnames: [hen, egg]\n")
    assert len(open_dataset(tmp_path / "yolo").labels)


def test_no_two_pictures_share_a_name(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a/x.jpg", "b/x.jpg", "c/x-2.jpg", "d/X.jpg"):
        (tmp_path / name).parent.mkdir()
        Image.new("RGB", (40, 30)).save(tmp_path / name)
    assert main(words(weights, tmp_path, tmp_path / "out", "--format", "yolo")) == 0
    stems = [Path(json.loads(line)["picture"]).stem for line in capsys.readouterr().out.splitlines()]
    assert stems == ["x", "x-2", "x-2-2", "X-3"]
    assert sorted(p.stem for p in (tmp_path / "out" / "labels").iterdir()) == sorted(stems)


@pytest.mark.parametrize(
    ("source", "out"),
    [
        ("", ""),
        ("a.jpg", "deep/.."),
        ("", "deep"),
        ("*/*.png", "deep"),
        ("**/*", "."),
        ("link/a.png", "deep"),
    ],
)
def test_sources_are_never_written_over(
    source: str, out: str, weights: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (pictures / "link").symlink_to(pictures / "deep")
    before = {file: file.read_bytes() for file in pictures.rglob("*.*")}
    assert main(words(weights, pictures / source, pictures / out)) == 2
    assert "use.conflict: --out" in capsys.readouterr().err
    assert {file: file.read_bytes() for file in pictures.rglob("*.*")} == before
    assert main(words(weights, pictures / source, pictures / out, "--no-draw")) == 0
    assert all(file.read_bytes() == content for file, content in before.items())


def test_labels_are_replaced_only_when_asked(
    weights: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = write(pictures / "labels" / "a.txt", "0 0.5 0.5 0.1 0.1\n")
    again = words(weights, pictures / "a.jpg", pictures, "--format", "yolo", "--no-draw")
    assert main(again) == 2
    assert f"use.exists: {mine} exists" in capsys.readouterr().err
    assert mine.read_text() == "0 0.5 0.5 0.1 0.1\n"
    assert main([*again, "--overwrite"]) == 0
    assert len(mine.read_text().splitlines()) > 1


@pytest.mark.parametrize(
    ("kind", "name"), [("coco", "predictions.json"), ("csv", "predictions.csv"), ("yolo", "classes.txt")]
)
def test_files_that_somebody_may_have_corrected_are_replaced_only_when_asked(
    kind: str, name: str, weights: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mine = write(tmp_path / "out" / name, "corrected")
    again = words(weights, pictures / "a.jpg", tmp_path / "out", "--no-draw", "--format", kind)
    assert main(again) == 2
    assert f"use.exists: {mine} exists" in capsys.readouterr().err
    assert mine.read_text() == "corrected"
    assert main([*again, "--overwrite"]) == 0
    assert mine.read_text() != "corrected"


def test_annotated_pictures_replace_only_those_of_an_earlier_predict(
    weights: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    for name in ("a.jpg", "b.jpg", "a.jpg"):
        assert main(words(weights, pictures / name, out)) == 0
    shutil.copy(pictures / "b.jpg", out / "b.jpg")
    before = (out / "b.jpg").read_bytes()
    assert main(words(weights, pictures, out)) == 2
    assert f"use.exists: {out / 'b.jpg'} exists" in capsys.readouterr().err
    assert (out / "b.jpg").read_bytes() == before
    assert main(words(weights, pictures, out, "--no-draw")) == 0
    assert main(words(weights, pictures, out, "--overwrite")) == 0
    assert (out / "b.jpg").read_bytes() != before


def test_what_was_found_before_an_error_is_kept(
    weights: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.png"
    cut.write_bytes((pictures / "deep" / "a.png").read_bytes()[:60])
    asked = ["predict", weights, *map(str, (pictures / "a.jpg", cut, pictures / "b.jpg")), "--device", "cpu"]
    for more in ([], ["--json"]):
        out = tmp_path / f"out{len(more)}"
        assert main([*asked, "--out", str(out), "--format", "yolo", *more]) == 3
        (line,) = (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
        assert json.loads(line)["path"] == str(pictures / "a.jpg")
        assert (out / "labels" / "a.txt").is_file()
    error = json.loads(capsys.readouterr().out.splitlines()[-1])["error"]
    assert error["code"] == "data.corrupt_image"
    assert error["report"] == {"pictures": [json.loads(line)], "out": str(out)}


@pytest.mark.skipif(sys.platform != "linux", reason="the longest name is another elsewhere")
def test_a_name_as_long_as_a_name_can_be(weights: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (90, 70)).save(folder / f"{'x' * 251}.png")
    assert main(words(weights, folder, tmp_path / "out", "--format", "yolo")) == 0
    assert (tmp_path / "out" / "labels" / f"{'x' * 200}.txt").is_file()
    assert (tmp_path / "out" / f"{'x' * 200}.jpg").is_file()


@pytest.mark.parametrize("size", ["0", "33"])
def test_a_size_that_cannot_be_is_usage(
    size: str, weights: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words(weights, pictures / "a.jpg", tmp_path / "out", "--size", size, size)) == 2
    assert capsys.readouterr().err.startswith("use.")


def test_broken_pictures_are_warnings_unless_all_are(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    for name in ("x: one.jpg", "x: two.jpg"):
        write(folder / name, "no picture")
    for kind in ("json", "yolo"):
        assert main(words(weights, folder, tmp_path / "out", "--format", kind)) == 3
        assert f"data.corrupt_image: none of 2 pictures can be read, first: {folder}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    Image.new("RGB", (90, 70)).save(folder / "good.jpg")
    write(folder / "a.mp4", "")
    assert main(words(weights, folder, tmp_path / "out", "--json")) == 0
    warnings = json.loads(capsys.readouterr().out)["warnings"]
    assert warnings.pop() == "1 videos are passed over: name them one by one"
    assert [warning.partition(": cannot be decoded")[0] for warning in warnings] == [
        f"{folder}/x: {name}.jpg" for name in ("one", "two")
    ]


def test_tiles_and_numbers_out_of_range(
    weights: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for more in ((), ("--tile", "48"), ("--tile", "48", "--top", "2")):
        assert main(words(weights, pictures / "a.jpg", tmp_path / "out", *more, "--json")) == 0
        (one,) = json.loads(capsys.readouterr().out)["result"]["pictures"]
        assert one["width"] == 90
        found.append([(row["score"], row["xyxy"]) for row in one["detections"]])
    whole, tiled, best = found
    assert not {tuple(box) for _, box in tiled} <= {tuple(box) for _, box in whole}
    assert len(best) == 2 < len(tiled)
    assert main(words(weights, pictures / "a.jpg", tmp_path / "out", "--tile", "5")) == 2
    assert main(words(weights, pictures / "a.jpg", tmp_path / "out", "--format", "xml")) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="names of files are any bytes on Linux only")
def test_a_name_that_is_no_text(weights: str, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (90, 70), (100, 90, 20)).save(folder / "a.jpg")
    os.rename(folder / "a.jpg", os.fsencode(folder) + b"/\xff\n.jpg")
    for kind in ("json", "coco", "csv", "yolo"):
        done = subprocess.run(
            [sys.executable, "-m", "finedetr", *words(weights, folder, tmp_path / kind, "--format", kind)],
            capture_output=True,
            check=True,
        )
        path = json.loads(done.stdout)["path"]
        assert os.path.isfile(path)
        assert json.loads((tmp_path / kind / "predictions.jsonl").read_text(encoding="utf-8"))["path"] == path


def test_a_source_of_no_letters(weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", weights, "", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "nothing came" in capsys.readouterr().err


def test_a_video_becomes_lines_and_an_annotated_video(
    weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    with VideoWriter(tmp_path / "clip.mp4", Fraction(10)) as writer:
        for number in range(3):
            writer.add(Image.new("RGB", (64, 48), (number, 90, 20)))
    assert main(words(weights, tmp_path / "clip.mp4", tmp_path / "out")) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["frame"], line["seconds"]) for line in lines] == [(0, 0.0), (1, 0.1), (2, 0.2)]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["clip.mp4", "predictions.jsonl"]
    assert main(words(weights, tmp_path / "clip.mp4", tmp_path / "out")) == 0
    write(tmp_path / "out" / "clip.mp4", "mine")
    assert main(words(weights, tmp_path / "clip.mp4", tmp_path / "out")) == 2
    assert "use.exists" in capsys.readouterr().err
    assert main(words(weights, tmp_path / "clip.mp4", tmp_path / "out", "--format", "coco")) == 2
    assert "a frame of a video is no file" in capsys.readouterr().err
