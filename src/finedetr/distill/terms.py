"""What is learned from a teacher's answers and features: terms of the objective, as those of `supervise`."""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from finedetr.distill.edges import edge_divergence
from finedetr.distill.stages import Grouping, layer_stages, links
from finedetr.distill.targets import Pairing, TeacherCost, pair_by_cost, pair_by_token
from finedetr.distill.tokens import shared_cells, slots_of, starts_of
from finedetr.geometry import giou, iou
from finedetr.records import Lesson, Supervision, Trace, Who
from finedetr.supervise.terms import Term, over_processes

__all__ = [
    "ContrastiveDistillation",
    "EncoderDistillation",
    "FeatureDistillation",
    "LogitsDistillation",
    "PredictionDistillation",
    "SecondBox",
    "TeacherTerm",
]


@dataclass(frozen=True)
class TeacherTerm(Term, ABC):
    """A term that compares the detector's own queries with a teacher's, layer by layer."""

    needs_truth: ClassVar[bool] = False
    teacher: Who = "frozen"
    stages: Grouping = "group"

    def covers(self, s: Supervision) -> range:
        """The layers, where the teacher speaks and the group is the detector's own; none without a weight."""
        silent = self.weight == 0 or s.output is None or self.lesson(s) is None
        return range(0) if silent else layer_stages(s.answers.stages)

    def lesson(self, s: Supervision) -> Lesson | None:
        """What the teacher of this term says."""
        return None if s.guidance is None else s.guidance.of(self.teacher)

    def links(self, s: Supervision, lesson: Lesson) -> tuple[tuple[int, int], ...]:
        """Layers of the student and of the teacher that belong together."""
        return links(len(layer_stages(s.answers.stages)), len(layer_stages(lesson.answers.stages)), self.stages)


@dataclass(frozen=True)
class LogitsDistillation(TeacherTerm):
    """The teacher's queries as targets: DETRDistill's Hungarian-matching distillation (Chang et al., 2023, eq. 3-5).

    Of each pair: BCE to all of the teacher's probabilities, L1 and generalized IoU to its box, and where both have
    them the divergence of the edges' distributions, carried into the student's frame. With `pairing="joint"`, `top=0`,
    `weighting="uniform"` and `normalizer="queries"` it is the released code, with `pairing="split"`,
    `negative_labels=False` and `normalizer="pairs"` the paper's; the defaults match only what says something.

    Attributes:
        pairing: How queries find each other; see `pair_by_cost`. `token`: by the cell they come from (or their place,
            if they are the student's own and learned), unassigned.
        top: The teacher's best so many queries; 0: all.
        label, l1, giou, edges: Weights of the parts of a pair.
        temperature: Of the edges' distributions. DDF has 5, between layers that measure from one anchor. Softened
            distributions lose their form on the way to another anchor, where bins are finer or coarser: at 5 a student
            could not reach its targets, and the term's gradient was as large as that of all other losses (LOG.md).
        negative_labels: Whether queries that stand for no target teach classes, too.
        weighting: A pair counts as much as the teacher's score (KD-DETR's foreground weighting), or 1.
        normalizer: The sum of what the pairs count, the number of pairs, or all of the student's queries.
    """

    pairing: Pairing = "common"
    top: int = 100
    label: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    edges: float = 0.25
    temperature: float = 1.0
    negative_labels: bool = True
    weighting: Literal["score", "uniform"] = "score"
    normalizer: Literal["weights", "pairs", "queries"] = "weights"

    def __call__(self, s: Supervision) -> Float[Tensor, " L"]:
        """Sum over the pairs of each layer, divided by the normalizer."""
        lesson = self.lesson(s)
        assert lesson is not None
        linked = self.links(s, lesson)
        cost = TeacherCost(self.label, self.l1, self.giou)
        pairs = (
            pair_by_token(s, lesson, linked, self.top)
            if self.pairing == "token"
            else pair_by_cost(s, lesson, linked, self.pairing, self.top, cost)
        )
        layer, other = torch.tensor(linked, device=pairs.link.device)[pairs.link].unbind(-1)
        mine, said = layer_stages(s.answers.stages), layer_stages(lesson.answers.stages)
        here = (layer + mine.start, pairs.image, pairs.student)
        there = (other + said.start, pairs.image, pairs.teacher)

        logits, probability = s.answers.logits[here], lesson.answers.logits[there].sigmoid()
        entropy = _entropy(logits, probability, lesson)
        if not self.negative_labels:
            entropy = entropy * pairs.positive
        boxes, truth = s.answers.boxes[here], lesson.answers.boxes[there].clamp(0, 1)
        value = self.label * entropy + _box_distance(boxes, truth, self.l1, self.giou)
        own, theirs = s.answers.edges, lesson.answers.edges
        if self.edges and own is not None and theirs is not None:
            value = value + self.edges * edge_divergence(
                theirs.logits[other, pairs.image, pairs.teacher],
                theirs,
                theirs.anchors[pairs.image, pairs.teacher],
                own.logits[layer, pairs.image, pairs.student],
                own,
                own.anchors[pairs.image, pairs.student],
                self.temperature,
            )
        share = pairs.valid * (probability.amax(-1) if self.weighting == "score" else 1.0)
        total, mass = (
            torch.zeros(len(mine), device=value.device).index_add(0, layer, part) for part in (value * share, share)
        )
        return lesson.strength * total / self._norm(s, layer, pairs.valid, mass)

    def _norm(self, s: Supervision, layer: Tensor, valid: Tensor, mass: Tensor) -> Tensor:
        match self.normalizer:
            case "weights":
                return over_processes(mass).clamp(min=1e-6)
            case "pairs":
                return over_processes(torch.zeros_like(mass).index_add(0, layer, valid)).clamp(min=1)
            case "queries":
                return torch.full_like(mass, s.answers.logits.shape[1] * s.answers.logits.shape[2])


