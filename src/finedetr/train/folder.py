"""The folder of a run: what it writes, where, and how the lines of its log stay true when it is resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finedetr.errors import ModelError, UsageError
from finedetr.files import read_records, write_text
from finedetr.model.foreign import is_foreign
from finedetr.model.hub import OURS, fetch, is_name

try:
    import fcntl
except ImportError:  # Windows has other locks
    fcntl = None  # type: ignore[assignment]

__all__ = ["RunFolder", "find_weights"]

BEFORE = ("config.json", "classes.json", "data_report.json", "train.log")
"""What is written before the first step."""
FILES = (
    *BEFORE,
    "metrics.jsonl",
    "status.json",
    "predictions_val.json",
    "evaluation.json",
    "report.html",
)
FOLDERS = ("checkpoints", "weights", "samples")
LOCK = ".lock"
"""Empty, and there only while somebody trains."""


@dataclass(frozen=True)
class RunFolder:
    """Names of everything in a run's folder."""

    root: Path

    @classmethod
    def create(cls, root: str | Path, *, overwrite: bool = False) -> RunFolder:
        """An empty folder for a new run.

        Args:
            root: Made with its parents where it does not exist.
            overwrite: Delete what an earlier run wrote there; other files stay.

        Raises:
            UsageError: There is something already (`use.exists`), and more than a run leaves that could not begin.
        """
        folder = cls(Path(root))
        if folder.root.exists() and not folder.root.is_dir():
            raise UsageError(f"{root} is a file, a run needs a folder", code="exists")
        if folder.root.is_dir() and any(path.name != LOCK for path in folder.root.iterdir()):
            if not overwrite and not folder._never_began():
                what = "holds a run" if folder.config.is_file() else "is not empty"
                raise UsageError(f"{root} {what}", code="exists", hint="Use --resume, --overwrite, or another --out.")
            for name in FILES:
                (folder.root / name).unlink(missing_ok=True)
            for dump in folder.root.glob("nan_batch*.pt"):
                dump.unlink()
            for name in FOLDERS:
                shutil.rmtree(folder.root / name, ignore_errors=True)
        folder.root.mkdir(parents=True, exist_ok=True)
        return folder

    def _never_began(self) -> bool:
        """Whether all that is here was written before the first step of a run, which then could not begin."""
        return {path.name for path in self.root.iterdir()} <= {*BEFORE, *FOLDERS, LOCK} and not any(
            path.is_file() for name in FOLDERS for path in (self.root / name).rglob("*")
        )

    @classmethod
    def existing(cls, root: str | Path) -> RunFolder:
        """The folder of a run that has begun.

        Raises:
            ModelError: There is none.
        """
        folder = cls(Path(root))
        if not folder.config.is_file():
            raise ModelError(f"{root} holds no run: {folder.config.name} is missing", code="not_found")
        return folder

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Meanwhile no other process trains here. One that dies lets go, however it dies; its loaders hold nothing.

        Where the system or the file system has no such locks, nothing is held.

        Raises:
            UsageError: Another process trains here (`use.busy`).
        """
        path = self.root / LOCK
        handle = None
        if fcntl is not None and not self.root.is_file():
            self.root.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not flock: children inherit that
            except (BlockingIOError, PermissionError):
                os.close(handle)
                raise UsageError(
                    f"another process trains in {self.root}",
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
                    path.unlink()
                os.close(handle)

    @property
    def config(self) -> Path:
        """The resolved recipe, written before the first step."""
        return self.root / "config.json"

    @property
    def classes(self) -> Path:
        """Category id -> index -> name."""
        return self.root / "classes.json"

    @property
    def metrics(self) -> Path:
        """One line for every so many steps and every evaluation."""
        return self.root / "metrics.jsonl"

    @property
    def status(self) -> Path:
        """The last state, for somebody who watches."""
        return self.root / "status.json"

    @property
    def log(self) -> Path:
        """The same text as on stderr."""
        return self.root / "train.log"

    @property
    def last(self) -> Path:
        """The resume state."""
        return self.root / "checkpoints" / "last.pt"

    @property
    def best(self) -> Path:
        """The resume state at the best AP."""
        return self.root / "checkpoints" / "best.pt"

    @property
    def restart(self) -> Path:
        """The state from which restarts without strong augmentation begin: the best before them."""
        return self.root / "checkpoints" / "restart.pt"

    def bad_batch(self, rank: int = 0) -> Path:
        """The latest batch whose loss or gradient was not finite, of each process."""
        return self.root / (f"nan_batch-{rank}.pt" if rank else "nan_batch.pt")

    @property
    def best_weights(self) -> Path:
        """The averaged weights at the best AP, with their card."""
        return self.root / "weights" / "best.safetensors"

    @property
    def last_weights(self) -> Path:
        """The averaged weights of the last evaluation, with their card."""
        return self.root / "weights" / "last.safetensors"

    @property
    def samples(self) -> Path:
        """Pictures of training batches and of predictions."""
        return self.root / "samples"

    @property
    def predictions(self) -> Path:
        """COCO results of the best weights, in original ids."""
        return self.root / "predictions_val.json"

    @property
    def evaluation(self) -> Path:
        """The numbers of the best weights."""
        return self.root / "evaluation.json"

    def write_json(self, path: Path, document: object) -> None:
        """Writes a document atomically, indented for readers."""
        write_text(path, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def read_json(self, path: Path) -> Any:
        """Reads a document.

        Raises:
            ModelError: It is absent or no JSON.
        """
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {error}", code="schema") from error

    def append(self, record: Mapping[str, object]) -> None:
        """Adds one line to the metrics: `kind`, `epoch`, `step` and numbers."""
        with self.metrics.open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def records(self) -> list[dict[str, Any]]:
        """The lines of the metrics; a last line that a crash cut off is left out."""
        return read_records(self.metrics)

    def rewind(self, *, step: int, epoch: int) -> None:
        """Drops the lines of what a resumed run will do again, and the unfinished files of a killed one.

        Args:
            step: Steps that the resume state has done.
            epoch: Epochs that it has finished, evaluation included.
        """
        for litter in self.root.rglob(".*.tmp"):
            litter.unlink(missing_ok=True)
        kept = [
            record
            for record in self.records()
            if (record.get("epoch", 0) < epoch if record.get("kind") == "evaluation" else record.get("step", 0) <= step)
        ]
        write_text(self.metrics, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in kept))


def find_weights(target: str | Path) -> Path:
    """The weights that a path means: a file, the best of a run's folder, or a folder with the layout of the Hub.

    A name of `finedetr.model.hub`, where no such path exists, is fetched.

    Raises:
        ModelError: There are none.
    """
    path = Path(target)
    if path.is_file():
        return path
    name = re.sub(r"^hf:/(?=[^/])", "hf://", str(target))  # a Path has dropped one slash
    if not path.exists() and is_name(name):
        path = fetch(name)
    if not path.is_dir():
        raise ModelError(
            f"no weights at {path}",
            code="not_found",
            hint="Give a run's folder, a weight file, or a name such as dfine-s-coco.",
        )
    if (path / OURS).is_file():
        return path / OURS
    if is_foreign(path):
        return path
    folder = RunFolder(path)
    for file in (folder.best_weights, folder.last_weights):
        if file.is_file():
            return file
    what = "the run has not been evaluated yet" if folder.config.is_file() else "it is no run"
    raise ModelError(f"{path} holds no weights: {what}", code="not_found")
