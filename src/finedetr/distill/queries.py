"""Groups of queries that a teacher asks, and the student answers beside its own; in training only."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from finedetr.distill.stages import layer_stages, source_stages
from finedetr.distill.tokens import carry
from finedetr.errors import ConfigError
from finedetr.model.config import ModelConfig
from finedetr.records import Assignment, Edges, Guidance, Lesson, Prediction, QueryGroup, Targets, Who
from finedetr.supervise.matching import Cost, FocalCost, assignment_of, costs

__all__ = ["AuxiliaryQueries", "PredictionQueries", "QueryPrior", "QuerySource", "TeacherSource"]


@dataclass(frozen=True)
class QuerySource(ABC):
    """Makes a group of queries of a batch."""

    weight: float = 1.0
    """Of all losses of the group; 0: there is no such group."""

    @abstractmethod
    def __call__(self, targets: Targets, guidance: Guidance | None, student: ModelConfig) -> QueryGroup | None:
        """The group, or None where there is nothing to ask."""


@dataclass(frozen=True)
class TeacherSource(QuerySource, ABC):
    """Makes it of what a teacher says."""

    teacher: Who = "frozen"
    """Who asks."""

    def __call__(self, targets: Targets, guidance: Guidance | None, student: ModelConfig) -> QueryGroup | None:
        """The group, or None while the teacher is silent."""
        lesson = None if guidance is None else guidance.of(self.teacher)
        if guidance is None or lesson is None or self.weight == 0:
            return None
        group = self.group(targets, lesson, student, guidance.size)
        return replace(group, weight=group.weight * self.weight * lesson.strength)

    @abstractmethod
    def group(self, targets: Targets, lesson: Lesson, student: ModelConfig, size: tuple[int, int]) -> QueryGroup:
        """The group, before the weight."""

    @abstractmethod
    def borrows(self, student: ModelConfig, teacher: ModelConfig) -> tuple[str, ...]:
        """What of a teacher's queries is taken over as it is, and has to be as wide as the student's.

        Raises:
            ConfigError: The student can make no queries of the teacher's.
        """


@dataclass(frozen=True)
class QueryPrior(TeacherSource):
    """The teacher's queries under the teacher's assignment (DETRDistill, eq. 10).

    A student that selects its queries makes them of its own pyramid at the teacher's cells (token transfer), and starts
    from the teacher's boxes; no space of the teacher has to be learned. One that has learned them takes the teacher's
    learned ones as they are, as published; where widths differ an adapter is learned.
    """

    top: int = 100
    """So many of the teacher's queries: those of targets at any stage first, then by score. 0: all."""
    content: Literal["own", "teacher"] = "own"
    """What they start with where the student could make it: its own, or what the teacher's start with."""
    points: Literal["teacher", "student"] = "teacher"
    """Who makes points of positions that are taken over (Conditional and Deformable DETR; the released code: the
    student)."""
    assign: Literal["teacher", "self"] = "teacher"
    """Who matches them: the teacher's own answers, or the student's (as the released code does)."""
    answers: bool = False
    """Hold the student to the teacher's answers, too, where the objective has PredictionDistillation."""

    def group(self, targets: Targets, lesson: Lesson, student: ModelConfig, size: tuple[int, int]) -> QueryGroup:
        """The teacher's queries, judged by the targets."""
        names, chosen = stages_of(student), _chosen(lesson, targets, self.top)
        known = _at_stages(lesson.match, source_stages(names, lesson.answers.stages))
        slot = chosen.new_zeros(lesson.trace.boxes.shape[:2]).scatter_(
            1, chosen, torch.arange(chosen.shape[1], device=chosen.device).expand_as(chosen)
        )
        group = QueryGroup(
            "prior",
            _as_boxes(_of(lesson.trace.boxes, chosen)),
            assignment=replace(known, query=slot[known.image, known.query]) if self.assign == "teacher" else None,
            taught=_answers_for(lesson.answers, names, chosen) if self.answers else None,
            own_points=self.points == "student",
        )
        return _started(group, lesson, student, size, chosen, self.content)

    def borrows(self, student: ModelConfig, teacher: ModelConfig) -> tuple[str, ...]:
        """See `TeacherSource`."""
        return _borrowed(student, teacher, self.content)


