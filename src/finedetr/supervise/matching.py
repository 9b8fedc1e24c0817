"""Who answers for which target: costs of all stages in one tensor, one copy to the host, assignments on the blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import torch
from hotcoco.primitives import lsap
from jaxtyping import Float, Int
from torch import Tensor

from finedetr.geometry import box_cost, iou
from finedetr.records import Assignment, Guidance, Match, Output, Prediction, Targets

__all__ = [
    "Cost",
    "Fixed",
    "FocalCost",
    "MatchingPolicy",
    "PerStage",
    "QualityCost",
    "UnionOfStages",
    "assignment_of",
    "costs",
    "match_stages",
    "pairs_on",
    "unite",
]


class Cost(ABC):
    """What it costs that a query answers for a target; element-wise."""

    @abstractmethod
    def __call__(
        self,
        logits: Float[Tensor, "S B G Q"],
        boxes: Float[Tensor, "S B 1 Q 4"],
        truth: Float[Tensor, "1 B G 1 4"],
    ) -> Float[Tensor, "S B G Q"]:
        """The costs, from each query's logit for the target's class, its box, and the target's box; all in fp32."""


@dataclass(frozen=True)
class FocalCost(Cost):
    """Focal classification cost, L1 distance and generalized IoU (Deformable DETR; unchanged since)."""

    label: float = 2.0
    l1: float = 5.0
    giou: float = 2.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __call__(
        self,
        logits: Float[Tensor, "S B G Q"],
        boxes: Float[Tensor, "S B 1 Q 4"],
        truth: Float[Tensor, "1 B G 1 4"],
    ) -> Float[Tensor, "S B G Q"]:
        """Weighted sum of the three."""
        p = logits.sigmoid()
        positive = self.alpha * (1 - p) ** self.gamma * -(p + 1e-8).log()
        negative = (1 - self.alpha) * p**self.gamma * -(1 - p + 1e-8).log()
        return self.label * (positive - negative) + box_cost(boxes, truth, self.l1, self.giou)


@dataclass(frozen=True)
class QualityCost(Cost):
    """-(p · IoU^power): DEIMv2's cost for the last part of a training, when boxes are good enough to be judged."""

    power: float = 4.0

    def __call__(
        self,
        logits: Float[Tensor, "S B G Q"],
        boxes: Float[Tensor, "S B 1 Q 4"],
        truth: Float[Tensor, "1 B G 1 4"],
    ) -> Float[Tensor, "S B G Q"]:
        """Minus the product."""
        return -(logits.sigmoid() * iou(boxes, truth) ** self.power)


class MatchingPolicy(ABC):
    """Decides which query answers for which target, for labels and for boxes.

    The counts of the result are those of this process; the objective averages them over processes.
    """

    @abstractmethod
    def __call__(self, prediction: Prediction, targets: Targets) -> Match:
        """Matches all stages of one group of queries."""

    def informed(self, output: Output, guidance: Guidance | None) -> MatchingPolicy:
        """The policy for the detector's own queries, which a teacher may have a say in; by default the same."""
        return self

    def with_cost(self, cost: Cost) -> MatchingPolicy:
        """The same policy by another cost; itself where it has none."""
        return self


@dataclass(frozen=True)
class PerStage(MatchingPolicy):
    """Every stage has its own optimal one-to-one matching (DETR), for labels and boxes alike."""

    cost: Cost = field(default_factory=FocalCost)

    def __call__(self, prediction: Prediction, targets: Targets) -> Match:
        """One Hungarian matching for each stage and picture."""
        pairs, sizes = match_stages(self.cost, prediction, targets)
        own = assignment_of(pairs_on(prediction.logits.device, pairs), sizes, len(targets))
        return Match(own, own)

    def with_cost(self, cost: Cost) -> PerStage:
        """The same by another cost."""
        return PerStage(cost)


@dataclass(frozen=True)
class UnionOfStages(MatchingPolicy):
    """Labels by each stage's own matching, boxes by the union over all stages (D-FINE's GO-LSD).

    Of the pairs that any stage chose, the most frequent come first and each query keeps the first: a query has one
    target at most, a target may have several queries. Ties fall to the smaller target (the official code leaves them
    to an unstable sort). All stages refine the same boxes of the same queries this way.
    """

    cost: Cost = field(default_factory=FocalCost)

    def __call__(self, prediction: Prediction, targets: Targets) -> Match:
        """One Hungarian matching for each stage and picture, and their union."""
        pairs, sizes = match_stages(self.cost, prediction, targets)
        union = unite(pairs, queries=prediction.logits.shape[2], targets=len(targets))
        packed = pairs_on(prediction.logits.device, np.concatenate((pairs, union), axis=1))
        own, shared = packed.split((pairs.shape[1], union.shape[1]), dim=1)
        return Match(
            assignment_of(own, sizes, len(targets)),
            assignment_of(shared, (union.shape[1],), union.shape[1]).repeat(len(sizes)),
        )

    def with_cost(self, cost: Cost) -> UnionOfStages:
        """The same by another cost."""
        return UnionOfStages(cost)


