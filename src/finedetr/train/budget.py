"""A time budget: how many epochs of a run fit into it, by the first steps and then by all that was done."""

from __future__ import annotations

import math

from finedetr.train.state import Progress

__all__ = ["Budget", "epochs_in_time"]

PROBE = 12  # steps after which the budget is first held against the speed
WARMING = 2  # steps at the beginning of a process that say nothing about the speed
MARGIN = 0.97  # of the budget is planned for
WHOLE = 4  # epochs before one that the budget may cut: a shorter run would lose too much of its schedule
CUT = 0.25  # the least part of a last epoch that is worth beginning


class Budget:
    """The seconds that a run may take.

    Args:
        seconds: 0 is no limit.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds * MARGIN
        self._warm: tuple[int, float] | None = None  # (steps, seconds) when this process had warmed up

    def is_spent(self, p: Progress, seconds: float, evaluation: float) -> bool:
        """Whether an epoch must be left before its end, so that there is time for a last evaluation.

        Args:
            p: Where the run stands; what the last evaluation took counts, if there was one.
            seconds: Spent so far, the same number in all processes.
            evaluation: What an evaluation is guessed to take, in steps.
        """
        last = p.evaluating or evaluation * self._step(p, seconds)
        return bool(self.seconds) and seconds + last > self.seconds and p.step < p.steps

    def _step(self, p: Progress, seconds: float) -> float:
        """Seconds of a step of this process, warmed up; 0 until there are enough of them."""
        if self._warm is None or p.total - self._warm[0] < PROBE - WARMING:
            return 0.0
        return (seconds - self._warm[1]) / (p.total - self._warm[0])

    def first_guess(self, p: Progress, seconds: float, evaluation: float) -> int | None:
        """Epochs that fit, by the speed of the first steps; None but for the one step after which that is asked.

        Args:
            p: Where the run stands.
            seconds: Spent so far, the same number in all processes.
            evaluation: What evaluations are guessed to add to an epoch, in steps.
        """
        if not self.seconds:
            return None
        if self._warm is None and p.total >= WARMING:
            self._warm = (p.total, seconds)
        if p.total != PROBE or self._warm is None:
            return None
        each = (seconds - self._warm[1]) / max(PROBE - self._warm[0], 1)
        return epochs_in_time(p.limit, 1.0, each * (p.steps + evaluation), self.seconds)

    def fit(self, p: Progress, seconds: float) -> int:
        """Epochs that fit, at the speed so far; as planned where there is no limit."""
        return epochs_in_time(p.limit, p.done, seconds, self.seconds) if self.seconds else p.epochs


def epochs_in_time(planned: int, done: float, spent: float, budget: float) -> int:
    """How many epochs fit into a budget of seconds, at the speed so far; from `done` epochs up to `planned`.

    Args:
        planned: The most there may be.
        done: Epochs done, with the part of the one that is going on.
        spent: Seconds for these, evaluations included.
        budget: Seconds for the whole run.
    """
    if done <= 0 or spent <= 0:
        return planned
    fit = budget / spent * done
    epochs = math.floor(fit)
    if epochs >= WHOLE and fit - epochs >= CUT:
        epochs += 1
    return max(1, math.ceil(done - 1e-9), min(planned, epochs))
