"""Annotated pictures of one split, as numpy arrays; and the checks that every layout's reader ends in."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from finedetr.data.images import SWAPPED, Header, read_header
from finedetr.errors import DataError

__all__ = ["COMMON", "Categories", "Dataset", "Draft", "Note", "finish", "split_name", "unions"]

Level = Literal["info", "warn", "error"]
COMMON = ("train", "val", "test")
"""The splits that every layout knows."""
SYNONYMS = {"training": "train", "valid": "val", "validation": "val", "testing": "test"}
TOLERATED_MISSING = 0.01  # more absent pictures than this share is an error, not a warning


@dataclass(frozen=True, slots=True)
class Note:
    """Something worth saying about a data set, counted: `code: what, where (first three), how many, what to do`."""

    code: str  # "data.degenerate"
    level: Level
    message: str
    where: tuple[str, ...] = ()
    count: int = 1

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"


@dataclass(frozen=True, slots=True)
class Categories:
    """The one table of classes: category id -> index -> name. The position is the index."""

    ids: tuple[int, ...]  # the data set's original ids, as results are written
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in self.names:
            if any("\ud800" <= character <= "\udfff" for character in name):
                raise DataError(f"the class name {name!r} holds half a character", code="class_names")

    def __len__(self) -> int:
        return len(self.names)

    def index_of(self) -> dict[int, int]:
        """Category id -> index."""
        return {identity: index for index, identity in enumerate(self.ids)}


@dataclass(frozen=True, eq=False)
class Dataset:
    """Annotated pictures of one split: N pictures, T boxes, sorted by picture.

    `files` are absolute paths; `sizes` are (width, height) as seen after EXIF; `boxes` are xyxy pixels, clipped to the
    picture and never degenerate; `crowd` marks crowd or difficult boxes (ignored in evaluation, left out of training).
    """

    split: str
    layout: str
    evidence: str
    files: tuple[str, ...]
    ids: NDArray[np.int64]  # [N]
    sizes: NDArray[np.int32]  # [N, 2]
    starts: NDArray[np.int64]  # [N + 1]
    labels: NDArray[np.int64]  # [T] class indices
    boxes: NDArray[np.float32]  # [T, 4]
    crowd: NDArray[np.bool_]  # [T]
    area: NDArray[np.float32]  # [T]
    annotation_ids: NDArray[np.int64]  # [T]
    categories: Categories
    notes: tuple[Note, ...] = ()

    def __len__(self) -> int:
        return len(self.files)

    def rows(self, index: int) -> slice:
        """Where the annotations of a picture stand."""
        return slice(int(self.starts[index]), int(self.starts[index + 1]))

    def subset(self, indices: Sequence[int] | NDArray[Any]) -> Dataset:
        """The same data set with these pictures only, in this order."""
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        counts = np.diff(self.starts)[chosen]
        rows = [np.arange(self.starts[i], self.starts[i + 1]) for i in chosen]
        row = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        return replace(
            self,
            files=tuple(self.files[i] for i in chosen),
            ids=self.ids[chosen],
            sizes=self.sizes[chosen],
            starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
            labels=self.labels[row],
            boxes=self.boxes[row],
            crowd=self.crowd[row],
            area=self.area[row],
            annotation_ids=self.annotation_ids[row],
        )


@dataclass(frozen=True, eq=False)
class Draft:
    """What a reader of one layout found, before anything is checked. Rows may stand in any order.

    A size of 0 means that the annotations do not tell it. `boxes` are xyxy, in pixels or (where `relative`) in shares
    of the picture. `where` names a row for messages: a file and line, or an annotation id.
    """

    split: str
    layout: str
    evidence: str
    files: tuple[str, ...]
    ids: NDArray[np.int64]
    sizes: NDArray[np.int32]  # [N, 2] as the annotations say
    picture: NDArray[np.int64]  # [T] which picture a row belongs to
    labels: NDArray[np.int64]
    boxes: NDArray[np.float64]
    crowd: NDArray[np.bool_]
    area: NDArray[np.float64]  # NaN: width times height
    annotation_ids: NDArray[np.int64]
    categories: Categories
    where: Callable[[int], str]
    relative: bool = False
    notes: tuple[Note, ...] = ()


def finish(draft: Draft, *, skip_missing: bool = False) -> Dataset:
    """Checks a draft and makes the data set of it.

    Args:
        draft: What a reader found.
        skip_missing: Leave absent pictures out however many they are.

    Raises:
        DataError: A fault that cannot be mended here (codes of the data set table: nonfinite, size, missing_image ...).
    """
    notes = [*draft.notes, *repeated_files(draft)]
    check_finite(draft)
    keep = np.ones(len(draft.files), dtype=bool)
    turned = np.ones(len(draft.files), dtype=np.int64)
    sizes = draft.sizes.astype(np.int64).copy()
    for index, header in enumerate(read_headers(draft, notes, skip_missing)):
        if header is None:
            keep[index] = False
        else:
            sizes[index], turned[index] = settle_size(draft.files[index], header, draft.sizes[index])
    if np.any(turned > 1):
        notes.append(exif_note(draft, np.flatnonzero(turned > 1)))
    if not keep.any():
        raise DataError(f"split {draft.split!r} has no pictures ({draft.evidence})", code="empty_split")

    boxes = draft.boxes.reshape(-1, 4).copy()
    if draft.relative:
        boxes *= np.tile(sizes[draft.picture], 2)
    boxes = turn_boxes(boxes, turned[draft.picture], sizes[draft.picture])
    row_kept = clip_and_judge(draft, boxes, sizes[draft.picture], keep, notes)
    return assemble(draft, boxes, sizes, keep, row_kept, notes)


def assemble(
    draft: Draft,
    boxes: NDArray[np.float64],
    sizes: NDArray[np.int64],
    keep: NDArray[np.bool_],
    row_kept: NDArray[np.bool_],
    notes: list[Note],
) -> Dataset:
    """Sorts what is left by picture."""
    number = np.cumsum(keep) - 1  # the new index of each picture
    rows = np.flatnonzero(row_kept)
    rows = rows[np.argsort(draft.picture[rows], kind="stable")]
    picture = number[draft.picture[rows]]
    counts = np.bincount(picture, minlength=int(keep.sum()))
    boxes = boxes[rows]
    area = draft.area[rows]
    area = np.where(np.isfinite(area), area, (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))
    crowd = draft.crowd[rows]
    if crowd.any():
        message = f"{crowd.sum()} crowd or difficult boxes: ignored in evaluation, left out of training."
        notes.append(Note("data.crowd", "info", message, count=int(crowd.sum())))
    kept = np.flatnonzero(keep)
    return Dataset(
        split=draft.split,
        layout=draft.layout,
        evidence=draft.evidence,
        files=tuple(draft.files[i] for i in kept),
        ids=draft.ids[kept].astype(np.int64),
        sizes=sizes[kept].astype(np.int32),
        starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        labels=draft.labels[rows].astype(np.int64),
        boxes=boxes.astype(np.float32),
        crowd=crowd.astype(bool),
        area=area.astype(np.float32),
        annotation_ids=draft.annotation_ids[rows].astype(np.int64),
        categories=draft.categories,
        notes=tuple(notes),
    )


# ------------------------------------------------------------------------------------------------------------- splits


def split_name(word: str) -> str:
    """The name of a split, however a data set spells it.

    >>> split_name("Validation")
    'val'
    """
    return SYNONYMS.get(word.lower(), word.lower())


def unions(datasets: Sequence[Dataset]) -> tuple[Dataset, ...]:
    """Splits of another name that hold nothing but pictures of train, val and test, such as VOC's trainval."""
    held = {file for data in datasets if data.split in COMMON for file in data.files}
    return tuple(data for data in datasets if data.split not in COMMON and held.issuperset(data.files))


