from __future__ import annotations

import os
import random
import stat
from pathlib import Path

import numpy as np
import pytest
import torch

from finedetr.errors import ModelError, RunError
from finedetr.files import write_atomically
from finedetr.train.checkpoint import load_state, save_state


def test_everything_that_a_run_keeps_comes_back_equal(tmp_path: Path) -> None:
    state = {
        "model": {"weight": torch.randn(3)},
        "random": {
            "python": random.getstate(),
            "numpy": np.random.default_rng(0).bit_generator.state,
            "torch": torch.get_rng_state(),
        },
        "epoch": 3,
        "best": None,
        "names": ["a", "b"],
        "flags": (True, 1.5),
    }
    path = save_state(tmp_path / "deep" / "last.pt", state)
    back = load_state(path)
    assert torch.equal(back["model"]["weight"], state["model"]["weight"])  # type: ignore[index]
    assert back["random"]["python"] == state["random"]["python"]  # type: ignore[index]
    assert back["random"]["numpy"] == state["random"]["numpy"]  # type: ignore[index]
    assert (back["epoch"], back["best"], back["names"], back["flags"]) == (3, None, ["a", "b"], (True, 1.5))


def test_the_file_has_the_permissions_of_the_umask(tmp_path: Path) -> None:
    mask = os.umask(0o022)
    try:
        path = save_state(tmp_path / "last.pt", {"step": 1})
    finally:
        os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_crash_while_writing_leaves_the_old_file_and_no_litter(tmp_path: Path) -> None:
    path = save_state(tmp_path / "last.pt", {"step": 1})

    def crash(file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, crash)
    assert load_state(path)["step"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


@pytest.mark.parametrize("value", [Path("x"), np.float32(1), {"deep": [object()]}, {1.5: 2}])
def test_what_could_not_be_loaded_is_refused_when_saving(tmp_path: Path, value: object) -> None:
    with pytest.raises(TypeError, match=r"state\['odd'\]"):
        save_state(tmp_path / "last.pt", {"odd": value})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_a_damaged_file_is_a_clear_error(tmp_path: Path, damage: str) -> None:
    path = save_state(tmp_path / "last.pt", {"model": torch.zeros(1000)})
    data = path.read_bytes()
    path.write_bytes({"cut": data[: len(data) // 2], "text": b"hello", "empty": b""}[damage])
    with pytest.raises(ModelError, match=r"last\.pt is damaged or no resume state"):
        load_state(path)


def test_any_error_of_a_damaged_file_is_a_clear_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_state(tmp_path / "last.pt", {"model": torch.zeros(10)})

    def load(*_: object, **__: object) -> None:
        raise IndexError("pop from empty list")  # what torch says where bytes of its table are flipped

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(ModelError, match=r"last\.pt is damaged or no resume state: pop from empty list"):
        load_state(path)


def test_an_absent_file_and_another_format_are_clear_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no resume state at"):
        load_state(tmp_path / "last.pt")
    torch.save({"format": 99}, tmp_path / "new.pt")
    with pytest.raises(ModelError, match="has format 99"):
        load_state(tmp_path / "new.pt")


def test_loading_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return os.system, (f"touch {tmp_path}/ran",)

    torch.save({"format": 1, "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ModelError):
        load_state(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="cannot be written"):
        save_state(tmp_path / "file" / "last.pt", {})
