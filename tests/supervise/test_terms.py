"""Loss terms: golden values, gradients against autograd, and the contract that every term keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finedetr.geometry import bin_values
from finedetr.records import Edges, Output, Prediction, Targets
from finedetr.supervise.denoising import Denoising
from finedetr.supervise.objective import Losses, Objective
from finedetr.supervise.terms import (
    BoxGIoU,
    BoxL1,
    FineGrainedLocalization,
    Focal,
    LocalizationDistillation,
    MatchabilityAware,
    QualityFocal,
    TaskAligned,
    Term,
    Varifocal,
    _EdgeDivergence,
    _LabelSum,
)
from tests.supervise import golden

ALL = [
    Focal(),
    Varifocal(),
    MatchabilityAware(),
    QualityFocal(),
    TaskAligned(),
    BoxL1(),
    BoxGIoU(),
    FineGrainedLocalization(),
    LocalizationDistillation(),
]
STAGES = ("encoder", "initial", "layer0", "layer1", "layer2")


def answers(pictures: int, queries: int, classes: int = 5, names: tuple[str, ...] = STAGES) -> Prediction:
    shape = (len(names), pictures, queries)
    corners = torch.randn(3, pictures, queries, 4, 33, requires_grad=True)
    return Prediction(
        torch.randn(*shape, classes).requires_grad_(),
        (torch.rand(*shape, 4) * 0.4 + 0.2).requires_grad_(),
        names,
        Edges(corners, torch.rand(pictures, queries, 4) * 0.4 + 0.2, bin_values(), 4.0),
    )


def truth(counts: tuple[int, ...], classes: int = 5) -> Targets:
    return Targets.from_lists(
        [torch.randint(classes, (n,)) for n in counts], [torch.rand(n, 4) * 0.4 + 0.2 for n in counts]
    )


def leaves(prediction: Prediction) -> list[Tensor]:
    assert prediction.edges is not None
    return [prediction.logits, prediction.boxes, prediction.edges.logits]


@pytest.mark.parametrize(
    ("term", "value"),
    [
        (Varifocal(), 1.4682),
        (MatchabilityAware(), 2.3536),
        (BoxL1(), 0.0650),
        (BoxGIoU(), 0.2629),
        (FineGrainedLocalization(), 10.5692),
    ],
)
def test_values_are_the_golden_ones(term: Term, value: float) -> None:
    assert term(golden.supervision()).tolist() == pytest.approx([value], abs=1e-4)


def test_distillation_has_the_golden_value_and_leaves_the_final_layer_out() -> None:
    s = golden.supervision(stages=2)
    term = LocalizationDistillation()
    assert term(s).tolist() == pytest.approx([0.0134], abs=1e-4)
    assert [s.answers.stages[i] for i in term.covers(s)] == ["layer0"]


# --- gradients ------------------------------------------------------------------------------------------------------


def focal(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    p = x.sigmoid()
    weight = y * 0.25 * (1 - p) ** 2 + (1 - y) * 0.75 * p**2
    return weight * F.binary_cross_entropy_with_logits(x, y, reduction="none")


def varifocal(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    weight = 0.75 * x.sigmoid().detach() ** 2 * (1 - y) + q * y
    return weight * F.binary_cross_entropy_with_logits(x, q * y, reduction="none")


def matchability(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    weight = x.sigmoid().detach() ** 1.5 * (1 - y) + y
    return weight * F.binary_cross_entropy_with_logits(x, q**1.5 * y, reduction="none")


def quality_focal(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    return (q * y - x.sigmoid()).abs() ** 2 * F.binary_cross_entropy_with_logits(x, q * y, reduction="none")


def aligned(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    s = x.sigmoid()
    t = (s**0.25 * q**0.75).detach() * y
    return (t - s).abs() ** 2 * F.binary_cross_entropy_with_logits(x, t, reduction="none")


def aligned_at_rest(x: Tensor, y: Tensor, q: Tensor) -> Tensor:
    s = x.sigmoid().detach()
    t = (s**0.25 * q**0.75).clamp(min=0.3) * y
    share = (t - s).abs() ** 2 * (0.25 * y + 0.75 * (1 - y))
    return share * F.binary_cross_entropy_with_logits(x, t, reduction="none")


@pytest.mark.parametrize(
    ("term", "formula"),
    [
        (TaskAligned(), aligned),
        (TaskAligned(moving=False, least=0.3, balance=0.25), aligned_at_rest),
        (Focal(), focal),
        (Varifocal(), varifocal),
        (MatchabilityAware(), matchability),
        (QualityFocal(), quality_focal),
    ],
)
def test_label_terms_equal_their_formula_and_its_gradient(
    term: Focal | Varifocal | MatchabilityAware | QualityFocal | TaskAligned,
    formula: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    x = (torch.randn(2, 3, 4, 5, dtype=torch.float64) * 4).requires_grad_()
    entry, quality = torch.tensor([0, 7, 63, 119]), torch.rand(4, dtype=torch.float64)
    dense = torch.zeros(120, dtype=torch.float64).index_put((entry,), quality).view_as(x)
    y = torch.zeros(120, dtype=torch.float64).index_fill(0, entry, 1).view_as(x)
    wanted = formula(x, y, dense).flatten(1).sum(1)
    found = _LabelSum.apply(x, entry, quality, term._background, term._foreground)
    torch.testing.assert_close(found, wanted)
    upstream = torch.tensor([0.3, -2.0], dtype=torch.float64)
    (slope,) = torch.autograd.grad(wanted, x, upstream)
    (mine,) = torch.autograd.grad(found, x, upstream)
    torch.testing.assert_close(mine, slope)


def test_label_terms_survive_extreme_logits() -> None:
    x = torch.tensor([-200.0, -90.0, 90.0, 200.0]).view(1, 1, 1, 4).requires_grad_()
    for term in (Focal(), Varifocal(), MatchabilityAware(), QualityFocal(), TaskAligned()):
        total = _LabelSum.apply(x, torch.tensor([0, 3]), torch.ones(2), term._background, term._foreground)
        (slope,) = torch.autograd.grad(total.sum(), x)
        assert bool(total.isfinite().all())
        assert bool(slope.isfinite().all())


def at_pair(term: TaskAligned, score: float, overlap: float) -> tuple[float, float]:
    """Value and slope of one pair."""
    p = torch.tensor([score], dtype=torch.float64)
    value, slope = term._foreground(p.logit(), p, torch.tensor([overlap], dtype=torch.float64))
    return value.item(), slope.item()


def test_alignment_rests_where_the_score_is_the_overlap() -> None:
    """The factor vanishes there, so no entropy is left; below it scores rise, above it they fall (spec 7.1, S3)."""
    for overlap in (0.1, 0.5, 0.9):
        assert at_pair(TaskAligned(), overlap, overlap) == pytest.approx((0, 0), abs=1e-12)
        assert (
            at_pair(TaskAligned(), overlap - 0.05, overlap)[1] < 0 < at_pair(TaskAligned(), overlap + 0.05, overlap)[1]
        )


def test_alignment_without_overlap_is_background() -> None:
    p = torch.tensor([0.02, 0.4, 0.97], dtype=torch.float64)
    term, x = TaskAligned(), p.logit()
    background = term._background(x, p)
    torch.testing.assert_close(background[0], -(p**2) * (1 - p).log())
    for mine, theirs in zip(term._foreground(x, p, torch.zeros_like(p)), background, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_factor_of_alignment_carries_most_of_its_gradient() -> None:
    """Near the target the gradient through the factor is hundreds of times the rest (spec 3.4)."""
    overlap = (0.61 / 0.57**0.25) ** (1 / 0.75)
    assert at_pair(TaskAligned(), 0.57, overlap)[1] / at_pair(TaskAligned(moving=False), 0.57, overlap)[1] > 200


def test_alignment_has_a_gradient_through_the_score_only() -> None:
    s = golden.supervision()
    s.answers.boxes.requires_grad_()
    s.answers.logits.requires_grad_()
    TaskAligned()(s).sum().backward()
    assert s.answers.boxes.grad is None
    assert s.answers.logits.grad.abs().min() > 0


def test_edge_divergence_equals_its_formula_and_passes_gradcheck() -> None:
    torch.manual_seed(0)
    layers = torch.randn(3, 2, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    teacher, share = torch.randn(1, 2, 2, 4, 5, dtype=torch.float64), torch.rand(2, 2, 2, dtype=torch.float64)
    divergence = F.kl_div(
        (layers[:-1] / 5).log_softmax(-1), (teacher / 5).softmax(-1).expand(2, -1, -1, -1, -1), reduction="none"
    )
    wanted = 25 * (divergence.sum((-1, -2)) * share).sum((1, 2))
    torch.testing.assert_close(_EdgeDivergence.apply(layers, teacher, share, 5.0), wanted)
    assert torch.autograd.gradcheck(lambda x: _EdgeDivergence.apply(x, teacher, share, 5.0), (layers,))


def test_distillation_teaches_the_earlier_layers_only() -> None:
    s = golden.supervision(stages=2)
    s.answers.edges.logits.requires_grad_()
    s.answers.logits.requires_grad_()
    s.answers.boxes.requires_grad_()
    LocalizationDistillation()(s).sum().backward()
    assert s.answers.edges.logits.grad[0].abs().max() > 0
    assert s.answers.edges.logits.grad[1].abs().max() == 0
    assert s.answers.logits.grad is None
    assert s.answers.boxes.grad is None


@pytest.mark.parametrize("term", [Varifocal(), MatchabilityAware(), FineGrainedLocalization()])
def test_the_iou_is_a_weight_without_gradient(term: Term) -> None:
    s = golden.supervision()
    s.answers.boxes.requires_grad_()
    s.answers.logits.requires_grad_()
    s.answers.edges.logits.requires_grad_()
    term(s).sum().backward()
    assert s.answers.boxes.grad is None


# --- the contract of every term -------------------------------------------------------------------------------------


def judge(term: Term, prediction: Prediction, targets: Targets) -> Losses:
    """Also judges a denoising group; returns the losses after the backward pass."""
    group = Denoising(queries=10)(targets, classes=5)
    noisy = answers(targets.pictures, group.boxes.shape[1], names=STAGES[1:])
    losses = Objective((term,))(Output(prediction, ((group, noisy),)), targets)
    losses.total.backward()
    return losses


@pytest.mark.parametrize("term", ALL, ids=lambda t: type(t).__name__)
@pytest.mark.parametrize(
    ("counts", "queries"),
    [((0, 0), 4), ((2, 0), 4), ((9, 1), 4), ((4, 4), 4)],
    ids=["no targets", "an empty picture", "more targets than queries", "as many targets as queries"],
)
def test_every_term_is_finite_and_so_are_its_gradients(term: Term, counts: tuple[int, ...], queries: int) -> None:
    torch.manual_seed(0)
    prediction = answers(2, queries)
    losses = judge(term, prediction, truth(counts))
    assert all(value >= 0 for value in losses.by_name().values())
    gradients = [leaf.grad for leaf in leaves(prediction) if leaf.grad is not None]
    assert gradients, "at least one output stays in the graph"
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


@pytest.mark.parametrize("term", ALL, ids=lambda t: type(t).__name__)
def test_every_term_computes_in_single_precision(term: Term) -> None:
    s = golden.supervision(stages=2)
    a = s.answers
    half = Prediction(
        a.logits.bfloat16(), a.boxes.bfloat16(), a.stages, replace(a.edges, logits=a.edges.logits.bfloat16())
    )
    rounded = Prediction(
        half.logits.float(), half.boxes.float(), a.stages, replace(a.edges, logits=half.edges.logits.float())
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = term(replace(s, answers=half))
        high = term(replace(s, answers=rounded))
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, high, atol=0, rtol=0)
    torch.testing.assert_close(low, term(replace(s, answers=rounded)), atol=0, rtol=0)


@pytest.mark.parametrize("term", ALL, ids=lambda t: type(t).__name__)
def test_every_term_gives_one_value_for_each_stage_that_it_covers(term: Term) -> None:
    s = golden.supervision(stages=2)
    assert term(s).shape == (len(term.covers(s)),)
    plain = replace(s, answers=replace(s.answers, edges=None))
    assert term(plain).shape == (len(term.covers(plain)),)


def test_pairs_that_a_union_repeats_are_judged_like_each_stage_alone() -> None:
    torch.manual_seed(0)
    prediction, targets = answers(2, 6), truth((3, 2))
    together = Objective((BoxL1(), BoxGIoU(), FineGrainedLocalization()))(Output(prediction), targets).by_name()
    ((_, _, s),) = Objective((BoxL1(),)).supervise(Output(prediction), targets)
    pairs = s.match.boxes
    for stage, name in enumerate(STAGES):
        at = pairs.stage == stage
        picked = prediction.boxes[stage, pairs.image[at], pairs.query[at]]
        wanted = 5 * (picked - targets.boxes[pairs.target[at]]).abs().sum() / pairs.sizes[stage]
        assert together[f"matching/{name}/BoxL1"] == pytest.approx(wanted.item(), rel=1e-5)
