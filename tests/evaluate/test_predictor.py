"""Weights at work: the truth scores 1, sources are found, boxes are pixels of the original, broken files are told."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from finedetr.data.dataset import Dataset
from finedetr.data.images import SUFFIXES
from finedetr.detections import Detections
from finedetr.errors import DataError, RunError, UsageError
from finedetr.evaluate.diagnosis import diagnose
from finedetr.evaluate.inference import Inference
from finedetr.evaluate.predictor import Predictor, evaluate_detector
from finedetr.model.weights import Card
from finedetr.model.zoo import variant
from tests.evaluate.cases import Oracle, solid_pictures
from tests.model.test_detector import tiny


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return solid_pictures(tmp_path)


def predictor_for(dataset: Dataset, **options: Any) -> Predictor:
    card = Card(variant("dfine-n"), dataset.categories.names, dataset.categories.ids, size=(64, 96))
    return Predictor(Oracle(dataset), card, **options)


# ---- evaluation ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch", "workers"), [(2, 0), (5, 1)])
def test_a_detector_that_answers_the_truth_scores_one(dataset: Dataset, batch: int, workers: int) -> None:
    oracle = Oracle(dataset).train()
    steps: list[tuple[int, int]] = []
    result, evaluator = evaluate_detector(
        oracle, dataset, (64, 96), Inference(), batch=batch, workers=workers, progress=lambda *done: steps.append(done)
    )
    assert result.ap == pytest.approx(1)
    assert result.ar100 == pytest.approx(1)
    assert result.unanswered == 0
    assert result.pictures == 5
    assert oracle.training
    assert not any(training for _, _, training in oracle.seen)
    assert {shape[2:] for _, shape, _ in oracle.seen} == {(64, 96)}
    assert steps[-1] == (-(-5 // batch), -(-5 // batch))
    best = max(evaluator.coco_results(), key=lambda row: (row["image_id"] == 30) + row["score"])
    assert best["category_id"] == 90
    assert best["bbox"] == pytest.approx([0, 0, 50, 90], abs=1e-3)


def test_half_precision_runs_the_detector_in_it_and_the_boxes_outside(dataset: Dataset) -> None:
    oracle = Oracle(dataset)
    result, _ = evaluate_detector(oracle, dataset, (32, 32), Inference(precision="bf16"), workers=0)
    assert oracle.seen[0][0] is torch.bfloat16
    assert result.ap == pytest.approx(1)
    evaluate_detector(oracle, dataset, (32, 32), Inference(precision="auto"), workers=0)
    assert oracle.seen[-1][0] is torch.float32  # the CPU has no native bf16
    with pytest.raises(UsageError, match="auto, fp32"):
        evaluate_detector(oracle, dataset, (32, 32), Inference(precision="int3"), workers=0)  # type: ignore[arg-type]


def test_mean_and_std_reach_the_detector(dataset: Dataset) -> None:
    seen: list[torch.Tensor] = []

    class Spy(Oracle):
        def forward(self, images: torch.Tensor) -> Any:
            seen.append(images)
            return super().forward(torch.zeros_like(images))

    mean, std = (0.4, 0.4, 0.4), (0.2, 0.2, 0.1)
    evaluate_detector(Spy(dataset), dataset, (32, 32), Inference(mean=mean, std=std), batch=5, workers=0)
    expected = (torch.tensor([10 / 255, 7 / 255, 9 / 255]) - 0.4) / torch.tensor([0.2, 0.2, 0.1])
    torch.testing.assert_close(seen[0][1, :, 0, 0], expected)


def test_a_detector_can_be_trained_after_it_was_measured(dataset: Dataset) -> None:
    detector = tiny(queries=20).train()
    evaluate_detector(detector, dataset, (64, 64), Inference(), batch=2, workers=0, names=("cat", "dog", "x", "y", "z"))
    output = detector(torch.rand(2, 3, 64, 64))
    (output.matching.logits.sum() + output.matching.boxes.sum()).backward()
    assert any(p.grad is not None for p in detector.parameters())


def test_classes_are_matched_by_name(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    class Swapped(Oracle):
        """Knows the classes in another order, and one more."""

        def forward(self, images: torch.Tensor) -> Any:
            matching = super().forward(images).matching
            logits = torch.cat((matching.logits.flip(-1), matching.logits[..., :1] * 0 + 8), -1)
            return type(super().forward(images))(type(matching)(logits, matching.boxes, matching.stages))

    with caplog.at_level(logging.WARNING):
        result, _ = evaluate_detector(
            Swapped(dataset), dataset, (32, 32), Inference(), workers=0, names=("dog", "cat", "ufo")
        )
    assert result.ap == pytest.approx(1)
    assert "not in the data set: ufo" in caplog.text
    result, _ = evaluate_detector(
        Swapped(dataset), dataset, (32, 32), Inference(), workers=0, names=("Dog", "CAT", "ufo")
    )
    assert result.ap == pytest.approx(1)
    assert "under another name: Dog as dog, CAT as cat" in caplog.text
    with pytest.raises(DataError, match="no name is the same"):
        evaluate_detector(Oracle(dataset), dataset, (32, 32), Inference(), workers=0, names=("hen", "fox"))


def test_weights_that_answer_nan_are_named_and_not_measured(dataset: Dataset) -> None:
    oracle = Oracle(dataset)
    with torch.no_grad():
        oracle.boxes[3] = float("nan")
    with pytest.raises(RunError, match=r"3\.png.*NaN"):
        evaluate_detector(oracle, dataset, (32, 32), Inference(), workers=0)
    with pytest.raises(RunError, match="NaN"):
        Predictor(oracle, predictor_for(dataset).card)(dataset.files[3])


def test_pictures_that_cannot_be_read_are_left_out(dataset: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    Path(dataset.files[1]).write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        result, evaluator = evaluate_detector(Oracle(dataset), dataset, (32, 32), Inference(), workers=0)
    assert result.ap == pytest.approx(1)
    assert (result.pictures, result.unanswered, result.unreadable) == (4, 0, 1)
    assert "1 of 5 pictures cannot be read and are not measured" in caplog.text
    assert evaluator.dataset.files == (dataset.files[0], *dataset.files[2:])
    assert {row["image_id"] for row in evaluator.coco_results()} == set(evaluator.dataset.ids.tolist())
    assert not diagnose(evaluator).worst


def test_an_evaluation_without_any_picture_is_an_error(dataset: Dataset) -> None:
    for file in dataset.files:
        Path(file).write_bytes(b"broken")
    with pytest.raises(DataError, match="none of 5 pictures can be read") as caught:
        evaluate_detector(Oracle(dataset), dataset, (32, 32), Inference(), workers=0)
    assert caught.value.code == "data.corrupt_image"


TWO = """
import json, sys, torch
from pathlib import Path
from torch import distributed
from finedetr.errors import FineDETRError
from finedetr.evaluate.inference import Inference
from finedetr.evaluate.predictor import evaluate_detector
from tests.evaluate.cases import Oracle, solid_pictures
torch.set_num_threads(1)
folder, rank = Path(sys.argv[1]), int(sys.argv[2])
distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
dataset = solid_pictures(folder / str(rank)).subset(range(5))
oracle = Oracle(dataset)
result, evaluator = evaluate_detector(oracle, dataset, (32, 32), Inference(), batch=2, workers=0, rank=rank, world=2)
said = {"ap": result.ap, "unanswered": result.unanswered, "rows": len(evaluator.coco_results())}
Path(dataset.files[1]).write_bytes(b"broken")  # of the second process
result, evaluator = evaluate_detector(oracle, dataset, (32, 32), Inference(), batch=2, workers=0, rank=rank, world=2)
said["broken"] = (result.ap, result.unreadable, len(evaluator.dataset))
if rank == 1:
    oracle.logits.data[3] = float("nan")