# ----------------------------------------------------------------------------------------------------------- checks


def listed(names: Sequence[str]) -> str:
    """The first three of a list, and a sign that there are more."""
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def check_finite(draft: Draft) -> None:
    """NaN and infinity in a box are an error: evaluators take them without a word."""
    bad = np.flatnonzero(~np.isfinite(draft.boxes.reshape(-1, 4)).all(1))
    if len(bad):
        raise DataError(
            f"{draft.where(int(bad[0]))}: the box contains NaN or infinity ({len(bad)} such boxes)", code="nonfinite"
        )


def repeated_files(draft: Draft) -> list[Note]:
    """A note of the pictures that are listed more than once, such as under two ids."""
    files = tuple(file for file, count in Counter(draft.files).items() if count > 1)
    message = f"{len(files)} pictures of {draft.split} are listed more than once: {listed(files)}"
    return [Note("data.duplicate_image", "warn", message, files, len(files))] if files else []


def read_headers(draft: Draft, notes: list[Note], skip_missing: bool) -> list[Header | None]:
    """Every picture's header; None for a picture that is left out, with a note."""
    headers: list[Header | None] = []
    missing: list[tuple[str, DataError]] = []
    broken: list[tuple[str, DataError]] = []
    for file in draft.files:
        try:
            headers.append(read_header(file))
        except DataError as error:
            headers.append(None)
            (missing if error.code == "data.missing_image" else broken).append((file, error))
    if missing:
        names = [file for file, _ in missing]
        state = "cannot be opened" if any(map(os.path.exists, names)) else "are listed but absent"
        message = f"{len(missing)} of {len(draft.files)} pictures {state}: {listed(names)}"
        if len(missing) > TOLERATED_MISSING * len(draft.files) and not skip_missing:
            hint = "Check the folder of the pictures. Use --skip-missing to go on without them."
            raise DataError(message, code="missing_image", hint=hint)
        notes.append(Note("data.missing_image", "warn", f"{message}. They are left out.", tuple(names), len(names)))
    if broken:
        names = [file for file, _ in broken]
        why = broken[0][1].message.partition("(")[2].rstrip(")")
        message = f"{len(broken)} pictures cannot be decoded ({why}): {listed(names)}. They are left out."
        notes.append(Note("data.corrupt_image", "warn", message, tuple(names), len(names)))
    return headers


