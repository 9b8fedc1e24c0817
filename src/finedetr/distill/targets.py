"""A teacher's queries as targets: which of them stands for which of the student's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from hotcoco.primitives import lsap
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from finedetr.distill.stages import layer_stages
from finedetr.distill.tokens import same_queries
from finedetr.geometry import box_cost
from finedetr.records import Assignment, Lesson, Supervision

__all__ = ["Pairing", "Pairs", "TeacherCost", "pair_by_cost", "pair_by_token"]

Pairing = Literal["common", "split", "joint", "token"]
Links = tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Pairs:
    """M pairs of a student's and a teacher's query, as parallel vectors. `link` counts the linked layers."""

    link: Int[Tensor, " M"]
    image: Int[Tensor, " M"]
    student: Int[Tensor, " M"]
    teacher: Int[Tensor, " M"]
    positive: Float[Tensor, " M"]  # 1: the teacher's query stands for a target
    valid: Float[Tensor, " M"]  # 0: a place without a pair


@dataclass(frozen=True)
class TeacherCost:
    """What it costs that a student's query answers as a teacher's: all classes, and the box (spec 4.2)."""

    label: float = 1.0
    l1: float = 5.0
    giou: float = 2.0

    def __call__(
        self,
        logits: Float[Tensor, "*N Q C"],
        boxes: Float[Tensor, "*N Q 4"],
        teacher: Float[Tensor, "*N P C"],
        teacher_boxes: Float[Tensor, "*N P 4"],
    ) -> Float[Tensor, "*N P Q"]:
        """Binary cross-entropy to the teacher's probabilities summed over classes, L1, generalized IoU."""
        entropy = F.softplus(logits).sum(-1).unsqueeze(-2) - teacher @ logits.transpose(-1, -2)
        own, other = boxes.unsqueeze(-3), teacher_boxes.unsqueeze(-2)
        return self.label * entropy + box_cost(own, other, self.l1, self.giou)


@torch.no_grad()
def pair_by_token(s: Supervision, lesson: Lesson, links: Links, top: int) -> Pairs:
    """The teacher's best queries and those of the student that are the same ones; nothing is assigned."""
    assert s.output is not None
    assert s.output.trace is not None
    layers = layer_stages(lesson.answers.stages)
    slots = same_queries(lesson, s.output.trace)
    stages = torch.tensor([layers[layer] for _, layer in links], device=slots.device)
    best = _best(lesson, top)[stages]
    student = slots.expand(len(links), -1, -1).gather(2, best)
    link, image = _places(best)
    positive = _matched(lesson)[stages].gather(2, best)
    valid = (student >= 0).float()
    return Pairs(
        link, image, student.clamp(min=0).flatten(), best.flatten(), positive.float().flatten(), valid.flatten()
    )


@torch.no_grad()
def pair_by_cost(s: Supervision, lesson: Lesson, links: Links, pairing: Pairing, top: int, cost: TeacherCost) -> Pairs:
    """The teacher's best queries, assigned to the student's on the host.

    Args:
        s: The matching group.
        lesson: The teacher's.
        links: Layers of both that belong together.
        pairing: `joint`: one assignment of all (DETRDistill's code); `split`: those that stand for a target first,
            then the rest (its paper); `common`: those that stand for a target go to the student's query for the same
            target, the rest is assigned.
        top: So many of the teacher's queries, best score first; those that stand for a target are always among them.
            0: all.
        cost: Of a pair.
    """
    own, other = layer_stages(s.answers.stages), layer_stages(lesson.answers.stages)
    students = torch.tensor([own[k] for k, _ in links])
    teachers = torch.tensor([other[layer] for _, layer in links], device=s.answers.logits.device)
    best = _best(lesson, top)[teachers]
    logits, boxes = lesson.answers.logits[teachers], lesson.answers.boxes[teachers].clamp(0, 1)
    probability = logits.gather(2, best[..., None].expand(-1, -1, -1, logits.shape[-1])).sigmoid()
    seen = s.answers.logits.detach()[students]
    if lesson.known is not None:
        probability, seen = probability[..., lesson.known], seen[..., lesson.known]
    table = cost(
        seen, s.answers.boxes.detach()[students], probability, boxes.gather(2, best[..., None].expand(-1, -1, -1, 4))
    )
    costs = torch.nan_to_num(table, nan=1.0).cpu().numpy()
    chosen = best.cpu().numpy()
    # a target's query among the teacher's and the student's; -1: none
    of_teacher = _by_target(lesson.match, len(s.targets))[teachers.cpu().numpy()]
    of_student = _by_target(s.match.labels, len(s.targets))[students.numpy()]
    rows = []
    for link in range(len(links)):
        for image, (start, count) in enumerate(zip(s.targets.starts, s.targets.counts, strict=True)):
            targets = slice(start, start + count)
            found = _assign(
                costs[link, image], chosen[link, image], of_teacher[link, targets], of_student[link, targets], pairing
            )
            rows.append(np.concatenate((np.full((2, found.shape[1]), [[link], [image]]), found)))
    packed = torch.from_numpy(np.concatenate(rows, axis=1)).to(s.answers.logits.device)
    link_, image_, student, teacher, positive = packed.unbind()
    return Pairs(link_, image_, student, teacher, positive.float(), torch.ones_like(positive, dtype=torch.float32))