@dataclass(frozen=True)
class PredictionDistillation(Term):
    """A teacher's own queries, asked of the student, held to what the teacher answered (OD-DETR; D3ETR; KD-DETR).

    Query by query, nothing is assigned: |p' - p|^γ BCE(p, p') over the classes, L1, generalized IoU, and the divergence
    of the edges; each query counts as much as the teacher's score.
    """

    needs_truth: ClassVar[bool] = False
    weight: float = 1.0
    label: float = 1.0
    l1: float = 5.0
    giou: float = 2.0
    edges: float = 0.25
    temperature: float = 5.0
    gamma: float = 2.0

    def covers(self, s: Supervision) -> range:
        """All stages of groups to whose queries a teacher gave answers."""
        return range(len(s.answers.stages)) if s.teacher is not None else range(0)

    def __call__(self, s: Supervision) -> Float[Tensor, " S"]:
        """Weighted mean over the queries."""
        assert s.teacher is not None
        x, target = s.answers.logits, s.teacher.logits.sigmoid()
        share = target.amax(-1)
        quality = (target - x.sigmoid()).abs() ** self.gamma
        entropy = F.binary_cross_entropy_with_logits(x, target, reduction="none")
        # -inf: a class of which the teacher knows nothing
        value = self.label * (quality * entropy * s.teacher.logits.isfinite()).sum(-1)
        value = value + _box_distance(s.answers.boxes, s.teacher.boxes, self.l1, self.giou)
        total = (value * share).flatten(1).sum(1)
        own, theirs = s.answers.edges, s.teacher.edges
        if self.edges and own is not None and theirs is not None:
            divergence = edge_divergence(
                theirs.logits, theirs, theirs.anchors, own.logits, own, own.anchors, self.temperature
            )
            layers = len(divergence)
            blurred = (divergence * share[-layers:]).flatten(1).sum(1)
            total = torch.cat((total[:-layers], total[-layers:] + self.edges * blurred))
        return total / over_processes(share.flatten(1).sum(1)).clamp(min=1e-6)


