"""Teachers of the classic hosts: queries by place or by cell, groups that answer as the own queries, other families."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from finedetr.distill.matching import TeacherVotes
from finedetr.distill.queries import AuxiliaryQueries, PredictionQueries, QueryPrior
from finedetr.distill.stability import agreement, hits, matched_by
from finedetr.distill.targets import pair_by_token
from finedetr.distill.teachers import Teacher, Teachers, build_adapters
from finedetr.distill.terms import FeatureDistillation, LogitsDistillation
from finedetr.distill.tokens import known_as, same_queries, slots_of
from finedetr.errors import ConfigError
from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.recipes import build
from finedetr.records import Guidance, Lesson, Output, QueryGroup, Targets
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import BoxL1
from finedetr.train.recipe import Recipe
from finedetr.train.step import Precision, Source, step
from tests.distill.small import batch
from tests.model.classic import CLASSES, RECIPES, random_detector, small
from tests.train.tiny import TINY

CPU = Precision("fp32", torch.device("cpu"))
OWN = {
    **RECIPES,
    "deformable-detr-r50-single": "deformable-detr",
    "deformable-detr-r50-single-dc5": "deformable-detr",
}
LEARNED = [name for name, recipe in OWN.items() if recipe != "dino" and "two" not in name]


def host(name: str, **decoder: Any) -> ModelConfig:
    return TINY if name == "dfine" else small(name, layers=2, encoders=1, **decoder)


@cache
def fixed(name: str, seed: int = 0) -> Detector:
    """One for all tests; do not change it."""
    return random_detector(host(name), seed)


def taught(detector: Detector, counts: tuple[int, ...] = (3, 0), *, itself: bool = False) -> Lesson:
    return Teacher(detector.eval(), itself=itself)(*batch(counts, CLASSES))


def answer(detector: Detector, *groups: QueryGroup) -> Output:
    with torch.no_grad():
        output: Output = detector.eval()(batch()[0], groups, all_stages=True)
    return output


def sources(recipe: Recipe) -> tuple[Source, ...]:
    given: list[Source] = [
        lambda targets, guidance, made=source: made(targets, guidance, recipe.model)  # type: ignore[misc]
        for source in recipe.sources
    ]
    return tuple(given)


@pytest.mark.parametrize("fdr", [False, True], ids=["plain", "fdr"])
@pytest.mark.parametrize("name", OWN)
def test_a_teacher_of_the_same_weights_is_the_student_itself(name: str, fdr: bool) -> None:
    """X1 and O3: its queries answer as the student's own, and there is nothing to learn of it."""
    recipe = build(host(name), OWN[name], ("fdr",) * fdr + ("od-detr",), random_start=False)
    student = random_detector(recipe.model)
    lesson = taught(student, itself=True)
    made = PredictionQueries(top=0)(batch()[1], Guidance((64, 64), average=lesson), recipe.model)
    assert made is not None
    output = answer(student, made)
    assert output.trace is not None
    slots = same_queries(lesson, output.trace)
    assert torch.equal(slots.sort(-1).values, torch.arange(7).expand(2, 7))
    chosen = lesson.answers.logits[-1].amax(-1).sigmoid() + _stands(lesson)
    slots = slots.gather(1, chosen.topk(7, dim=1).indices)
    own, said = output.matching, output.groups[0][1]
    image, first = torch.arange(2)[:, None], len(own.stages) - len(said.stages)
    torch.testing.assert_close(said.logits, own.logits[first:, image, slots], atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(said.boxes, own.boxes[first:, image, slots], atol=2e-5, rtol=1e-4)
    losses = recipe.objective(output, batch()[1], Guidance((64, 64), average=lesson)).by_name()
    held = {key: value for key, value in losses.items() if key.startswith("prediction")}
    assert len(held) == len(said.stages)
    assert max(held.values()) < 2e-3
    second = recipe.objective.supervise(output, batch()[1], Guidance((64, 64), average=lesson))[0][2].match.second
    assert second is not None
    assert len(second) == 0


def _stands(lesson: Lesson) -> torch.Tensor:
    stands = torch.zeros(lesson.answers.logits.shape[1:3])
    stands[lesson.match.image, lesson.match.query] = 2
    return stands


@pytest.mark.parametrize("name", OWN)
def test_a_step_with_both_papers_is_finite_and_leaves_the_own_queries_alone(name: str) -> None:
    recipe = build(host(name), OWN[name], ("detrdistill", "od-detr"), random_start=False)
    narrow = replace(recipe.model, encoder=replace(recipe.model.encoder, width=32))
    narrow = replace(narrow, decoder=replace(narrow.decoder, width=32, layers=4))
    student, teacher = random_detector(recipe.model), random_detector(narrow, seed=3)
    adapters = build_adapters(recipe.objective.terms, student, teacher, sources=recipe.sources)
    assert ("positions0" in adapters.layers) == (recipe.model.decoder.source == "points")
    teachers = Teachers(Teacher(teacher), Teacher(random_detector(recipe.model, seed=1), itself=True), adapters)
    images, targets = batch()
    guidance = teachers(images, targets)
    groups = tuple(group for source in sources(recipe) if (group := source(targets, guidance)) is not None)
    assert [group.name for group in groups] == ["prior", "prediction", "auxiliary"]
    alone, beside = answer(student), answer(student, *groups)
    torch.testing.assert_close(beside.matching.logits, alone.matching.logits, atol=1e-4, rtol=1e-4)
    student.train()
    for dropped in student.modules():
        if hasattr(dropped, "dropout") and isinstance(dropped.dropout, float):
            dropped.dropout = 0.0
    losses = step(student, images, targets, sources(recipe), recipe.objective, CPU, teachers)
    losses.total.backward()
    assert all(map(torch.isfinite, losses.values()))
    assert {"matching/layer1/LogitsDistillation", "matching/layer1/FeatureDistillation"} <= losses.keys()
    assert losses["prior/layer1/BoxL1"] > 0
    assert all(p.grad is not None and p.grad.any() for p in adapters.parameters())
    assert losses["prediction/layer1/PredictionDistillation"] > 0
    assert losses["auxiliary/layer1/BoxL1"] > 0
    assert "matching/layer1/SecondBox" in losses
    for other in (teachers.frozen, teachers.average):
        assert other is not None
        assert all(p.grad is None for p in other.detector.parameters())


@pytest.mark.parametrize("name", LEARNED[:3])
def test_learned_queries_keep_their_places_and_strangers_have_none(name: str) -> None:
    student = fixed(name)
    own = answer(student).trace
    assert own is not None
    assert own.tokens is None
    itself, stranger = taught(student, itself=True), taught(fixed(name, 1))
    assert torch.equal(same_queries(itself, own), torch.arange(7).expand(2, 7))
    assert bool((same_queries(stranger, own) == -1).all())
    assert known_as(stranger, own) is None
    assert known_as(taught(fixed("dfine", 1)), own) is None
    assert matched_by(stranger, own) is None
    matched = matched_by(itself, own)
    assert matched is not None
    assert agreement(matched, matched) == hits(matched, matched) == 1
    pairs = pair_by_token(
        Objective((BoxL1(),)).supervise(answer(student), batch()[1])[0][2], itself, ((0, 0), (1, 1)), 0
    )
    assert torch.equal(pairs.student, pairs.teacher)
    assert bool(pairs.valid.all())


def test_a_stranger_votes_by_its_boxes_alone() -> None:
    config = host("conditional-detr-r50")
    student, stranger = random_detector(config), taught(random_detector(config, 1))
    output, targets = answer(student), batch()[1]
    guidance = Guidance((64, 64), frozen=stranger)
    for nearest, heard in ((0.0, True), (1.0, False)):
        votes = TeacherVotes(build(config, "conditional-detr", random_start=False).objective.policy)
        policy = replace(votes, teacher="frozen", nearest=nearest).informed(output, guidance)
        second = policy(output.matching, targets).second
        assert second is not None
        assert (len(second) > 0) == heard


def test_the_contents_of_dino_go_by_rank_and_its_boxes_by_cell() -> None:
    config = host("dino-r50")
    student, lesson = random_detector(config), taught(random_detector(host("dino-r50", queries=14), 1))
    made = QueryPrior(top=0)(batch()[1], Guidance((64, 64), lesson), config)
    assert made is not None
    assert made.slots is not None
    assert made.tokens is None
    assert torch.equal(made.slots.sort(-1).values, torch.arange(14).expand(2, 14) // 2)
    assert torch.equal(made.boxes.sort(1).values, lesson.trace.boxes.sort(1).values)
    full = replace(QueryPrior(top=0), content="teacher")(batch()[1], Guidance((64, 64), lesson), config)
    assert full is not None
    assert full.content is not None
    assert full.content.shape == (2, 14, 64)
    assert answer(student, made).groups[0][1].logits.shape == (2, 2, 14, CLASSES)


KINDS = ("dfine", "conditional-detr-r50", "dab-detr-r50", "deformable-detr-r50", "deformable-detr-r50-two-stage")
POINTS = ("conditional-detr-r50", "deformable-detr-r50")
GIVES_POSITIONS = (*POINTS, "deformable-detr-r50-two-stage")


@pytest.mark.parametrize("teacher", [*KINDS, "dino-r50"])
@pytest.mark.parametrize("student", [*KINDS, "dino-r50"])
def test_families_teach_one_another_where_a_query_means_something_in_both(student: str, teacher: str) -> None:
    config, detector, other = host(student), fixed(student), fixed(teacher, 1)
    makes_sense = teacher in GIVES_POSITIONS if student in POINTS else teacher not in POINTS
    for source in (QueryPrior(), QueryPrior(content="teacher"), AuxiliaryQueries(teacher="frozen")):
        if not makes_sense:
            with pytest.raises(ConfigError, match=r"queries of .* (points|none to give)"):
                build_adapters((), detector, other, sources=(source,))
            continue
        adapters = build_adapters((), detector, other, sources=(source,))
        guidance = Teachers(Teacher(other), adapters=adapters)(*batch())
        made = source(batch()[1], guidance, config)
        assert made is not None
        assert answer(detector, made).groups[0][1].logits.isfinite().all()


def test_what_needs_cells_says_so_where_there_are_none() -> None:
    terms = (LogitsDistillation(pairing="token"),)
    for student, teacher in (("conditional-detr-r50", "dfine"), ("dfine", "dab-detr-r50")):
        with pytest.raises(ConfigError, match="are learned and come from no cell"):
            build_adapters(terms, random_detector(host(student)), random_detector(host(teacher)))
    build_adapters(terms, random_detector(host("dino-r50")), random_detector(TINY))


def test_the_neck_is_compared_before_the_encoder() -> None:
    """As released for Deformable DETR: four levels, one of which the backbone does not have."""
    recipe = build(host("deformable-detr-r50"), "deformable-detr", ("detrdistill",), random_start=False)
    (term,) = (t for t in recipe.objective.terms if isinstance(t, FeatureDistillation))
    assert (term.tap, term.space, term.weight) == ("neck", "map", 1.0)
    student, teacher = random_detector(recipe.model), random_detector(recipe.model, 1)
    targets = batch()[1]
    output, lesson = answer(student), taught(teacher)
    assert output.trace is not None
    assert len(output.trace.necks) == 4
    assert len(output.trace.features) == 3

    def loss(lesson: Lesson, term: FeatureDistillation) -> torch.Tensor:
        return Objective((term,))(output, targets, Guidance((64, 64), lesson)).vector

    same = replace(lesson, trace=replace(lesson.trace, necks=output.trace.necks))
    assert loss(same, term).abs().max() == 0
    assert loss(lesson, term).min() > 0
    flat = replace(term, mode="none")
    wanted = sum(((a - b) ** 2).mean() for a, b in zip(output.trace.necks, lesson.trace.necks, strict=True))
    torch.testing.assert_close(loss(lesson, flat), torch.as_tensor(wanted).expand(2))
    backbone = replace(flat, tap="backbone")
    wanted = sum(((a - b) ** 2).mean() for a, b in zip(output.trace.features, lesson.trace.features, strict=True))
    torch.testing.assert_close(loss(lesson, backbone), torch.as_tensor(wanted).expand(2))


def test_tokens_of_odd_levels_are_carried_exactly() -> None:
    """A level that rounds up: three cells of stride 32 become two of stride 64."""
    config = host("dino-r50")
    detector = random_detector(config)
    images, targets = torch.rand(1, 3, 96, 96), Targets.from_lists([torch.zeros(0).long()], [torch.zeros(0, 4)])
    lesson = Teacher(detector, itself=True)(images, targets)
    made = PredictionQueries(top=0)(targets, Guidance((96, 96), average=lesson), TINY)
    assert made is not None
    assert lesson.trace.shapes[-1] == (2, 2)
    assert slots_of(lesson.trace.tokens, lesson.trace.tokens).min() >= 0  # type: ignore[arg-type]


def test_the_released_form_makes_points_by_the_students_own_layer() -> None:
    config = host("deformable-detr-r50")
    recipe = build(config, "deformable-detr", ("detrdistill-released",), random_start=False)
    (source,) = recipe.sources
    assert source == QueryPrior(assign="self", points="student", top=0)
    student, lesson = random_detector(config), taught(random_detector(config, 1))
    released, ours = (
        made(batch()[1], Guidance((64, 64), lesson), config) for made in (source, replace(source, points="teacher"))
    )
    assert released is not None
    assert ours is not None
    assert released.positions is not None
    assert released.assignment is None
    points = student.selection.points_of(released.positions)  # type: ignore[operator]
    moved = replace(ours, boxes=torch.cat((points, points), dim=-1))
    torch.testing.assert_close(answer(student, released).groups[0][1].boxes, answer(student, moved).groups[0][1].boxes)
    assert not torch.allclose(points, ours.boxes[..., :2], atol=1e-2)
    (contrast,) = (term for term in recipe.objective.terms if type(term).__name__ == "ContrastiveDistillation")
    assert contrast.weight == 0.2
