"""Tables of an evaluation: for eyes where there is a terminal, tab-separated and complete everywhere else."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from finedetr.evaluate.evaluation import METRICS, Evaluation

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["evaluation_text", "print_evaluation"]

SUMMARY = tuple(METRICS)


def print_evaluation(evaluation: Evaluation, *, per_class: bool = True, stream: TextIO | None = None) -> None:
    """Prints the tables to stdout or another stream: boxed if it is a terminal, else tab-separated."""
    stream = stream or sys.stdout
    terminal = stream.isatty()
    stream.write(evaluation_text(evaluation, per_class=per_class, terminal=terminal))


def evaluation_text(
    evaluation: Evaluation, *, per_class: bool = True, terminal: bool = False, width: int | None = None
) -> str:
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
        rows = [(_plain(c.name), c.id, c.ap, c.ap50, c.ar, c.boxes) for c in evaluation.per_class]
        blocks.append([("class", "id", "AP", "AP50", "AR", "boxes"), *rows])
    return "\n".join("".join("\t".join(map(_cell, row)) + "\n" for row in block) for block in blocks)


def _cell(value: object) -> str:
    return f"{value:.6f}" if isinstance(value, float) else str(value)


def _plain(name: str) -> str:
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
    if per_class:
        table = Table()
        table.add_column("class", overflow="fold")
        for name in ("id", "AP", "AP50", "AR", "boxes"):
            table.add_column(name, justify="right", overflow="fold")
        for c in e.per_class:
            numbers = (str(c.id), _percent(c.ap), _percent(c.ap50), _percent(c.ar), str(c.boxes))
            table.add_row(escape(_plain(c.name)), *numbers)
        parts.append(table)
    return parts


def _headline(evaluation: Evaluation) -> str:
    return f"{evaluation.pictures} pictures, {evaluation.boxes} boxes, {evaluation.detections} detections"


def _percent(value: float) -> str:
    """Points of AP with one digit, as papers write it; a dash where there is nothing to measure."""
    return "–" if value < 0 else f"{100 * value:.1f}"
