"""Where a run stands, and everything that has to be saved so that it goes on as if nothing had happened."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import nn

from finedetr.errors import ModelError
from finedetr.train.ema import MovingAverage

__all__ = ["Progress", "capture", "restore"]


@dataclass
class Progress:
    """Where a run stands, in plain numbers. All randomness of the data follows from these and the seed."""

    epoch: int = 0  # the one that is going on, from 0
    step: int = 0  # steps done in it
    total: int = 0  # steps done since the run began
    epochs: int = 1  # how many are planned; a time budget makes them fewer ...
    limit: int = 1  # ... than the recipe has
    steps: int = 1  # of an epoch
    best: float = -1.0  # AP
    best_epoch: int = -1
    stale: int = 0  # evaluations since the best
    accumulate: int = 1  # parts of a batch: the recipe's, more where memory was too small for these
    seconds: float = 0.0  # spent on steps and evaluations
    evaluating: float = 0.0  # seconds of the last evaluation
    restarts: int = 0
    since_restart: float = -1.0  # the best AP since then; -1: none yet
    skipped: int = 0  # steps whose loss or gradient was not finite
    skipped_in_a_row: int = 0  # ... that came right before this moment

    @property
    def done(self) -> float:
        """Epochs done, with the part of the one that is going on."""
        return self.epoch + self.step / self.steps

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Progress:
        """The inverse of `asdict`.

        Raises:
            ModelError: A field is missing or unknown, or no number that can be.
        """
        wanted = {field.name for field in fields(cls)}
        if set(values) != wanted:
            raise ModelError(
                f"the resume state's progress differs in {sorted(set(values) ^ wanted)}",
                code="schema",
                hint="Resume with the version of finedetr that wrote it.",
            )
        for field in fields(cls):
            value, whole = values[field.name], isinstance(field.default, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ModelError(f"the resume state's {field.name} is no number, {value!r}", code="schema")
        progress = cls(**values)
        if not (progress.epoch >= 0 and 0 <= progress.step <= progress.steps and progress.step <= progress.total):
            raise ModelError(f"the resume state stands where no run can be: {progress}", code="schema")
        return progress


def capture(
    progress: Progress,
    model: nn.Module,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    adapters: nn.Module | None = None,
) -> dict[str, Any]:
    """Everything as plain values and tensors; see `finedetr.train.checkpoint`.

    `adapters` belong to the training beside the model (`finedetr.distill.teachers`).
    """
    return {
        "progress": asdict(progress),
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "adapters": adapters.state_dict() if adapters else {},
        "random": {
            "python": random.getstate(),
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        },
    }


def restore(
    state: Mapping[str, Any],
    model: nn.Module,
    average: MovingAverage,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    adapters: nn.Module | None = None,
) -> Progress:
    """Puts everything back and gives the progress of that moment.

    Raises:
        ModelError: The state belongs to another model or another version.
    """
    try:
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        if adapters is not None:
            adapters.load_state_dict(state["adapters"])
        if state["scaler"]:  # empty where there is no fp16
            scaler.load_state_dict(state["scaler"])
        random.setstate(state["random"]["python"])
        torch.set_rng_state(state["random"]["torch"])
        if torch.cuda.is_available() and len(state["random"]["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        return Progress.from_dict(state["progress"])
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise ModelError(f"the resume state does not fit this run: {first}", code="mismatch") from error