def settle_size(file: str, header: Header, said: NDArray[np.int32]) -> tuple[tuple[int, int], int]:
    """The size of a picture as seen, and the orientation that its boxes still have to be turned by (1: none).

    A file that is rotated by EXIF has two possible sizes; the annotations were made on the one that fits them.
    """
    width, height = int(said[0]), int(said[1])
    if width <= 0 or height <= 0 or header.size == (width, height):
        return header.size, 1
    if header.orientation in SWAPPED and (header.width, header.height) == (width, height):
        return header.size, header.orientation
    raise DataError(
        f"{file} is {header.size[0]}x{header.size[1]}, the annotations say {width}x{height}",
        code="size",
        hint="Was the picture resized or rotated after it was annotated? Mend the size, or the file.",
    )


def exif_note(draft: Draft, indices: NDArray[np.int64]) -> Note:
    """Says that boxes were turned together with their pictures."""
    names = tuple(draft.files[i] for i in indices)
    message = (
        f"{len(names)} pictures are rotated by EXIF and were annotated unrotated: their boxes are turned upright "
        f"with them: {listed(names)}"
    )
    return Note("data.exif", "info", message, names, len(names))


def turn_boxes(
    boxes: NDArray[np.float64], orientation: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Moves boxes of the stored picture into the upright one of the given sizes (orientations 5 to 8)."""
    if not np.any(orientation > 1):
        return boxes
    x1, y1, x2, y2 = boxes.T
    width, height = sizes.T
    swapped = np.stack((y1, x1, y2, x2), 1)
    left = np.where(np.isin(orientation, (6, 7)), width - swapped[:, 2], swapped[:, 0])
    right = np.where(np.isin(orientation, (6, 7)), width - swapped[:, 0], swapped[:, 2])
    top = np.where(np.isin(orientation, (7, 8)), height - swapped[:, 3], swapped[:, 1])
    bottom = np.where(np.isin(orientation, (7, 8)), height - swapped[:, 1], swapped[:, 3])
    return np.where((orientation > 1)[:, None], np.stack((left, top, right, bottom), 1), boxes)


def clip_and_judge(
    draft: Draft,
    boxes: NDArray[np.float64],
    sizes: NDArray[np.int64],
    keep: NDArray[np.bool_],
    notes: list[Note],
) -> NDArray[np.bool_]:
    """Clips boxes to their pictures, in place, and tells which rows stay. Counts what it clips and drops."""
    alive = keep[draft.picture]
    degenerate = alive & ((boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1]))
    limit = np.tile(sizes, 2).astype(np.float64)
    outside = alive & ((boxes < -1) | (boxes > limit + 1)).any(1) & ~degenerate
    np.clip(boxes, 0, limit, out=boxes)
    # float32 is what is kept: a box must have an extent in it as well
    low, high = boxes[:, :2].astype(np.float32), boxes[:, 2:].astype(np.float32)
    degenerate |= alive & ((high <= low).any(1))
    duplicate = duplicates(draft, boxes, alive & ~degenerate)
    for rows, code, what in (
        (degenerate, "degenerate", "boxes have no width or height (or lie outside the picture) and are dropped"),
        (outside & ~degenerate, "outside", "boxes reach outside the picture by more than 1 pixel and are clipped"),
        (duplicate, "duplicate_box", "boxes repeat another one exactly (same picture, class and corners)"),
    ):
        if rows.any():
            places = tuple(draft.where(int(row)) for row in np.flatnonzero(rows)[:1000])
            message = f"{rows.sum()} {what}: {listed(places)}"
            notes.append(Note(f"data.{code}", "warn", message, places, int(rows.sum())))
    result: NDArray[np.bool_] = alive & ~degenerate
    return result


def duplicates(draft: Draft, boxes: NDArray[np.float64], alive: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Rows that repeat an earlier row: same picture, class, corners."""
    rows = np.flatnonzero(alive)
    result = np.zeros(len(boxes), dtype=bool)
    if len(rows):
        keys = np.column_stack((draft.picture[rows], draft.labels[rows], boxes[rows]))
        order = np.lexsort(keys.T)
        same = (keys[order][1:] == keys[order][:-1]).all(1)
        result[rows[order[1:][same]]] = True
    return result


def absolute(path: str | Path) -> str:
    """An absolute path without touching the disk for links."""
    return str(Path(path).absolute())
