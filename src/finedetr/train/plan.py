"""What a recipe means for a run of so many epochs and steps, and how a batch is divided."""

from __future__ import annotations

from dataclasses import dataclass

from finedetr.data.balance import epoch_length
from finedetr.data.dataset import Dataset
from finedetr.data.transforms import STRONG, Augmentation, Windows
from finedetr.errors import ConfigError
from finedetr.train.recipe import Recipe
from finedetr.train.schedule import Curve

__all__ = ["Plan", "more_parts", "share_of"]


@dataclass(frozen=True)
class Plan:
    """The lengths of one run: all of them follow from the recipe, the planned epochs and the steps of an epoch."""

    recipe: Recipe
    epochs: int
    steps: int  # of an epoch

    @classmethod
    def of(cls, recipe: Recipe, epochs: int, data: Dataset) -> Plan:
        """The plan of a resolved recipe for its training pictures."""
        return cls(recipe, epochs, recipe.steps(epoch_length(data, recipe.balance)))

    @property
    def total(self) -> int:
        """Steps of the run."""
        return self.epochs * self.steps

    @property
    def windows(self) -> Windows:
        """Epochs at which the augmentation changes."""
        return self.recipe.schedule.windows(self.epochs)

    @property
    def augmentation(self) -> Augmentation:
        """With as much of what is strong as a run of this length can use."""
        return self.recipe.augmentation.milder(self.recipe.schedule.strength(self.total))

    @property
    def why_milder(self) -> list[str]:
        """One line on what of the augmentation is rarer because the run is short, if it is."""
        schedule, share = self.recipe.schedule, self.recipe.schedule.strength(self.total)
        strong = [name for name in STRONG if getattr(self.recipe.augmentation, name)]
        if share == 1 or not strong:
            return []
        return [
            f"short run: {self.total} steps, schedule.long_steps is {schedule.long_steps}: {', '.join(strong)} with "
            f"{share:.0%} of their chances"
        ]

    @property
    def rates(self) -> Curve:
        """The curve of the learning rate."""
        return self.recipe.schedule.rates(self.epochs, self.steps)

    @property
    def decay(self) -> float:
        """Of the moving average."""
        return self.recipe.average.decay_for(self.total)

    @property
    def ramp(self) -> float:
        """Of the moving average."""
        return self.recipe.average.ramp_for(self.total)

    def evaluates_after(self, epoch: int) -> bool:
        """Whether an epoch (from 0) is followed by an evaluation."""
        return (epoch + 1) % self.recipe.evaluating.every == 0 or epoch + 1 >= self.epochs

    def restarts_at(self, epoch: int) -> bool:
        """Whether the best weights come back before an epoch: it is without strong augmentation, and not the first.

        A time budget may move the plain part behind the current epoch; hence any epoch of it, not its first one alone.
        """
        return self.recipe.schedule.restart and 0 < self.windows.plain_from <= epoch < self.epochs


def share_of(batch: int, processes: int, accumulate: int) -> int:
    """Pictures of one process in a step.

    Raises:
        ConfigError: The batch cannot be divided; the message names batches that can.
    """
    parts = processes * accumulate
    if batch % parts:
        low = max(batch // parts * parts, parts)
        raise ConfigError(
            f"batch {batch} cannot be divided among {processes} processes with {accumulate} parts each",
            code="range",
            hint=f"The nearest batches that can are {low} and {low + parts}.",
        )
    return batch // processes


def more_parts(pictures: int, parts: int) -> int | None:
    """At least twice as many parts for the pictures of one process, equal ones; None where each has one picture."""
    return next((more for more in range(2 * parts, pictures + 1) if pictures % more == 0), None)