def _assign(
    table: NDArray[np.float32],
    chosen: NDArray[np.int64],
    of_teacher: NDArray[np.int64],
    of_student: NDArray[np.int64],
    pairing: Pairing,
) -> NDArray[np.int64]:
    """Rows (student, teacher, positive) of one picture at one link.

    Args:
        table: Costs, [P, Q].
        chosen: Which of the teacher's queries the rows of the table are, [P].
        of_teacher: The teacher's query of each target, [G].
        of_student: The student's.
        pairing: See `pair_by_cost`.
    """
    standing = np.isin(chosen, of_teacher)
    if pairing == "joint":
        rows, columns = lsap(table)
        return np.stack((columns, chosen[rows], standing[rows])).astype(np.int64)
    if pairing == "split":
        positive = np.flatnonzero(standing)
        rows, columns = lsap(table[positive])
        first = np.stack((columns, chosen[positive[rows]]))
    else:
        both = (of_teacher >= 0) & (of_student >= 0)
        first = np.stack((of_student[both], of_teacher[both]))
    rest = np.flatnonzero(~standing)
    free = np.setdiff1d(np.arange(table.shape[1]), first[0])
    if not len(rest) or not len(free):
        return np.concatenate((first, np.ones((1, first.shape[1])))).astype(np.int64)
    rows, columns = lsap(np.ascontiguousarray(table[np.ix_(rest, free)]))
    pairs = np.concatenate((first, np.stack((free[columns], chosen[rest[rows]]))), axis=1)
    return np.concatenate((pairs, (np.arange(pairs.shape[1]) < first.shape[1])[None])).astype(np.int64)


def _best(lesson: Lesson, top: int) -> Int[Tensor, "S B P"]:
    """The teacher's queries at each of its stages that teach: those of targets first, then by score."""
    score = lesson.answers.logits.amax(-1).sigmoid() + 2.0 * _matched(lesson)
    return score.topk(min(top or score.shape[-1], score.shape[-1]), dim=-1).indices


def _matched(lesson: Lesson) -> Tensor:
    """Whether each of the teacher's queries stands for a target, [S, B, Q]."""
    matched = torch.zeros(lesson.answers.logits.shape[:3], dtype=torch.bool, device=lesson.answers.logits.device)
    matched[lesson.match.stage, lesson.match.image, lesson.match.query] = True
    return matched


def _by_target(pairs: Assignment, targets: int) -> NDArray[np.int64]:
    """The query of each target at each stage, [S, T]; -1: none."""
    stage, query, target = torch.stack((pairs.stage, pairs.query, pairs.target)).cpu().numpy()
    table = np.full((pairs.stages, targets), -1, dtype=np.int64)
    table[stage, target] = query
    return table


def _places(best: Int[Tensor, "L B P"]) -> tuple[Int[Tensor, " M"], Int[Tensor, " M"]]:
    """Link and picture of each place, flattened."""
    links, pictures, places = best.shape
    link = torch.arange(links, device=best.device)[:, None, None].expand(best.shape)
    image = torch.arange(pictures, device=best.device)[:, None].expand(links, pictures, places)
    return link.flatten(), image.flatten()
