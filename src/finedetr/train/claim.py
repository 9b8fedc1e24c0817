"""A folder becomes that of one run: nobody else trains there, and nothing is lost before the run has begun."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from finedetr.errors import UsageError

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]

__all__ = ["begun", "claimed", "drop_earlier", "replaces"]

BEFORE = ("config.json", "classes.json", "data_report.json", "train.log")
"""What is written before the first step."""
FOLDERS = ("checkpoints", "weights", "samples")
WRITTEN = (
    *BEFORE,
    "metrics.jsonl",
    "status.json",
    "predictions_val.json",
    "evaluation.json",
    "report.html",
    "nan_batch*.pt",
    "checkpoints/*.pt",
    "weights/best.safetensors",
    "weights/last.safetensors",
    "samples/*.jpg",
)
"""Whatever a run writes, as patterns; nothing else is ever deleted."""
LOCK = ".lock"
"""Empty, and there only while somebody trains."""
EARLIER = ".earlier"
"""Where a whole run waits that another one is to replace, until that one has begun."""
MOVING = ".earlier.part"
"""What is on its way there or back: it belongs to the run in the folder."""
DROPPED = ".earlier.old"
"""What nobody wants back."""


@contextmanager
def claimed(root: Path) -> Iterator[None]:
    """Meanwhile no other process trains here. One that dies lets go, however it dies; its loaders hold nothing.

    Where the system or the file system has no such locks, nothing is held.

    Raises:
        UsageError: Another process trains here (`use.busy`).
    """
    handle = None
    if fcntl is not None and not root.is_file():
        root.mkdir(parents=True, exist_ok=True)
        handle = os.open(root / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: children inherit that
        except (BlockingIOError, PermissionError):
            os.close(handle)
            raise UsageError(
                f"another process trains in {root}",
                code="busy",
                hint="Wait until it ends, stop it with Ctrl-C or kill, or use another --out.",
            ) from None
        except OSError:
            pass
    try:
        yield
    finally:
        if handle is not None:
            with suppress(OSError):
                (root / LOCK).unlink()
            os.close(handle)


@contextmanager
def begun(root: Path, *, overwrite: bool = False) -> Iterator[None]:
    """The folder for a new run, made with its parents where it does not exist.

    An earlier run that is to be replaced is put aside. Where an error comes before `drop_earlier`, it is there again.

    Args:
        root: The folder; claimed.
        overwrite: Replace an earlier run; files that no run writes stay.

    Raises:
        UsageError: There is something already (`use.exists`), and more than a run leaves that could not begin; or
            `overwrite` would delete what no run has written.
    """
    if root.exists() and not root.is_dir():
        raise UsageError(f"{root} is a file, a run needs a folder", code="exists")
    _recall(root)  # a process may have been killed meanwhile
    if root.is_dir() and any(path.name != LOCK for path in root.iterdir()):
        _check_replaceable(root, overwrite)
        if _is_run(root) and _never_began(root):
            _delete(root)
        else:
            _put_aside(root)
    root.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException:
        _recall(root)
        raise


def drop_earlier(root: Path) -> None:
    """The new run stands: the one that it replaces goes, at once and for good."""
    if (root / EARLIER).is_dir():
        (root / EARLIER).rename(root / DROPPED)
        shutil.rmtree(root / DROPPED, ignore_errors=True)


def replaces(root: Path, path: Path) -> bool:
    """Whether a new run in `root` would take away what `path` means: the run itself, or something that it wrote."""
    root, path = root.resolve(), path.resolve()
    if path == root:
        return True
    return root in path.parents and any(path in (file, *file.parents) for file in _written(root))


def _check_replaceable(root: Path, overwrite: bool) -> None:
    ours, written = _is_run(root), _written(root)
    if overwrite and written and not ours:
        raise UsageError(
            f"{root} holds no run of finedetr, and --overwrite would delete {written[0].relative_to(root)}",
            code="exists",
            hint="Use another --out, or remove yourself what is not needed.",
        )
    if not overwrite and not (ours and _never_began(root)):
        what = "holds a run" if ours else "is not empty"
        raise UsageError(f"{root} {what}", code="exists", hint="Use --resume, --overwrite, or another --out.")


def _is_run(root: Path) -> bool:
    """Whether the configuration here is that of a run."""
    try:
        document = json.loads((root / BEFORE[0]).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(document, dict) and {"finedetr", "recipe"} <= document.keys()


def _never_began(root: Path) -> bool:
    """Whether all that is here was written before the first step of a run, which then could not begin."""
    return {path.name for path in root.iterdir()} <= {*BEFORE, *FOLDERS, LOCK} and not any(
        path.is_file() for name in FOLDERS for path in (root / name).rglob("*")
    )


def _written(root: Path) -> list[Path]:
    return [path for pattern in WRITTEN for path in sorted(root.glob(pattern))]


def _delete(root: Path) -> None:
    for path in _written(root):
        path.unlink()


def _move(source: Path, target: Path) -> None:
    for path in _written(source):
        place = target / path.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        path.replace(place)


def _put_aside(root: Path) -> None:
    _move(root, root / MOVING)
    if (root / MOVING).is_dir():
        (root / MOVING).rename(root / EARLIER)
    for name in FOLDERS:
        with suppress(OSError):  # it holds more, or there is none
            (root / name).rmdir()


def _recall(root: Path) -> None:
    """Undoes `_put_aside`, wherever that or this was killed: what is deleted is never all that there is."""
    shutil.rmtree(root / DROPPED, ignore_errors=True)
    if (root / EARLIER).is_dir():
        _delete(root)
        (root / EARLIER).rename(root / MOVING)
    if (root / MOVING).is_dir():
        _move(root / MOVING, root)
        shutil.rmtree(root / MOVING)
