"""How queries keep their identity between two detectors: by the cells that they come from, or by their places."""

from __future__ import annotations

import itertools
import math

import torch
from jaxtyping import Int
from torch import Tensor

from finedetr.records import Lesson, Trace

__all__ = ["carry", "known_as", "same_queries", "shared_cells", "slots_of", "starts_of"]

Shapes = tuple[tuple[int, int], ...]


def carry(tokens: Int[Tensor, "B Q"], source: Shapes, target: Shapes) -> Int[Tensor, "B Q"]:
    """The cells of another pyramid at the same places, on the level whose cells are most nearly as large.

    Where both pyramids have a level of the same shape its cells are the same ones, whatever the two models are.

    Args:
        tokens: Cells of the source, counted level after level, row after row.
        source: Height and width of its levels.
        target: Those of the other pyramid, of the same picture.
    """
    return tokens if source == target else _table(source, target).to(tokens.device)[tokens]


def starts_of(shapes: Shapes) -> list[int]:
    """The first cell of each level in a flattened pyramid, and the number of all."""
    return [0, *itertools.accumulate(height * width for height, width in shapes)]


def _table(source: Shapes, target: Shapes) -> Int[Tensor, " T"]:
    """For each cell of the source the cell of the target."""
    starts = starts_of(target)
    parts = []
    for height, width in source:
        ratios = [abs(math.log(h * w / (height * width))) for h, w in target]
        level = ratios.index(min(ratios))
        h, w = target[level]
        y = (2 * torch.arange(height) + 1) * h // (2 * height)
        x = (2 * torch.arange(width) + 1) * w // (2 * width)
        parts.append((starts[level] + y[:, None] * w + x).flatten())
    return torch.cat(parts)


def shared_cells(source: Shapes, target: Shapes) -> Int[Tensor, " T"]:
    """For each cell of the source the same one of the target, or -1 where no level of it has that shape."""
    starts = starts_of(target)
    parts = []
    for height, width in source:
        cells = torch.arange(height * width)
        same = (height, width) in target
        parts.append(cells + starts[target.index((height, width))] if same else torch.full_like(cells, -1))
    return torch.cat(parts)


def slots_of(tokens: Int[Tensor, "B P"], own: Int[Tensor, "B Q"]) -> Int[Tensor, "B P"]:
    """The query that comes from each token, or -1 where none does."""
    same = tokens[:, :, None] == own[:, None]
    return torch.where(same.any(-1), same.long().argmax(-1), -1)


def known_as(lesson: Lesson, own: Trace) -> Int[Tensor, "B P"] | None:
    """What identifies each of a teacher's queries in the student; None where nothing does.

    Selected queries are known by their cell, carried into the student's pyramid. Learned ones keep their place between
    a detector and its average; those of another detector are strangers.
    """
    theirs = lesson.trace.tokens
    if theirs is not None and own.tokens is not None:
        return carry(theirs, lesson.trace.shapes, own.shapes)
    if theirs is not None or own.tokens is not None or not lesson.itself:
        return None
    pictures, queries = own.boxes.shape[:2]
    return torch.arange(queries, device=own.boxes.device).expand(pictures, -1)


def same_queries(lesson: Lesson, own: Trace) -> Int[Tensor, "B P"]:
    """The student's query that is the same as each of a teacher's, or -1."""
    known = known_as(lesson, own)
    if known is None:
        return torch.full(lesson.trace.boxes.shape[:2], -1, device=own.boxes.device)
    return known if own.tokens is None else slots_of(known, own.tokens)
