"""What is measured about teachers on validation pictures: is the matching steady, do student and teacher agree."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from finedetr.data.dataset import Dataset
from finedetr.data.device import normalize
from finedetr.data.loader import EvaluationLoader
from finedetr.distill.stability import Matched, agreement, hits, instability, matched_by
from finedetr.distill.teachers import Teacher, Teachers
from finedetr.evaluate.inference import at_rest
from finedetr.model.detector import Detector
from finedetr.records import Targets
from finedetr.train.recipe import Recipe
from finedetr.train.step import Precision

__all__ = ["Watch"]


class Watch:
    """Asks student and teachers about the same few pictures after each epoch, and remembers what they said.

    Args:
        recipe: How many pictures, of which size.
        dataset: The validation split.
        batch: Pictures at a time.
        precision: Of the forward passes.
    """

    def __init__(self, recipe: Recipe, dataset: Dataset, batch: int, precision: Precision) -> None:
        self.recipe, self.dataset, self.precision = recipe, dataset, precision
        self.batch = min(batch, recipe.teaching.watch)
        self.before: dict[str, list[Matched]] = {}

    def __call__(self, student: Detector, teachers: Teachers) -> dict[str, float]:
        """`instability` of the student and of its average since the last call; `agreement` and `hits` by teacher.

        A teacher whose queries cannot be told in the student's has neither.
        """
        now: dict[str, list[Matched]] = {}
        with at_rest(student):
            asked = {"student": Teacher(student, itself=True), "average": teachers.average, "frozen": teachers.frozen}
            for images, targets in self._batches():
                with self.precision.forward():
                    lessons = {who: teacher(images, targets) for who, teacher in asked.items() if teacher}
                for who, lesson in lessons.items():
                    if (matched := matched_by(lesson, lessons["student"].trace)) is not None:
                        now.setdefault(who, []).extend(matched)
        measured = {
            f"instability_{who}": instability(self.before[who], matched)
            for who, matched in now.items()
            if who in self.before and who != "frozen"
        }
        for who in now.keys() - {"student"}:
            measured[f"agreement_{who}"] = agreement(now["student"], now[who])
            measured[f"hits_{who}"] = hits(now["student"], now[who])
        self.before = now
        return dict(sorted(measured.items()))

    def _batches(self) -> Iterator[tuple[Tensor, Targets]]:
        """The first pictures of the split, as every evaluation sees them."""
        recipe, device = self.recipe, self.precision.device
        loader = EvaluationLoader(self.dataset, recipe.size, self.batch, 0)
        loader.keys = loader.keys[: -(-recipe.teaching.watch // self.batch)]
        for pictures, _ in loader:
            images = pictures.images.to(device).float().div_(255)
            yield normalize(images, recipe.mean, recipe.std), pictures.targets.to(device)
