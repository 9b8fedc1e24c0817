"""What flows inside: small frozen records instead of dicts of strings.

Shape letters: B pictures, Q queries, C classes, K bins, S stages, L decoder layers, T targets, M pairs, D channels.
Boxes are (cx, cy, w, h) in [0, 1] of the network input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from finedetr.geometry import iou, iou_giou

__all__ = [
    "Assignment",
    "Batch",
    "Edges",
    "Guidance",
    "Lesson",
    "Match",
    "Output",
    "Prediction",
    "QueryGroup",
    "Supervision",
    "Targets",
    "Trace",
    "Who",
]

Who = Literal["frozen", "average"]
"""The two teachers: another detector that stays as it is, or the moving average of the student itself."""


@dataclass(frozen=True, slots=True)
class Targets:
    """The truth of a batch: T boxes, picture after picture, as three parallel tensors.

    `counts` are plain integers, so that nothing has to ask the device how many boxes a picture has. Pictures of which
    nobody knows the truth stand last and count no boxes; only teachers have something to say about them.
    """

    labels: Int[Tensor, " T"]
    boxes: Float[Tensor, "T 4"]
    image: Int[Tensor, " T"]  # the picture of each box, non-decreasing
    counts: tuple[int, ...]  # boxes of each picture, length B
    annotated: int | None = None  # of so many pictures, the first ones, the truth is known; None: of all

    def __len__(self) -> int:
        return sum(self.counts)

    @property
    def pictures(self) -> int:
        """How many pictures the batch has, those without boxes included."""
        return len(self.counts)

    @property
    def with_truth(self) -> int:
        """How many pictures the truth is known of."""
        return self.pictures if self.annotated is None else self.annotated

    @property
    def starts(self) -> tuple[int, ...]:
        """The row of each picture's first box."""
        total, starts = 0, []
        for count in self.counts:
            starts.append(total)
            total += count
        return tuple(starts)

    @property
    def slot(self) -> Int[Tensor, " T"]:
        """The place of each box within its own picture, from 0."""
        return torch.arange(len(self), device=self.image.device) - torch.searchsorted(self.image, self.image)

    def padded(self, label: int, slots: int | None = None) -> tuple[Int[Tensor, "B G"], Float[Tensor, "B G 4"]]:
        """Labels and boxes as one block a picture; free places hold `label` and a box of zeros.

        Args:
            label: What stands in free places.
            slots: G, at least the largest of `counts`, which is the default.
        """
        size = (self.pictures, max(self.counts, default=0) if slots is None else slots)
        labels = torch.full(size, label, dtype=torch.long, device=self.labels.device)
        boxes = torch.zeros(*size, 4, device=self.boxes.device, dtype=self.boxes.dtype)
        place = (self.image, self.slot)
        return labels.index_put_(place, self.labels), boxes.index_put_(place, self.boxes)

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
            self.annotated,
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
        pinned = Targets(t.labels.pin_memory(), t.boxes.pin_memory(), t.image.pin_memory(), t.counts, t.annotated)
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

    def first(self, pictures: int) -> Prediction:
        """The answers to the first so many pictures."""
        edges = self.edges
        if edges is not None:
            edges = Edges(edges.logits[:, :pictures], edges.anchors[:pictures], edges.bins, edges.scale)
        return Prediction(self.logits[:, :pictures], self.boxes[:, :pictures], self.stages, edges)


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which query answers for which target, at which stage: M pairs, as parallel index vectors.

    Pairs are sorted by stage; at one stage a query has one target at most. `count` is the normalizer of each stage:
    as a policy gives it, the number of boxes on this process; as a term sees it, averaged over processes and at
    least 1 (the objective does this, for all at once). `sizes` are plain integers, so that nothing has to ask the
    device where a stage begins.
    """

    stage: Int[Tensor, " M"]
    image: Int[Tensor, " M"]
    query: Int[Tensor, " M"]
    target: Int[Tensor, " M"]  # rows of Targets
    count: Float[Tensor, " S"]
    sizes: tuple[int, ...]  # pairs of each stage, length S

    def __len__(self) -> int:
        return sum(self.sizes)

    @property
    def stages(self) -> int:
        """S."""
        return len(self.sizes)

    def pick(self, values: Float[Tensor, "S B Q ..."]) -> Float[Tensor, "M ..."]:
        """The entry of every pair in a tensor over stages, pictures and queries."""
        return values[self.stage, self.image, self.query]

    def sum_by_stage(self, values: Float[Tensor, " M"]) -> Float[Tensor, " S"]:
        """Adds the pairs of each stage and divides by that stage's count."""
        if len(set(self.sizes)) == 1:
            return values.reshape(self.stages, -1).sum(1) / self.count
        return torch.stack([part.sum() for part in values.split(self.sizes)]) / self.count

    def last(self, stages: int) -> Assignment:
        """The pairs of the last so many stages, renumbered from 0."""
        first = self.stages - stages
        skip = sum(self.sizes[:first])
        return Assignment(
            self.stage[skip:] - first,
            self.image[skip:],
            self.query[skip:],
            self.target[skip:],
            self.count[first:],
            self.sizes[first:],
        )

    def repeat(self, stages: int) -> Assignment:
        """The pairs of a stage-free assignment (one stage), at each of so many stages."""
        pairs = len(self)
        return Assignment(
            torch.arange(stages, device=self.stage.device).repeat_interleave(pairs, output_size=stages * pairs),
            self.image.repeat(stages),
            self.query.repeat(stages),
            self.target.repeat(stages),
            self.count.expand(stages),
            self.sizes * stages,
        )


