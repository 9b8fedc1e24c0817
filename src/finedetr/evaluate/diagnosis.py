"""What goes wrong in an evaluation: kinds of error, classes taken for others, thresholds, the worst pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from finedetr.detections import THRESHOLD
from finedetr.errors import UsageError

if TYPE_CHECKING:
    from finedetr.evaluate.coco import Evaluator, Judged

__all__ = ["ClassThreshold", "Confusion", "Diagnosis", "ErrorKind", "Goal", "PictureFaults", "diagnose"]

Goal = Literal["f1", "cost"]
KINDS = {
    "Cls": "class",
    "Loc": "place",
    "Both": "class and place",
    "Dupe": "double",
    "Bkg": "nothing",
    "Miss": "missed",
}
"""TIDE's six kinds (Bolya et al., ECCV 2020) -> what is wrong with the box; `nothing`: there is no object."""
WORST = 24  # pictures that are kept


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


def diagnose(evaluator: Evaluator, goal: Goal = "f1", costs: tuple[float, float] = (1.0, 1.0)) -> Diagnosis:
    """Looks for what goes wrong.

    Args:
        evaluator: What was found, and the truth.
        goal: Thresholds give the best F1 of each class, or the least cost. Either is measured on these very pictures:
            with few boxes of a class it flatters.
        costs: Of a box that is wrong, and of an object that is missed.

    Raises:
        UsageError: A cost is negative, or both are 0.
    """
    if not all(0 <= cost < math.inf for cost in costs) or max(costs) == 0:
        raise UsageError(f"costs are positive: of a wrong box and of a missed object; got {costs}", code="range")
    judged = evaluator.judged()
    data = evaluator.dataset
    real = data.labels[~data.crowd]
    counts = np.bincount(real, minlength=len(data.categories))
    thresholds = tuple(
        _threshold(name, judged, index, int(counts[index]), goal, costs)
        for index, name in enumerate(data.categories.names)
    )
    limits = np.array([entry.threshold for entry in thresholds])
    told = (judged.score >= limits[judged.label]) & (judged.verdict >= 0)
    matrix = evaluator.confused(told)
    return Diagnosis(
        errors=_errors(judged.errors),
        thresholds=thresholds,
        confusion=tuple(Confusion(int(t), int(a), int(matrix[t, a])) for t, a in np.argwhere(matrix)),
        worst=_worst(evaluator, judged, told),
    )


def _threshold(
    name: str, judged: Judged, index: int, objects: int, goal: Goal, costs: tuple[float, float]
) -> ClassThreshold:
    """The best threshold of one class: half-way between the last score that is told and the first that is not."""
    mine = (judged.label == index) & (judged.verdict >= 0)
    if not objects:
        return ClassThreshold(name, THRESHOLD, -1.0, -1.0, -1.0)
    order = np.argsort(-judged.score[mine], kind="stable")
    score = judged.score[mine][order].astype(np.float64)
    hits = np.concatenate(([0], np.cumsum(judged.verdict[mine][order] == 1)))
    told = np.arange(len(hits))
    value = 2 * hits / (told + objects) if goal == "f1" else -(costs[0] * (told - hits) + costs[1] * (objects - hits))
    borders = np.concatenate(([1.0], score, [0.0]))
    between = borders[:-1] > borders[1:]  # no threshold parts equal scores
    best = int(np.argmax(np.where(between, value, -np.inf)))
    right = int(hits[best])
    return ClassThreshold(
        name,
        threshold=float(borders[best] + borders[best + 1]) / 2,
        f1=float(2 * right / (best + objects)),
        precision=right / best if best else 0.0,
        recall=right / objects,
    )


def _errors(found: Mapping[str, Any]) -> tuple[ErrorKind, ...]:
    return tuple(
        ErrorKind(word, int(found["counts"][kind]), float(found["delta_ap"][kind])) for kind, word in KINDS.items()
    )


def _worst(evaluator: Evaluator, judged: Judged, told: NDArray[np.bool_]) -> tuple[PictureFaults, ...]:
    data = evaluator.dataset
    owner = np.repeat(np.arange(len(data)), np.diff(data.starts))[~data.crowd]
    objects = np.bincount(owner, minlength=len(data))
    found = np.bincount(judged.picture[told & (judged.verdict == 1)], minlength=len(data))
    wrong = np.bincount(judged.picture[told & (judged.verdict == 0)], minlength=len(data))
    faults = objects - found + wrong
    order = [int(i) for i in np.argsort(-faults, kind="stable")[:WORST] if faults[i] > 0]
    return tuple(
        PictureFaults(data.files[i], int(data.ids[i]), int(found[i]), int(objects[i] - found[i]), int(wrong[i]))
        for i in order
    )
