"""What an evaluation may say of what goes wrong; `diagnosis.py` finds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["ClassThreshold", "Confusion", "Diagnosis", "ErrorKind", "PictureFaults"]


@dataclass(frozen=True, slots=True)
class ErrorKind:
    """One of TIDE's six kinds: how many there are, and by how much AP50 would rise if there were none."""

    kind: str
    count: int
    cost: float


@dataclass(frozen=True, slots=True)
class ClassThreshold:
    """The score from which on boxes of a class are best told, and what is then right; -1: the split has none of it."""

    name: str
    threshold: float
    f1: float
    precision: float
    recall: float


@dataclass(frozen=True, slots=True)
class Confusion:
    """How often a class was taken for another, at IoU .5. The index after the last class stands for nothing."""

    truth: int
    answer: int
    count: int


@dataclass(frozen=True, slots=True)
class PictureFaults:
    """Boxes of one picture at the thresholds: found, missed, and told where none is."""

    file: str
    id: int
    found: int
    missed: int
    wrong: int


@dataclass(frozen=True)
class Diagnosis:
    """What goes wrong.

    Attributes:
        errors: The six kinds, over all scores.
        thresholds: One entry a class, in the order of their indices.
        confusion: What is not zero of the matrix of truth and answer, at the thresholds.
        worst: The pictures with the most faults, at the thresholds.
    """

    errors: tuple[ErrorKind, ...]
    thresholds: tuple[ClassThreshold, ...]
    confusion: tuple[Confusion, ...]
    worst: tuple[PictureFaults, ...]

    def confused(self) -> tuple[Confusion, ...]:
        """What is off the diagonal, the most frequent first."""
        wrong = [entry for entry in self.confusion if entry.truth != entry.answer]
        return tuple(sorted(wrong, key=lambda entry: -entry.count))

    def matrix(self) -> NDArray[np.int64]:
        """Rows: truth, columns: answer, the last of both: nothing; [C + 1, C + 1]."""
        matrix = np.zeros((len(self.thresholds) + 1,) * 2, dtype=np.int64)
        for entry in self.confusion:
            matrix[entry.truth, entry.answer] = entry.count
        return matrix

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Diagnosis:
        """The inverse of `to_dict`. Raises KeyError or TypeError for anything else."""
        return cls(
            errors=tuple(ErrorKind(**entry) for entry in values["errors"]),
            thresholds=tuple(ClassThreshold(**entry) for entry in values["thresholds"]),
            confusion=tuple(Confusion(**entry) for entry in values["confusion"]),
            worst=tuple(PictureFaults(**entry) for entry in values["worst"]),
        )
