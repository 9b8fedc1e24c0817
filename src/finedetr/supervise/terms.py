"""Loss terms: each a published formula, evaluated once for all stages of a group.

A term sees a `Supervision` and returns one value for each stage that it judges, before its weight. It computes in
fp32 whatever comes in. Where a formula runs over every query and class (or bin), its gradient is written down beside
it and computed in the same pass; the tests hold it to autograd.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from finedetr.geometry import bracket, encode_edges, iou, to_xyxy
from finedetr.records import Assignment, Edges, Supervision, Targets

__all__ = [
    "BoxGIoU",
    "BoxL1",
    "FineGrainedLocalization",
    "Focal",
    "LocalizationDistillation",
    "MatchabilityAware",
    "QualityFocal",
    "TaskAligned",
    "Term",
    "Varifocal",
    "over_processes",
]


@dataclass(frozen=True)
class Term(ABC):
    """One summand of the objective."""

    needs_truth: ClassVar[bool] = True
    """Whether it says nothing about pictures whose truth nobody knows."""
    weight: float = 1.0

    @abstractmethod
    def __call__(self, s: Supervision) -> Float[Tensor, " N"]:
        """The value at each stage that `covers` names, normalized, before the weight."""

    def covers(self, s: Supervision) -> range:
        """The stages that this term judges. An empty range: nothing to say about this group.

        By default all stages of every group that the targets judge.
        """
        return range(len(s.answers.stages)) if s.by_targets else range(0)


def over_processes(values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """The mean of each value over all processes, without gradient: for normalizers that are no counts of pairs."""
    values = values.detach()
    if distributed.is_available() and distributed.is_initialized():
        values = values.clone()
        distributed.all_reduce(values)
        values /= distributed.get_world_size()
    return values


# --- labels ---------------------------------------------------------------------------------------------------------


# Value and slope of a summand as functions of the logit x, with p = σ(x); the foreground also of the pair's IoU.
Background = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Foreground = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def sum_over_classes(s: Supervision, background: Background, foreground: Foreground) -> Float[Tensor, " S"]:
    """Sum over all queries and classes, divided by the count.

    Args:
        s: What is judged.
        background: The summand where the query is not of this class, which is nearly everywhere.
        foreground: The summand where it is: at the pairs of `match.labels` and of `match.second`.
    """
    pairs, second, logits = s.match.labels, s.match.second, s.answers.logits.float()
    entry, quality = _entries(pairs, s.targets, logits), s.quality
    if second is not None:
        other = s.match.share * iou(second.pick(s.answers.boxes.detach()).float(), s.targets.boxes[second.target])
        entry = torch.cat((entry, _entries(second, s.targets, logits)))
        # one class of one query may be asked for twice: the better target counts, at both places
        best = torch.zeros(logits.numel(), device=logits.device)
        quality = best.scatter_reduce_(0, entry, torch.cat((quality, other)), "amax")[entry]
    total: Tensor = _LabelSum.apply(logits, entry, quality, background, foreground)  # type: ignore[no-untyped-call]
    return total / pairs.count


def _entries(pairs: Assignment, targets: Targets, logits: Float[Tensor, "S B Q C"]) -> Int[Tensor, " M"]:
    """Where in the flattened logits the class of each pair's target stands."""
    _, pictures, queries, classes = logits.shape
    row = (pairs.stage * pictures + pairs.image) * queries + pairs.query
    return row * classes + targets.labels[pairs.target]


