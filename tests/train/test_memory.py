"""A device whose memory is too small, acted by a step that refuses more than so many pictures at a time."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finedetr.errors import RunError
from finedetr.train import step
from finedetr.train.checkpoint import load_state
from finedetr.train.folder import RunFolder
from finedetr.train.plan import more_parts
from finedetr.train.session import Request, begin, resume, saved_recipe
from tests.train.small import draw, small_recipe
from tests.train.test_step import NAMES, OBJECTIVE, batch, updater


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"), train=8, val=1)


def request(data: Path, out: Path, **changes: Any) -> Request:
    return Request(data, small_recipe(**changes), out, device="cpu", quiet=True)


def small_memory(monkeypatch: pytest.MonkeyPatch, room: int, after: int = 0) -> list[int]:
    """From the step after `after` on, no more than `room` pictures fit; gives the sizes that were tried."""
    real, tried = step.step, []

    def fake(student: Any, images: torch.Tensor, *rest: Any) -> Any:
        tried.append(len(images))
        answer = real(student, images, *rest)
        if len(tried) > after and len(images) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")
        return answer

    monkeypatch.setattr(step, "step", fake)
    return tried


def test_a_batch_is_worked_off_in_more_parts_and_the_run_goes_on_so(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = small_memory(monkeypatch, room=1)
    begin(request(data, tmp_path / "a", epochs=1))
    assert tried == [4, 2, 1, 1, 1, 1, 1, 1, 1, 1]
    folder = RunFolder(tmp_path / "a")
    said = folder.log.read_text()
    assert "out of memory with 4 pictures at a time: from here on batches of 4 are worked off in 2 parts of 2" in said
    assert "4 parts of 1 (--accumulate 4)" in said
    assert load_state(folder.last)["progress"]["accumulate"] == 4


def test_a_step_in_parts_is_the_one_that_was_asked_for_with_so_many_parts(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(request(data, tmp_path / "asked", epochs=1, accumulate=2))
    small_memory(monkeypatch, room=2)
    begin(request(data, tmp_path / "forced", epochs=1))
    asked, forced = (load_state(RunFolder(tmp_path / name).last) for name in ("asked", "forced"))
    for name, tensor in asked["model"].items():
        assert torch.equal(tensor, forced["model"][name]), f"{name}: the attempt that failed left its trace"


def test_a_resumed_run_keeps_its_parts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_memory(monkeypatch, room=2)
    begin(request(data, tmp_path / "a", epochs=1))
    monkeypatch.undo()
    tried = small_memory(monkeypatch, room=100)
    saved, _ = saved_recipe(RunFolder(tmp_path / "a"))
    resume(tmp_path / "a", replace(saved, epochs=2), device="cpu", quiet=True)
    assert tried == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("changes", "room", "after", "message"),
    [
        (
            {"epochs": 2},
            2,
            2,
            "out of memory with 4 pictures at a time: CUDA out of memory. Tried to allocate 2.00 GiB.",
        ),
        ({"epochs": 1}, 0, 0, "out of memory with 1 pictures at a time"),
    ],
    ids=["after the first epoch", "one picture is too much"],
)
def test_otherwise_it_is_an_error_with_its_remedy(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: Any, room: int, after: int, message: str
) -> None:
    small_memory(monkeypatch, room, after)
    with pytest.raises(RunError) as raised:
        begin(request(data, tmp_path / "a", **changes))
    assert raised.value.message.startswith(message)
    assert (raised.value.code, raised.value.exit) == ("run.oom", 1)
    assert "--accumulate" in raised.value.hint
    assert RunFolder(tmp_path / "a").read_json(tmp_path / "a" / "status.json")["state"] == "failed"


def test_an_update_that_ran_out_of_memory_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    update = updater()

    def full(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(update.optimizer, "step", full)
    with pytest.raises(RunError, match="out of memory with 4 pictures"):
        update(*batch(), NAMES, (), OBJECTIVE)


@pytest.mark.parametrize(("pictures", "parts", "more"), [(8, 1, 2), (8, 2, 4), (6, 2, 6), (9, 1, 3), (7, 1, 7)])
def test_parts_stay_equal(pictures: int, parts: int, more: int) -> None:
    assert more_parts(pictures, parts) == more
    assert more_parts(pictures, pictures) is None
