from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finedetr.distill.matching import TeacherVotes
from finedetr.distill.terms import SecondBox
from finedetr.geometry import iou
from finedetr.records import Guidance, Lesson, Match, Output, Targets
from finedetr.supervise.matching import PerStage, QualityCost, UnionOfStages
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import BoxGIoU, BoxL1, MatchabilityAware, QualityFocal, Term
from tests.distill.small import batch, detector, leaf, lesson, output_of

MANY = (6, 5)


def shuffled(output: Output, order: torch.Tensor) -> Output:
    """The same student with its queries in another order."""
    m, trace = output.matching, output.trace
    assert m.edges is not None
    assert trace is not None
    edges = replace(m.edges, logits=m.edges.logits[:, :, order], anchors=m.edges.anchors[:, order])
    return replace(
        output,
        matching=replace(m, logits=m.logits[:, :, order], boxes=m.boxes[:, :, order], edges=edges),
        trace=replace(trace, tokens=trace.tokens[:, order]),
    )


def match(output: Output, targets: Targets, taught: Lesson | None, votes: TeacherVotes) -> Match:
    guidance = None if taught is None else Guidance((64, 64), average=taught)
    return Objective((BoxL1(),), votes).supervise(output, targets, guidance)[0][2].match


def losses(term: Term, output: Output, targets: Targets, taught: Lesson | None, votes: TeacherVotes) -> torch.Tensor:
    return Objective((term,), votes)(
        output, targets, None if taught is None else Guidance((64, 64), average=taught)
    ).vector


@pytest.mark.parametrize("base", [UnionOfStages(), PerStage()])
def test_a_teacher_of_the_same_mind_changes_nothing(base: UnionOfStages | PerStage) -> None:
    output, targets, taught = output_of(detector()), batch()[1], lesson(detector())
    votes = TeacherVotes(base)
    found = match(output, targets, taught, votes)
    assert found.second is not None
    assert len(found.second) == 0
    for term in (QualityFocal(), MatchabilityAware(), BoxL1(), BoxGIoU()):
        torch.testing.assert_close(
            losses(term, output, targets, taught, votes), Objective((term,), base)(output, targets).vector
        )
    assert losses(SecondBox(), output, targets, taught, votes).abs().max() == 0


def test_a_teacher_of_another_mind_gives_second_targets_at_the_same_cells() -> None:
    output, targets, taught = output_of(detector(), MANY), batch(MANY)[1], lesson(detector(seed=7), MANY)
    found = match(output, targets, taught, TeacherVotes(nearest=1.0))
    assert output.trace is not None
    second = found.second
    assert second is not None
    assert len(second) > 0
    pairs = {
        (s, i, int(taught.trace.tokens[i, q]), t)
        for s, i, q, t in zip(*(x.tolist() for x in _columns(taught.match)), strict=True)
    }
    for s, i, q, t in zip(*(x.tolist() for x in _columns(second)), strict=True):
        assert (s, i, int(output.trace.tokens[i, q]), t) in pairs
    own = set(zip(*(x.tolist() for x in _columns(found.labels)), strict=True))
    assert not own & set(zip(*(x.tolist() for x in _columns(second)), strict=True))


def _columns(pairs: object) -> list[torch.Tensor]:
    return [getattr(pairs, name) for name in ("stage", "image", "query", "target")]


def test_the_label_loss_is_the_formula_with_two_targets() -> None:
    output, targets, taught = output_of(detector(), MANY), batch(MANY)[1], lesson(detector(seed=7), MANY)
    votes = TeacherVotes(PerStage())
    found = match(output, targets, taught, votes)
    assert found.second is not None
    logits, boxes = output.matching.logits, output.matching.boxes
    y = torch.zeros_like(logits)
    for pairs in (found.labels, found.second):
        for s, i, q, t in zip(*(x.tolist() for x in _columns(pairs)), strict=True):
            label = targets.labels[t]
            y[s, i, q, label] = torch.maximum(y[s, i, q, label], iou(boxes[s, i, q], targets.boxes[t]))
    p = logits.sigmoid()
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none")
    positives = [
        len({(i, q) for pairs in (found.labels, found.second) for st, i, q, _ in _rows(pairs) if st == s})
        for s in range(4)
    ]
    wanted = ((y - p).abs() ** 2 * entropy).sum((1, 2, 3)) / torch.tensor(positives)
    torch.testing.assert_close(losses(QualityFocal(), output, targets, taught, votes), wanted)
    assert sum(positives) > len(found.labels)  # a query with only the teacher's target has become a positive