class _LabelSum(torch.autograd.Function):
    """Adds up a label term over each stage: dense background, foreground at the given entries, gradient alongside."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "S B Q C"],
        entry: Int[Tensor, " M"],
        quality: Float[Tensor, " M"],
        background: Background,
        foreground: Foreground,
    ) -> Float[Tensor, " S"]:
        x = logits.contiguous()
        value, slope = background(x, x.sigmoid())
        matched = x.view(-1)[entry]
        at_pairs, slope_at_pairs = foreground(matched, matched.sigmoid(), quality)
        value.view(-1)[entry] = at_pairs
        slope.view(-1)[entry] = slope_at_pairs
        ctx.save_for_backward(slope)
        return value.flatten(1).sum(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " S"]) -> tuple[Tensor, None, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * grad[:, None, None, None], None, None, None, None


@dataclass(frozen=True)
class Focal(Term):
    """Focal loss (Lin et al., 2017, eq. 5), one binary problem a class: -α_t (1 - p_t)^γ log p_t."""

    weight: float = 1.0
    alpha: float = 0.25
    gamma: float = 2.0

    def __call__(self, s: Supervision) -> Float[Tensor, " S"]:
        """Sum over queries and classes, divided by the count."""
        return sum_over_classes(s, self._background, self._foreground)

    def _background(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """(1-α) p^γ softplus(x); the weight has a gradient, too."""
        entropy, share = F.softplus(x), (1 - self.alpha) * _power(p, self.gamma)
        return share * entropy, share * (self.gamma * (1 - p) * entropy + p)

    def _foreground(self, x: Tensor, p: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """The same for -x, with α."""
        entropy, share = F.softplus(-x), self.alpha * (1 - p) ** self.gamma
        return share * entropy, -share * (self.gamma * p * entropy + (1 - p))


@dataclass(frozen=True)
class Varifocal(Term):
    """Varifocal loss (Zhang et al., 2021, eq. 2) as RT-DETR and D-FINE use it: the target is the IoU q.

    q · BCE(p, q) at the pairs, α p^γ · BCE(p, 0) elsewhere; weights have no gradient.
    """

    weight: float = 1.0
    alpha: float = 0.75
    gamma: float = 2.0

    def __call__(self, s: Supervision) -> Float[Tensor, " S"]:
        """Sum over queries and classes, divided by the count."""
        return sum_over_classes(s, self._background, self._foreground)

    def _background(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """α p^γ softplus(x)."""
        return _constant_weight(x, p, self.alpha, self.gamma)

    def _foreground(self, x: Tensor, p: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """BCE with the target q, times q."""
        return quality * (F.softplus(x) - quality * x), quality * (p - quality)


@dataclass(frozen=True)
class MatchabilityAware(Term):
    """Varifocal's heir: a poor match still weighs fully, its target shrinks instead (DEIM, eq. 3).

    BCE(p, q^γ) at the pairs, α p^γ · BCE(p, 0) elsewhere; weights have no gradient.
    """

    weight: float = 1.0
    alpha: float = 1.0
    gamma: float = 1.5

    def __call__(self, s: Supervision) -> Float[Tensor, " S"]:
        """Sum over queries and classes, divided by the count."""
        return sum_over_classes(s, self._background, self._foreground)

    def _background(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """α p^γ softplus(x)."""
        return _constant_weight(x, p, self.alpha, self.gamma)

    def _foreground(self, x: Tensor, p: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """softplus(x) - q^γ x."""
        target = quality**self.gamma
        return F.softplus(x) - target * x, p - target


@dataclass(frozen=True)
class QualityFocal(Term):
    """Quality focal loss (Li et al., 2020, eq. 5): |q - p|^γ · BCE(p, q), q the IoU at the pairs and 0 elsewhere.

    With second targets (`Match.second`) it is OD-DETR's multi-target quality focal loss.
    """

    weight: float = 1.0
    gamma: float = 2.0

    def __call__(self, s: Supervision) -> Float[Tensor, " S"]:
        """Sum over queries and classes, divided by the count."""
        return sum_over_classes(s, self._background, self._foreground)

    def _background(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """p^γ softplus(x)."""
        return _modulated_background(x, p, self.gamma)

    def _foreground(self, x: Tensor, p: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """|q - p|^γ (softplus(x) - q x)."""
        return _modulated(x, p, quality, self.gamma)


@dataclass(frozen=True)
class TaskAligned(Term):
    """Task alignment learning (SD-DETR, eq. 6 and 7): a score is to say how good its own box is.

    |t - p|^γ · BCE(p, t) with t = p^α u^β at the pairs, u their IoU, and p^γ · BCE(p, 0) elsewhere; t has no gradient.
    The loss rests where p = t, which is p = u. Second targets (`Match.second`) are taken as in QualityFocal.

    Attributes:
        alpha: Of the score in the target.
        beta: Of the overlap in the target.
        gamma: Of the distance between score and target.
        moving: The factors |t - p|^γ and p^γ have a gradient, too. Without, it nearly vanishes around the target.
        least: No target lies below this (Align-DETR: 0.01).
        balance: The share of the pairs, and one minus it of all else, as in the focal loss (0.25 there); None: 1 both.
    """

    weight: float = 2.0
    alpha: float = 0.25
    beta: float = 0.75
    gamma: float = 2.0
    moving: bool = True
    least: float = 0.0
    balance: float | None = None

    def __call__(self, s: Supervision) -> Float[Tensor, " S"]:
        """Sum over queries and classes, divided by the count."""
        return sum_over_classes(s, self._background, self._foreground)

    def _background(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """p^γ softplus(x)."""
        value, slope = (
            _modulated_background(x, p, self.gamma) if self.moving else _constant_weight(x, p, 1.0, self.gamma)
        )
        return (value, slope) if self.balance is None else (value * (1 - self.balance), slope * (1 - self.balance))

    def _foreground(self, x: Tensor, p: Tensor, quality: Tensor) -> tuple[Tensor, Tensor]:
        """|t - p|^γ (softplus(x) - t x)."""
        target = (p**self.alpha * quality**self.beta).clamp(min=self.least)
        value, slope = _modulated(x, p, target, self.gamma, moving=self.moving)
        return (value, slope) if self.balance is None else (value * self.balance, slope * self.balance)


def _modulated_background(x: Tensor, p: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """p^γ softplus(x); the weight has a gradient, too."""
    entropy, share = F.softplus(x), _power(p, gamma)
    return share * entropy, share * (gamma * (1 - p) * entropy + p)


def _modulated(x: Tensor, p: Tensor, target: Tensor, gamma: float, *, moving: bool = True) -> tuple[Tensor, Tensor]:
    """|target - p|^γ (softplus(x) - target · x); with `moving`, the weight has a gradient, too."""
    entropy, distance = F.softplus(x) - target * x, p - target
    share = distance.abs() ** gamma
    slope = share * distance
    if moving:
        slope = slope + gamma * distance.sign() * distance.abs() ** (gamma - 1) * p * (1 - p) * entropy
    return share * entropy, slope


def _constant_weight(x: Tensor, p: Tensor, alpha: float, gamma: float) -> tuple[Tensor, Tensor]:
    """α p^γ softplus(x) with a constant weight, and its slope α p^(γ+1)."""
    share = _power(p, gamma)
    if alpha != 1.0:
        share.mul_(alpha)
    return F.softplus(x).mul_(share), share.mul_(p)


def _power(p: Tensor, gamma: float) -> Tensor:
    """p^γ as a new tensor; the published exponents without pow, which costs as much as all the rest."""
    if gamma == 1.5:
        return p.sqrt().mul_(p)
    if gamma == 2.0:
        return p * p
    return p**gamma


# --- boxes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BoxL1(Term):
    """Absolute difference of centre and size of matched boxes, summed over the four (DETR)."""

    weight: float = 5.0

    def __call__(self, s: Supervision) -> Float[Tensor, " S"]:
        """Mean over the pairs."""
        answer, truth = s.boxes
        return s.match.boxes.sum_by_stage((answer - truth).abs().sum(-1))


@dataclass(frozen=True)
class BoxGIoU(Term):
    """One minus the generalized IoU of matched boxes (Rezatofighi et al., 2019)."""

    weight: float = 2.0

    def __call__(self, s: Supervision) -> Float[Tensor, " S"]:
        """Mean over the pairs."""
        return s.match.boxes.sum_by_stage(1 - s.overlap[1])


# --- edges ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FineGrainedLocalization(Term):
    """FGL (D-FINE, eq. 4): cross-entropy of each edge with the two bins around the true distance, times the IoU.

    The nearer bin weighs more. Distances are measured from the initial boxes, so all layers have the same targets.
    Summed, not averaged, over the four edges, as in the official code.
    """

    weight: float = 0.15

    def covers(self, s: Supervision) -> range:
        """The stages that have distributions, which are the last."""
        stages = super().covers(s)
        return stages[len(stages) - _layers(s.answers.edges) :]

    def __call__(self, s: Supervision) -> Float[Tensor, " L"]:
        """Mean over the pairs."""
        edges = s.answers.edges
        if edges is None:
            return s.answers.logits.new_zeros(0)
        pairs = s.match.boxes.last(_layers(edges))
        first = len(s.match.boxes) - len(pairs)
        overlap, truth = s.overlap[0].detach()[first:], s.boxes[1][first:]
        anchors = edges.anchors[pairs.image, pairs.query].detach().float()
        lower, upper = bracket(encode_edges(anchors, to_xyxy(truth), edges.scale), edges.bins.float())
        scores = pairs.pick(edges.logits).float().log_softmax(-1)
        around = scores.gather(-1, torch.stack((lower, lower + 1), dim=-1))
        entropy = -(around[..., 0] * (1 - upper) + around[..., 1] * upper)
        return pairs.sum_by_stage(overlap * entropy.sum(-1))


@dataclass(frozen=True)
class LocalizationDistillation(Term):
    """DDF, the distillation of GO-LSD (D-FINE, eq. 6): earlier layers learn the final layer's distributions.

    T² KL(final ‖ layer) of each edge at temperature T. A matched query weighs by the IoU of its box in that layer, any
    other by the final layer's confidence; the means over both kinds of edges are mixed in the ratio of the square
    roots of their numbers. The final layer teaches and is not judged.

    Attributes:
        temperature: T.
        balance_of_matching: Mix the means in a denoising group in the matching group's ratio, as the official code
            does (and the published models were trained), instead of in the group's own.
    """

    weight: float = 1.5
    temperature: float = 5.0
    balance_of_matching: bool = True

    def covers(self, s: Supervision) -> range:
        """The stages that have distributions, without the final one."""
        stages, layers = super().covers(s), _layers(s.answers.edges)
        return stages[len(stages) - layers : len(stages) - min(layers, 1)]

    def __call__(self, s: Supervision) -> Float[Tensor, " N"]:
        """Balanced mean over all queries of the pictures; free of the count."""
        edges, teacher = s.answers.edges, s.final.edges
        if edges is None or teacher is None or _layers(edges) < 2:
            return s.answers.logits.new_zeros(0)
        share = self._share(s, _layers(edges) - 1)
        layers, taught = edges.logits.float(), teacher.logits.float()
        total: Tensor = _EdgeDivergence.apply(layers, taught, share, self.temperature)  # type: ignore[no-untyped-call]
        return total

    @torch.no_grad()
    def _share(self, s: Supervision, layers: int) -> Float[Tensor, "N B Q"]:
        """What each query's divergence, summed over its edges, counts."""
        pairs = s.match.boxes.last(layers + 1)
        judged = len(pairs) - pairs.sizes[-1]
        place = (pairs.stage[:judged], pairs.image[:judged], pairs.query[:judged])
        first = len(s.match.boxes) - len(pairs)
        confidence = s.final.logits.float().amax(-1).sigmoid()
        matched = torch.zeros(layers, *confidence.shape[1:], dtype=torch.bool, device=confidence.device)
        matched[place] = True
        share = confidence.repeat(layers, 1, 1)
        share[place] = s.overlap[0].detach()[first : first + judged]

        number = matched.sum((1, 2), dtype=torch.float32)
        others = matched[0].numel() - number
        of_matched, of_others = number.sqrt(), others.sqrt()
        if self.balance_of_matching and s.matching is not None:
            own = s.matching.match.boxes.sizes[-1]
            of_matched = torch.full_like(number, own**0.5)
            of_others = torch.full_like(number, (s.matching.answers.logits[0, :, :, 0].numel() - own) ** 0.5)
        both = 4 * (of_matched + of_others)
        mean = torch.stack(
            (of_others / (both * others.clamp(min=1)), of_matched / (both * number.clamp(min=1))), dim=-1
        )
        return share * torch.where(matched, mean[:, 1, None, None], mean[:, 0, None, None])