@dataclass(frozen=True)
class PredictionQueries(TeacherSource):
    """The teacher's queries, held to its answers by PredictionDistillation (OD-DETR); no target judges them."""

    teacher: Who = "average"
    top: int = 100
    """So many of the teacher's queries: those of targets at any stage first, then by score. 0: all."""
    content: Literal["own", "teacher"] = "own"
    """See `QueryPrior`."""

    def group(self, targets: Targets, lesson: Lesson, student: ModelConfig, size: tuple[int, int]) -> QueryGroup:
        """The teacher's queries, beside its answers."""
        chosen = _chosen(lesson, targets, self.top)
        nothing = torch.zeros(4, 0, dtype=torch.long, device=lesson.trace.boxes.device)
        group = QueryGroup(
            "prediction",
            _as_boxes(_of(lesson.trace.boxes, chosen)),
            assignment=assignment_of(nothing, (0,), 0),
            taught=_answers_for(lesson.answers, stages_of(student), chosen),
            by_targets=False,
        )
        return _started(group, lesson, student, size, chosen, self.content)

    def borrows(self, student: ModelConfig, teacher: ModelConfig) -> tuple[str, ...]:
        """See `TeacherSource`."""
        return _borrowed(student, teacher, self.content)


@dataclass(frozen=True)
class AuxiliaryQueries(TeacherSource):
    """The teacher's two least-cost queries for each target, which shall find that target again (OD-DETR).

    They come from every layer of the teacher (or from its last), with its boxes. Queries of one target do not see one
    another: first and second choices, and those of each layer, stand in blocks of their own.
    """

    teacher: Who = "average"
    ranks: int = 2
    """Queries for each target and layer."""
    content: Literal["state", "token"] = "state"
    """What they start with: the teacher's state, normalized, or what the query started with (of the teacher's cell in
    the student, where it comes from one)."""
    scope: Literal["per_stage", "total"] = "per_stage"
    """Of every layer of the teacher, or of the last alone."""
    max_queries: int = 300
    """Where there would be more, only the last layer's are taken, and where those are too many, one for each target."""
    isolate: bool = True
    """Whether the blocks are apart."""
    cost: Cost = field(default_factory=FocalCost)
    """By what the teacher's answers are judged."""

    def borrows(self, student: ModelConfig, teacher: ModelConfig) -> tuple[str, ...]:
        """See `TeacherSource`."""
        started = _borrowed(student, teacher, "own")
        if self.content == "token":
            return started
        return ("states", *(name for name in started if name == "positions"))

    def group(self, targets: Targets, lesson: Lesson, student: ModelConfig, size: tuple[int, int]) -> QueryGroup:
        """`ranks` · layers · G queries a picture; a batch without targets has one of weight 0."""
        layers = layer_stages(lesson.answers.stages)
        slots, ranks = max(*targets.counts, 1), min(self.ranks, lesson.answers.logits.shape[2])
        if self.scope == "total" or ranks * slots * len(layers) > self.max_queries:
            layers = layers[-1:]
        if ranks * slots > self.max_queries:
            ranks = 1
        table = costs(self.cost, _stages(lesson.answers, tuple(layers)), targets)
        if not len(targets):
            table = table.new_zeros(len(layers), targets.pictures, 1, lesson.answers.logits.shape[2])
        best = table.topk(ranks, dim=-1, largest=False).indices.permute(3, 0, 1, 2)  # [R, L, B, G]
        chosen = best.flatten(0, 1).transpose(0, 1).flatten(1, 2)  # [B, R·L·G]
        image = torch.arange(targets.pictures, device=best.device)[:, None]
        stage = torch.tensor(layers, device=best.device)[:, None, None]
        boxes = lesson.answers.boxes[stage, image, best]
        rows = ranks * len(layers)
        group = QueryGroup(
            "auxiliary",
            boxes.flatten(0, 1).transpose(0, 1).flatten(1, 2),
            blocked=self._blocked(targets, rows, slots),
            assignment=_slots(targets, rows, slots),
            weight=float(len(targets) > 0),
        )
        group = _started(group, lesson, student, size, chosen, "own")
        if self.content == "token":
            return group
        states = torch.stack(lesson.trace.states[-len(layers) :])[torch.arange(len(layers))[:, None, None], image, best]
        content = F.layer_norm(states.float(), states.shape[-1:])
        content = content.flatten(0, 1).transpose(0, 1).flatten(1, 2)
        return replace(group, content=_adapted(lesson, "states", content), tokens=None, slots=None)

    def _blocked(self, targets: Targets, rows: int, slots: int) -> Bool[Tensor, "B Q Q"]:
        """Blocks of each rank and layer are apart, and nobody sees a free place but that place itself."""
        device = targets.boxes.device
        place = torch.arange(rows * slots, device=device)
        counts = torch.tensor(targets.counts, device=device)
        free = (place % slots)[None] >= counts[:, None]
        blocked = free[:, None].expand(-1, len(place), -1)
        if self.isolate:
            blocked = blocked | (place[:, None] // slots != place[None] // slots)
        return blocked & (place[:, None] != place[None])


def stages_of(model: ModelConfig) -> tuple[str, ...]:
    """The stages at which a detector answers a group from outside, in training."""
    first = ("initial",) if model.decoder.boxes == "distributions" else ()
    return (*first, *(f"layer{index}" for index in range(model.decoder.layers)))


def _tokens(lesson: Lesson, student: ModelConfig, size: tuple[int, int]) -> Int[Tensor, "B Q"]:
    """The teacher's cells in the student's pyramid."""
    assert lesson.trace.tokens is not None
    shapes = tuple((-(-size[0] // stride), -(-size[1] // stride)) for stride in student.strides)
    return carry(lesson.trace.tokens, lesson.trace.shapes, shapes)


def _started(
    group: QueryGroup,
    lesson: Lesson,
    student: ModelConfig,
    size: tuple[int, int],
    chosen: Int[Tensor, "B P"],
    content: Literal["own", "teacher"],
) -> QueryGroup:
    """The group with what its queries start with: made by the student as its own are, or taken from the teacher's.

    Args:
        group: With boxes.
        lesson: The teacher's.
        student: What it is made of.
        size: Of its pictures.
        chosen: Which of the teacher's queries these are.
        content: See `QueryPrior.content`.
    """
    trace, decoder = lesson.trace, student.decoder
    if decoder.source == "proposals":
        return group
    if decoder.source == "points":
        assert trace.positions is not None
        group = replace(group, positions=_adapted(lesson, "positions", _of(trace.positions, chosen)))
    if content == "own" and decoder.source == "tokens" and trace.tokens is not None:
        return replace(group, tokens=_tokens(lesson, student, size).gather(1, chosen))
    if content == "own" and decoder.source == "mixed":  # learned for ranks: the rank of the teacher's among its own
        return replace(group, slots=chosen * decoder.queries // trace.boxes.shape[1])
    if decoder.attention == "conditional":  # starts at zero, as its own
        return replace(group, content=group.boxes.new_zeros(*chosen.shape, decoder.width))
    assert trace.content is not None
    return replace(group, content=_adapted(lesson, "content", _of(trace.content, chosen)))


def _borrowed(student: ModelConfig, teacher: ModelConfig, content: Literal["own", "teacher"]) -> tuple[str, ...]:
    """What `_started` takes from the teacher.

    Raises:
        ConfigError: It cannot.
    """
    own, other = student.decoder, teacher.decoder
    learned = own.attention == "deformable"  # content; with conditional attention it starts at zero
    if own.source == "points":
        if other.source not in ("points", "proposals"):
            raise ConfigError(
                f"queries of {student.name} are learned positions, and those of {teacher.name} have none to give",
                code="conflict",
                hint="A teacher with positions is a conditional or deformable model; or leave its queries away: "
                "--sources.QueryPrior.weight 0",
            )
        return ("positions", *(("content",) if learned else ()))
    if other.source == "points":
        raise ConfigError(
            f"queries of {student.name} start from boxes, and those of {teacher.name} from points",
            code="conflict",
            hint="A teacher with boxes is a model of any other kind; or leave its queries away: "
            "--sources.QueryPrior.weight 0",
        )
    made = own.source == "proposals" or (content == "own" and (own.source == "mixed" or other.selects))
    return ("content",) if learned and not (made and own.source != "anchors") else ()


def _adapted(lesson: Lesson, what: str, values: Float[Tensor, "B P D"]) -> Float[Tensor, "B P E"]:
    """What a teacher's queries have, without gradient, in the student's width."""
    values = values.detach().float()
    return values if lesson.adapt is None else lesson.adapt(what, 0, values)


def _as_boxes(references: Float[Tensor, "B P R"]) -> Float[Tensor, "B P 4"]:
    """Boxes, or points as boxes of no size."""
    return F.pad(references, (0, 4 - references.shape[-1]))


def _stages(answers: Prediction, chosen: tuple[int, ...]) -> Prediction:
    """The answers at some stages, without their distributions."""
    return Prediction(
        answers.logits[list(chosen)], answers.boxes[list(chosen)], tuple(answers.stages[index] for index in chosen)
    )


def _chosen(lesson: Lesson, targets: Targets, top: int) -> Int[Tensor, "B P"]:
    """Which of the teacher's queries are asked; whoever stands for a target at any stage is always among them."""
    score, match = lesson.answers.logits[-1].amax(-1).sigmoid(), lesson.match
    matched = torch.zeros_like(score)
    matched[match.image, match.query] = 2.0
    least = match.stages * max(targets.counts, default=0)
    count = min(max(top, least), score.shape[1]) if top else score.shape[1]
    return (score + matched).topk(count, dim=1).indices


def _of(values: Float[Tensor, "B Q N"], chosen: Int[Tensor, "B P"]) -> Float[Tensor, "B P N"]:
    return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))


def _answers_for(answers: Prediction, names: tuple[str, ...], chosen: Int[Tensor, "B P"]) -> Prediction:
    """A teacher's answers to some of its queries, at the student's stages."""
    stages = source_stages(names, answers.stages)
    said, edges = _stages(answers, stages), answers.edges
    image = torch.arange(len(chosen), device=chosen.device)[:, None]
    if edges is not None:
        start = layer_stages(answers.stages).start
        layers = [stages[index] - start for index in layer_stages(names)]
        edges = Edges(edges.logits[layers][:, image, chosen], _of(edges.anchors, chosen), edges.bins, edges.scale)
    return Prediction(said.logits[:, image, chosen], said.boxes[:, image, chosen], names, edges)


def _at_stages(pairs: Assignment, chosen: tuple[int, ...]) -> Assignment:
    """The pairs of some stages, in that order, counted anew."""
    starts = [0]
    for size in pairs.sizes:
        starts.append(starts[-1] + size)
    device = pairs.stage.device
    rows = torch.cat([torch.arange(starts[index], starts[index + 1], device=device) for index in chosen])
    sizes = tuple(pairs.sizes[index] for index in chosen)
    stage = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor(sizes)).to(device)
    return Assignment(stage, pairs.image[rows], pairs.query[rows], pairs.target[rows], pairs.count[list(chosen)], sizes)


def _slots(targets: Targets, rows: int, slots: int) -> Assignment:
    """Place j of each row of a picture answers for its target j."""
    pairs, device = rows * len(targets), targets.boxes.device
    row = torch.arange(rows, device=device).repeat_interleave(len(targets), output_size=pairs)
    return Assignment(
        torch.zeros(pairs, dtype=torch.long, device=device),
        targets.image.repeat(rows),
        row * slots + targets.slot.repeat(rows),
        torch.arange(len(targets), device=device).repeat(rows),
        torch.full((1,), float(pairs), device=device),
        (pairs,),
    )
