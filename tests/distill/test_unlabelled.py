"""Pictures without labels: teachers speak about them, the targets do not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from finedetr.data.blend import plan_pastes
from finedetr.data.device import mix
from finedetr.data.transforms import Augmentation
from finedetr.distill.matching import TeacherVotes
from finedetr.distill.queries import AuxiliaryQueries, PredictionQueries, QueryPrior
from finedetr.distill.terms import FeatureDistillation, LogitsDistillation, PredictionDistillation
from finedetr.records import Guidance, Output, Targets, Trace
from finedetr.supervise.denoising import Denoising
from finedetr.supervise.matching import PerStage, UnionOfStages
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import (
    BoxGIoU,
    BoxL1,
    FineGrainedLocalization,
    LocalizationDistillation,
    QualityFocal,
    Term,
    Varifocal,
)
from finedetr.train.step import parts_of
from tests.distill.small import DEEP, batch, detector, lesson
from tests.train.tiny import TINY

GROUND: tuple[Term, ...] = (Varifocal(), BoxL1(), BoxGIoU(), FineGrainedLocalization(), LocalizationDistillation())
TAUGHT: tuple[Term, ...] = (LogitsDistillation(), FeatureDistillation(), PredictionDistillation())
COUNTS = (3, 1, 0, 0)


def half(targets: Targets) -> Targets:
    return replace(targets, annotated=2)


def answer(pictures: int = 4, *groups: Any) -> Output:
    with torch.no_grad():
        output: Output = detector(TINY)(batch(COUNTS)[0][:pictures], groups, all_stages=True)
    return output


def cut(group: Any, pictures: int) -> Any:
    """The same group for the first pictures alone."""
    fields = {
        name: value[:pictures]
        for name in ("boxes", "content", "labels", "tokens", "slots", "positions")
        if (value := getattr(group, name)) is not None
    }
    if group.blocked is not None and group.blocked.ndim == 3:
        fields["blocked"] = group.blocked[:pictures]
    if group.taught is not None:
        fields["taught"] = group.taught.first(pictures)
    return replace(group, **fields)


@pytest.mark.parametrize("policy", [UnionOfStages(), PerStage(), TeacherVotes(UnionOfStages())], ids=str)
def test_what_the_targets_say_is_what_they_say_without_these_pictures(policy: Any) -> None:
    targets = half(batch(COUNTS)[1])
    taught, few = lesson(detector(DEEP, 7), COUNTS), Targets(targets.labels, targets.boxes, targets.image, (3, 1))
    groups = [
        Denoising(10)(targets, 5, torch.Generator().manual_seed(0)),
        *(source(targets, Guidance((64, 64), taught), TINY) for source in (QueryPrior(), QueryPrior(assign="self"))),
    ]
    groups[-1] = replace(groups[-1], name="self")
    guidance = Guidance((64, 64), average=lesson(detector(seed=5), COUNTS))
    short = Guidance((64, 64), average=_first(guidance.average))
    both = answer(4, *groups)
    alone = answer(2, *(cut(group, 2) for group in groups))
    whole = Objective((*GROUND, PredictionDistillation()), policy)
    for name, value in Objective(GROUND, policy)(alone, few, short).items():
        torch.testing.assert_close(whole(both, targets, guidance)[name], value, atol=1e-4, rtol=1e-4)


def _first(taught: Any) -> Any:
    """A lesson about the first two pictures; its pairs are in them."""
    trace = Trace(taught.trace.shapes, taught.trace.tokens[:2], taught.trace.boxes[:2], ())
    return replace(taught, answers=taught.answers.first(2), trace=trace)


def test_no_gradient_of_the_targets_reaches_these_pictures_and_that_of_teachers_does() -> None:
    targets = half(batch(COUNTS)[1])
    taught = lesson(detector(DEEP, 7), COUNTS)
    guidance = Guidance((64, 64), taught, taught)
    groups = [source(targets, guidance, TINY) for source in (QueryPrior(), PredictionQueries(), AuxiliaryQueries())]
    assert groups[2] is not None
    output = answer(4, *groups)
    for terms, heard in ((GROUND, False), (TAUGHT, True), ((QualityFocal(),), False)):
        logits = [said.logits.clone().requires_grad_() for said in (output.matching, *(g[1] for g in output.groups))]
        memory = tuple(level.clone().requires_grad_() for level in output.memory)
        leaves = replace(
            output,
            matching=replace(output.matching, logits=logits[0]),
            groups=tuple(
                (group, replace(said, logits=x)) for (group, said), x in zip(output.groups, logits[1:], strict=True)
            ),
            memory=memory,
        )
        Objective(terms)(leaves, targets, guidance).total.backward()
        reached = [x.grad is not None and bool(x.grad[:, 2:].any()) for x in logits]
        assert reached == ([True, False, True, False] if heard else [False] * 4)
        assert all(level.grad is not None and bool(level.grad[2:].any()) for level in memory) == heard


def test_a_batch_of_nothing_else_teaches_nothing_but_the_background() -> None:
    targets = replace(batch((0, 0))[1], annotated=1)
    taught = lesson(detector(DEEP, 7), (0, 0))
    with torch.no_grad():
        output = detector(TINY)(batch((0, 0))[0], (), all_stages=True)
    losses = Objective((*GROUND, *TAUGHT))(output, targets, Guidance((64, 64), taught)).by_name()
    assert losses["matching/layer1/LogitsDistillation"] > 0
    assert losses["matching/layer1/BoxL1"] == 0


def test_each_part_of_a_batch_has_its_share_of_these_pictures() -> None:
    images, targets = torch.arange(7.0).view(7, 1, 1, 1).expand(-1, 3, 2, 2), batch((2, 0, 1, 1, 0, 0, 0))[1]
    parts = parts_of(images, replace(targets, annotated=4), tuple("abcdefg"), 2)
    assert [part.names for part in parts] == [("a", "b", "e"), ("c", "d", "f", "g")]
    assert [part.images[:, 0, 0, 0].tolist() for part in parts] == [[0, 1, 4], [2, 3, 5, 6]]
    assert [part.targets.counts for part in parts] == [(2, 0, 0), (1, 1, 0, 0)]
    assert [part.targets.annotated for part in parts] == [2, 2]
    assert parts[1].targets.image.tolist() == [0, 1]


def test_mixup_and_pasted_objects_do_not_mix_truth_with_none() -> None:
    images, targets = torch.arange(5.0).view(5, 1, 1, 1).expand(-1, 3, 32, 32), batch((1, 2, 1, 0, 0))[1]
    targets = replace(targets, annotated=3)
    mixed, joined = mix(images, targets, 0.5)
    assert mixed[:, 0, 0, 0].tolist() == [1.0, 0.5, 1.5, 3.5, 3.5]
    assert joined.counts == (2, 3, 3, 0, 0)
    assert joined.annotated == 3
    generator = np.random.default_rng(0)
    pastes, pasted = plan_pastes(targets, (32, 32), Augmentation(copy_blend_area=1), generator)
    assert pastes
    assert {p.image for p in pastes} <= {0, 1, 2}
    assert pasted.counts[3:] == (0, 0)
    assert pasted.annotated == 3