try:
    evaluate_detector(oracle, dataset, (32, 32), Inference(), batch=2, workers=0, rank=rank, world=2)
except FineDETRError as error:
    said["error"] = str(error)
print(json.dumps(said))
distributed.destroy_process_group()
"""


def test_two_processes_give_the_same_numbers_and_fail_together(tmp_path: Path) -> None:
    for rank in "01":
        (tmp_path / rank).mkdir()
    root = Path(__file__).parents[2]
    places = os.pathsep.join((str(root), os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": places, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(tmp_path), rank],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in "01"
    ]
    said = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        said.append(json.loads(out.splitlines()[-1]))
    assert [one["ap"] for one in said] == [pytest.approx(1)] * 2
    assert [one["unanswered"] for one in said] == [0, 0]
    assert said[0]["rows"] == 5 * 24
    assert [one["broken"] for one in said] == [[pytest.approx(1), 1, 4], [pytest.approx(1), 1, 5]]
    assert "process 1" in said[0]["error"]
    assert "NaN" in said[0]["error"]
    assert "NaN" in said[1]["error"]


def test_many_processes_without_a_group_are_refused(dataset: Dataset) -> None:
    with pytest.raises(UsageError, match="torchrun"):
        evaluate_detector(Oracle(dataset), dataset, (32, 32), Inference(), workers=0, rank=0, world=2)


# ---- prediction ----------------------------------------------------------------------------------------------------


def test_one_picture_gives_detections_in_its_own_pixels(dataset: Dataset) -> None:
    answer = predictor_for(dataset)(dataset.files[0])
    assert isinstance(answer, Detections)
    assert answer.size == (64, 48)
    assert sorted(answer.label.tolist()) == [0, 1]
    np.testing.assert_allclose(answer.xyxy[answer.label == 0][0], [2, 3, 30, 40], atol=1e-4)
    assert answer.path == dataset.files[0]
    assert answer.draw().size == (64, 48)


@pytest.mark.parametrize("kind", ["path", "str", "pil", "array", "grey", "alpha"])
def test_a_picture_is_the_same_picture_however_it_comes(dataset: Dataset, kind: str) -> None:
    path = Path(dataset.files[3])
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    source: Any = {
        "path": path,
        "str": str(path),
        "pil": image,
        "array": np.asarray(image),
        "grey": np.full((40, 120), 30, np.uint8),
        "alpha": np.asarray(image.convert("RGBA")),
    }[kind]
    predictor = predictor_for(dataset)
    expected, found = predictor(str(path)), predictor(source)
    assert isinstance(found, Detections)
    np.testing.assert_array_equal(found.xyxy, expected.xyxy)  # type: ignore[union-attr]
    assert (found.path is None) == (kind not in ("path", "str"))
    assert found.draw().size == (120, 40)


def test_folders_globs_and_lists_give_lists_in_order(dataset: Dataset, tmp_path: Path) -> None:
    predictor = predictor_for(dataset, batch=2)
    (tmp_path / "notes.txt").write_text("no picture")
    (tmp_path / ".hidden.png").write_text("no picture")
    folder = predictor(tmp_path)
    assert isinstance(folder, list)
    assert [Path(d.path or "").name for d in folder] == [f"{i}.png" for i in range(5)]
    assert all(d.image is None for d in folder)
    assert len(folder[0].draw().getbands()) == 3
    assert [d.size for d in predictor(str(tmp_path / "[13].png"))] == [(50, 90), (120, 40)]  # type: ignore[union-attr]
    mixed = predictor([dataset.files[4], np.zeros((20, 30, 3), np.uint8)])
    assert [d.size for d in mixed] == [(33, 77), (30, 20)]  # type: ignore[union-attr]
    assert mixed[1].image is not None  # type: ignore[index]
    assert predictor([]) == []


def test_the_batch_size_changes_nothing(dataset: Dataset) -> None:
    one, many = (predictor_for(dataset, batch=batch)(list(dataset.files), 0.0) for batch in (1, 4))
    for a, b in zip(one, many, strict=True):  # type: ignore[arg-type]
        np.testing.assert_array_equal(a.xyxy, b.xyxy)
        np.testing.assert_array_equal(a.score, b.score)


def test_boxes_are_clipped_to_the_picture_and_low_scores_left_out(dataset: Dataset) -> None:
    predictor = predictor_for(dataset)
    with torch.no_grad():
        predictor.detector.boxes[0, :2] = torch.tensor([0.1, 0.9, 0.5, 0.5])
    answer = predictor(dataset.files[0])
    assert answer.xyxy.min() >= 0  # type: ignore[union-attr]
    assert (answer.xyxy.max(0) <= [64, 48, 64, 48]).all()  # type: ignore[union-attr]
    assert len(predictor(dataset.files[0], threshold=0.0)) == 24
    assert len(predictor(dataset.files[0], threshold=0.99)) == 0
    assert len(predictor(dataset.files[0], threshold=0.0, nms=0.01)) < 24


def test_a_stream_reads_ahead_but_not_everything(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    predictor = predictor_for(dataset, batch=1)
    read: list[Any] = []
    load = predictor._load
    monkeypatch.setattr(predictor, "_load", lambda item: (read.append(item), load(item))[1])
    stream = predictor.stream([dataset.files[0]] * 50)
    first = next(stream)
    assert first.image is not None
    assert len(read) <= 6
    stream.close()


def test_a_broken_file_in_a_folder_is_passed_over_and_told(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "2b.jpg"
    broken.write_bytes(b"\xff\xd8 no more")
    predictor = predictor_for(dataset, batch=2)
    with caplog.at_level(logging.WARNING):
        assert len(predictor(tmp_path)) == 5
    assert list(predictor.broken) == [str(broken)]
    assert "2b.jpg" in caplog.text
    assert "1 of 6 pictures" in caplog.text
    assert len(predictor(str(tmp_path / "*.[jp][pn]g"))) == 5
    for named in (broken, [broken, dataset.files[0]]):
        with pytest.raises(DataError, match=r"2b\.jpg"):
            predictor(named)


def test_videos_of_a_folder_are_passed_over_and_told(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "deep").mkdir()
    for name in ("a.mp4", "deep/b.avi"):
        (tmp_path / name).write_bytes(b"")
    predictor = predictor_for(dataset)
    for source, count in ((tmp_path, 2), (str(tmp_path / "*"), 1), ([tmp_path, tmp_path], 4)):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert len(predictor(source)) in (5, 10)
        assert f"{count} videos are passed over: name them one by one" in caplog.text
        assert "no pictures are passed over" not in caplog.text
    with pytest.raises(DataError, match=r"holds no picture \(1 other files\)\n  Name videos one by one"):
        predictor(tmp_path / "deep")


def test_files_that_are_no_pictures_are_told(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a.txt", "b.TXT", "LICENSE", ".hidden"):
        (tmp_path / name).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert len(predictor_for(dataset)(tmp_path)) == 5
    assert "3 files that are no pictures are passed over: 2 .txt, 1 without an ending" in caplog.text


def test_folders_behind_links_are_read(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "only" / "links").mkdir(parents=True)
    (tmp_path / "only" / "links" / "there").symlink_to(tmp_path)
    assert len(predictor_for(dataset)(tmp_path / "only")) == 5


@pytest.mark.skipif(".avif" not in SUFFIXES, reason="this Pillow reads no AVIF")
def test_avif_in_a_folder(dataset: Dataset, tmp_path: Path) -> None:
    Image.new("RGB", (20, 10)).save(tmp_path / "only.avif")
    assert [d.size for d in predictor_for(dataset)(tmp_path)][-1] == (20, 10)  # type: ignore[union-attr]


def test_sources_that_cannot_be_say_what_is_wanted(dataset: Dataset, tmp_path: Path) -> None:
    predictor = predictor_for(dataset)
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "a.txt").write_text("")
    cut = Path(dataset.files[3]).read_bytes()[:-30]
    cases: list[tuple[Any, type[Exception], str]] = [
        (tmp_path / "absent.jpg", DataError, "no such file"),
        (empty, DataError, r"no picture \(1 other"),
        (str(empty / "*"), DataError, r"matches no picture \(1 other"),
        ("ftp://example.com/a.jpg", UsageError, "from files and from http"),
        ("https://example.com/a.mp4?x=1", UsageError, "videos are read from files"),
        (3, UsageError, "got int"),
        (b"bytes", UsageError, "got bytes"),
        (np.zeros((4, 4, 3)), UsageError, "uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), UsageError, "list of arrays"),
        (np.zeros((0, 4, 3), np.uint8), UsageError, r"\[0, 4, 3\]"),
        (torch.zeros(4, 6, 3, dtype=torch.uint8), UsageError, r"tensor \[4, 6, 3\]\n  Such as .*numpy"),
        ([torch.zeros(3, 4, 6)], UsageError, r"tensor \[3, 4, 6\]"),
        (Image.open(BytesIO(cut)), DataError, "a PIL image: cannot be decoded"),
        (Image.new("RGB", (0, 5)), DataError, "a PIL image: .*no pixels"),
        (Image.new("La", (3, 3)), DataError, "a PIL image: cannot be decoded"),
    ]
    for source, error, words in cases:
        with pytest.raises(error, match=words):
            predictor(source)
    with pytest.raises(UsageError, match="threshold"):
        predictor(dataset.files[0], threshold=40)
    with pytest.raises(UsageError, match="batch"):
        predictor(dataset.files[0], batch=0)