class _EdgeDivergence(torch.autograd.Function):
    """T² Σ share · KL(softmax(teacher/T) ‖ softmax(layer/T)) over all layers but the last, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        layers: Float[Tensor, "L B Q 4 K"],
        teacher: Float[Tensor, "1 B Q 4 K"],
        share: Float[Tensor, "N B Q"],
        temperature: float,
    ) -> Float[Tensor, " N"]:
        log_teacher = (teacher / temperature).log_softmax(-1)
        probability = log_teacher.exp()
        log_student = (layers[:-1] / temperature).log_softmax(-1)
        divergence = (log_teacher - log_student).mul_(probability).sum((-1, -2))
        share = share * temperature
        # the last layer has a place of its own here, so that the backward pass need not pad
        slope = torch.empty_like(layers, memory_format=torch.contiguous_format)
        torch.exp(log_student, out=slope[:-1])
        slope[:-1].sub_(probability).mul_(share[..., None, None])
        slope[-1].zero_()
        ctx.save_for_backward(slope)
        return (divergence * share).sum((1, 2)) * temperature

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Float[Tensor, " N"]) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * F.pad(grad, (0, 1))[:, None, None, None, None], None, None, None


def _layers(edges: Edges | None) -> int:
    """L, or 0 where there are no distributions."""
    return 0 if edges is None else edges.logits.shape[0]
