"""What an evaluation says: COCO's twelve numbers, each class, each size. A value, with its JSON and its table."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from finedetr.errors import DataError
from finedetr.evaluate.findings import Diagnosis

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["SIZES", "ClassScore", "Evaluation", "SizeScore", "plain"]

SIZES: dict[str, tuple[float, float]] = {
    "small": (0.0, 32.0**2),
    "medium": (32.0**2, 96.0**2),
    "large": (96.0**2, 1e10),
}
"""COCO's sizes by the area of an object in pixels of the original picture."""

CONFUSED = 20  # lines of a table
METRICS: dict[str, str] = {
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
    "ap_small": "AP_small",
    "ap_medium": "AP_medium",
    "ap_large": "AP_large",
    "ar1": "AR1",
    "ar10": "AR10",
    "ar100": "AR100",
    "ar_small": "AR_small",
    "ar_medium": "AR_medium",
    "ar_large": "AR_large",
}
"""Field of `Evaluation` -> name in files and tables, in COCO's order."""


@dataclass(frozen=True, slots=True)
class ClassScore:
    """One class. -1: it has no boxes in this split."""

    name: str
    id: int  # the data set's original category id
    ap: float
    ap50: float
    ar: float
    boxes: int  # without crowd


@dataclass(frozen=True, slots=True)
class SizeScore:
    """Objects of one size. -1: there are none."""

    ap: float
    ar: float
    boxes: int


@dataclass(frozen=True)
class Evaluation:
    """COCO's numbers in [0, 1], as pycocotools computes them; -1 where there is nothing to measure.

    AP is the mean over IoU .50:.05:.95, classes and 101 recalls; AR the mean over IoU and classes of the best recall.
    `ar100` and all but `ar1` and `ar10` are at `max_detections` for each picture and class, 100 if not said otherwise.

    Attributes:
        per_class: One entry for each class, in the order of their indices.
        by_size: `small` (area below 32²), `medium`, `large` (96² and more).
        pictures: How many pictures the data set has.
        boxes: How many boxes, without crowd.
        detections: How many detections came in.
        unanswered: Pictures for which no answer came; all their objects count as missed.
        unreadable: Pictures that could not be read; neither they nor their objects count.
        max_detections: The limit for each picture and class.
        diagnosis: What goes wrong, where somebody asked (`finedetr.evaluate.diagnose`).
    """

    ap: float
    ap50: float
    ap75: float
    ap_small: float
    ap_medium: float
    ap_large: float
    ar1: float
    ar10: float
    ar100: float
    ar_small: float
    ar_medium: float
    ar_large: float
    per_class: tuple[ClassScore, ...]
    by_size: dict[str, SizeScore]
    pictures: int
    boxes: int
    detections: int
    unanswered: int = 0
    unreadable: int = 0
    max_detections: int = 100
    diagnosis: Diagnosis | None = None

    def metrics(self) -> dict[str, float]:
        """The twelve numbers under COCO's names: AP, AP50, AP75, AP_small ... AR_large."""
        return {name: getattr(self, key) for key, name in METRICS.items()}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts: what `to_json` writes."""
        return {
            **self.metrics(),
            "by_size": {name: asdict(score) for name, score in self.by_size.items()},
            "per_class": [asdict(score) for score in self.per_class],
            "pictures": self.pictures,
            "boxes": self.boxes,
            "detections": self.detections,
            "unanswered": self.unanswered,
            "unreadable": self.unreadable,
            "max_detections": self.max_detections,
            **({"diagnosis": self.diagnosis.to_dict()} if self.diagnosis else {}),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Evaluation:
        """The inverse of `to_dict`; further entries (a run's seconds, its weights) are passed over.

        Raises:
            DataError: Where an entry is missing or of the wrong kind.
        """
        try:
            metrics: dict[str, Any] = {key: float(values[name]) for key, name in METRICS.items()}
            counts = ("pictures", "boxes", "detections", "unanswered", "max_detections")
            diagnosis = values.get("diagnosis")
            return cls(
                **metrics,
                per_class=tuple(ClassScore(**score) for score in values["per_class"]),
                by_size={name: SizeScore(**score) for name, score in values["by_size"].items()},
                **{name: int(values[name]) for name in counts},
                unreadable=int(values.get("unreadable", 0)),  # older files do not tell
                diagnosis=Diagnosis.from_dict(diagnosis) if diagnosis else None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"this is no evaluation: {error!r}", code="evaluation") from error

    def to_json(self) -> str:
        """One JSON document."""
        return json.dumps(self.to_dict(), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The inverse of `to_json`.

        Raises:
            DataError: Where the text is no such document.
        """
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"this is no evaluation: {error}", code="evaluation") from error
        if not isinstance(values, dict):
            raise DataError(
                f"this is no evaluation: a JSON object was wanted, got {type(values).__name__}", code="evaluation"
            )
        return cls.from_dict(values)

    def table(self, *, per_class: bool = True, terminal: bool = False, width: int | None = None) -> str:
        """The numbers as text: boxed and aligned for a terminal, otherwise tab-separated and complete."""
        return _text(self, per_class=per_class, terminal=terminal, width=width)

    def __str__(self) -> str:
        return self.table(per_class=False)