@dataclass(frozen=True)
class SecondBox(Term):
    """Boxes of second targets (OD-DETR): L1 and generalized IoU, counted by how far the box is there already.

    For policies whose teacher does not vote about boxes. A box that does not overlap asks for nothing.
    """

    weight: float = 1.0
    l1: float = 5.0
    giou: float = 2.0

    def covers(self, s: Supervision) -> range:
        """All stages of a group that has second targets."""
        return range(0) if s.match.second is None else super().covers(s)

    def __call__(self, s: Supervision) -> Float[Tensor, " S"]:
        """Sum over the second pairs, divided by the count."""
        pairs = s.match.second
        assert pairs is not None
        boxes, truth = pairs.pick(s.answers.boxes), s.targets.boxes[pairs.target]
        share = s.match.share * iou(boxes, truth).detach()
        return pairs.sum_by_stage(share * _box_distance(boxes, truth, self.l1, self.giou))


@dataclass(frozen=True)
class FeatureDistillation(TeacherTerm):
    """The teacher's maps where its good queries look: target-aware feature distillation (DETRDistill, eq. 6-9).

    On each level that both have: mean over cells and channels of (mask · (F_T - φ F_S))², summed over levels and over
    the teacher's layers. The mask of a layer is Σ q_n cos(query n, cell), at least 0.01, divided by its maximum; q is
    the score of the teacher's best (query, class) pairs times the IoU of their box with the truth.

    Attributes:
        tap: Maps of the encoder, of the backbone, or of the neck between them, which has the encoder's width.
        mode: `combined`: one mask of all queries (the released code); `per_query`: Σ q_n/M ‖ψ_n · ΔF‖² (eq. 9);
            `none`: no mask (FitNet).
        similarity: Of a query and a cell: the cosine, or the dot product (eq. 7).
        space: What of a cell is compared with queries: as the decoder's queries are made of it (where queries are
            learned, as the decoder sees it), or the map itself that is compared.
        top: The teacher's best so many (query, class) pairs.
        gamma: `per_query` only: q = score^γ · IoU^(1-γ).
        floor: The smallest value of the mask before it is divided.
        normalize: Compare channels with zero mean and unit variance over a batch (PKD).
        adapter: φ is a 1×1 convolution where the widths differ (`auto`), always, or never.
    """

    tap: Literal["encoder", "neck", "backbone"] = "encoder"
    mode: Literal["combined", "per_query", "none"] = "combined"
    similarity: Literal["cos", "dot"] = "cos"
    space: Literal["queries", "map"] = "queries"
    top: int = 100
    gamma: float = 0.5
    floor: float = 0.01
    normalize: bool = False
    adapter: Literal["auto", "conv", "none"] = "auto"

    def covers(self, s: Supervision) -> range:
        """The layers, where the two pyramids have a level in common."""
        lesson = self.lesson(s)
        if lesson is None or s.output is None or s.output.trace is None:
            return range(0)
        return super().covers(s) if self._levels(s.output.trace, lesson.trace) else range(0)

    def __call__(self, s: Supervision) -> Float[Tensor, " L"]:
        """One value for each layer of the student: that of all layers of the teacher that belong to it."""
        lesson, output = self.lesson(s), s.output
        assert lesson is not None
        assert output is not None
        assert output.trace is not None
        linked = self.links(s, lesson)
        mine, theirs = self._maps(output.memory, output.trace), self._maps(lesson.memory, lesson.trace)
        masks = None if self.mode == "none" else self._masks(s, lesson, linked)
        starts = starts_of(lesson.trace.shapes)
        values = []
        for here, there in self._levels(output.trace, lesson.trace):
            student = mine[here].float()
            if lesson.adapt is not None:
                student = lesson.adapt(self.tap, here, student)
            teacher = theirs[there].float()
            if self.normalize:
                student, teacher = _standard(student), _standard(teacher)
            energy = (teacher - student).square().mean(1).flatten(1)  # [B, H·W]
            if masks is None:
                values.append(energy.mean().expand(len(linked)))
                continue
            weight = masks[:, :, starts[there] : starts[there + 1]]
            if self.mode == "combined":
                weight = weight.clamp(min=self.floor)
                weight = (weight / weight.amax(-1, keepdim=True)).square()
            values.append((weight * energy).mean((1, 2)))
        layer = torch.tensor([k for k, _ in linked], device=values[0].device)
        stages = torch.zeros(len(self.covers(s)), device=layer.device)
        return lesson.strength * stages.index_add(0, layer, torch.stack(values).sum(0))

    @torch.no_grad()
    def _masks(self, s: Supervision, lesson: Lesson, linked: tuple[tuple[int, int], ...]) -> Float[Tensor, "L B T"]:
        """Σ q ψ of every cell (`combined`), or Σ q ψ² / M (`per_query`)."""
        queries, quality = self._queries(s, lesson, [layer for _, layer in linked])
        cells = self._cells(lesson)
        if self.similarity == "cos":
            queries, cells = F.normalize(queries, dim=-1), F.normalize(cells, dim=-1)
        similar = queries @ cells.transpose(-1, -2)  # [L, B, M, T]
        if self.mode == "per_query":
            similar = similar.square() / similar.shape[2]
        return (quality[..., None] * similar).sum(2)

    def _queries(
        self, s: Supervision, lesson: Lesson, layers: list[int]
    ) -> tuple[Float[Tensor, "L B M D"], Float[Tensor, "L B M"]]:
        """States of the teacher's best (query, class) pairs at some of its layers, and their quality."""
        first = layer_stages(lesson.answers.stages).start
        stages = [first + layer for layer in layers]
        scores, classes = lesson.answers.logits[stages].sigmoid(), lesson.answers.logits.shape[-1]
        score, place = scores.flatten(2).topk(min(self.top, scores[0, 0].numel()), dim=-1)
        query = place // classes
        states = torch.stack([lesson.trace.states[layer] for layer in layers]).float()
        chosen = states.gather(2, query[..., None].expand(-1, -1, -1, states.shape[-1]))
        if not len(s.targets):
            return chosen, score
        boxes = lesson.answers.boxes[stages].gather(2, query[..., None].expand(-1, -1, -1, 4))
        _, truth = s.targets.padded(label=0)
        overlap = iou(boxes[:, :, :, None], truth[None, :, None]).amax(-1)
        # a picture without boxes goes by the score alone
        empty = torch.tensor([count == 0 for count in s.targets.counts], device=overlap.device)[None, :, None]
        if self.mode == "per_query":
            return chosen, torch.where(empty, score, score**self.gamma * overlap ** (1 - self.gamma))
        return chosen, torch.where(empty, score, score * overlap)

    def _levels(self, own: Trace, other: Trace) -> tuple[tuple[int, int], ...]:
        """Common levels at which there are maps to compare; an encoder may make more levels than it is given."""
        found = common_levels(own.shapes, other.shapes)
        if self.tap == "encoder":
            return found
        mine, theirs = (len(self._maps((), trace)) for trace in (own, other))
        return tuple((here, there) for here, there in found if here < mine and there < theirs)

    def _maps(self, memory: tuple[Tensor, ...], trace: Trace) -> tuple[Tensor, ...]:
        match self.tap:
            case "encoder":
                return memory
            case "neck":
                return trace.necks
            case "backbone":
                return trace.features

    def _cells(self, lesson: Lesson) -> Float[Tensor, "B T D"]:
        if self.space == "queries" and lesson.trace.embedded is not None:
            return lesson.trace.embedded.float()
        maps = lesson.trace.necks if self.tap == "neck" and self.space == "map" else lesson.memory
        return torch.cat([level.float().flatten(2) for level in maps], dim=2).transpose(1, 2)


