from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finedetr.cli import main
from finedetr.errors import DivergedError, ModelError
from finedetr.train import loop
from finedetr.train.checkpoint import load_state
from finedetr.train.dump import Dump
from finedetr.train.folder import RunFolder
from finedetr.train.session import Request, begin, resume
from tests.train.small import draw, small_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"), train=8, val=1)


def request(data: Path, out: Path, **changes: Any) -> Request:
    return Request(data, small_recipe(**changes), out, device="cpu", quiet=True)


def poison(monkeypatch: pytest.MonkeyPatch, when: Callable[[int, int], bool]) -> None:
    """The first picture of these (epoch, step) is no number."""
    real = loop.OnDevice.__call__

    def call(self: Any, batch: Any, *, epoch: int, step: int) -> Any:
        images, targets = real(self, batch, epoch=epoch, step=step)
        if when(epoch, step):
            images = images.clone()
            images[0] = math.nan
        return images, targets

    monkeypatch.setattr(loop.OnDevice, "__call__", call)


def test_a_bad_batch_is_passed_over_kept_and_counted(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda epoch, step: (epoch, step) in {(0, 1), (2, 0)})
    result = begin(request(data, tmp_path / "a"))
    assert (result.epochs, result.steps) == (3, 6)
    folder = RunFolder(tmp_path / "a")
    state = load_state(folder.last)
    assert (state["progress"]["skipped"], state["progress"]["skipped_in_a_row"]) == (2, 0)
    assert state["average"]["updates"] == 4
    for name, tensor in {**state["model"], **state["average"]["model"]}.items():
        assert tensor.isfinite().all(), f"{name}: a batch that was passed over left its trace"
    skipped = [r for r in folder.records() if r["kind"] == "skipped"]
    assert [(r["step"], r["in_a_row"], r["skipped"]) for r in skipped] == [(2, 1, 1), (5, 1, 2)]
    assert [r["skipped"] for r in folder.records() if r["kind"] == "step"] == [0, 1, 1, 2]
    said = folder.log.read_text()
    assert "step 2 is passed over (1 in a row, 1 in all): matching/" in said
    assert str(folder.bad_batch()) in said
    assert (folder.samples / "nan_batch.jpg").is_file()


def test_too_many_in_a_row_end_the_run_and_the_dump_can_be_looked_at(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, lambda epoch, step: epoch > 0)
    with pytest.raises(DivergedError, match=r"3 steps in a row .* matching/\w+/\w+ is nan .*\.jpg") as raised:
        begin(request(data, tmp_path / "a", diverged_after=3))
    folder = RunFolder(tmp_path / "a")
    path = folder.bad_batch()
    assert f"finedetr info {path}" in raised.value.hint
    assert (raised.value.code, raised.value.exit) == ("run.diverged", 1)
    assert folder.read_json(folder.status)["state"] == "failed"

    dump = Dump.load(path)
    assert (dump.place["epoch"], dump.place["step"], dump.place["total"]) == (1, 0, 2)
    assert len(dump.images) == len(dump.pictures) == dump.targets.pictures == 4
    before = {k: v for k, v in load_state(folder.last)["model"].items() if "num_batches" not in k}
    assert all(torch.equal(dump.model[name], tensor) for name, tensor in before.items())
    again = dump.replay()
    assert again.losses.keys() == dump.losses.keys() != set()
    assert (again.first, again.weights) == ("backbone.stem.stem1.conv", ())
    assert again.largest[1] == float(dump.model[again.largest[0]].abs().max()) >= 1  # norms begin with 1

    assert main(["info", str(path)]) == 0
    said = capsys.readouterr().out
    assert "step     3 (epoch 2, step 1 of it)" in said
    assert "weights  all finite; the largest is " in said
    assert f"again    losses {len(again.losses)} not finite, such as matching/" in said
    assert f"picture  {dump.pictures[0]}, {dump.targets.counts[0]} boxes, values that are not finite" in said
    assert "first module with an answer that is not finite: backbone.stem" in said
    assert main(["info", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["pictures_not_finite"] == [dump.pictures[0]]


def test_a_gradient_that_is_not_finite_is_kept_with_all_its_losses_finite(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.build_student

    def spoiled(*args: Any) -> Any:
        student = real(*args)
        next(iter(student.detector.parameters())).register_hook(lambda gradient: gradient * math.inf)
        return student

    monkeypatch.setattr(loop, "build_student", spoiled)
    with pytest.raises(DivergedError, match="the gradient's norm is"):
        begin(request(data, tmp_path / "a", diverged_after=1))
    again = Dump.load(RunFolder(tmp_path / "a").bad_batch()).replay()
    assert (again.losses, again.first) == ({}, None)
    assert math.isfinite(again.gradient)


def test_the_count_in_a_row_goes_on_after_a_resume(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, lambda epoch, step: True)
    recipe = small_recipe(diverged_after=4)
    recipe = replace(recipe, saving=replace(recipe.saving, steps=1))
    with pytest.raises(DivergedError, match="4 steps in a row"):
        begin(Request(data, recipe, tmp_path / "a", device="cpu", quiet=True))
    assert load_state(RunFolder(tmp_path / "a").last)["progress"]["total"] == 3
    with pytest.raises(DivergedError, match="4 steps in a row"):
        resume(tmp_path / "a", device="cpu", quiet=True)
    rows = [r["in_a_row"] for r in RunFolder(tmp_path / "a").records() if r["kind"] == "skipped"]
    assert rows == [1, 2, 3, 4]


def test_something_else_is_no_dump(tmp_path: Path) -> None:
    from finedetr.train.checkpoint import save_state

    with pytest.raises(ModelError, match="no dump of a batch"):
        Dump.load(save_state(tmp_path / "nan_batch.pt", {"progress": {}}))
    with pytest.raises(ModelError, match="no resume state at"):
        Dump.load(tmp_path / "nothing.pt")