def _text(evaluation: Evaluation, *, per_class: bool, terminal: bool, width: int | None) -> str:
    """The tables as text that ends with a newline.

    Args:
        evaluation: What to show.
        per_class: Whether to add a line for each class.
        terminal: Boxes and aligned columns, at most `width` wide; otherwise tab-separated values, never cut.
        width: Columns of the terminal; asked from it where it is not given.
    """
    if not terminal:
        return _tsv(evaluation, per_class)
    from rich.console import Console

    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=True, highlight=False)
    for part in _rich(evaluation, per_class):
        console.print(part)
    return stream.getvalue()


def _tsv(evaluation: Evaluation, per_class: bool) -> str:
    """Blocks with a header line each, an empty line between blocks; numbers with six digits, -1 where undefined."""
    blocks: list[Sequence[Sequence[object]]] = [
        [("metric", "value"), *((name, value) for name, value in evaluation.metrics().items())],
        [("size", "AP", "AR", "boxes"), *((n, s.ap, s.ar, s.boxes) for n, s in evaluation.by_size.items())],
    ]
    if per_class:
        rows = [(plain(c.name), c.id, c.ap, c.ap50, c.ar, c.boxes) for c in evaluation.per_class]
        blocks.append([("class", "id", "AP", "AP50", "AR", "boxes"), *rows])
    if evaluation.diagnosis is not None:
        blocks += [[head, *rows] for head, rows in _findings(evaluation.diagnosis)]
    return "\n".join("".join("\t".join(map(_cell, row)) + "\n" for row in block) for block in blocks)


def _findings(diagnosis: Diagnosis) -> list[tuple[tuple[str, ...], list[tuple[object, ...]]]]:
    """(header, rows) of each table of a diagnosis."""
    names = [plain(t.name) for t in diagnosis.thresholds]
    sides = [*names, "nothing"]
    confused = [(sides[c.truth], sides[c.answer], c.count) for c in diagnosis.confused()]
    return [
        (("error", "count", "AP50 lost"), [(e.kind, e.count, e.cost) for e in diagnosis.errors]),
        (
            ("class", "threshold", "F1", "precision", "recall"),
            [(plain(t.name), t.threshold, t.f1, t.precision, t.recall) for t in diagnosis.thresholds],
        ),
        (("truth", "answer", "boxes"), list(confused[:CONFUSED])),
        (("picture", "found", "missed", "wrong"), [(w.file, w.found, w.missed, w.wrong) for w in diagnosis.worst]),
    ]


def _cell(value: object) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def plain(name: str) -> str:
    """A class name without the characters that end a cell or a line, or steer a terminal."""
    return "".join(character if character.isprintable() else " " for character in name)


def _rich(evaluation: Evaluation, per_class: bool) -> list[RenderableType]:
    """The same for a terminal. Class names are text, never markup."""
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    limit = evaluation.max_detections
    head = Table(title=Text(_headline(evaluation)), title_justify="left", title_style="")
    for name in ("", "all", "IoU .50", "IoU .75", "small", "medium", "large"):
        head.add_column(name, justify="right" if name else "left", overflow="fold")
    e = evaluation
    head.add_row("AP", *map(_percent, (e.ap, e.ap50, e.ap75, e.ap_small, e.ap_medium, e.ap_large)), style="bold")
    head.add_row("AR", _percent(e.ar100), "", "", *map(_percent, (e.ar_small, e.ar_medium, e.ar_large)))
    head.add_row("AR, best 1", _percent(e.ar1), "", "", "", "", "")
    head.add_row("AR, best 10", _percent(e.ar10), "", "", "", "", "")
    head.add_row("boxes", f"{e.boxes}", "", "", *(str(score.boxes) for score in e.by_size.values()))
    parts: list[RenderableType] = [head]
    if limit != 100:
        parts.append(
            Text(f"AP and AR are at {limit} detections a picture and class; COCO's are at 100.", style="yellow")
        )
    if e.unanswered:
        parts.append(Text(f"{e.unanswered} pictures were not answered: their objects count as missed.", style="yellow"))
    if e.unreadable:
        parts.append(Text(f"{e.unreadable} pictures could not be read and are left out.", style="yellow"))
    if per_class:
        table = Table()
        table.add_column("class", overflow="fold")
        for name in ("id", "AP", "AP50", "AR", "boxes"):
            table.add_column(name, justify="right", overflow="fold")
        for c in e.per_class:
            numbers = (str(c.id), _percent(c.ap), _percent(c.ap50), _percent(c.ar), str(c.boxes))
            table.add_row(escape(plain(c.name)), *numbers)
        parts.append(table)
    if evaluation.diagnosis is not None:
        for head_row, rows in _findings(evaluation.diagnosis):
            table = Table()
            for name in head_row:
                table.add_column(name, overflow="fold")
            for row in rows:
                table.add_row(*(escape(plain(_cell(cell))) for cell in row))
            parts.append(table)
    return parts


def _headline(evaluation: Evaluation) -> str:
    return f"{evaluation.pictures} pictures, {evaluation.boxes} boxes, {evaluation.detections} detections"


def _percent(value: float) -> str:
    """Points of AP with one digit, as papers write it; a dash where there is nothing to measure."""
    return "–" if value < 0 else f"{100 * value:.1f}"
