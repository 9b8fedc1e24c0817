"""What the terms of teachers say: held to plain loops, and to what must vanish where student and teacher agree."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from finedetr.distill.targets import Pairs, TeacherCost, pair_by_cost, pair_by_token
from finedetr.distill.teachers import Teacher, build_adapters
from finedetr.distill.terms import FeatureDistillation, LogitsDistillation, PredictionDistillation
from finedetr.geometry import giou
from finedetr.records import Guidance, Lesson, Output, Supervision
from finedetr.supervise.matching import PerStage
from tests.distill.small import DEEP, PLAIN, WIDE, batch, detector, judge, leaf, lesson, output_of, supervision
from tests.train.tiny import TINY

PAIRINGS = ("joint", "split", "common", "token")
LINKS = ((0, 0), (1, 1))


@pytest.fixture(scope="module")
def taught() -> Lesson:
    return lesson(detector(seed=7))


@pytest.fixture(scope="module")
def s(taught: Lesson) -> Supervision:
    return supervision(detector(), taught)


def pairs(s: Supervision, taught: Lesson, pairing: Any, top: int = 0) -> Pairs:
    return pair_by_cost(s, taught, LINKS, pairing, top, TeacherCost())


def asked(config: Any = TINY, seed: int = 0, counts: tuple[int, ...] = (3, 0)) -> Output:
    return output_of(detector(config, seed), counts)


# --- pairs ----------------------------------------------------------------------------------------------------------


def test_the_cost_is_the_naive_one() -> None:
    torch.manual_seed(0)
    logits, p = torch.randn(3, 4) * 3, torch.rand(2, 4)
    boxes, truth = torch.rand(3, 4) * 0.3 + 0.2, torch.rand(2, 4) * 0.3 + 0.2
    table = TeacherCost()(logits, boxes, p, truth)
    for j, i in itertools.product(range(2), range(3)):
        wanted = (
            F.binary_cross_entropy_with_logits(logits[i], p[j], reduction="sum") + 5 * (boxes[i] - truth[j]).abs().sum()
        )
        torch.testing.assert_close(table[j, i], wanted - 2 * giou(boxes[i], truth[j]), atol=1e-5, rtol=1e-5)


def test_the_joint_assignment_is_the_cheapest_of_all() -> None:
    """Six queries of the teacher against six of the student: all 720 permutations."""
    small = replace(TINY, decoder=replace(TINY.decoder, queries=6))
    told = lesson(detector(small, 7))
    s = supervision(detector(small), told)
    found = pairs(s, told, "joint")
    table = TeacherCost()(
        s.answers.logits[-1, 1], s.answers.boxes[-1, 1], told.answers.logits[-1, 1].sigmoid(), told.answers.boxes[-1, 1]
    )
    here = (found.link == 1) & (found.image == 1)
    cost = table[found.teacher[here], found.student[here]].sum()
    best = min(sum(table[j, i] for j, i in enumerate(order)) for order in itertools.permutations(range(6)))
    torch.testing.assert_close(cost, best)


@pytest.mark.parametrize("pairing", PAIRINGS[:3])
@pytest.mark.parametrize(("own", "theirs"), [(12, 20), (20, 12)])
def test_unequal_numbers_of_queries_give_as_many_pairs_as_the_smaller(pairing: str, own: int, theirs: int) -> None:
    told = lesson(detector(replace(TINY, decoder=replace(TINY.decoder, queries=theirs)), 7))
    s = supervision(detector(replace(TINY, decoder=replace(TINY.decoder, queries=own))), told)
    found = pairs(s, told, pairing)
    assert len(found.link) == len(LINKS) * 2 * min(own, theirs)
    for side in (found.student, found.teacher):
        keys = torch.stack((found.link, found.image, side)).T.tolist()
        assert len({tuple(key) for key in keys}) == len(keys)


def test_positives_meet_through_their_target(s: Supervision, taught: Lesson) -> None:
    found = pairs(s, taught, "common")
    own, theirs = s.match.labels, taught.match
    for link in range(2):
        here = (found.link == link) & (found.positive > 0)
        mine = dict(zip(*(x[own.stage == link + 2].tolist() for x in (own.target, own.query)), strict=True))
        said = dict(zip(*(x[theirs.stage == link + 2].tolist() for x in (theirs.target, theirs.query)), strict=True))
        wanted = {(mine[t], said[t]) for t in range(3)}
        assert set(zip(found.student[here].tolist(), found.teacher[here].tolist(), strict=True)) == wanted


@pytest.mark.parametrize("pairing", PAIRINGS[:3])
def test_only_the_best_of_the_teacher_and_those_of_targets_are_paired(
    s: Supervision, taught: Lesson, pairing: str
) -> None:
    found = pairs(s, taught, pairing, top=5)
    assert len(found.link) == 2 * 2 * 5
    assert found.positive.sum() == 2 * 3
    score = taught.answers.logits.amax(-1)
    rest = (found.image == 1) & (found.link == 0)
    assert set(found.teacher[rest].tolist()) == set(score[2, 1].topk(5).indices.tolist())


def test_by_token_pairs_come_from_one_cell(s: Supervision, taught: Lesson) -> None:
    found = pair_by_token(s, taught, LINKS, 0)
    assert s.output is not None
    assert s.output.trace is not None
    for image, student, teacher, valid in zip(found.image, found.student, found.teacher, found.valid, strict=True):
        own = s.output.trace.tokens[image]
        if valid:
            assert own[student] == taught.trace.tokens[image, teacher]
        else:
            assert taught.trace.tokens[image, teacher] not in own
    assert 0 < found.valid.mean() <= 1


# --- logits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_order_of_the_teachers_queries_means_nothing(pairing: Any) -> None:
    torch.manual_seed(0)
    told, output, targets = lesson(detector(seed=7)), asked(), batch()[1]
    order = torch.randperm(12)
    edges, a = told.answers.edges, told.answers
    assert edges is not None
    place = torch.empty(12, dtype=torch.long)
    place[order] = torch.arange(12)
    moved = replace(
        told,
        answers=replace(
            a,
            logits=a.logits[:, :, order],
            boxes=a.boxes[:, :, order],
            edges=replace(edges, logits=edges.logits[:, :, order], anchors=edges.anchors[:, order]),
        ),
        trace=replace(told.trace, tokens=told.trace.tokens[:, order]),
        match=replace(told.match, query=place[told.match.query]),
    )
    term = LogitsDistillation(pairing=pairing, top=8)
    torch.testing.assert_close(term(judge(output, targets, moved)), term(judge(output, targets, told)))


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_a_student_that_is_its_teacher_has_nothing_to_learn(pairing: Any) -> None:
    told = lesson(detector())
    told = replace(told, answers=replace(told.answers, boxes=told.answers.boxes.clamp(0.1, 0.9)))
    output, logits, boxes = leaf(replace(asked(), matching=told.answers))
    s = judge(output, batch()[1], told)
    if pairing != "token":
        found = pairs(s, told, pairing)
        assert torch.equal(found.student, found.teacher)
    value = LogitsDistillation(pairing=pairing, l1=0.0, giou=0.0, edges=0.0)(s)
    value.sum().backward()
    assert value.min() > 0  # the entropy of the teacher
    assert logits.grad is not None
    assert logits.grad.abs().max() < 1e-6
    apart = LogitsDistillation(pairing=pairing, label=0.0)(judge(output, batch()[1], told))
    torch.testing.assert_close(apart, torch.zeros(2), atol=1e-4, rtol=0)
    assert boxes.grad is not None
    assert boxes.grad.abs().max() == 0


def test_negatives_teach_boxes_only_where_the_paper_is_followed() -> None:
    told, targets = lesson(detector(seed=7), (0, 0)), batch((0, 0))[1]
    output, logits, boxes = leaf(asked(counts=(0, 0)))
    LogitsDistillation(pairing="split", negative_labels=False, edges=0.0)(judge(output, targets, told)).sum().backward()
    assert logits.grad is None or logits.grad.abs().max() == 0
    assert boxes.grad is not None
    assert boxes.grad.abs().max() > 0


def test_the_released_form_is_a_plain_sum_over_one_assignment(s: Supervision, taught: Lesson) -> None:
    term = LogitsDistillation(pairing="joint", top=0, weighting="uniform", normalizer="queries", edges=0.0)
    found = pairs(s, taught, "joint")
    wanted = torch.zeros(2)
    for link, image, i, j in zip(found.link, found.image, found.student, found.teacher, strict=True):
        x, p = s.answers.logits[link + 2, image, i], taught.answers.logits[link + 2, image, j].sigmoid()
        box, truth = s.answers.boxes[link + 2, image, i], taught.answers.boxes[link + 2, image, j].clamp(0, 1)
        wanted[link] += F.binary_cross_entropy_with_logits(x, p, reduction="sum").detach()
        wanted[link] += (5 * (box - truth).abs().sum() + 2 * (1 - giou(box, truth))).detach()
    torch.testing.assert_close(term(s).detach(), wanted / (2 * 12))


def test_a_pair_counts_as_much_as_the_teachers_score(s: Supervision, taught: Lesson) -> None:
    found = pairs(s, taught, "joint")
    wanted, mass = torch.zeros(2), torch.zeros(2)
    for link, image, i, j in zip(found.link, found.image, found.student, found.teacher, strict=True):
        x, p = s.answers.logits[link + 2, image, i], taught.answers.logits[link + 2, image, j].sigmoid()
        box, truth = s.answers.boxes[link + 2, image, i], taught.answers.boxes[link + 2, image, j].clamp(0, 1)
        value = F.binary_cross_entropy_with_logits(x, p, reduction="sum")
        value = value + 5 * (box - truth).abs().sum() + 2 * (1 - giou(box, truth))
        wanted[link] += value.detach() * p.max()
        mass[link] += p.max()
    term = LogitsDistillation(pairing="joint", top=0, edges=0.0)
    torch.testing.assert_close(term(s).detach(), wanted / mass)


def test_unknown_classes_are_not_taught(taught: Lesson) -> None:
    known = torch.tensor([True, True, False, True, False])
    partly = replace(
        taught,
        answers=replace(taught.answers, logits=taught.answers.logits.masked_fill(~known, -torch.inf)),
        known=known,
    )
    output, logits, _ = leaf(asked())
    LogitsDistillation()(judge(output, batch()[1], partly)).sum().backward()
    assert logits.grad is not None
    assert logits.grad[..., ~known].abs().max() == 0
    assert logits.grad[..., known].abs().max() > 0


# --- features -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["combined", "per_query", "none"])
@pytest.mark.parametrize("tap", ["encoder", "backbone"])
def test_equal_maps_have_no_loss_and_gradients_reach_the_student_alone(mode: Any, tap: Any) -> None:
    told, targets = lesson(detector()), batch()[1]
    output = asked()
    term = FeatureDistillation(mode=mode, tap=tap)
    torch.testing.assert_close(term(judge(output, targets, told)), torch.zeros(2))
    other = lesson(detector(seed=7))
    maps = tuple(m.clone().requires_grad_() for m in (output.memory if tap == "encoder" else output.trace.features))
    output = (
        replace(output, memory=maps)
        if tap == "encoder"
        else replace(output, trace=replace(output.trace, features=maps))
    )
    value = term(judge(output, targets, other))
    assert value.min() > 0
    value.sum().backward()
    assert all(m.grad is not None and m.grad.abs().max() > 0 for m in maps)
    assert not any(m.requires_grad for m in other.memory)


@pytest.mark.parametrize("floor", [0.01, 0.4])
def test_the_default_masks_the_difference_of_maps_as_written_out(s: Supervision, taught: Lesson, floor: float) -> None:
    """Mean of (mask · ΔF)², the mask Σ_n q_n cos(query n, cell), at least the floor, by its maximum on the level."""
    term = FeatureDistillation(top=7, floor=floor)
    queries, quality = term._queries(s, taught, [0, 1])
    cells = term._cells(taught)
    assert s.output is not None
    total, start = torch.zeros(2), 0
    for own, theirs in zip(s.output.memory, taught.memory, strict=True):
        size = own.shape[-2] * own.shape[-1]
        delta = (theirs - own).detach().flatten(2)
        for layer, image in itertools.product(range(2), range(2)):
            mask = torch.zeros(size)
            for n, cell in itertools.product(range(7), range(size)):
                similar = F.cosine_similarity(queries[layer, image, n], cells[image, start + cell], dim=0)
                mask[cell] += quality[layer, image, n] * similar
            mask = mask.clamp(min=floor)
            mask = mask / mask.max()
            assert floor / 7 < mask.min() <= mask.max() == 1
            total[layer] += (mask * delta[image]).square().mean() / 2
        start += size
    torch.testing.assert_close(term(s).detach(), total, rtol=1e-4, atol=1e-6)


def test_the_weight_of_cells_equals_the_sum_over_queries(s: Supervision, taught: Lesson) -> None:
    """Eq. 9 written out: Σ_n q_n / (M d H W) ‖ψ_n · ΔF‖², on one level and layer."""
    term = FeatureDistillation(mode="per_query", top=7, similarity="dot")
    queries, quality = term._queries(s, taught, [0, 1])
    cells = term._cells(taught)
    assert s.output is not None
    total = torch.zeros(2)
    start = 0
    for own, theirs in zip(s.output.memory, taught.memory, strict=True):
        height, width = own.shape[-2:]
        delta = (theirs - own).detach().flatten(2)
        for layer, image, n in itertools.product(range(2), range(2), range(7)):
            psi = cells[image, start : start + height * width] @ queries[layer, image, n]
            total[layer] += quality[layer, image, n] / 7 * (psi * delta[image]).square().mean() / 2
        start += height * width
    torch.testing.assert_close(term(s).detach(), total, rtol=1e-4, atol=1e-6)


def test_without_targets_quality_is_the_score(taught: Lesson) -> None:
    told = lesson(detector(seed=7), (0, 0))
    s = supervision(detector(), told, (0, 0))
    _, quality = FeatureDistillation(top=9)._queries(s, told, [1])
    torch.testing.assert_close(quality[0], told.answers.logits[-1].sigmoid().flatten(1).topk(9).values)


def test_more_pairs_than_there_are_is_all_of_them(s: Supervision, taught: Lesson) -> None:
    assert FeatureDistillation(top=1000)._queries(s, taught, [0])[1].shape == (1, 2, 60)


def test_widths_that_differ_are_adapted_and_the_adapter_learns() -> None:
    images, targets = batch()
    student, teacher = detector(), detector(WIDE, 7)
    term = FeatureDistillation()
    adapters = build_adapters((term,), student, teacher)
    assert {name: tuple(p.shape) for name, p in adapters.named_parameters() if "weight" in name} == {
        "layers.encoder0.weight": (32, 16, 1, 1),
        "layers.encoder1.weight": (32, 16, 1, 1),
    }
    told = replace(Teacher(teacher)(images, targets), adapt=adapters)
    term(judge(student(images, all_stages=True), targets, told)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in adapters.parameters())
    assert not list(build_adapters((term,), student, detector(DEEP)).parameters())


# --- predictions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tap", ["encoder", "neck", "backbone"])
def test_levels_that_only_one_has_are_passed_over(tap: Any) -> None:
    """Student at strides 16 and 32, teacher at 8, 16 and 32, both with maps of the same width."""
    levels = replace(TINY.decoder, points=(2, 2, 2))
    finer = replace(TINY, backbone=replace(TINY.backbone, stages=(1, 2, 3)), decoder=levels)
    student, taught = detector(), lesson(detector(finer, 7))
    output = output_of(student)
    assert output.trace is not None
    mine = {"encoder": output.memory, "neck": output.trace.necks, "backbone": output.trace.features}[tap]
    theirs = {"encoder": taught.memory, "neck": taught.trace.necks, "backbone": taught.trace.features}[tap]
    wanted = sum(((a - b) ** 2).mean() for a, b in zip(mine, theirs[1:], strict=True))
    found = FeatureDistillation(tap=tap, mode="none")(supervision(student, taught))
    torch.testing.assert_close(found, torch.as_tensor(wanted).expand(2))


def test_predictions_vanish_where_both_agree_and_without_any_score() -> None:
    told, output = lesson(detector()), asked()
    s = judge(output, batch()[1], told)
    same = replace(s, teacher=told.answers)
    torch.testing.assert_close(PredictionDistillation()(same), torch.zeros(4), atol=1e-4, rtol=0)
    silent = replace(told.answers, logits=torch.full_like(told.answers.logits, -torch.inf))
    assert PredictionDistillation()(replace(s, teacher=silent)).tolist() == [0] * 4


def test_predictions_are_the_weighted_mean_of_their_parts(s: Supervision, taught: Lesson) -> None:
    term = PredictionDistillation(edges=0.0)
    x, p = s.answers.logits[-1], taught.answers.logits[-1].sigmoid()
    entropy = (p - x.sigmoid()).abs() ** 2 * F.binary_cross_entropy_with_logits(x, p, reduction="none")
    box, truth = s.answers.boxes[-1], taught.answers.boxes[-1]
    value = entropy.sum(-1) + 5 * (box - truth).abs().sum(-1) + 2 * (1 - giou(box, truth))
    w = p.amax(-1)
    torch.testing.assert_close(term(replace(s, teacher=taught.answers))[-1], (w * value).sum() / w.sum())


# --- the contract ---------------------------------------------------------------------------------------------------

TERMS = [
    *(LogitsDistillation(pairing=p) for p in PAIRINGS),
    LogitsDistillation(pairing="joint", top=0, weighting="uniform", normalizer="queries"),
    LogitsDistillation(pairing="split", negative_labels=False, normalizer="pairs"),
    FeatureDistillation(),
    FeatureDistillation(mode="per_query", similarity="dot", space="map", normalize=True),
]


@pytest.mark.parametrize("term", TERMS, ids=range(len(TERMS)))
@pytest.mark.parametrize("counts", [(0, 0), (2, 0), (15, 1)], ids=str)
@pytest.mark.parametrize("teacher", [TINY, DEEP, PLAIN], ids=lambda c: c.name)
def test_every_term_is_finite_has_gradients_and_its_stages(term: Any, counts: tuple[int, ...], teacher: Any) -> None:
    taught = lesson(detector(teacher, 7), counts)
    student = detector()
    if isinstance(term, FeatureDistillation):
        taught = replace(taught, adapt=build_adapters((term,), student, detector(teacher, 7)))
    output, logits, boxes = leaf(output_of(student, counts))
    s = judge(output, batch(counts)[1], taught)
    value = term(s)
    assert value.shape == (len(term.covers(s)),) == (2,)
    assert [s.answers.stages[i] for i in term.covers(s)] == ["layer0", "layer1"]
    assert bool((value >= 0).all())
    assert bool(value.isfinite().all())
    if isinstance(term, LogitsDistillation):
        value.sum().backward()
        assert logits.grad is not None
        assert boxes.grad is not None
        assert bool((logits.grad.isfinite().all()) & boxes.grad.isfinite().all())


@pytest.mark.parametrize("term", TERMS, ids=range(len(TERMS)))
def test_nobody_speaks_of_other_groups_or_without_a_teacher(term: Any, s: Supervision) -> None:
    assert not len(term.covers(replace(s, output=None)))
    assert not len(term.covers(replace(s, guidance=None)))
    assert not len(term.covers(replace(s, guidance=Guidance((64, 64)))))


def test_plain_boxes_learn_from_distributions_and_the_other_way() -> None:
    for student, teacher in ((PLAIN, TINY), (TINY, PLAIN)):
        s = supervision(detector(student), lesson(detector(teacher, 7)), policy=PerStage())
        assert bool(LogitsDistillation()(s).isfinite().all())
