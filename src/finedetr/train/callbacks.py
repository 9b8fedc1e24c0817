"""Five plain functions that a user may give a run; each is called with the run's state. There is nothing to inherit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from torch import nn

from finedetr.errors import did_you_mean
from finedetr.evaluate.evaluation import Evaluation
from finedetr.train.recipe import Recipe

__all__ = ["Callback", "Callbacks", "State"]


@dataclass(frozen=True)
class State:
    """Where a run stands, to look at: a run whose weights a callback changes is not resumed exactly."""

    folder: Path
    recipe: Recipe  # resolved
    epoch: int  # the one that is going on, from 0
    epochs: int  # planned
    step: int  # steps done since the run began
    steps: int  # planned
    seconds: float  # of training so far
    best_ap: float | None
    detector: nn.Module  # what is trained
    average: nn.Module  # the moving average, which is evaluated and kept
    losses: Mapping[str, float] = field(default_factory=dict)  # on_step: by name, "group/stage/Term"
    rate: float | None = None  # on_step: the learning rate
    evaluation: Evaluation | None = None  # on_eval: this one; on_end: that of the best weights
    path: Path | None = None  # on_save: the state that was written
    outcome: Literal["finished", "interrupted", "failed"] | None = None  # on_end

    @property
    def loss(self) -> float:
        """The sum of all losses of a step."""
        return sum(self.losses.values())


Callback = Callable[[State], object]


@dataclass(frozen=True)
class Callbacks:
    """What is called when. Only the first of many processes calls; an error in a callback ends the run.

    >>> aps = []
    >>> callbacks = Callbacks(on_eval=lambda state: aps.append(state.evaluation.ap))
    """

    on_start: Callback | None = None
    """Before the first step, also of a run that goes on."""
    on_step: Callback | None = None
    """After each step but those that were passed over."""
    on_eval: Callback | None = None
    """After each evaluation; its weights are on disk."""
    on_save: Callback | None = None
    """After each time that the resume state was written."""
    on_end: Callback | None = None
    """At the end, however it comes."""

    @classmethod
    def of(cls, functions: Mapping[str, Callback]) -> Callbacks:
        """From a mapping: {"on_eval": function}.

        Raises:
            TypeError: A name is unknown, with the nearest ones, or its value cannot be called.
        """
        known = [each.name for each in fields(cls)]
        for name, function in functions.items():
            if name not in known:
                raise TypeError(f"no callback is called {name!r}. {did_you_mean(name, known)}")
            if not callable(function):
                raise TypeError(f"{name}: a function of the run's state is wanted, {function!r} came")
        return cls(**functions)
