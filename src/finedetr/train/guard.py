"""A step, and what is done where it cannot be: a batch that is not finite is passed over, one too large is cut."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from finedetr.errors import DivergedError
from finedetr.records import Targets
from finedetr.train.build import Student
from finedetr.train.distributed import World
from finedetr.train.dump import Dump
from finedetr.train.keep import Keeper
from finedetr.train.plan import more_parts
from finedetr.train.state import Progress
from finedetr.train.step import StepReport, Teaching, out_of_memory, sources_of

__all__ = ["Guard"]


class Guard:
    """Does the steps of a run.

    Args:
        student: What is trained.
        keeper: Of the run's folder; it has the recipe and says what happens.
        world: This process among the others.
    """

    def __init__(self, student: Student, keeper: Keeper, world: World) -> None:
        self.student, self.keeper, self.world = student, keeper, world
        self.recipe, self.classes = keeper.recipe, keeper.categories.names

    def __call__(
        self, images: Float[Tensor, "B 3 H W"], targets: Targets, pictures: tuple[str, ...], p: Progress
    ) -> StepReport | None:
        """One step at the place that `p` gives; None where it was passed over. Counts in `p` what it has to do.

        Raises:
            DivergedError: There were too many in a row that had to be passed over.
            RunError: Out of memory, and smaller parts are not possible.
        """
        try:
            report = self._in_parts(images, targets, pictures, p)
        except DivergedError as error:
            self._pass_over(error, images, targets, pictures, p)
            return None
        p.skipped_in_a_row = 0
        return report

    def _in_parts(self, images: Tensor, targets: Targets, pictures: tuple[str, ...], p: Progress) -> StepReport:
        """The step; in smaller parts where memory was too small for these, as long as the run is young."""
        place = {"epoch": p.epoch, "step": p.step, "rank": self.world.rank}
        objective, count = self.recipe.objective_at(p.epoch, p.epochs), targets.with_truth
        while True:
            sources = sources_of(self.recipe, len(self.classes), device=self.world.device, **place)
            try:
                return self.student.updater(
                    images, targets, pictures, sources, objective, p.accumulate, self._teaching(p)
                )
            except torch.OutOfMemoryError as error:
                # the other processes of a run are in the midst of their step and cannot follow
                parts = more_parts(count, p.accumulate) if p.epoch == 0 and self.world.size == 1 else None
                if parts is None:
                    raise out_of_memory(error, count // p.accumulate) from error
            self.keeper.reporter.warn(
                f"out of memory with {count // p.accumulate} pictures at a time: from here on batches of "
                f"{count} are worked off in {parts} parts of {count // parts} (--accumulate {parts}), "
                "in which norms and the union over stages see a part"
            )
            p.accumulate = parts
            if self.world.device.type == "cuda":
                torch.cuda.empty_cache()  # what is left in pieces of the old size

    def _teaching(self, p: Progress) -> Teaching | None:
        """Who speaks in this step."""
        if self.student.teachers is None:
            return None
        return partial(self.student.teachers, strength=self.recipe.teaching.strength(p.total, p.epochs * p.steps))

    def _pass_over(
        self, error: DivergedError, images: Tensor, targets: Targets, pictures: tuple[str, ...], p: Progress
    ) -> None:
        """Leaves out a step that would spoil the weights, and keeps the first batch in a row of such steps."""
        path = self.keeper.folder.bad_batch(self.world.rank)
        place = {"epoch": p.epoch, "step": p.step, "rank": self.world.rank, "total": p.total, "epochs": p.epochs}
        model = self.student.detector.state_dict()
        dump = Dump(self.recipe, self.classes, place, images, targets, pictures, error.message, error.losses, model)
        p.skipped += 1
        p.skipped_in_a_row += 1
        if p.skipped_in_a_row == 1:
            dump.save(path)
        if self.world.main:
            self.keeper.skipped(p, dump, path)
        if p.skipped_in_a_row >= min(self.recipe.diverged_after, p.epochs * p.steps):
            raise DivergedError(
                f"{p.skipped_in_a_row} steps in a row were not finite, the last: {error.message}",
                hint=f"{error.hint}\n  The first batch is kept; look at it with: finedetr info {path}".lstrip(),
                losses=error.losses,
            ) from error