@dataclass(frozen=True, slots=True)
class Match:
    """The two assignments of a group: labels may be judged stage by stage, boxes by a union over stages (GO-LSD).

    `second` are further pairs for labels, which a teacher would have chosen (OD-DETR): a query may so have two targets.
    """

    labels: Assignment
    boxes: Assignment
    second: Assignment | None = None
    share: float = 1.0  # of its quality that a second target asks for, while a teacher is phased in


@dataclass(frozen=True, slots=True)
class QueryGroup:
    """Queries from outside the detector, for training only; they attend to one another and to the image.

    At most one of `content`, `labels`, `tokens` and `slots` is given: `labels` are class indices (C = padding) that the
    detector embeds, `tokens` are cells of its flattened pyramid, of which it makes queries as it makes its own, `slots`
    are places among its learned contents (DINO). None of them: it makes queries of boxes (Deformable DETR in two
    stages). `positions` are for detectors that do not make them of boxes (Conditional DETR, Deformable DETR in one
    stage); these look at the boxes' centers.
    `assignment` is stage-free (its pairs hold at every stage, `stage` is all zero with a count of length 1), or has the
    stages of the group's answers.
    """

    name: str
    boxes: Float[Tensor, "B Q 4"]
    content: Float[Tensor, "B Q D"] | None = None
    labels: Int[Tensor, "B Q"] | None = None
    tokens: Int[Tensor, "B Q"] | None = None
    slots: Int[Tensor, "B Q"] | None = None
    blocked: Bool[Tensor, "*B Q Q"] | None = None  # True: the row's query does not see the column's
    assignment: Assignment | None = None
    taught: Prediction | None = None  # what a teacher answered to these very queries
    by_targets: bool = True  # False: only what a teacher answered judges the group
    sees_matching: bool = False
    weight: float = 1.0  # 0: keeps every parameter in the graph and teaches nothing (a batch without targets)
    positions: Float[Tensor, "B Q D"] | None = None
    agnostic: bool = False  # classes do not count: every target is of class 0
    own_points: bool = False  # the detector makes points of the positions, as for its own; the boxes do not count


@dataclass(frozen=True, slots=True)
class Trace:
    """How the detector came to its answers, where all stages were asked for: what teachers show and students compare.

    A token is a cell of the pyramid, counted level after level (the finest first), row after row.
    """

    shapes: tuple[tuple[int, int], ...]  # height and width of each level
    tokens: Int[Tensor, "B Q"] | None  # which cell each matching query comes from; None: it is learned
    boxes: Float[Tensor, "B Q R"]  # where it starts to look: a box, or a point
    features: tuple[Float[Tensor, "B _ _ _"], ...]  # the backbone's maps
    necks: tuple[Float[Tensor, "B E _ _"], ...] = ()  # the same in the encoder's width, before it
    states: tuple[Float[Tensor, "B Q D"], ...] = ()  # behind each layer
    embedded: Float[Tensor, "B _ D"] | None = None  # all tokens in the space of queries; outside training only
    content: Float[Tensor, "B Q D"] | None = None  # what each matching query starts with
    positions: Float[Tensor, "B Q D"] | None = None  # its position, where the decoder does not make it of the box
    score: Callable[[Tensor], Tensor] | None = None  # tokens [B P] -> the encoder's logits of them [B P C]


