"""CSV: one table a split, a row a box (`image,xmin,ymin,xmax,ymax,label`), pixels; empty numbers are a background."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from finedetr.data.dataset import Categories, Draft, listed, split_name
from finedetr.data.formats.folders import picture_folder, picture_path
from finedetr.data.formats.numbers import told_size, whole
from finedetr.errors import DataError, did_you_mean

__all__ = ["COLUMNS", "evidence", "read", "splits"]

COLUMNS: dict[str, tuple[str, ...]] = {
    "image": ("image", "filename", "file", "imagepath", "path", "imagename", "imagefile", "imageid", "img", "picture"),
    "xmin": ("xmin", "x1", "left", "bboxxmin", "boxxmin"),
    "ymin": ("ymin", "y1", "top", "bboxymin", "boxymin"),
    "xmax": ("xmax", "x2", "right", "bboxxmax", "boxxmax"),
    "ymax": ("ymax", "y2", "bottom", "bboxymax", "boxymax"),
    "label": ("label", "class", "classname", "category", "categoryname", "name", "labelname"),
    "crowd": ("iscrowd", "crowd", "difficult"),
    "width": ("width", "imagewidth"),
    "height": ("height", "imageheight"),
}
"""What a column means -> how its header may be written, in small letters without spaces and signs."""
NEEDED = ("image", "xmin", "ymin", "xmax", "ymax", "label")
CORNERS = NEEDED[1:5]


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a table; `box` is None for a picture without boxes."""

    line: int
    image: str
    label: str
    box: tuple[float, ...] | None
    crowd: bool
    size: tuple[int, int]


# ------------------------------------------------------------------------------------------------------------ layout


def evidence(root: Path) -> str:
    """Why this path reads as CSV, or an empty string."""
    if root.is_file():
        return f"{root.name} is CSV" if root.suffix.lower() == ".csv" else ""
    found = annotation_files(root)
    return f"{found[0][0].relative_to(root)} has the columns {', '.join(NEEDED)}" if found else ""


def annotation_files(root: Path) -> list[tuple[Path, str]]:
    """The tables of a folder and the split of each: `train.csv`, or `train/_annotations.csv` as Roboflow writes it."""
    found = [(file, file.parent.name) for file in sorted(root.glob("*/_annotations.csv"))]
    found += [(file, file.stem) for file in sorted([*root.glob("*.csv"), *root.glob("annotations/*.csv")])]
    tables = [(file, split_name(name)) for file, name in found if header(file)]
    empty = [file for file, _ in found if os.path.isfile(file) and not os.path.getsize(file)]
    if tables and empty:  # alone it may be anything; beside a table it was to be one
        hint = f"A split without boxes has a header: {','.join(NEEDED)}. Remove the file if it is no split."
        raise DataError(f"{empty[0]}: is empty", code="csv", hint=hint)
    return tables


def splits(root: Path) -> tuple[str, ...]:
    """Names of the splits."""
    if root.is_file():
        return (split_name(root.stem),)
    return tuple(dict.fromkeys(name for _, name in annotation_files(root)))


def header(file: Path) -> dict[str, int]:
    """Meaning -> column, from the first line of a file; empty where one that is needed is absent."""
    try:
        with open(file, encoding="utf-8-sig", errors="replace", newline="") as stream:
            line = stream.readline(4096)
    except PermissionError as error:  # a split that is passed over without a word would be worse
        raise DataError(f"{file}: cannot be read ({error.strerror})", code="csv") from error
    except OSError:
        return {}
    words = next(csv.reader([line], delimiter=delimiter(line)), [])
    plain = ["".join(c for c in word.lower() if c.isalnum()) for word in words]
    columns = {
        meaning: next(plain.index(name) for name in names if name in plain)
        for meaning, names in COLUMNS.items()
        if set(names) & set(plain)
    }
    return columns if all(name in columns for name in NEEDED) else {}


def delimiter(line: str) -> str:
    """The sign between the cells of a header: the most frequent of comma, semicolon and tab."""
    return max(",;\t", key=line.count)


# ----------------------------------------------------------------------------------------------------------- reading


