"""Where the pictures of an annotation file stand, and what is below a folder."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from finedetr.data.dataset import absolute
from finedetr.files import walk

__all__ = ["below", "picture_folder", "picture_path"]


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
    return max(candidates, key=lambda folder: sum(os.path.isfile(picture_path(folder, name)) for name in probe))


def picture_path(folder: Path, name: str) -> str:
    """Absolute path of a picture. A backslash stands for a slash, as on Windows, unless a file has it in its name."""
    own = absolute(folder / name)
    return absolute(folder / name.replace("\\", "/")) if "\\" in name and not os.path.isfile(own) else own


def below(folder: Path, suffixes: Collection[str]) -> list[str]:
    """Every file below a folder with one of the endings, sorted."""
    found = []
    for place, _, names in walk(absolute(folder)):
        found += [os.path.join(place, name) for name in names if os.path.splitext(name)[1].lower() in suffixes]
    return sorted(found)