def _rows(pairs: object) -> list[tuple[int, ...]]:
    return list(zip(*(x.tolist() for x in _columns(pairs)), strict=True))


def test_one_class_asked_for_twice_takes_the_better_target() -> None:
    output, logits, _ = leaf(output_of(detector(), MANY))
    targets = batch(MANY)[1]
    targets = replace(targets, labels=torch.zeros_like(targets.labels))
    taught = lesson(detector(seed=7), MANY)
    votes = TeacherVotes(PerStage(), norm="targets")
    losses(QualityFocal(), output, targets, taught, votes).sum().backward()
    found = match(output, targets, taught, votes)
    assert found.second is not None
    both = {row[:3] for row in _rows(found.labels)} & {row[:3] for row in _rows(found.second)}
    for s, i, q in both:
        best = max(
            float(iou(output.matching.boxes[s, i, q].detach(), targets.boxes[t]))
            for pairs in (found.labels, found.second)
            for *place, t in _rows(pairs)
            if tuple(place) == (s, i, q)
        )
        assert logits.grad is not None
        direction = torch.sign(logits[s, i, q, 0].sigmoid() - best)
        assert torch.sign(logits.grad[s, i, q, 0]) == direction


def test_the_order_of_queries_means_nothing() -> None:
    output, targets, taught = output_of(detector(), MANY), batch(MANY)[1], lesson(detector(seed=7), MANY)
    other = shuffled(output, torch.randperm(12, generator=torch.Generator().manual_seed(0)))
    for votes in (TeacherVotes(), TeacherVotes(PerStage())):
        for term in (QualityFocal(), BoxGIoU()):
            torch.testing.assert_close(
                losses(term, output, targets, taught, votes), losses(term, other, targets, taught, votes)
            )


def test_the_teacher_is_one_more_voter_of_the_union() -> None:
    output, targets, taught = output_of(detector(), MANY), batch(MANY)[1], lesson(detector(seed=7), MANY)
    alone = match(output, targets, None, TeacherVotes()).boxes
    together = match(output, targets, taught, TeacherVotes()).boxes
    assert together.sizes[0] > alone.sizes[0]
    places = [row[:3] for row in _rows(together)]
    assert len(set(places)) == len(places)  # a query never keeps two targets


def test_the_nearest_query_stands_in_only_above_the_threshold() -> None:
    output, targets, taught = output_of(detector(), MANY), batch(MANY)[1], lesson(detector(seed=7), MANY)
    assert output.trace is not None
    apart = replace(output, trace=replace(output.trace, tokens=output.trace.tokens * 0 - 1))  # no cell in common
    strict, loose = (match(apart, targets, taught, TeacherVotes(nearest=n)).second for n in (0.999, 0.0))
    assert strict is not None
    assert loose is not None
    assert len(strict) == 0
    assert len(loose) > 0


def test_the_second_box_counts_by_how_near_it_is() -> None:
    output, targets, taught = output_of(detector(), MANY), batch(MANY)[1], lesson(detector(seed=7), MANY)
    votes = TeacherVotes(PerStage(), norm="targets")
    pairs = match(output, targets, taught, votes).second
    assert pairs is not None
    wanted = torch.zeros(4)
    for s, i, q, t in _rows(pairs):
        box, truth = output.matching.boxes[s, i, q], targets.boxes[t]
        wanted[s] += iou(box, truth) * 5 * (box - truth).abs().sum() / len(targets)
    torch.testing.assert_close(losses(SecondBox(giou=0.0), output, targets, taught, votes), wanted)


def test_while_it_is_phased_in_a_second_target_asks_for_less() -> None:
    output, targets, taught = output_of(detector(), MANY), batch(MANY)[1], lesson(detector(seed=7), MANY)
    half = match(output, targets, replace(taught, strength=0.5), TeacherVotes(weight=0.5))
    assert half.share == 0.25
    assert match(output, targets, taught, TeacherVotes(weight=0.0)).second is None
    assert match(output, targets, None, TeacherVotes()).second is None


def test_another_cost_reaches_the_base() -> None:
    assert TeacherVotes().with_cost(QualityCost()) == TeacherVotes(UnionOfStages(QualityCost()))