@dataclass(frozen=True)
class EncoderDistillation(TeacherTerm):
    """Which cells are worth a query: the teacher's scores of the cells that either of the two has chosen.

    Binary cross-entropy to the teacher's probabilities, summed over classes and over the union of both choices on
    common levels, divided by the sum of the teacher's scores there. Not part of a paper (spec 6.3); it is for detectors
    whose encoders score classes.
    """

    def covers(self, s: Supervision) -> range:
        """The stage of the encoder, where both have one."""
        lesson = self.lesson(s)
        if lesson is None or s.output is None or s.output.trace is None or not self.weight:
            return range(0)
        scored = "encoder" in lesson.answers.stages and s.answers.stages[0] == "encoder"
        return range(1) if scored and common_levels(s.output.trace.shapes, lesson.trace.shapes) else range(0)

    def __call__(self, s: Supervision) -> Float[Tensor, " 1"]:
        """One value."""
        lesson, output = self.lesson(s), s.output
        assert lesson is not None
        assert output is not None
        own, other = output.trace, lesson.trace
        assert own is not None
        assert own.tokens is not None
        assert other.tokens is not None
        assert own.score is not None
        assert other.score is not None
        back = shared_cells(own.shapes, other.shapes).to(own.tokens.device)[own.tokens]
        here = shared_cells(other.shapes, own.shapes).to(own.tokens.device)[other.tokens]
        both = torch.cat((back >= 0, (here >= 0) & (slots_of(here, own.tokens) < 0)), dim=1)
        logits = own.score(torch.cat((own.tokens, here.clamp(min=0)), dim=1))
        with torch.no_grad():
            probability = other.score(torch.cat((back.clamp(min=0), other.tokens), dim=1)).sigmoid()
        entropy = _entropy(logits, probability, lesson)
        total, mass = (entropy * both).sum(), (probability.amax(-1) * both).sum()
        return lesson.strength * (total / over_processes(mass[None]).clamp(min=1e-6))


