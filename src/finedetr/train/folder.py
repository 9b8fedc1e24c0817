"""The folder of a run: what it writes, where, and how the lines of its log stay true when it is resumed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finedetr.errors import ModelError
from finedetr.files import read_records, write_text
from finedetr.model.foreign import is_foreign
from finedetr.model.hub import OURS, fetch, is_name

__all__ = ["RunFolder", "find_weights"]


@dataclass(frozen=True)
class RunFolder:
    """Names of everything in a run's folder."""

    root: Path

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
        kept = []
        for record in self.records():
            done, now = ("epoch", epoch - 1) if record.get("kind") == "evaluation" else ("step", step)
            place = record.get(done, 0)
            if isinstance(place, int) and place <= now:  # others nobody could read
                kept.append(record)
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
