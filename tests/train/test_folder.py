from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest

from finedetr.errors import ModelError
from finedetr.train.folder import RunFolder
from finedetr.train.state import Progress


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no run"):
        RunFolder.existing(tmp_path)


def test_rewinding_drops_what_will_be_done_again_and_a_cut_line(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.append({"kind": "step", "epoch": 0, "step": step})
    folder.append({"kind": "evaluation", "epoch": 0, "step": 3, "ap": 0.5})
    folder.append({"kind": "step", "epoch": 1, "step": 4})
    folder.append({"kind": "step", "epoch": 1, "step": 5})
    folder.append({"kind": "evaluation", "epoch": 1, "step": 5, "ap": 0.6})
    with folder.metrics.open("a") as file:
        file.write('{"kind": "step", "ep')
    folder.rewind(step=5, epoch=1)  # killed while the second epoch was evaluated
    assert [(r["kind"], r["step"]) for r in folder.records()] == [
        ("step", 1),
        ("step", 2),
        ("step", 3),
        ("evaluation", 3),
        ("step", 4),
        ("step", 5),
    ]
    folder.rewind(step=2, epoch=0)
    assert [(r["kind"], r["step"]) for r in folder.records()] == [("step", 1), ("step", 2)]


def test_rewinding_passes_over_lines_that_nobody_could_read(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    folder.append({"kind": "step", "step": "x"})
    folder.append({"kind": "evaluation", "epoch": None})
    folder.append({"kind": "step", "step": 1})
    folder.rewind(step=5, epoch=1)
    assert folder.records() == [{"kind": "step", "step": 1}]


@pytest.mark.parametrize("odd", [{"epoch": "a"}, {"epoch": -3}, {"step": 10**6}, {"total": True}])
def test_a_state_that_stands_where_no_run_can_be_is_refused(odd: dict[str, object]) -> None:
    sane = asdict(Progress(epoch=1, step=2, total=6, steps=4))
    assert Progress.from_dict(sane) == Progress(**sane)
    with pytest.raises(ModelError, match="the resume state"):
        Progress.from_dict({**sane, **odd})