@dataclass(frozen=True)
class ContrastiveDistillation(TeacherTerm):
    """A student's state shall be told among all of the batch by that of its teacher's query (DETRDistill's code).

    InfoNCE of the pairs of one joint assignment, behind a projection of either side that is learned along and part of
    no detector. It is not in the paper.

    Attributes:
        temperature: T.
    """

    weight: float = 0.2
    temperature: float = 0.07

    def covers(self, s: Supervision) -> range:
        """The layers, where there are projections."""
        lesson = self.lesson(s)
        return super().covers(s) if lesson is not None and lesson.adapt is not None else range(0)

    def __call__(self, s: Supervision) -> Float[Tensor, " L"]:
        """Mean over the pairs of each link, summed over the teacher's layers of each layer of the student."""
        lesson, output = self.lesson(s), s.output
        assert lesson is not None
        assert lesson.adapt is not None
        assert output is not None
        assert output.trace is not None
        linked = self.links(s, lesson)
        pairs = pair_by_cost(s, lesson, linked, "joint", 0, TeacherCost())
        values = []
        for index, (layer, other) in enumerate(linked):
            at = pairs.link == index
            image, student, teacher = pairs.image[at], pairs.student[at], pairs.teacher[at]
            mine = lesson.adapt("contrast", 0, output.trace.states[layer][image, student].float())
            said = lesson.adapt("contrasted", 0, lesson.trace.states[other][image, teacher].float())
            similar = F.normalize(mine, dim=-1) @ F.normalize(said, dim=-1).T / self.temperature
            values.append(F.cross_entropy(similar, torch.arange(len(similar), device=similar.device)))
        layers = torch.tensor([k for k, _ in linked], device=values[0].device)
        total = torch.zeros(len(self.covers(s)), device=layers.device)
        return lesson.strength * total.index_add(0, layers, torch.stack(values))


def common_levels(
    student: tuple[tuple[int, int], ...], teacher: tuple[tuple[int, int], ...]
) -> tuple[tuple[int, int], ...]:
    """Levels (of the student, of the teacher) whose maps have the same cells."""
    return tuple((here, teacher.index(shape)) for here, shape in enumerate(student) if shape in teacher)


def _standard(x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
    """Each channel with zero mean and unit variance over the batch."""
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), keepdim=True, correction=0)
    return (x - mean) * (variance + 1e-6).rsqrt()


def _entropy(logits: Float[Tensor, "*M C"], probability: Float[Tensor, "*M C"], lesson: Lesson) -> Float[Tensor, "*M"]:
    """Binary cross-entropy summed over the classes that the teacher knows."""
    entropy = F.binary_cross_entropy_with_logits(logits, probability, reduction="none")
    return (entropy if lesson.known is None else entropy * lesson.known).sum(-1)


def _box_distance(boxes: Float[Tensor, "*N 4"], truth: Float[Tensor, "*N 4"], l1: float, weight: float) -> Tensor:
    """Weighted sum of L1 and one minus generalized IoU."""
    return l1 * (boxes - truth).abs().sum(-1) + weight * (1 - giou(boxes, truth))
