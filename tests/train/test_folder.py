from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finedetr.errors import ModelError, UsageError
from finedetr.train.folder import RunFolder


def run(root: Path) -> RunFolder:
    folder = RunFolder.create(root)
    folder.write_json(folder.config, {"epochs": 1})
    folder.last.parent.mkdir()
    folder.last.write_text("state")
    return folder


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    run(tmp_path / "a")
    with pytest.raises(UsageError, match="holds a run") as raised:
        RunFolder.create(tmp_path / "a")
    assert raised.value.code == "use.exists"
    assert "--resume, --overwrite" in raised.value.hint


def test_what_a_run_leaves_that_could_not_begin_is_no_run(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path / "a")
    folder.write_json(folder.config, {"epochs": 1})
    folder.log.write_text("model.mismatch")
    RunFolder.create(folder.root)
    assert not list(folder.root.iterdir())
    folder.append({"kind": "step"})
    with pytest.raises(UsageError, match="is not empty"):
        RunFolder.create(folder.root)


def test_overwriting_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
    (folder.root / "notes.txt").write_text("mine")
    RunFolder.create(folder.root, overwrite=True)
    assert [path.name for path in folder.root.iterdir()] == ["notes.txt"]


def test_a_folder_with_other_files_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match="is not empty"):
        RunFolder.create(tmp_path)
    with pytest.raises(UsageError, match="is a file"):
        RunFolder.create(tmp_path / "a.txt", overwrite=True)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind on Windows")
def test_two_processes_do_not_train_in_one_folder_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    holds = (
        "import os, sys, time; from pathlib import Path; from finedetr.train.folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])).claimed():\n"
        "    if os.fork() == 0: time.sleep(60)\n"  # as a loader's worker, which outlives a killed trainer for a while
        "    print('held', flush=True); time.sleep(60)"
    )
    folder = RunFolder(tmp_path / "a")
    other = subprocess.Popen(
        [sys.executable, "-c", holds, str(folder.root)], stdout=subprocess.PIPE, start_new_session=True
    )
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another process trains") as raised, folder.claimed():
            pass
        assert raised.value.code == "use.busy"
        other.kill()
        other.wait()
        with folder.claimed():
            RunFolder.create(folder.root)  # the lock itself is no content
        assert not list(folder.root.iterdir())
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.stdout.close()


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no run"):
        RunFolder.existing(tmp_path)


def test_rewinding_drops_what_will_be_done_again_and_a_cut_line(tmp_path: Path) -> None:
    folder = run(tmp_path / "a")
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
