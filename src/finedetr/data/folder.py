"""Pictures that stand beside a data set: a folder that nobody has annotated, or what a detector found in them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from finedetr.data.dataset import Categories, Dataset, Draft, Note, absolute, finish, listed
from finedetr.data.formats import open_dataset
from finedetr.data.images import SUFFIXES
from finedetr.errors import DataError

__all__ = ["open_beside", "open_folder"]


def open_beside(path: str | Path, categories: Categories) -> Dataset:
    """A folder of pictures without labels, or a JSON of COCO's form with labels that a detector gave (`predict`).

    Args:
        path: The folder or the file.
        categories: Those of the data set; labels are matched by name, boxes of other classes are dropped with a note.

    Raises:
        DataError: There is nothing to read, or no class has the same name.
    """
    if Path(path).suffix.lower() != ".json":
        return open_folder(path, categories)
    found = open_dataset(path)
    place = {name: index for index, name in enumerate(categories.names)}
    table = np.array([place.get(name, -1) for name in found.categories.names], dtype=np.int64)
    if not (table >= 0).any():
        raise DataError(
            f"{path} has the classes {listed(found.categories.names)}, the data {listed(categories.names)}: "
            "no name is the same",
            code="class_names",
            hint="Detections are matched to the data set's classes by name.",
        )
    labels = table[found.labels]
    rows = np.flatnonzero((labels >= 0) & ~found.crowd)
    picture = np.repeat(np.arange(len(found)), np.diff(found.starts))[rows]
    counts = np.bincount(picture, minlength=len(found))
    unknown = int((labels < 0).sum())
    note = Note(
        "data.class_names", "warn", f"{path}: {unknown} boxes of classes that the data does not have", (), unknown
    )
    return replace(
        found,
        evidence=f"{len(found)} pictures with {len(rows)} boxes in {path}",
        starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        labels=labels[rows],
        boxes=found.boxes[rows],
        crowd=found.crowd[rows],
        area=found.area[rows],
        annotation_ids=found.annotation_ids[rows],
        categories=categories,
        notes=(*found.notes, *([note] if unknown else [])),
    )


def open_folder(path: str | Path, categories: Categories) -> Dataset:
    """All pictures of a folder and of those in it, in the order of their names.

    Args:
        path: The folder.
        categories: Those of the data set beside which they are used.

    Raises:
        DataError: There is no such folder, or no picture in it that can be read.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root} is no folder of pictures", code="none", hint="Give the folder that holds them.")
    files = tuple(sorted(absolute(file) for file in root.rglob("*") if file.suffix.lower() in SUFFIXES))
    if not files:
        raise DataError(
            f"{root} holds no pictures", code="empty_split", hint=f"Known endings: {', '.join(sorted(SUFFIXES))}."
        )
    none = np.zeros(0, dtype=np.int64)
    draft = Draft(
        split="unlabelled",
        layout="folder",
        evidence=f"{len(files)} pictures in {root}",
        files=files,
        ids=np.arange(len(files)),
        sizes=np.zeros((len(files), 2), dtype=np.int32),
        picture=none,
        labels=none,
        boxes=np.zeros((0, 4)),
        crowd=np.zeros(0, dtype=bool),
        area=np.zeros(0),
        annotation_ids=none,
        categories=categories,
        where=lambda row: f"{root} ({row})",
    )
    return finish(draft)
