"""A teacher as one more judge of who answers for which target: OD-DETR's matching distillation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from finedetr.distill.stages import source_stages
from finedetr.distill.tokens import same_queries
from finedetr.geometry import iou
from finedetr.records import Assignment, Guidance, Lesson, Match, Output, Prediction, Targets, Trace, Who
from finedetr.supervise.matching import (
    Cost,
    MatchingPolicy,
    PerStage,
    UnionOfStages,
    assignment_of,
    match_stages,
    pairs_on,
    unite,
)

__all__ = ["TeacherVotes"]


@dataclass(frozen=True)
class TeacherVotes(MatchingPolicy):
    """What a teacher matches counts beside the student's own matching (OD-DETR, matching distillation).

    For labels a query may so have a second target (`Match.second`). Where boxes go by the union of all stages, the
    teacher's stages are voters, too. A query is the same in both where it comes from the same cell, or has the same
    place among learned queries; if the student has no such query, its query nearest to the teacher's box stands in.
    """

    base: MatchingPolicy = field(default_factory=UnionOfStages)
    weight: float = 1.0
    """What a second target's quality is multiplied by; 0: the teacher has no say."""
    teacher: Who = "average"
    stage: Literal["same", "last"] = "same"
    """Whether each stage hears the same stage of the teacher, or its last."""
    nearest: float = 0.5
    """The IoU with the teacher's box from which the nearest query stands in; 1: none does."""
    norm: Literal["queries", "targets"] = "queries"
    """Losses of labels are divided by the number of queries with a target (eq. of L_MQF), or of targets."""

    def __call__(self, prediction: Prediction, targets: Targets) -> Match:
        """Without a teacher: as the base."""
        return self.base(prediction, targets)

    def informed(self, output: Output, guidance: Guidance | None) -> MatchingPolicy:
        """With what the teacher says, while it speaks."""
        lesson = None if guidance is None else guidance.of(self.teacher)
        if lesson is None or output.trace is None or self.weight == 0:
            return self.base
        return _Informed(self, lesson, output.trace)

    def with_cost(self, cost: Cost) -> MatchingPolicy:
        """The same around another base."""
        return replace(self, base=self.base.with_cost(cost))


@dataclass(frozen=True, eq=False)
class _Informed(MatchingPolicy):
    """The policy of one step."""

    votes: TeacherVotes
    lesson: Lesson
    trace: Trace

    def __call__(self, prediction: Prediction, targets: Targets) -> Match:
        """The base's matching, with the teacher's pairs."""
        base = self.votes.base
        if not isinstance(base, (PerStage, UnionOfStages)):
            return base(prediction, targets)
        own, sizes = match_stages(base.cost, prediction, targets)
        heard = self._pairs(prediction)
        second, number = _second(own, heard, len(sizes))
        parts = [own, second]
        if isinstance(base, UnionOfStages):
            parts.append(unite(np.concatenate((own, heard), axis=1), prediction.logits.shape[2], len(targets)))
        packed = pairs_on(prediction.logits.device, np.concatenate(parts, axis=1)).split([p.shape[1] for p in parts], 1)
        labels = assignment_of(packed[0], sizes, len(targets))
        if self.votes.norm == "queries":
            labels = replace(labels, count=labels.count + torch.tensor(number, device=labels.count.device))
        boxes = assignment_of(packed[0], sizes, len(targets))
        if isinstance(base, UnionOfStages):
            boxes = assignment_of(packed[2], (packed[2].shape[1],), packed[2].shape[1]).repeat(len(sizes))
        at = tuple(np.bincount(second[0], minlength=len(sizes)).tolist())
        return Match(
            labels, boxes, assignment_of(packed[1], at, len(targets)), self.votes.weight * self.lesson.strength
        )

    @torch.no_grad()
    def _pairs(self, prediction: Prediction) -> NDArray[np.int64]:
        """Rows (stage, image, query of the student, target) that the teacher would choose."""
        lesson = self.lesson
        stages = source_stages(prediction.stages, lesson.answers.stages)
        if self.votes.stage == "last":
            stages = (len(lesson.answers.stages) - 1,) * len(stages)
        slots = same_queries(lesson, self.trace)
        rows = []
        for own, theirs in enumerate(stages):
            image, query, target = _of_stage(lesson.match, theirs)
            slot = slots[image, query]
            if self.votes.nearest < 1:
                box = lesson.answers.boxes[theirs, image, query]
                slot = torch.where(slot >= 0, slot, _nearest(box, prediction.boxes[own, image], self.votes.nearest))
            rows.append(torch.stack((torch.full_like(image, own), image, slot, target)))
        found = torch.cat(rows, dim=1).cpu().numpy()
        return found[:, found[2] >= 0]


def _of_stage(pairs: Assignment, stage: int) -> tuple[Tensor, Tensor, Tensor]:
    """Image, query and target of the pairs of one stage."""
    start = sum(pairs.sizes[:stage])
    rows = slice(start, start + pairs.sizes[stage])
    return pairs.image[rows], pairs.query[rows], pairs.target[rows]


def _nearest(box: Float[Tensor, "M 4"], boxes: Float[Tensor, "M Q 4"], least: float) -> Int[Tensor, " M"]:
    """The query whose box overlaps most, or -1 where none overlaps by more than `least`."""
    best, query = iou(box[:, None].float(), boxes.float()).max(-1)
    return torch.where(best > least, query, -1)


def _second(own: NDArray[np.int64], heard: NDArray[np.int64], stages: int) -> tuple[NDArray[np.int64], list[float]]:
    """The teacher's pairs that the student does not have, one a query; and how many queries have no other target."""
    queries = int(max(own[2].max(initial=0), heard[2].max(initial=0))) + 1
    images = int(max(own[1].max(initial=0), heard[1].max(initial=0))) + 1

    def place(pairs: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.asarray((pairs[0] * images + pairs[1]) * queries + pairs[2])

    targets = int(max(own[3].max(initial=0), heard[3].max(initial=0))) + 1
    new = heard[:, ~np.isin(place(heard) * targets + heard[3], place(own) * targets + own[3])]
    _, first = np.unique(place(new), return_index=True)
    new = new[:, first]
    alone = ~np.isin(place(new), place(own))
    return new, np.bincount(new[0][alone], minlength=stages).astype(float).tolist()
