"""From a recipe to the things that a run changes: detector, moving average, optimizer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finedetr.distill.teachers import Teacher, Teachers, build_adapters, map_classes
from finedetr.errors import ModelError, UsageError
from finedetr.model.deploy import fold_norms
from finedetr.model.detector import Detector
from finedetr.model.pretrained import load_backbone
from finedetr.model.weights import load_weights, transfer_weights
from finedetr.train.distributed import World
from finedetr.train.ema import MovingAverage
from finedetr.train.optimizer import adamw, parameter_groups
from finedetr.train.plan import Plan
from finedetr.train.recipe import Recipe
from finedetr.train.step import Precision, Updater

__all__ = ["Start", "Student", "build_student", "freeze"]


@dataclass(frozen=True)
class Start:
    """What a run begins with instead of random numbers."""

    weights: Path | None = None  # of a whole detector; class rows are mapped by name
    backbone: Path | None = None  # of a backbone alone

    def __post_init__(self) -> None:
        if self.weights and self.backbone:
            raise UsageError(
                "a run starts from the weights of a detector or from those of a backbone, not from both",
                code="conflict",
                hint="--weights has a backbone of its own: leave --backbone-weights out.",
            )
        if self.backbone and not self.backbone.is_file():
            raise ModelError(
                f"no weights at {self.backbone}",
                code="not_found",
                hint="`finedetr models show NAME` says where the file of a model's backbone is.",
            )


@dataclass(frozen=True)
class Student:
    """What is trained, and what trains it."""

    detector: Detector
    wrapped: nn.Module  # the same, averaging its gradients over processes
    average: MovingAverage
    optimizer: torch.optim.Optimizer
    updater: Updater
    frozen: tuple[nn.Module, ...]  # modules whose norms keep their statistics
    origins: tuple[tuple[str, str], ...]  # (what, which): what became of the weights that were given
    teachers: Teachers | None = None

    @property
    def adapters(self) -> nn.Module | None:
        """What is trained beside the detector, because of a teacher."""
        return None if self.teachers is None else self.teachers.adapters

    def train(self) -> None:
        """Training mode, but for the norms of what is frozen."""
        self.wrapped.train()
        for module in self.frozen:
            module.eval()


def build_student(
    recipe: Recipe, plan: Plan, names: tuple[str, ...], world: World, start: Start, teacher: Path | None = None
) -> Student:
    """Everything for a run, from random weights of the recipe's seed or from given ones.

    Args:
        recipe: Resolved.
        plan: Its lengths.
        names: The class names, in order.
        world: This process and its device.
        start: What it begins with.
        teacher: The weights of a frozen teacher.

    Raises:
        UsageError: The recipe has parts that need a frozen teacher, and there is none.
    """
    random.seed(recipe.seed)  # nothing here draws from it; a callback or a library may
    torch.manual_seed(recipe.seed)
    detector = Detector(recipe.model, len(names))
    origins: list[tuple[str, str]] = []
    if start.weights:
        origins = transfer_weights(detector, names, start.weights).rows()
    if start.backbone:
        origins = load_backbone(detector, start.backbone)
    if recipe.sync_norms:  # in place, and before anybody remembers a norm
        world.join_norms(detector)
    frozen = freeze(detector, recipe)
    detector.to(world.device)
    if recipe.channels_last:
        detector.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = MovingAverage(detector, plan.decay, plan.ramp)
    if recipe.compile:  # in place, so that names stay; the decoder's number of queries varies with the batch
        detector.backbone.compile()
        detector.encoder.compile()
    options = recipe.optimizer
    groups = parameter_groups(
        detector,
        lr=recipe.lr or options.lr,
        weight_decay=options.weight_decay,
        backbone=options.backbone,
        aim=options.aim,
        grouping=options.grouping,
    )
    teachers = _teachers(recipe, detector, average, names, world, teacher)
    if teachers is not None and teachers.adapters is not None:
        groups += parameter_groups(teachers.adapters, lr=recipe.lr or options.lr, weight_decay=options.weight_decay)
    optimizer = adamw(groups, options.betas)
    wrapped = world.wrap(detector, unused=not recipe.denoise)
    updater = Updater(
        wrapped, optimizer, average, Precision.choose(recipe.precision, world.device), world, options.clip
    )
    return Student(detector, wrapped, average, optimizer, updater, frozen, tuple(origins), teachers)


def _teachers(
    recipe: Recipe,
    detector: Detector,
    average: MovingAverage,
    names: tuple[str, ...],
    world: World,
    weights: Path | None,
) -> Teachers | None:
    """Whoever the recipe lets speak; None where nobody does."""
    wanted = recipe.teachers
    if not wanted:
        return None
    teachers = Teachers()
    if "average" in wanted:
        teachers.average = Teacher(average.model, itself=True)
    if "frozen" in wanted:
        if weights is None:
            raise UsageError(
                f"the recipe {recipe.name} has parts that a teacher teaches, and there is none",
                code="required",
                hint="Give one with --teacher: a run, a weight file, a folder of transformers or a published name.",
            )
        other, card = load_weights(weights, world.device)
        fold_norms(other)
        if recipe.channels_last:
            other.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        theirs = (card.mean, card.std) if card.mean and card.std else None
        teachers.frozen = Teacher(
            other,
            map_classes(names, card.names),
            scale=recipe.teaching.scale,
            given=recipe.normalization,
            wanted=theirs,
        )
        adapters = build_adapters(recipe.objective.terms, detector, other, recipe.teaching.scale, recipe.sources)
        if any(True for _ in adapters.parameters()):
            teachers.adapters = adapters.to(world.device)
    return teachers


def freeze(detector: Detector, recipe: Recipe) -> tuple[nn.Module, ...]:
    """Switches off what the recipe does not train; gives the modules that stay in eval mode."""
    still: list[nn.Module] = []
    for name in recipe.freeze:
        if name == "norms":
            norms = [module for module in detector.backbone.modules() if isinstance(module, _BatchNorm)]
            for norm in norms:
                norm.requires_grad_(False)
            still += norms
        else:
            part = detector.backbone if name == "backbone" else detector.encoder
            still.append(part.requires_grad_(False))
    return tuple(still)
