"""The learning rate over a run: three published curves as plain functions of the iteration, and how they are applied.

Iterations are counted from 1: the first step of a run takes `factor(1)`. The official DEIM code counts from 0 and steps
its scheduler late, so that its first two iterations run at lr / 500 and at 0 (spec 4.1); here no iteration is lost.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from finedetr.errors import ConfigError

__all__ = ["Curve", "Drop", "FlatCosine", "WarmupConstant", "apply_rate"]


class Curve(ABC):
    """What the base learning rate is multiplied with at an iteration."""

    @abstractmethod
    def factor(self, iteration: int) -> float:
        """The multiplier of the `iteration`-th step, counted from 1; 1 is the full rate."""


@dataclass(frozen=True)
class WarmupConstant(Curve):
    """D-FINE and RT-DETRv2: linear warm-up, then constant to the end (their milestones are never reached).

    Attributes:
        warmup: Iterations until the full rate (500 for D-FINE, 2000 for RT-DETRv2); 0 starts at the full rate.
    """

    warmup: int = 500

    def factor(self, iteration: int) -> float:
        """min(1, iteration / warmup)."""
        return min(1.0, iteration / self.warmup) if self.warmup else 1.0


@dataclass(frozen=True)
class Drop(Curve):
    """The classic DETRs: linear warm-up, if any, then constant until the rate drops once.

    Attributes:
        at: Iterations at the full rate, the warm-up included.
        gamma: What is left of the rate.
        warmup: Iterations until the full rate; 0 starts at the full rate.
    """

    at: int
    gamma: float = 0.1
    warmup: int = 0

    def factor(self, iteration: int) -> float:
        """min(1, iteration / warmup), times gamma from the drop on."""
        return WarmupConstant(self.warmup).factor(iteration) * (self.gamma if iteration > self.at else 1.0)


@dataclass(frozen=True)
class FlatCosine(Curve):
    """DEIM (Huang et al., CVPR 2025): quadratic warm-up, a flat stretch, half a cosine, and a flat tail.

    Attributes:
        total: Iterations of the run.
        warmup: Iterations of the warm-up; 0 starts at the full rate.
        flat: Iterations until the cosine begins, the warm-up included.
        plain: Iterations of the tail without strong augmentation, at `gamma` of the rate.
        gamma: Where the cosine ends; 1 is constant (DEIM-N).
    """

    total: int
    warmup: int = 2000
    flat: int = 0
    plain: int = 0
    gamma: float = 0.5

    def __post_init__(self) -> None:
        if min(self.total, self.warmup, self.flat, self.plain) < 0 or not 0 <= self.gamma <= 1:
            raise ConfigError(f"a flat-cosine schedule needs lengths of at least 0 and a gamma of 0 to 1, got {self}")

    def factor(self, iteration: int) -> float:
        """Equation of spec 4.1, with a warm-up of 0 allowed and the tail first where the parts overlap."""
        if iteration <= self.warmup and iteration < self.total - self.plain:
            return (iteration / self.warmup) ** 2
        if iteration >= self.total - self.plain:
            return self.gamma
        if iteration <= self.flat:
            return 1.0
        length = self.total - self.flat - self.plain
        cosine = 0.5 * (1 + math.cos(math.pi * (iteration - self.flat) / length))
        return self.gamma + (1 - self.gamma) * cosine


def apply_rate(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Sets the rate of every group to its own initial rate times `factor`; gives back that of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])
