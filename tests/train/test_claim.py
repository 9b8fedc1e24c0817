from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from finedetr.errors import UsageError
from finedetr.train.claim import begun, claimed, drop_earlier, replaces


def write_run(root: Path, mark: str = "old") -> Path:
    """What a run leaves that has made some steps."""
    for name in ("config.json", "metrics.jsonl", "checkpoints/last.pt", "weights/best.safetensors", "samples/a.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(mark)
    (root / "config.json").write_text(f'{{"finedetr": "{mark}", "recipe": {{}}}}')
    return root


def fail_to_begin(root: Path, *, overwrite: bool = False) -> None:
    """A run that ends in an error after it has written its configuration."""
    with begun(root, overwrite=overwrite):
        (root / "config.json").write_text('{"finedetr": "new", "recipe": {}}')
        (root / "train.log").write_text("model.mismatch")
        raise ZeroDivisionError


def names(root: Path) -> list[str]:
    return sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    root = write_run(tmp_path / "a")
    with pytest.raises(UsageError, match="holds a run") as raised, begun(root):
        pass
    assert raised.value.code == "use.exists"
    assert "--resume, --overwrite" in raised.value.hint


def test_what_a_run_leaves_that_could_not_begin_is_no_run(tmp_path: Path) -> None:
    root = tmp_path / "a"
    with pytest.raises(ZeroDivisionError):
        fail_to_begin(root)
    assert names(root) == ["config.json", "train.log"]
    with begun(root):
        assert not names(root)
    (root / "metrics.jsonl").write_text("{}")
    with pytest.raises(UsageError, match="is not empty"), begun(root):
        pass


def test_a_configuration_of_the_user_is_no_run_that_could_not_begin(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"epochs": 1}')
    with pytest.raises(UsageError, match="is not empty"), begun(tmp_path):
        pass
    assert names(tmp_path) == ["config.json"]


def test_overwriting_removes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    root = write_run(tmp_path / "a")
    for mine in ("notes.txt", "weights/mine.pth", "samples/mine.png"):
        (root / mine).write_text("mine")
    with begun(root, overwrite=True):
        drop_earlier(root)
    assert names(root) == ["notes.txt", "samples/mine.png", "weights/mine.pth"]


def test_overwriting_where_no_run_stands_deletes_nothing(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "best.safetensors").write_text("mine")
    with pytest.raises(UsageError, match=r"would delete weights.best\.safetensors"), begun(tmp_path, overwrite=True):
        pass
    assert names(tmp_path) == ["weights/best.safetensors"]


def test_a_run_is_there_again_where_the_one_that_replaces_it_cannot_begin(tmp_path: Path) -> None:
    root = write_run(tmp_path / "a")
    before = names(root)
    with pytest.raises(ZeroDivisionError):
        fail_to_begin(root, overwrite=True)
    assert names(root) == before
    assert "old" in (root / "config.json").read_text()


def test_a_run_is_there_again_after_a_kill_between_two_runs(tmp_path: Path) -> None:
    root = write_run(tmp_path / "a")
    killed = begun(root, overwrite=True)
    killed.__enter__()
    (root / "train.log").write_text("new")
    with pytest.raises(UsageError, match="holds a run"), begun(root):
        pass
    assert "train.log" not in names(root)
    assert "old" in (root / "config.json").read_text()


def test_a_kill_while_files_are_moved_loses_none(tmp_path: Path) -> None:
    root = write_run(tmp_path / "a")
    before = names(root)
    (root / ".earlier.part").mkdir()
    (root / "config.json").rename(root / ".earlier.part" / "config.json")  # the first of them was on its way
    with pytest.raises(UsageError, match="holds a run"), begun(root):
        pass
    assert names(root) == before


def test_a_run_that_was_dropped_never_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_run(tmp_path / "a")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)  # as on a disk that cannot delete just now
    with begun(root, overwrite=True):
        write_run(root, "new")
        drop_earlier(root)
    with pytest.raises(UsageError, match="holds a run"), begun(root):
        pass
    assert "new" in (root / "config.json").read_text()


def test_a_folder_with_other_files_and_a_file_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(UsageError, match="is not empty"), begun(tmp_path):
        pass
    with pytest.raises(UsageError, match="is a file"), begun(tmp_path / "a.txt", overwrite=True):
        pass


def test_a_new_run_replaces_the_weights_of_the_run_in_its_folder(tmp_path: Path) -> None:
    root = write_run(tmp_path / "a")
    (root / "mine.pth").write_text("")
    assert replaces(root, root)
    assert replaces(root, root / "weights" / "best.safetensors")
    assert replaces(root, root / "weights")
    assert not replaces(root, root / "mine.pth")
    assert not replaces(root, tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no locks of this kind on Windows")
def test_two_processes_do_not_train_in_one_folder_and_a_killed_one_lets_go(tmp_path: Path) -> None:
    holds = (
        "import os, sys, time; from pathlib import Path; from finedetr.train.claim import claimed\n"
        "with claimed(Path(sys.argv[1])):\n"
        "    if os.fork() == 0: time.sleep(60)\n"  # as a loader's worker, which outlives a killed trainer for a while
        "    print('held', flush=True); time.sleep(60)"
    )
    root = tmp_path / "a"
    other = subprocess.Popen([sys.executable, "-c", holds, str(root)], stdout=subprocess.PIPE, start_new_session=True)
    assert other.stdout is not None
    try:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(UsageError, match="another process trains") as raised, claimed(root):
            pass
        assert raised.value.code == "use.busy"
        other.kill()
        other.wait()
        with claimed(root), begun(root):  # the lock itself is no content
            pass
        assert not list(root.iterdir())
    finally:
        os.killpg(other.pid, signal.SIGKILL)
        other.stdout.close()
