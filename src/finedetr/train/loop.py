"""The loop: epochs of steps, an evaluation of the moving average after each, and a state on disk at all times."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from finedetr.data.dataset import Dataset
from finedetr.data.device import OnDevice
from finedetr.data.loader import TrainingLoader
from finedetr.errors import UsageError
from finedetr.evaluate.evaluation import Evaluation
from finedetr.evaluate.inference import Inference
from finedetr.evaluate.predictor import evaluate_detector
from finedetr.kernels.process import settled
from finedetr.records import Batch
from finedetr.train.budget import Budget
from finedetr.train.build import Start, build_student
from finedetr.train.callbacks import Callback, Callbacks, State
from finedetr.train.checkpoint import link_file, load_state, save_state
from finedetr.train.config import check_changes, from_dict
from finedetr.train.distributed import World
from finedetr.train.folder import RunFolder
from finedetr.train.guard import Guard
from finedetr.train.interrupt import Interruption
from finedetr.train.keep import Keeper
from finedetr.train.log import Reporter, Stopwatch
from finedetr.train.plan import Plan, share_of
from finedetr.train.recipe import Recipe
from finedetr.train.schedule import apply_rate
from finedetr.train.state import Progress, capture, restore
from finedetr.train.step import StepReport
from finedetr.train.watch import Watch

__all__ = ["Data", "Result", "Run"]


@dataclass(frozen=True)
class Data:
    """The splits of a run."""

    train: Dataset
    val: Dataset | None = None
    unlabelled: Dataset | None = None  # pictures of which only teachers have something to say


@dataclass(frozen=True)
class Result:
    """What a run ended with."""

    folder: Path
    evaluation: Evaluation | None  # of the best weights
    epochs: int
    steps: int
    seconds: float
    warnings: tuple[str, ...] = ()  # that were said on the way


class Run:
    """One training, from its first step or from a saved one.

    Args:
        recipe: Resolved.
        data: Training pictures, and those for evaluation.
        folder: Where everything goes.
        world: This process among the others.
        reporter: Who says what happens.
        start: What it begins with instead of random numbers.
        teacher: Weights of a frozen teacher.
        callbacks: Functions of a user, called in the main process.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        folder: RunFolder,
        world: World,
        reporter: Reporter,
        start: Start | None = None,
        teacher: Path | None = None,
        callbacks: Callbacks | None = None,
    ) -> None:
        self.recipe, self.data, self.folder, self.world, self.reporter = recipe, data, folder, world, reporter
        self.callbacks = callbacks or Callbacks()
        self.watch = Stopwatch()
        self.saved_at = time.monotonic()
        self.budget = Budget(recipe.max_time)
        self.out_of_time = False
        self.last_ap = -1.0
        self.loader: TrainingLoader | None = None
        self.plan: Plan
        self._plan_for(recipe.epochs)
        self.progress = Progress(
            epochs=recipe.epochs, limit=recipe.epochs, steps=self.plan.steps, accumulate=recipe.accumulate
        )
        self.student = build_student(recipe, self.plan, data.train.categories.names, world, start or Start(), teacher)
        self.keeper = Keeper(folder, data.train.categories, recipe, reporter)
        self.guard = Guard(self.student, self.keeper, world)
        self.observer: Watch | None = None
        if data.val is not None and recipe.teaching.watch:
            batch = recipe.evaluation_batch(world.size)
            self.observer = Watch(recipe, data.val, batch, self.student.updater.precision)

    def _plan_for(self, epochs: int) -> None:
        """Fits everything that has a length to a run of so many epochs; a new loader only where its part changes."""
        recipe, plan = self.recipe, Plan.of(self.recipe, epochs, self.data.train)
        windows, augmentation = plan.windows, plan.augmentation
        if self.loader is None or (windows, augmentation) != (self.plan.windows, self.plan.augmentation):
            self.close()
            share = share_of(recipe.batch or 1, self.world.size, recipe.accumulate)
            self.loader = TrainingLoader(
                self.data.train,
                augmentation,
                windows,
                recipe.size,
                share,
                workers_for(recipe, self.world.device),
                recipe.seed,
                self.world.rank,
                self.world.size,
                recipe.balance,
                self.data.unlabelled,
                recipe.teaching.beside(share),
            )
            self.on_device = OnDevice(
                augmentation, windows, recipe.size, recipe.seed, self.world.device, recipe.mean, recipe.std
            )
        self.plan, self.rates = plan, plan.rates

    def close(self) -> None:
        """Ends the processes that read pictures."""
        if self.loader is not None:
            self.loader.close()
            self.loader = None

    # ---------------------------------------------------------------------------------------------------- the state

    def resume(self) -> None:
        """Goes on from the saved state of the folder, exactly.

        Raises:
            ModelError: There is none, or it belongs to another run.
            UsageError: The run has come to its end.
        """
        state = load_state(self.folder.last)
        # config.json may have been edited meanwhile
        check_changes(from_dict(state["config"]["recipe"], str(self.folder.last)), self.recipe)
        self._restore(state)
        p = self.progress
        if p.epoch >= p.epochs:
            raise UsageError(
                f"{self.folder.root} has done all of its {p.epochs} epochs",
                code="finished",
                hint="Give it more with --epochs, or start another run from its weights with --weights.",
            )
        if self.world.main:
            self.folder.rewind(step=p.total, epoch=p.epoch)
        self.world.wait()
        self.reporter.line(f"resumed at epoch {p.epoch + 1} of {p.epochs}, step {p.step} of {p.steps}")

    def _restore(self, state: dict[str, Any]) -> None:
        s = self.student
        self.progress = p = restore(state, s.detector, s.average, s.optimizer, s.updater.scaler, s.adapters)
        changed = p.limit != self.recipe.epochs or state["config"]["recipe"]["max_time"] != self.recipe.max_time
        p.accumulate = max(p.accumulate, self.recipe.accumulate)  # more parts as asked, or as memory demanded
        share_of(self.recipe.batch or 1, self.world.size, p.accumulate)
        if changed:  # the user asks for more or fewer epochs, or for more or less time, than the run was begun with
            p.epochs = p.limit = self.recipe.epochs
        self._plan_for(p.epochs)
        p.steps = self.plan.steps
        if changed:
            self._retune()

    def _retune(self) -> None:
        """The memory of the moving average follows the length of the run."""
        if self.progress.restarts == 0:
            self.student.average.retune(self.plan.decay, self.plan.ramp)

    def _save(self) -> None:
        if self.world.main:
            save_state(self.folder.last, self._state())
            self._call(self.callbacks.on_save, path=self.folder.last)
        self.saved_at = time.monotonic()

    def _state(self) -> dict[str, Any]:
        s = self.student
        categories = self.data.train.categories
        state = capture(self.progress, s.detector, s.average, s.optimizer, s.updater.scaler, s.adapters)
        return {
            **state,
            "config": self.folder.read_json(self.folder.config),
            "classes": {"ids": list(categories.ids), "names": list(categories.names)},
        }

    # ----------------------------------------------------------------------------------------------------- the loop

    def train(self) -> Result:
        """Runs to the end, or until somebody asks to stop.

        Raises:
            Interrupted: Ctrl-C or SIGTERM came; everything is saved.
            DivergedError: Losses or gradients were not finite too often; names the term, the stage and the pictures.
        """
        p = self.progress
        interruption = Interruption()
        self._status("running")
        try:
            with interruption, settled():
                self._call(self.callbacks.on_start)
                while p.epoch < p.epochs and not self.out_of_time and not self._patience_is_over():
                    if p.step == 0 and p.restarts == 0 and self.data.val and self.plan.restarts_at(p.epoch):
                        self._restart()
                    self._epoch(interruption)
                    if p.step >= p.steps or self.out_of_time:
                        self._end_epoch()
                    self._stop_if_asked(interruption)
        except BaseException as error:
            outcome: Literal["interrupted", "failed"] = "interrupted" if interruption.requested else "failed"
            self._status(outcome, str(error))
            self._call(self.callbacks.on_end, evaluation=self.keeper.best, outcome=outcome)
            raise
        finally:
            self.close()
            self.reporter.stop()
        self._status("finished")
        self._call(self.callbacks.on_end, evaluation=self.keeper.best, outcome="finished")
        return Result(self.folder.root, self.keeper.best, p.epoch, p.total, p.seconds)

    def _epoch(self, interruption: Interruption) -> None:
        """Steps until the epoch is over, somebody asks to stop, or the plan changes."""
        p, s = self.progress, self.student
        assert self.loader is not None
        s.train()
        p.seconds += self.watch.lap("between")
        for batch in self.loader.epoch(p.epoch, first_step=p.step):
            p.seconds += self.watch.lap("data")
            rate = apply_rate(s.optimizer, self.rates.factor(p.total + 1))
            images, targets = self.on_device(batch, epoch=p.epoch, step=p.step)
            if p.step == 0 and self.world.main:
                self.keeper.training_batch(self.plan.windows.kind(p.epoch).name, images, targets, batch.names)
            report = self.guard(images, targets, batch.names, p)
            p.step += 1
            p.total += 1
            seconds = self.watch.lap("step")
            p.seconds += seconds
            if report is not None:
                self._tell(report, rate, batch)
                price = self.student.teachers.price(seconds) if self.student.teachers else None
                if price:
                    self.reporter.line(price)
            if self._wants_to_leave(interruption):
                return

    def _wants_to_leave(self, interruption: Interruption) -> bool:
        """Saves when it is time to; says whether the epoch has to be left before its end. The same on all processes."""
        p, saving = self.progress, self.recipe.saving
        due = (saving.steps > 0 and p.total % saving.steps == 0) or time.monotonic() - self.saved_at >= saving.seconds
        stop, save, seconds = self.world.largest([float(interruption.requested), float(due), p.seconds])
        if save and p.step < p.steps:  # at the end of an epoch it is saved anyway
            self._save()
        if stop:
            interruption.requested = int(stop)
            return True
        return self._time_changes_the_plan(seconds)

    def _stop_if_asked(self, interruption: Interruption) -> None:
        p = self.progress
        (stop,) = self.world.largest([float(interruption.requested)])  # a signal may have reached one of them only
        if stop and p.epoch < p.epochs and not self.out_of_time:
            interruption.requested = int(stop)
            self._save()
            raise interruption.error(f"Go on with: finedetr train --resume {self.folder.root}")

    def _patience_is_over(self) -> bool:
        patience, p = self.recipe.patience, self.progress
        if patience and p.stale >= patience:
            self.reporter.line(f"stopped: {p.stale} evaluations without a better AP than {p.best:.4f}")
            return True
        return False

    # -------------------------------------------------------------------------------------------------- time budgets

    def _time_changes_the_plan(self, seconds: float) -> bool:
        """Whether the epoch must be left: the budget is spent, or the first steps show that fewer epochs fit."""
        p, recipe = self.progress, self.recipe
        pictures = 0 if self.data.val is None else len(self.data.val)
        # until one was measured: a picture costs a third in an evaluation of what it costs in a step
        evaluation = pictures / (3 * (recipe.batch or 1))
        if self.budget.is_spent(p, seconds, evaluation):
            self.out_of_time = True
            self.reporter.line("the time budget is spent: the run ends here")
            return True
        epochs = self.budget.first_guess(p, seconds, evaluation / recipe.evaluating.every)
        return epochs is not None and self._shorten(epochs)

    def _epochs_in_time(self) -> int:
        """Epochs that fit into the time budget, at the speed so far; as planned where there is none."""
        (seconds,) = self.world.largest([self.progress.seconds])
        return self.budget.fit(self.progress, seconds)

    def _shorten(self, epochs: int) -> bool:
        """Plans for another number of epochs; whether the loader had to change for it."""
        p = self.progress
        if epochs == p.epochs:
            return False
        before, augmentation = self.loader, self.plan.augmentation
        p.epochs = epochs
        self._plan_for(epochs)
        self._retune()
        self.reporter.line(f"epochs that fit into {self.recipe.max_time:g} seconds: {epochs}; the schedule follows")
        for line in self.plan.why_milder if self.plan.augmentation != augmentation else ():
            self.reporter.line(line)
        return self.loader is not before

    # ------------------------------------------------------------------------------------------------- between epochs

    def _end_epoch(self) -> None:
        """Evaluates, keeps what is best, plans anew, saves."""
        p = self.progress
        last = self.out_of_time or self._epochs_in_time() <= p.epoch + 1
        better, evaluated = False, last or self.plan.evaluates_after(p.epoch)
        if evaluated:
            p.seconds += self.watch.lap("between")
            better = self._evaluate()
            spent = self.watch.lap("evaluation")
            p.seconds += spent
            (p.evaluating,) = self.world.largest([spent])  # the main process draws and writes, too
        p.epoch, p.step = p.epoch + 1, 0
        if self.recipe.max_time:
            fit = self._epochs_in_time()
            # late in the run only shorter, unless the first steps had been so slow that much of the time is left
            if p.done < p.epochs / 2 or fit < p.epochs or fit > 1.5 * p.epochs:
                self._shorten(fit)
        if evaluated and p.restarts:
            self._judge_restart()
        if self.world.main and better:  # the best first: a crash in between leaves a state that does it again
            save_state(self.folder.best, self._state())
            link_file(self.folder.best, self.folder.last)
            self._call(self.callbacks.on_save, path=self.folder.best)
            self.saved_at = time.monotonic()
        else:
            self._save()
        self.world.wait()

    def _evaluate(self) -> bool:
        """Measures the moving average; whether it is the best so far."""
        p, recipe, data = self.progress, self.recipe, self.data
        detector, teachers = self.student.average.model, self.student.teachers
        if data.val is None:
            if self.world.main:
                self.keeper.unmeasured(detector, p)
            return True
        evaluation, evaluator = evaluate_detector(
            detector,
            data.val,
            recipe.size,
            Inference(self.world.device, mean=recipe.mean, std=recipe.std),
            batch=recipe.evaluation_batch(self.world.size),
            workers=workers_for(recipe, self.world.device),
            rank=self.world.rank,
            world=self.world.size,
            names=data.train.categories.names,
            max_detections=recipe.evaluating.max_detections,
        )
        better = evaluation.ap > p.best or p.best <= 0  # as long as nothing is found, the latest is the best
        p.stale = 0 if better else p.stale + 1
        if better:
            p.best, p.best_epoch = evaluation.ap, p.epoch
        if self.world.main:
            seen = self.observer(self.student.detector, teachers) if self.observer and teachers else None
            self.keeper.evaluation(detector, evaluation, evaluator, p, better=better, teaching=seen)
            self._call(self.callbacks.on_eval, evaluation=evaluation)
        self.last_ap = evaluation.ap
        return better

    def _restart(self) -> None:
        """Brings back the best weights, optimizer and average, for the part without strong augmentation (spec 4.7).

        The moving average then forgets faster, a little more with each restart. In the official code that number had
        no effect, and a run whose best state was missing crashed; here it goes on with what it has.
        """
        p, s = self.progress, self.student
        if p.restarts == 0 and self.world.main and self.folder.best.is_file():
            link_file(self.folder.best, self.folder.restart)
        self.world.wait()
        p.restarts += 1
        if self.folder.restart.is_file():
            restore(load_state(self.folder.restart), s.detector, s.average, s.optimizer, s.updater.scaler, s.adapters)
            self.reporter.line(f"epoch {p.epoch + 1}: back to the best weights (restart {p.restarts})")
        else:
            self.reporter.warn(f"no state at {self.folder.restart}: the plain epochs go on from the current weights")
        s.average.restart(self.recipe.average.decay_after(p.restarts, self.plan.total))
        p.since_restart = p.best if p.restarts == 1 else -1.0

    def _judge_restart(self) -> None:
        """After a plain epoch that is no better than the best since the last restart, begins again from there."""
        p = self.progress
        if self.last_ap > p.since_restart:
            p.since_restart = self.last_ap
        elif p.epoch < p.epochs:
            self._restart()

    # --------------------------------------------------------------------------------------------------- what is said

    def _status(self, state: str, message: str = "") -> None:
        if self.world.main:
            self.keeper.status(state, self.progress, message)

    def _tell(self, report: StepReport, rate: float, batch: Batch) -> None:
        p = self.progress
        if self.world.main:
            self.keeper.step(p, report, rate, self.watch, pictures=len(batch.names) * self.world.size)
            self._call(self.callbacks.on_step, losses=report.losses, rate=rate)

    def _call(self, callback: Callback | None, **news: Any) -> None:
        """Tells a user's function how things stand, and the news of this moment."""
        if callback is None or not self.world.main:
            return
        p, s = self.progress, self.student
        state = State(
            folder=self.folder.root,
            recipe=self.recipe,
            epoch=p.epoch,
            epochs=p.epochs,
            step=p.total,
            steps=p.epochs * p.steps,
            seconds=p.seconds,
            best_ap=p.best if p.best >= 0 else None,
            detector=s.detector,
            average=s.average.model,
            **news,
        )
        callback(state)


def workers_for(recipe: Recipe, device: torch.device) -> int:
    """Processes that read pictures: as asked, or up to 4, and on a CPU only as many as it has cores to spare.

    A reader that competes with two threads of arithmetic for two cores slows each of their thousands of joint
    operations; reading in between costs less.
    """
    if recipe.workers is not None:
        return recipe.workers
    cores = os.cpu_count() or 1
    return max(0, min(4, cores - 2)) if device.type == "cpu" else max(1, min(4, cores - 1))
