"""The folder in which the pictures of an annotation file stand."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

__all__ = ["picture_folder"]


def picture_folder(file: Path, splits: Sequence[str], names: Sequence[str]) -> Path:
    """The folder below which most of the pictures are found, some of them tried.

    Args:
        file: The annotations.
        splits: How the split may be spelled.
        names: Of the pictures, as the annotations give them.
    """
    base = file.parent.parent if file.parent.name == "annotations" else file.parent
    candidates = [file.parent, base, base / "images", base / "JPEGImages"]
    for split in dict.fromkeys(splits):
        candidates += [base / split, base / "images" / split, base / split / "images"]
    probe = names[:: max(1, len(names) // 20)]
    return max(candidates, key=lambda folder: sum(os.path.isfile(folder / name) for name in probe))
