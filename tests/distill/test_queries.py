"""Groups that teachers ask: what they hold, who judges them, and that nobody of the detector's own sees them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from finedetr.distill.queries import AuxiliaryQueries, PredictionQueries, QueryPrior, QuerySource, stages_of
from finedetr.distill.stages import layer_stages
from finedetr.distill.terms import PredictionDistillation
from finedetr.distill.tokens import slots_of
from finedetr.records import Guidance, Lesson, Output, QueryGroup
from finedetr.supervise.denoising import Denoising
from finedetr.supervise.matching import FocalCost, PerStage, costs
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import BoxGIoU, BoxL1, FineGrainedLocalization, LocalizationDistillation, Varifocal
from tests.distill.small import DEEP, PLAIN, WIDE, batch, detector, lesson
from tests.train.tiny import TINY

SOURCES = [
    QueryPrior(),
    QueryPrior(assign="self"),
    QueryPrior(answers=True),
    PredictionQueries(),
    AuxiliaryQueries(),
    AuxiliaryQueries(content="token", scope="total"),
    AuxiliaryQueries(isolate=False, ranks=3),
]
WHOLE = Objective(
    (Varifocal(), BoxL1(), BoxGIoU(), FineGrainedLocalization(), LocalizationDistillation(), PredictionDistillation())
)


def group(source: QuerySource, taught: Lesson, counts: tuple[int, ...] = (3, 0), student: Any = TINY) -> QueryGroup:
    made = source(batch(counts)[1], Guidance((64, 64), taught, taught), student)
    assert made is not None
    return made


def answer(*groups: QueryGroup, config: Any = TINY, counts: tuple[int, ...] = (3, 0)) -> Output:
    with torch.no_grad():
        output: Output = detector(config)(batch(counts)[0], groups, all_stages=True)
    return output


@pytest.mark.parametrize("source", SOURCES, ids=str)
@pytest.mark.parametrize("counts", [(3, 0), (0, 0), (15, 2)], ids=str)
@pytest.mark.parametrize(("student", "teacher"), [(TINY, DEEP), (TINY, PLAIN), (PLAIN, TINY)], ids=lambda c: c.name)
def test_every_source_gives_a_group_that_is_judged(
    source: QuerySource, counts: tuple[int, ...], student: Any, teacher: Any
) -> None:
    if isinstance(source, AuxiliaryQueries):
        teacher = student  # it is the moving average; its states are of one width
    made = group(source, lesson(detector(teacher, 7), counts), counts, student)
    output = answer(made, config=student, counts=counts)
    objective = WHOLE if student is TINY else replace(WHOLE, policy=PerStage())
    losses = objective(output, batch(counts)[1]).by_name()
    own = {name: value for name, value in losses.items() if name.startswith(made.name)}
    assert own
    assert {name.split("/")[1] for name in own} == set(stages_of(student))
    terms = {name.split("/")[2] for name in own}
    assert ("PredictionDistillation" in terms) == (made.taught is not None)
    assert ("BoxL1" in terms) == made.by_targets


@pytest.mark.parametrize("source", SOURCES, ids=str)
def test_the_matching_group_is_blind_to_what_teachers_ask(source: QuerySource) -> None:
    made = group(source, lesson(detector(seed=7)))
    alone = answer(made)
    noise = torch.rand_like(made.boxes) * 0.3 + 0.2
    if made.content is not None:
        other = replace(made, boxes=noise, content=made.content + 7)
    else:
        other = replace(made, boxes=noise, tokens=made.tokens.flip(1))
    changed = answer(other)
    assert torch.equal(alone.matching.logits, changed.matching.logits)
    assert torch.equal(alone.matching.boxes, changed.matching.boxes)
    assert not torch.equal(alone.groups[0][1].logits, changed.groups[0][1].logits)
    plain = answer()
    torch.testing.assert_close(alone.matching.logits, plain.matching.logits, atol=1e-5, rtol=1e-5)


def test_groups_do_not_see_one_another() -> None:
    taught, targets = lesson(detector(seed=7)), batch()[1]
    noisy = Denoising(10)(targets, 5, torch.Generator().manual_seed(0))
    prior, auxiliary = group(QueryPrior(), taught), group(AuxiliaryQueries(), taught)
    together = answer(noisy, prior, auxiliary)
    for made, said in together.groups:
        (_, alone) = answer(made).groups[0]
        torch.testing.assert_close(said.logits, alone.logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(said.boxes, alone.boxes, atol=1e-5, rtol=1e-5)


def test_queries_of_the_same_detector_answer_as_its_own() -> None:
    """Token transfer (X1): a teacher with the student's weights, the same cells, the same boxes."""
    taught = lesson(detector())
    made = group(PredictionQueries(), taught)
    output = answer(made)
    said = output.groups[0][1]
    assert output.trace is not None
    assert made.tokens is not None
    slots = slots_of(made.tokens, output.trace.tokens)
    image = torch.arange(2)[:, None]
    torch.testing.assert_close(said.logits, output.matching.logits[1:, image, slots], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(said.boxes, output.matching.boxes[1:, image, slots], atol=1e-5, rtol=1e-5)
    losses = WHOLE(output, batch()[1]).by_name()
    held = [value for name, value in losses.items() if name.endswith("PredictionDistillation")]
    assert held == pytest.approx([0] * 3, abs=1e-3)


def test_the_prior_keeps_the_teachers_assignment_whatever_the_student_answers() -> None:
    taught, targets = lesson(detector(DEEP, 7)), batch()[1]
    made = group(QueryPrior(), taught)
    for config, top in ((TINY, 0), (WIDE, 0), (TINY, 1)):
        prior = QueryPrior(top=top)
        output = answer(group(prior, taught, student=config), config=config)
        match = WHOLE.supervise(output, targets)[1][2].match.labels
        for own, theirs in ((1, 3), (2, 5)):  # layers 0, 1 of two learn from layers 1, 3 of four
            at, there = match.stage == own, taught.match.stage == theirs
            boxes = output.groups[0][0].boxes[0, match.query[at]]
            found = dict(zip(match.target[at].tolist(), boxes.tolist(), strict=True))
            said = taught.trace.boxes[0, taught.match.query[there]].tolist()
            assert found == dict(zip(taught.match.target[there].tolist(), said, strict=True))
    assert made.tokens is not None
    assert made.boxes.shape == taught.trace.boxes.shape
    output = answer(group(QueryPrior(assign="self"), taught))
    mine = WHOLE.supervise(output, targets)[1][2].match.labels
    own = WHOLE.policy(output.groups[0][1], targets).labels
    assert torch.equal(mine.query, own.query)


def test_the_auxiliary_group_holds_the_two_cheapest_queries_of_each_layer() -> None:
    taught, targets = lesson(detector(seed=7), (3, 1)), batch((3, 1))[1]
    made = group(AuxiliaryQueries(), taught, (3, 1))
    assert made.boxes.shape == (2, 2 * 2 * 3, 4)
    table = costs(FocalCost(), taught.answers, targets)[list(layer_stages(taught.answers.stages))]
    for layer, image, target in [(0, 0, 2), (1, 0, 0), (1, 1, 0)]:
        cheapest = sorted(range(12), key=lambda q: float(table[layer, image, target, q]))[:2]
        for rank, query in enumerate(cheapest):
            slot = (rank * 2 + layer) * 3 + target
            assert torch.equal(made.boxes[image, slot], taught.answers.boxes[layer + 2, image, query])
    assert made.assignment is not None
    slots = {(0, (r * 2 + n) * 3 + t): t for r in range(2) for n in range(2) for t in range(3)}
    slots |= {(1, (r * 2 + n) * 3): 3 for r in range(2) for n in range(2)}
    a = made.assignment
    assert dict(zip(zip(a.image.tolist(), a.query.tolist(), strict=True), a.target.tolist(), strict=True)) == slots


def test_two_queries_of_one_target_are_blind_to_one_another_and_free_places_to_all() -> None:
    taught = lesson(detector(seed=7), (3, 1))
    made = group(AuxiliaryQueries(), taught, (3, 1))
    assert made.blocked is not None
    sees = ~made.blocked
    blocks = torch.arange(12) // 3
    assert torch.equal(sees[0], blocks[:, None] == blocks)
    assert torch.equal(sees[1][::3, ::3], torch.eye(4, dtype=torch.bool))
    free = torch.arange(12) % 3 > 0
    assert not (sees[1][:, free] & ~torch.eye(12, dtype=torch.bool)[:, free]).any()
    noise = replace(
        made, boxes=torch.where(free[None, :, None] & (torch.arange(2) == 1)[:, None, None], 0.4, made.boxes)
    )
    one, two = answer(made, counts=(3, 1)).groups[0][1], answer(noise, counts=(3, 1)).groups[0][1]
    assert torch.equal(one.logits[:, 1, ::3], two.logits[:, 1, ::3])


def test_too_many_are_taken_from_the_last_layer_alone() -> None:
    taught = lesson(detector(seed=7), (3, 1))
    made = group(AuxiliaryQueries(max_queries=11), taught, (3, 1))
    assert made.boxes.shape == (2, 2 * 3, 4)
    assert torch.equal(made.boxes, group(AuxiliaryQueries(scope="total"), taught, (3, 1)).boxes)


def test_a_silent_teacher_and_a_weight_of_zero_give_no_group() -> None:
    targets, taught = batch()[1], lesson(detector(seed=7))
    for source in (QueryPrior(), PredictionQueries(), AuxiliaryQueries()):
        assert source(targets, None, TINY) is None
        assert source(targets, Guidance((64, 64)), TINY) is None
        assert replace(source, weight=0.0)(targets, Guidance((64, 64), taught, taught), TINY) is None
        halved = replace(taught, strength=0.5)
        half = replace(source, weight=0.5)(targets, Guidance((64, 64), halved, halved), TINY)
        assert half is not None
        assert half.weight == 0.25


def test_nothing_of_a_teacher_has_a_gradient() -> None:
    taught = lesson(detector(seed=7))
    for source in SOURCES:
        made = group(source, taught)
        for tensor in (made.boxes, made.content):
            assert tensor is None or not tensor.requires_grad