def read(root: Path, split: str, evidence: str) -> Draft:
    """One split as a draft."""
    tables = [(root, splits(root)[0])] if root.is_file() else annotation_files(root)
    chosen = [file for file, name in tables if root.is_file() or name == split]
    if not chosen:
        raise DataError(f"{root} has no split {split!r}", code="split", hint=did_you_mean(split, splits(root)))
    if len(chosen) > 1:
        raise DataError(
            f"{root} has {len(chosen)} tables for split {split!r}: {listed([str(f) for f in chosen])}",
            code="ambiguous",
            hint="Give the path of the CSV itself.",
        )
    file = chosen[0]
    rows = list(read_rows(file))
    if not rows:
        raise DataError(f"{file} names no pictures", code="empty_split")
    categories = read_classes([rows, *(read_rows(other) for other, _ in tables if other != file)], root)
    index_of = {name: index for index, name in enumerate(categories.names)}
    boxed = [row for row in rows if row.box is not None]
    not_normalized(file, boxed)
    split = splits(root)[0] if root.is_file() else split
    names = list(dict.fromkeys(row.image for row in rows))
    folder = picture_folder(file, (file.stem, split), names)
    path_of = {name: os.path.normpath(picture_path(folder, name)) for name in names}
    pictures = {path: index for index, path in enumerate(dict.fromkeys(path_of.values()))}
    sizes = np.zeros((len(pictures), 2), dtype=np.int32)
    for row in rows:
        sizes[pictures[path_of[row.image]]] = row.size
    return Draft(
        split=split,
        layout="csv",
        evidence=f"{evidence}; {file.name} names {len(pictures)} pictures, in {folder.name or folder}",
        files=tuple(pictures),
        ids=np.arange(1, len(pictures) + 1, dtype=np.int64),
        sizes=sizes,
        picture=np.array([pictures[path_of[row.image]] for row in boxed], dtype=np.int64),
        labels=np.array([index_of[row.label] for row in boxed], dtype=np.int64),
        boxes=np.array([row.box for row in boxed], dtype=np.float64).reshape(-1, 4),
        crowd=np.array([row.crowd for row in boxed], dtype=bool),
        area=np.full(len(boxed), np.nan),
        annotation_ids=np.arange(1, len(boxed) + 1, dtype=np.int64),
        categories=categories,
        where=lambda number: f"{file.name}:{boxed[number].line}",
    )


def read_rows(file: Path) -> Iterator[Row]:
    """The rows of a table.

    Raises:
        DataError: It is no UTF-8 text, or a row is malformed; file and line are named.
    """
    columns = header(file)
    if not columns:
        raise DataError(
            f"{file}:1: wanted a header with {', '.join(NEEDED)}",
            code="keys",
            hint=f"Such as: {','.join(NEEDED)}. Corners are pixels from the upper left.",
        )
    line = 1
    try:
        with open(file, encoding="utf-8-sig", newline="") as stream:
            first = stream.readline()
            reader = csv.reader(stream, delimiter=delimiter(first), strict=True)
            for cells in reader:
                line = reader.line_num + 1
                if any(cell.strip() for cell in cells):
                    yield parse(cells, columns, file, line)
    except (UnicodeDecodeError, csv.Error, OSError) as error:
        raise DataError(f"{file}: cannot be read after line {line} ({error})", code="csv") from error


def parse(cells: list[str], columns: dict[str, int], file: Path, line: int) -> Row:
    """One row of cells."""
    texts = {name: cells[at].strip() if at < len(cells) else "" for name, at in columns.items()}
    image, label = texts["image"], texts["label"]
    if not image:
        raise DataError(f"{file}:{line}: names no picture", code="csv")
    size = told_size(texts.get("width"), texts.get("height"))
    words = [texts[name] for name in CORNERS]
    if not any(words) and not label:
        return Row(line, image, "", None, False, size)
    try:
        box = tuple(float(word) for word in words)
    except ValueError as error:
        raise DataError(
            f"{file}:{line}: wanted {', '.join(CORNERS)} as numbers; got {', '.join(map(repr, words))}",
            code="box",
            hint="A picture without boxes is one row with the picture's name and nothing else.",
        ) from error
    if not label:
        raise DataError(f"{file}:{line}: the box has no label", code="csv")
    crowd = texts.get("crowd", "").lower() not in ("", "0", "0.0", "false", "no")
    return Row(line, image, label, box, crowd, size)


def not_normalized(file: Path, rows: list[Row]) -> None:
    """DataError where all corners lie in 0..1: they are shares of the picture, not pixels."""
    values = [value for row in rows for value in row.box or () if math.isfinite(value)]
    if values and max(values) <= 1 and min(values) >= 0:
        raise DataError(
            f"{file}:{rows[0].line}: all corners are within 0..1: shares of the picture where pixels are wanted",
            code="box",
            hint="Multiply them by the picture's width and height.",
        )


def read_classes(tables: list[list[Row] | Iterator[Row]], root: Path) -> Categories:
    """Every label of every split: the same table for all; numbers in their order, words in the alphabet's."""
    names = {row.label for rows in tables for row in rows if row.box is not None}
    if not names:
        raise DataError(f"{root}: no row has a label", code="keys")
    numbers = {name: whole(name) for name in names}
    numeric = None not in numbers.values()
    ordered = sorted(names, key=lambda name: (numbers[name] if numeric else 0, name))
    return Categories(tuple(range(len(ordered))), tuple(ordered))
