"""What a teacher says of cells (X3), and states told apart behind learned projections (D4)."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from finedetr.distill.stages import layer_stages
from finedetr.distill.teachers import Adapters, ClassMap, Teacher, Teachers, build_adapters
from finedetr.distill.terms import ContrastiveDistillation, EncoderDistillation, FeatureDistillation
from finedetr.distill.tokens import shared_cells
from finedetr.errors import ConfigError
from finedetr.recipes import build
from finedetr.records import Guidance, Lesson, Output
from finedetr.supervise.objective import Objective
from finedetr.train.step import Precision, step
from tests.distill.small import DEEP, PLAIN, WIDE, batch, detector, lesson, output_of
from tests.distill.test_hosts import host
from tests.model.classic import random_detector
from tests.train.tiny import TINY


def loss(output: Output, taught: Lesson, counts: tuple[int, ...] = (3, 0)) -> torch.Tensor:
    return Objective((EncoderDistillation(),))(output, batch(counts)[1], Guidance((64, 64), taught)).vector


def test_cells_of_common_levels_are_the_same() -> None:
    assert shared_cells(((4, 4), (2, 2)), ((2, 2), (1, 1))).tolist() == [-1] * 16 + [0, 1, 2, 3]
    assert shared_cells(((2, 2), (1, 1)), ((4, 4), (2, 2))).tolist() == [16, 17, 18, 19, -1]


def test_the_teachers_scores_of_cells_are_asked_for_on_the_union_of_both_choices() -> None:
    output, taught = output_of(detector()), lesson(detector(DEEP, 7))
    own, other = output.trace, taught.trace
    assert own is not None
    assert own.tokens is not None
    assert own.score is not None
    assert other.tokens is not None
    assert other.score is not None
    every = torch.arange(20).expand(2, 20)
    logits, probability = own.score(every), other.score(every).sigmoid()
    chosen = torch.zeros(2, 20, dtype=torch.bool).scatter_(1, own.tokens, True).scatter_(1, other.tokens, True)
    assert 12 < int(chosen[0].sum()) < 20
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, probability, reduction="none").sum(-1)
    wanted = (entropy * chosen).sum() / (probability.amax(-1) * chosen).sum()
    torch.testing.assert_close(loss(output, taught), wanted[None])
    for image, said in enumerate(own.score(own.tokens)):
        torch.testing.assert_close(said, output.matching.logits[0, image], atol=1e-4, rtol=1e-4)


def test_only_cells_of_the_union_get_a_gradient_and_none_where_both_agree() -> None:
    student = detector()
    taught, same = lesson(detector(DEEP, 7)), lesson(student)
    memory = torch.randn(2, 20, 16).requires_grad_()
    output = output_of(student)
    assert output.trace is not None
    trace = replace(output.trace, score=lambda tokens: student.selection.score(memory, output.trace.shapes, tokens))  # type: ignore[operator, union-attr]
    loss(replace(output, trace=trace), taught).sum().backward()
    assert trace.tokens is not None
    assert taught.trace.tokens is not None
    chosen = torch.zeros(2, 20, dtype=torch.bool).scatter_(1, trace.tokens, True)
    chosen.scatter_(1, taught.trace.tokens, True)
    assert memory.grad is not None
    assert not memory.grad[~chosen].any()
    assert bool(memory.grad[chosen].any(-1).float().mean() > 0.8)  # cells at the border hold no anchor
    x = torch.zeros(2, 24, 5, requires_grad=True)
    assert same.trace.score is not None
    agreed = replace(trace, score=lambda tokens: same.trace.score(tokens) + x)  # type: ignore[misc]
    loss(replace(output, trace=replace(agreed, tokens=same.trace.tokens)), same).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() < 1e-6


def test_levels_and_classes_that_only_one_has_are_passed_over() -> None:
    known = ClassMap(torch.tensor([2, 0, 0, 1, 4]), torch.tensor([True, True, False, True, True]), (), ())
    levels = replace(TINY.decoder, points=(2, 2, 2))
    finer = replace(TINY, backbone=replace(TINY.backbone, stages=(1, 2, 3)), decoder=levels)
    for teacher in (detector(WIDE, 7), detector(finer, 7)):
        taught = Teacher(teacher, known)(*batch())
        value = loss(output_of(detector()), taught)
        assert bool(value.isfinite().all())
        assert value > 0
    output = output_of(detector(PLAIN))
    assert loss(output, lesson(detector(seed=7))).shape == (1,)
    for config in ("dino-r50", "deformable-detr-r50-two-stage", "conditional-detr-r50"):
        student, teacher = random_detector(host(config)), random_detector(host(config), 1)
        if config.startswith("dino"):
            build_adapters((EncoderDistillation(),), student, teacher)
            continue
        with pytest.raises(ConfigError, match="scores no classes"):
            build_adapters((EncoderDistillation(),), student, teacher)


def test_the_contrast_is_least_where_every_pair_is_its_own() -> None:
    """Identical states behind identical projections: the minimum over all permutations of the labels."""
    student = detector(replace(TINY, decoder=replace(TINY.decoder, queries=5)))
    taught, output = lesson(student, (1,)), output_of(student, (1,))
    term = ContrastiveDistillation()
    found = []
    for order in permutations(range(5)):
        states = tuple(state[:, list(order)] for state in taught.trace.states)
        moved = replace(taught, trace=replace(taught.trace, states=states), adapt=lambda tap, level, x: x - x.mean(0))
        found.append(Objective((term,))(output, batch((1,))[1], Guidance((64, 64), moved)).total)
    assert min(found) == found[0]
    assert max(found) > found[0] * 1.01


def test_both_are_off_in_the_recipe_and_learn_where_they_have_a_weight() -> None:
    recipe = build(TINY, extras=("detrdistill",), random_start=True)
    assert "Contrastive" not in recipe.formula()
    assert "EncoderDistillation" not in recipe.formula()
    objective = recipe.objective.with_weights({"ContrastiveDistillation": 0.2, "EncoderDistillation": 1.0})
    student, teacher = copy.deepcopy(detector(TINY, classes=6)).train(), detector(WIDE, 3, 6)
    adapters = build_adapters(objective.terms, student, teacher)
    assert {"contrast0", "contrasted0"} <= set(adapters.layers)
    assert "contrast0" not in build_adapters(recipe.objective.terms, student, teacher).layers
    images, targets = batch(classes=6)
    losses = step(
        student,
        images,
        targets,
        (),
        objective,
        Precision("fp32", torch.device("cpu")),
        Teachers(Teacher(teacher), adapters=adapters),
    )
    assert losses["matching/encoder/EncoderDistillation"] > 0
    assert losses["matching/layer1/ContrastiveDistillation"] > 0
    losses.total.backward()
    assert all(p.grad is not None for p in adapters.parameters())


def test_a_teacher_without_projections_contrasts_nothing() -> None:
    output, taught = output_of(detector()), lesson(detector(DEEP, 7))
    objective = Objective((ContrastiveDistillation(), FeatureDistillation()))
    names = objective(output, batch()[1], Guidance((64, 64), taught)).names
    assert not any("Contrastive" in name for name in names)
    assert len(names) == len(layer_stages(output.matching.stages))
    assert isinstance(Adapters({}), torch.nn.Module)
