"""What flows inside: small frozen records instead of dicts of strings.

Shape letters: B pictures, Q queries, C classes, K bins, S stages, L decoder layers, T targets, M pairs, D channels.
Boxes are (cx, cy, w, h) in [0, 1] of the network input.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

__all__ = ["Assignment", "Batch", "Edges", "Match", "Output", "Prediction", "QueryGroup", "Supervision", "Targets"]


@dataclass(frozen=True, slots=True)
class Targets:
    """The truth of a batch: T boxes, picture after picture, as three parallel tensors.

    `counts` are plain integers, so that nothing has to ask the device how many boxes a picture has.
    """

    labels: Int[Tensor, " T"]
    boxes: Float[Tensor, "T 4"]
    image: Int[Tensor, " T"]  # the picture of each box, non-decreasing
    counts: tuple[int, ...]  # boxes of each picture, length B

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def pictures(self) -> int:
        """How many pictures the batch has, those without boxes included."""
        return len(self.counts)

    @property
    def starts(self) -> tuple[int, ...]:
        """The row of each picture's first box."""
        total, starts = 0, []
        for count in self.counts:
            starts.append(total)
            total += count
        return tuple(starts)

    @classmethod
    def from_lists(cls, labels: list[Tensor], boxes: list[Tensor]) -> Targets:
        """Joins one [t] and one [t, 4] tensor a picture."""
        counts = tuple(len(b) for b in boxes)
        device = boxes[0].device if boxes else torch.device("cpu")
        image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))
        if not sum(counts):
            return cls(
                torch.zeros(0, dtype=torch.long, device=device),
                torch.zeros(0, 4, device=device),
                image.to(device),
                counts,
            )
        return cls(torch.cat(labels).long(), torch.cat(boxes).float().reshape(-1, 4), image.to(device), counts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Targets:
        """The same targets on another device."""
        return Targets(
            self.labels.to(device, non_blocking=non_blocking),
            self.boxes.to(device, non_blocking=non_blocking),
            self.image.to(device, non_blocking=non_blocking),
            self.counts,
        )


@dataclass(frozen=True, slots=True)
class Batch:
    """What a loader gives: pictures as bytes, their truth, and their names for messages."""

    images: UInt8[Tensor, "B 3 H W"]
    targets: Targets
    names: tuple[str, ...]

    def pin_memory(self) -> Batch:
        """Called by a loader that pins; pictures and targets both."""
        t = self.targets
        pinned = Targets(t.labels.pin_memory(), t.boxes.pin_memory(), t.image.pin_memory(), t.counts)
        return Batch(self.images.pin_memory(), pinned, self.names)


@dataclass(frozen=True, slots=True)
class Edges:
    """Boxes as distributions (D-FINE, FDR): how far each of the four edges stands from an anchor box.

    One entry for each decoder layer; `logits` are the accumulated ones, from which the boxes were decoded.
    """

    logits: Float[Tensor, "L B Q 4 K"]  # edges in the order left, top, right, bottom
    anchors: Float[Tensor, "B Q 4"]  # the initial boxes that all layers refine; no gradient
    bins: Float[Tensor, " K"]  # W(n): what each bin means, in units of size / scale
    scale: float  # reg_scale


@dataclass(frozen=True, slots=True)
class Prediction:
    """What the detector answers for one group of queries, at every stage (the last is the final answer).

    `edges`, where given, belong to the last L of the S stages.
    """

    logits: Float[Tensor, "S B Q C"]
    boxes: Float[Tensor, "S B Q 4"]
    stages: tuple[str, ...]  # S names, such as ("encoder", "initial", "layer0", "layer1", "layer2")
    edges: Edges | None = None


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which query answers for which target, at which stage: M pairs, as parallel index vectors.

    Pairs are sorted by stage. `count` is the normalizer of each stage, already averaged over processes and at least 1.
    """

    stage: Int[Tensor, " M"]
    image: Int[Tensor, " M"]
    query: Int[Tensor, " M"]
    target: Int[Tensor, " M"]  # rows of Targets
    count: Float[Tensor, " S"]

    def __len__(self) -> int:
        return self.stage.shape[0]

    @property
    def stages(self) -> int:
        """S."""
        return self.count.shape[0]

    def pick(self, values: Float[Tensor, "S B Q *N"]) -> Float[Tensor, M * N]:
        """The entry of every pair in a tensor over stages, pictures and queries."""
        return values[self.stage, self.image, self.query]

    def sum_by_stage(self, values: Float[Tensor, " M"]) -> Float[Tensor, " S"]:
        """Adds the pairs of each stage and divides by that stage's count."""
        total = torch.zeros(self.stages, dtype=values.dtype, device=values.device)
        return total.index_add(0, self.stage, values) / self.count

    def last(self, stages: int) -> Assignment:
        """The pairs of the last so many stages, renumbered from 0."""
        first = self.stages - stages
        if first == 0:
            return self
        keep = self.stage >= first
        return Assignment(
            self.stage[keep] - first, self.image[keep], self.query[keep], self.target[keep], self.count[first:]
        )


@dataclass(frozen=True, slots=True)
class Match:
    """The two assignments of a group: labels may be judged stage by stage, boxes by a union over stages (GO-LSD)."""

    labels: Assignment
    boxes: Assignment


@dataclass(frozen=True, slots=True)
class QueryGroup:
    """Queries from outside the detector, for training only; they attend to one another and to the image.

    Exactly one of `content` and `labels` is given: `labels` are class indices (C = padding) that the detector embeds.
    `assignment` is stage-free: its pairs hold at every stage and `stage` is all zero with a count of length 1.
    """

    name: str
    boxes: Float[Tensor, "B Q 4"]
    content: Float[Tensor, "B Q D"] | None = None
    labels: Int[Tensor, "B Q"] | None = None
    blocked: Bool[Tensor, "Q Q"] | None = None  # True: the row's query does not see the column's
    assignment: Assignment | None = None
    taught: Prediction | None = None  # what a teacher answered to these very queries
    sees_matching: bool = False
    weight: float = 1.0  # 0: keeps every parameter in the graph and teaches nothing (a batch without targets)


@dataclass(frozen=True, slots=True)
class Output:
    """All that the detector answers. In eval `groups` is empty and `matching` has the final stage only."""

    matching: Prediction
    groups: tuple[tuple[QueryGroup, Prediction], ...] = ()
    memory: tuple[Float[Tensor, "B D _ _"], ...] = ()  # the encoder's pyramid


@dataclass(frozen=True, slots=True)
class Supervision:
    """All that a loss term may look at. Every loss of every paper is a function of this record."""

    answers: Prediction
    match: Match
    targets: Targets
    teacher: Prediction | None = None

    @property
    def final(self) -> Prediction:
        """The final stage of the same group, without gradient: it teaches the earlier stages (GO-LSD)."""
        edges = self.answers.edges
        last = None
        if edges is not None:
            last = Edges(edges.logits[-1:].detach(), edges.anchors, edges.bins, edges.scale)
        return Prediction(
            self.answers.logits[-1:].detach(), self.answers.boxes[-1:].detach(), self.answers.stages[-1:], last
        )
