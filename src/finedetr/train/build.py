"""From a recipe to the things that a run changes: detector, moving average, optimizer."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finedetr.model.detector import Detector
from finedetr.model.weights import Transfer, transfer_weights
from finedetr.train.distributed import World
from finedetr.train.ema import MovingAverage
from finedetr.train.optimizer import adamw, parameter_groups
from finedetr.train.plan import Plan
from finedetr.train.recipe import Recipe
from finedetr.train.step import Precision, Updater

__all__ = ["Student", "build_student"]


@dataclass(frozen=True)
class Student:
    """What is trained, and what trains it."""

    detector: Detector
    wrapped: nn.Module  # the same, averaging its gradients over processes
    average: MovingAverage
    optimizer: torch.optim.Optimizer
    updater: Updater
    frozen: tuple[nn.Module, ...]  # modules whose norms keep their statistics
    transfer: Transfer | None  # what became of the weights that were given

    def train(self) -> None:
        """Training mode, but for the norms of what is frozen."""
        self.wrapped.train()
        for module in self.frozen:
            module.eval()


def build_student(recipe: Recipe, plan: Plan, names: tuple[str, ...], world: World, weights: Path | None) -> Student:
    """Everything for a run, from random weights of the recipe's seed or from given ones.

    Args:
        recipe: Resolved.
        plan: Its lengths.
        names: The class names, in order.
        world: This process and its device.
        weights: A safetensors file of finedetr to start from; class rows are mapped by name.
    """
    random.seed(recipe.seed)  # nothing here draws from it; a callback or a library may
    torch.manual_seed(recipe.seed)
    detector = Detector(recipe.model, len(names))
    transfer = transfer_weights(detector, names, weights) if weights else None
    frozen = _freeze(detector, recipe)
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
    optimizer = adamw(groups, options.betas)
    wrapped = world.wrap(detector, sync_norms=recipe.sync_norms, unused=not recipe.denoise)
    updater = Updater(
        wrapped, optimizer, average, Precision.choose(recipe.precision, world.device), world, options.clip
    )
    return Student(detector, wrapped, average, optimizer, updater, frozen, transfer)


def _freeze(detector: Detector, recipe: Recipe) -> tuple[nn.Module, ...]:
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
