"""What goes wrong in an evaluation: kinds of error, classes taken for others, thresholds, the worst pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finedetr.detections import THRESHOLD
from finedetr.errors import UsageError
from finedetr.evaluate.coco import Evaluator, Judged
from finedetr.evaluate.findings import ClassThreshold, Confusion, Diagnosis, ErrorKind, PictureFaults

__all__ = ["COSTS", "Goal", "check_costs", "diagnose"]

Goal = Literal["f1", "cost"]
COSTS = (1.0, 1.0)
"""Of a box that is wrong, and of an object that is missed."""
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


def check_costs(costs: tuple[float, float]) -> None:
    """UsageError where a cost is negative, or both are 0."""
    if not all(0 <= cost < math.inf for cost in costs) or max(costs) == 0:
        raise UsageError(f"costs are positive: of a wrong box and of a missed object; got {costs}", code="range")


def diagnose(evaluator: Evaluator, goal: Goal = "f1", costs: tuple[float, float] = COSTS) -> Diagnosis:
    """Looks for what goes wrong.

    Args:
        evaluator: What was found, and the truth.
        goal: Thresholds give the best F1 of each class, or the least cost. Either is measured on these very pictures:
            with few boxes of a class it flatters.
        costs: Of a box that is wrong, and of an object that is missed.

    Raises:
        UsageError: A cost is negative, or both are 0.
    """
    check_costs(costs)
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
    if goal == "f1" and hits[-1] == 0:  # every threshold is as good, and none is measured
        return ClassThreshold(name, THRESHOLD, 0.0, 0.0, 0.0)
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
