"""How steady a matching is: between two epochs (DN-DETR's instability), and between a student and a teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from finedetr.distill.stages import layer_stages
from finedetr.distill.tokens import known_as
from finedetr.records import Lesson, Trace

__all__ = ["Matched", "agreement", "hits", "instability", "matched_by"]


@dataclass(frozen=True, slots=True)
class Matched:
    """One picture: which target the query of each cell answers for, and from which cells there are queries at all.

    Where queries are learned, their places stand for cells.
    """

    targets: Mapping[int, int]  # cell -> place of the target in its picture
    cells: frozenset[int]


def matched_by(lesson: Lesson, own: Trace) -> list[Matched] | None:
    """The last stage's matching of a detector, picture by picture, by cells of the student's pyramid.

    None where nothing tells which of the student's queries its queries are.
    """
    known = known_as(lesson, own)
    if known is None:
        return None
    tokens = known.tolist()
    pairs, last = lesson.match, layer_stages(lesson.answers.stages)[-1]
    found: list[dict[int, int]] = [{} for _ in tokens]
    at = pairs.stage == last
    for image, query, target in zip(*(x[at].tolist() for x in (pairs.image, pairs.query, pairs.target)), strict=True):
        found[image][tokens[image][query]] = target
    return [Matched(table, frozenset(cells)) for table, cells in zip(found, tokens, strict=True)]


def instability(before: Sequence[Matched], after: Sequence[Matched]) -> float:
    """Queries of a picture whose target is another one than before, or one where there was none: mean over pictures."""
    changed = [
        sum(old.targets.get(cell) != new.targets.get(cell) for cell in old.targets.keys() | new.targets.keys())
        for old, new in zip(before, after, strict=True)
    ]
    return sum(changed) / max(len(changed), 1)


def agreement(student: Sequence[Matched], teacher: Sequence[Matched]) -> float:
    """The share of a teacher's matched targets for which the student's query of the same cell answers, too."""
    same = sum(
        own.targets.get(cell) == target
        for own, other in zip(student, teacher, strict=True)
        for cell, target in other.targets.items()
    )
    return same / max(sum(len(other.targets) for other in teacher), 1)


def hits(student: Sequence[Matched], teacher: Sequence[Matched]) -> float:
    """The identity hit rate: the share of a teacher's queries of whose cell the student has one, too."""
    both = sum(len(own.cells & other.cells) for own, other in zip(student, teacher, strict=True))
    return both / max(sum(len(other.cells) for other in teacher), 1)
