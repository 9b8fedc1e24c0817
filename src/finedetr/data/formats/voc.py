"""Pascal VOC: JPEGImages/, Annotations/*.xml, ImageSets/Main/<split>.txt. Corners are 1-based and inclusive."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from finedetr.data.dataset import COMMON, Categories, Draft, Note, absolute, listed, split_name
from finedetr.data.formats.folders import below
from finedetr.data.formats.numbers import told_size
from finedetr.data.images import SUFFIXES
from finedetr.errors import DataError, did_you_mean

__all__ = ["evidence", "read", "splits"]

FOLDERS = ("JPEGImages", "Annotations", "ImageSets")


def evidence(root: Path) -> str:
    """Why this path reads as VOC, or an empty string."""
    if root.is_dir() and all((root / name).is_dir() for name in FOLDERS) and split_files(root):
        return "it holds JPEGImages/, Annotations/ and ImageSets/"
    return ""


def split_files(root: Path) -> dict[str, Path]:
    """Split -> list file. VOC's own `aeroplane_train.txt` belong to single classes and are left aside."""
    folder = root / "ImageSets" / "Main"
    files = sorted((folder if folder.is_dir() else root / "ImageSets").glob("*.txt"))
    stems = {file.stem for file in files}
    own = [f for f in files if "_" not in f.stem or f.stem.rpartition("_")[2] not in stems]
    return {split_name(file.stem): file for file in sorted(own, key=lambda file: file.stem in COMMON)}  # train.txt wins


def splits(root: Path) -> tuple[str, ...]:
    """Names of the splits."""
    return tuple(split_files(root))


def read(root: Path, split: str, evidence: str) -> Draft:
    """One split as a draft."""
    known = split_files(root)
    if split not in known:
        raise DataError(f"{root} has no split {split!r}", code="split", hint=did_you_mean(split, known))
    pictures = picture_files(root)
    names = read_list(root, known[split], pictures)
    if not names:
        raise DataError(f"{known[split]} names no pictures", code="empty_split")
    repeated = len(names) - len(set(names))
    names = list(dict.fromkeys(names))
    notes = []
    if repeated:
        message = f"{repeated} pictures stand twice in {known[split].name}: read once."
        notes.append(Note("data.duplicate_image", "warn", message, count=repeated))
    categories = read_classes(root)
    trees = [parse(root / "Annotations" / f"{name}.xml") for name in names]
    unlabelled = [name for name, tree in zip(names, trees, strict=True) if tree is None]
    if unlabelled:
        message = f"{len(unlabelled)} pictures have no XML and count as background: {listed(unlabelled)}"
        notes.append(Note("data.background", "warn", message, tuple(unlabelled), len(unlabelled)))
    rows, places = read_objects(root, names, trees, categories)
    table = np.array(rows, dtype=np.float64).reshape(-1, 7)
    return Draft(
        split=split,
        layout="voc",
        evidence=f"{evidence}; {known[split].name} lists {len(names)} pictures",
        files=tuple(pictures.get(name) or absolute(root / "JPEGImages" / f"{name}.jpg") for name in names),
        ids=np.arange(1, len(names) + 1, dtype=np.int64),
        sizes=np.array([size_of(tree) for tree in trees], dtype=np.int32).reshape(-1, 2),
        picture=table[:, 0].astype(np.int64),
        labels=table[:, 1].astype(np.int64),
        boxes=table[:, 2:6],
        crowd=table[:, 6].astype(bool),
        area=np.full(len(table), np.nan),
        annotation_ids=np.arange(1, len(table) + 1, dtype=np.int64),
        categories=categories,
        where=lambda row: places[row],
        notes=tuple(notes),
    )


def read_list(root: Path, file: Path, pictures: Mapping[str, str]) -> list[str]:
    """Names in a split's file. A mark may follow a name (`2008_000008 -1`); a name that exists may hold spaces."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})", code="split", hint="A list is UTF-8 text.") from error
    return [
        line if line in pictures or (root / "Annotations" / f"{line}.xml").is_file() else line.split()[0]
        for line in lines
        if line.strip()
    ]


def picture_files(root: Path) -> dict[str, str]:
    """Name -> file of every picture, whatever its suffix; one in a folder below is `folder/name`."""
    folder = root / "JPEGImages"
    files = below(folder, SUFFIXES)
    return {os.path.splitext(os.path.relpath(file, absolute(folder)))[0].replace(os.sep, "/"): file for file in files}


def parse(file: Path) -> ElementTree.Element | None:
    """The root of an XML, its names without namespaces; None where the file is absent."""
    try:
        tree = ElementTree.fromstring(file.read_bytes())
    except FileNotFoundError:
        return None
    except ElementTree.ParseError as error:
        line, column = error.position
        raise DataError(f"{file}:{line}:{column}: not valid XML ({error})", code="xml") from error
    except (OSError, LookupError, ValueError) as error:  # an encoding that nobody knows, or that expat cannot read
        raise DataError(f"{file}: cannot be read ({error})", code="xml") from error
    for item in tree.iter():
        item.tag = item.tag.rpartition("}")[2]
    return tree


def read_classes(root: Path) -> Categories:
    """Every class name of every annotation, sorted: the same table for all splits."""
    names: set[str] = set()
    for file in below(root / "Annotations", (".xml",)):
        tree = parse(Path(file))
        if tree is not None:
            names |= {(item.findtext("name") or "").strip() for item in tree.iter("object")}
    names.discard("")
    if not names:
        raise DataError(f"{root / 'Annotations'}: no object has a name", code="keys")
    return Categories(tuple(range(len(names))), tuple(sorted(names)))


def size_of(tree: ElementTree.Element | None) -> tuple[int, int]:
    """(width, height) as the XML says; (0, 0) where it does not."""
    size = tree.find("size") if tree is not None else None
    if size is None:
        return 0, 0
    try:
        return told_size(*(int(float(size.findtext(key) or 0)) for key in ("width", "height")))
    except (ValueError, OverflowError):
        return 0, 0


def read_objects(
    root: Path, names: list[str], trees: list[ElementTree.Element | None], categories: Categories
) -> tuple[list[tuple[Any, ...]], list[str]]:
    """Rows (picture, label, xyxy, difficult) and the place of each."""
    index_of = {name: index for index, name in enumerate(categories.names)}
    rows, places = [], []
    for picture, (name, tree) in enumerate(zip(names, trees, strict=True)):
        if tree is None:
            continue
        for number, item in enumerate(tree.findall("object"), start=1):
            place = f"{root / 'Annotations' / name}.xml: object {number}"
            label = (item.findtext("name") or "").strip()
            if not label:
                raise DataError(f"{place}: has no name", code="keys")
            difficult = (item.findtext("difficult") or "").strip().lower() in ("1", "true", "yes")
            rows.append((picture, index_of[label], *corners(item, place), difficult))
            places.append(place)
    return rows, places


def corners(item: ElementTree.Element, place: str) -> tuple[float, float, float, float]:
    """Continuous xyxy of a box whose corners are 1-based pixels, both belonging to it: (xmin - 1, ..., xmax, ...).

    A box whose corners coincide was drawn as a click: it stays without extent and is dropped later.
    """
    box = item.find("bndbox")
    try:
        if box is None:
            raise ValueError("no bndbox")
        x1, y1, x2, y2 = (float(box.findtext(key) or "") for key in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError as error:
        raise DataError(f"{place}: wanted bndbox with xmin, ymin, xmax, ymax as numbers", code="box") from error
    if x2 <= x1 or y2 <= y1:
        return x1, y1, min(x1, x2), min(y1, y2)
    return x1 - 1, y1 - 1, x2, y2