@dataclass(frozen=True, eq=False)
class Fixed(MatchingPolicy):
    """A group that knows its assignment (denoising, teachers' queries), for labels and boxes alike."""

    assignment: Assignment  # of each stage, or stage-free: one stage

    def __call__(self, prediction: Prediction, targets: Targets) -> Match:
        """The known pairs, repeated where they are the same at every stage."""
        pairs = self.assignment
        if pairs.stages == 1:
            pairs = pairs.repeat(len(prediction.stages))
        return Match(pairs, pairs)


@torch.no_grad()
def costs(cost: Cost, prediction: Prediction, targets: Targets) -> Float[Tensor, "S B G Q"]:
    """Costs of all stages, on each picture's own targets only (G is the largest number of them).

    Computed in fp32 whatever the prediction's dtype and the autocast. NaN counts as 1 and infinities as the largest
    finite numbers, so that a matching always exists; the objective is who complains about the loss.
    """
    labels, truth = targets.padded(label=0)
    with torch.autocast(prediction.logits.device.type, enabled=False):
        stages, _, queries, _ = prediction.logits.shape
        column = labels[None, :, None].expand(stages, -1, queries, -1)
        # queries stand last: the long, dense dimension
        logits = prediction.logits.gather(-1, column).transpose(-1, -2).float().contiguous()
        result = cost(logits, prediction.boxes.float().unsqueeze(2), truth.float()[None, :, :, None])
        return torch.nan_to_num(result, nan=1.0)


def match_stages(cost: Cost, prediction: Prediction, targets: Targets) -> tuple[np.ndarray, tuple[int, ...]]:
    """Optimal one-to-one pairs for each stage and picture, on the host.

    Returns:
        Rows (stage, image, query, target) of all pairs, int64 [4, M], sorted by stage, picture and query; and how
        many pairs each stage has. A picture with more targets than queries leaves the dearest targets unmatched.
    """
    stages, _, queries, _ = prediction.logits.shape
    size = sum(min(queries, count) for count in targets.counts)
    pairs = np.empty((4, stages, size), dtype=np.int64)
    if size:
        table = costs(cost, prediction, targets).cpu().numpy()  # the one copy to the host
        pairs[0] = np.arange(stages)[:, None]
        for stage in range(stages):
            place = 0
            for image, (start, count) in enumerate(zip(targets.starts, targets.counts, strict=True)):
                if count == 0:
                    continue
                rows, columns = lsap(table[stage, image, :count].T)
                block = pairs[1:, stage, place : place + len(rows)]
                block[0], block[1], block[2] = image, rows, columns
                block[2] += start
                place += len(rows)
    return pairs.reshape(4, -1), (size,) * stages


def unite(pairs: np.ndarray, queries: int, targets: int) -> np.ndarray:
    """Union of the pairs of all stages in which every query has one target: the most frequent, then the smallest.

    Args:
        pairs: Rows (stage, image, query, target), int64 [4, M].
        queries: Q.
        targets: T, of all pictures together.

    Returns:
        Rows (0, image, query, target) of the union, int64 [4, U], sorted by picture and query.
    """
    _, image, query, target = pairs
    keys, votes = np.unique((image * queries + query) * targets + target, return_counts=True)
    ranked = keys[np.argsort(-votes, kind="stable")]
    _, first = np.unique(ranked // max(targets, 1), return_index=True)
    kept = ranked[first]
    owner, target = np.divmod(kept, max(targets, 1))
    return np.stack((np.zeros_like(kept), owner // queries, owner % queries, target))


def pairs_on(device: torch.device, pairs: np.ndarray) -> Int[Tensor, "4 M"]:
    """Rows (stage, image, query, target) on a device."""
    return torch.from_numpy(pairs).to(device, non_blocking=True)


def assignment_of(pairs: Int[Tensor, "4 M"], sizes: tuple[int, ...], count: int) -> Assignment:
    """An assignment of rows (stage, image, query, target), with one count for all stages."""
    stage, image, query, target = pairs.unbind()
    counts = torch.full((len(sizes),), float(count), device=pairs.device)
    return Assignment(stage, image, query, target, counts, sizes)
