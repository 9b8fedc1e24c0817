"""A folder of pictures that nobody has annotated, as a data set without a box."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from finedetr.data.dataset import Categories, Dataset, Draft, absolute, finish
from finedetr.data.images import SUFFIXES
from finedetr.errors import DataError

__all__ = ["open_folder"]


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
