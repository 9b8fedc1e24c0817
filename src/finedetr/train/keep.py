"""What a run leaves behind for people and programs: lines, weights, predictions, pictures. Main process only."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor, nn

from finedetr.data.dataset import Categories
from finedetr.data.device import denormalize
from finedetr.evaluate.coco import Evaluator
from finedetr.evaluate.diagnosis import diagnose
from finedetr.evaluate.evaluation import Evaluation
from finedetr.evaluate.pictures import batch_sheet, prediction_sheet, save_picture, worst_sheet
from finedetr.model.weights import Card, save_weights
from finedetr.records import Targets
from finedetr.train.checkpoint import link_file
from finedetr.train.config import to_dict
from finedetr.train.dump import Dump
from finedetr.train.folder import RunFolder
from finedetr.train.log import Reporter, Stopwatch, clock
from finedetr.train.recipe import Recipe
from finedetr.train.state import Progress
from finedetr.train.step import StepReport

__all__ = ["Keeper"]

SHOWN = 16  # pictures of a batch on a sheet


class Keeper:
    """Writes a run's folder, and says on the way what is worth saying.

    Args:
        folder: Where.
        categories: The class table.
        recipe: Resolved.
        reporter: Who says it.
    """

    def __init__(self, folder: RunFolder, categories: Categories, recipe: Recipe, reporter: Reporter) -> None:
        self.folder, self.categories, self.recipe, self.reporter = folder, categories, recipe, reporter
        self.best: Evaluation | None = None
        self._status_at, self._window = 0.0, 0
        if folder.evaluation.is_file():  # a resumed run
            self.best = Evaluation.from_dict(folder.read_json(folder.evaluation))

    def step(self, p: Progress, report: StepReport, rate: float, watch: Stopwatch, *, pictures: int) -> None:
        """Moves the live line; every so many steps a line of the metrics too."""
        ap = f"AP {p.best:.3f}  " if p.best >= 0 else ""
        text = f"epoch {p.epoch + 1}/{p.epochs}  step {p.total}  loss {report.loss:.3f}  {ap}"
        self._window += 1
        wait = f"data wait {watch.share('data'):.0%}"
        live = self.reporter.live(text + wait, p.total, p.epochs * p.steps)
        if p.total % self.recipe.log_every and p.step < p.steps:  # the last step of an epoch has its line, too
            return
        self.folder.append(
            {
                "kind": "step",
                "epoch": p.epoch,
                "step": p.total,
                "loss": round(report.loss, 6),
                "lr": rate,
                "gradient": round(report.gradient, 6) if math.isfinite(report.gradient) else None,  # fp16 passed over
                "losses": {name: round(value, 6) for name, value in report.losses.items()},
                "seconds": round(p.seconds, 3),
                "data_wait": round(watch.share("data"), 4),
                "skipped": p.skipped,
            }
        )
        if not live:
            working = watch.spent.get("data", 0.0) + watch.spent.get("step", 0.0)
            pace = f"{self._window * pictures / working:.1f} pictures/s  " if working else ""
            self.reporter.line(f"{text}lr {rate:.2e}  {pace}{wait}  left {clock(self._left(p))}")
        self._window = 0
        watch.reset()
        if time.monotonic() - self._status_at > 5:
            self.status("running", p)

    def training_batch(self, window: str, images: Tensor, targets: Targets, names: tuple[str, ...]) -> None:
        """A sheet of the first batch of each kind of augmentation, as the detector gets it."""
        path = self.folder.samples / f"train_{window}.jpg"
        if not path.is_file():
            self._sheet(path, images, targets, names)

    def skipped(self, p: Progress, dump: Dump, path: Path) -> None:
        """A step that was passed over: one line, and with the first one in a row a sheet of the batch."""
        self.folder.append(
            {
                "kind": "skipped",
                "epoch": p.epoch,
                "step": p.total + 1,
                "message": dump.message,
                "losses": {name: str(value) for name, value in dump.losses.items()},  # JSON has no NaN
                "pictures": list(dump.pictures),
                "in_a_row": p.skipped_in_a_row,
                "skipped": p.skipped,
            }
        )
        where = ""
        if p.skipped_in_a_row == 1:
            self._sheet(self.folder.samples / "nan_batch.jpg", dump.images, dump.targets, dump.pictures)
            where = f"; the batch is in {path}"
        count = f"{p.skipped_in_a_row} in a row, {p.skipped} in all"
        self.reporter.warn(f"step {p.total + 1} is passed over ({count}): {dump.message}{where}")

    def _sheet(self, path: Path, images: Tensor, targets: Targets, names: tuple[str, ...]) -> None:
        """The first pictures of a batch with their boxes."""
        r = self.recipe
        shown = (denormalize(images[:SHOWN], r.mean, r.std) * 255).round().nan_to_num(0).clamp(0, 255).byte().cpu()
        counts = targets.counts[: len(shown)]
        rows = slice(0, sum(counts))
        own = Targets(targets.labels[rows].cpu(), targets.boxes[rows].cpu(), targets.image[rows].cpu(), counts)
        titles = tuple(Path(name).name for name in names[: len(shown)])
        save_picture(batch_sheet(shown, own, self.categories.names, titles=titles, count=SHOWN), path)

    def _left(self, p: Progress) -> float:
        """Seconds until the end, at the speed so far."""
        left = (p.epochs * p.steps - p.total) * p.seconds / max(p.total, 1)
        return min(left, self.recipe.max_time - p.seconds) if self.recipe.max_time else left

    def evaluation(
        self,
        detector: nn.Module,
        evaluation: Evaluation,
        evaluator: Evaluator,
        p: Progress,
        *,
        better: bool,
        teaching: Mapping[str, float] | None = None,
    ) -> None:
        """Keeps the weights that were measured, and where they are the best, what they found.

        `teaching` is what was measured about teachers beside it.
        """
        self._save_weights(detector, evaluation.metrics(), p, better=better)
        if better:
            self.best = evaluation
            save_picture(prediction_sheet(evaluator.dataset, evaluator), self.folder.samples / "predictions_val.jpg")
            evaluation = replace(evaluation, diagnosis=diagnose(evaluator))
            self._worst(evaluation, evaluator)
            self.folder.write_json(self.folder.predictions, evaluator.coco_results())
            self.folder.write_json(
                self.folder.evaluation,
                {**evaluation.to_dict(), "epoch": p.epoch, "step": p.total, "train_seconds": round(p.seconds, 3)},
            )
        self.folder.append(
            {
                "kind": "evaluation",
                "epoch": p.epoch,
                "step": p.total,
                "best": better,
                "seconds": round(p.seconds, 3),
                **evaluation.metrics(),
                **({"teaching": {name: round(value, 6) for name, value in teaching.items()}} if teaching else {}),
            }
        )
        star = "  best" if better else f"  best {p.best:.4f} in epoch {p.best_epoch + 1}"
        self.reporter.line(
            f"epoch {p.epoch + 1}/{p.epochs}  AP {evaluation.ap:.4f}  AP50 {evaluation.ap50:.4f}  "
            f"AR {evaluation.ar100:.4f}{star}  {clock(p.seconds)}"
        )
        if teaching:
            self.reporter.line("teaching: " + ", ".join(f"{name} {value:.3g}" for name, value in teaching.items()))
        self.status("running", p)

    def _worst(self, evaluation: Evaluation, evaluator: Evaluator) -> None:
        """The pictures with the most faults, beside their truth."""
        path = self.folder.samples / "worst_val.jpg"
        path.unlink(missing_ok=True)
        sheet = worst_sheet(evaluation, evaluator)
        if sheet is not None:
            save_picture(sheet, path)

    def unmeasured(self, detector: nn.Module, p: Progress) -> None:
        """Keeps the weights of a run that has no pictures for an evaluation: the last ones are the best."""
        self._save_weights(detector, {}, p, better=True)

    def _save_weights(self, detector: nn.Module, metrics: Mapping[str, float], p: Progress, *, better: bool) -> None:
        recipe = self.recipe
        card = Card(
            config=recipe.model,
            names=self.categories.names,
            category_ids=self.categories.ids,
            size=recipe.size,
            mean=recipe.mean,
            std=recipe.std,
            recipe={**to_dict(recipe), "epoch": p.epoch, "step": p.total},
            metrics=metrics,
        )
        save_weights(self.folder.last_weights, detector, card)
        if better:
            link_file(self.folder.last_weights, self.folder.best_weights)

    def status(self, state: str, p: Progress, message: str = "") -> None:
        """The last state, for somebody who watches from outside."""
        self._status_at = time.monotonic()
        document = {
            "state": state,
            "pid": os.getpid(),
            "time": time.time(),
            "epoch": p.epoch,
            "epochs": p.epochs,
            "step": p.total,
            "steps": p.epochs * p.steps,
            "seconds": round(p.seconds, 1),
            "seconds_left": round(self._left(p), 1),
            "best_ap": p.best if p.best >= 0 else None,
            "skipped": p.skipped,
            "message": message,
        }
        self.folder.write_json(self.folder.status, document)