@dataclass(frozen=True, slots=True)
class Output:
    """All that the detector answers. In eval `groups` is empty and `matching` has the final stage only.

    In training `groups` holds those that came from outside, and the proposals of a detector in two stages.
    """

    matching: Prediction
    groups: tuple[tuple[QueryGroup, Prediction], ...] = ()
    memory: tuple[Float[Tensor, "B D _ _"], ...] = ()  # the encoder's pyramid
    trace: Trace | None = None


@dataclass(frozen=True)
class Lesson:
    """What one teacher has to say about a batch, in the student's classes. Nothing of it has a gradient."""

    answers: Prediction  # to its own queries, at all of its stages
    trace: Trace
    memory: tuple[Float[Tensor, "B D _ _"], ...]  # its pyramid
    match: Assignment  # its own queries and the targets, at all of its stages
    known: Bool[Tensor, " C"] | None = None  # the student's classes that it knows; None: all
    strength: float = 1.0  # less than 1 while it is phased in
    adapt: Callable[[str, int, Tensor], Tensor] | None = None
    """(tap, level of the student, its map) -> the teacher's width; (what of queries, 0, the teacher's) -> the
    student's."""
    itself: bool = False  # it is the student, or its average: learned queries keep their places


@dataclass(frozen=True)
class Guidance:
    """What the teachers say about a batch."""

    size: tuple[int, int]  # height and width of the pictures that the student sees
    frozen: Lesson | None = None
    average: Lesson | None = None

    def of(self, who: Who) -> Lesson | None:
        """The lesson of one of them, if it speaks."""
        return self.frozen if who == "frozen" else self.average


@dataclass(frozen=True)
class Supervision:
    """All that a loss term may look at. Every loss of every paper is a function of this record.

    What several terms need is computed once, when the first asks for it.
    """

    answers: Prediction
    match: Match
    targets: Targets
    teacher: Prediction | None = None  # what a teacher answered to the same queries
    matching: Supervision | None = None  # of the detector's own queries, for a group from outside
    output: Output | None = None  # the whole answer, for the matching group only
    guidance: Guidance | None = None  # what the teachers say of it
    by_targets: bool = True  # whether the targets have a say in this group

    @cached_property
    def judged(self) -> Supervision:
        """The same for those pictures alone of which the truth is known: what terms about the targets look at."""
        known, t = self.targets.annotated, self.targets
        if known is None:
            return self
        return replace(
            self,
            answers=self.answers.first(known),
            targets=Targets(t.labels, t.boxes, t.image, t.counts[:known]),
            teacher=self.teacher and self.teacher.first(known),
            matching=self.matching and self.matching.judged,
        )

    @cached_property
    def final(self) -> Prediction:
        """The final stage of the same group, without gradient: it teaches the earlier stages (GO-LSD)."""
        edges = self.answers.edges
        last = None
        if edges is not None:
            last = Edges(edges.logits[-1:].detach(), edges.anchors, edges.bins, edges.scale)
        return Prediction(
            self.answers.logits[-1:].detach(), self.answers.boxes[-1:].detach(), self.answers.stages[-1:], last
        )

    @cached_property
    def boxes(self) -> tuple[Float[Tensor, "M 4"], Float[Tensor, "M 4"]]:
        """Answer and truth of each pair of `match.boxes`."""
        pairs = self.match.boxes
        return pairs.pick(self.answers.boxes).float(), self.targets.boxes[pairs.target].float()

    @cached_property
    def overlap(self) -> tuple[Float[Tensor, " M"], Float[Tensor, " M"]]:
        """IoU and generalized IoU of each pair of `match.boxes`, with gradient."""
        return iou_giou(*self.boxes)

    @cached_property
    def quality(self) -> Float[Tensor, " M"]:
        """IoU of each pair of `match.labels`, without gradient."""
        pairs = self.match.labels
        if pairs is self.match.boxes:
            return self.overlap[0].detach()
        return iou(pairs.pick(self.answers.boxes.detach()).float(), self.targets.boxes[pairs.target].float())
