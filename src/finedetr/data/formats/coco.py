"""COCO JSON: Roboflow's export, the classic layout, or one bare file."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from finedetr.data.dataset import Categories, Draft, Note, listed, split_name
from finedetr.data.formats.folders import picture_folder, picture_path
from finedetr.data.formats.numbers import told_size, whole
from finedetr.errors import DataError, did_you_mean

__all__ = ["evidence", "read", "splits"]

ROBOFLOW = "_annotations.coco.json"
LARGEST = 1 << 62  # of ids, in either direction, and of areas
KEYS = ("images", "annotations", "categories")
READ = {"id", "image_id", "category_id", "bbox", "area", "iscrowd"}  # of an annotation


@dataclass
class Reading:
    """A parsed file, and what is noted on the way."""

    path: Path
    content: dict[str, list[Any]]
    notes: list[Note] = field(default_factory=list)

    def entry(self, section: str, number: int) -> str:
        """A name for one entry of a section."""
        item = self.content[section][number]
        identity = item.get("id") if isinstance(item, dict) else None
        return f"{self.path.name}: {section}[{number}]" + (f" (id {identity!s:.40})" if identity is not None else "")

    def note(self, code: str, level: Any, message: str, where: tuple[str, ...] = (), count: int = 1) -> None:
        """Adds a note."""
        self.notes.append(Note(f"data.{code}", level, message, where, count))


# ------------------------------------------------------------------------------------------------------------ layout


def evidence(root: Path) -> str:
    """Why this path reads as COCO, or an empty string."""
    if root.is_file():
        return f"{root.name} is JSON" if root.suffix.lower() == ".json" else ""
    if (root / ROBOFLOW).is_file():
        return f"it holds {ROBOFLOW}"
    found = annotation_files(root)
    if not found:
        return ""
    first = next(iter(found.values()))[0]
    return f"{first.relative_to(root)} holds annotations"


def split_of(stem: str) -> str:
    """`instances_train2017` -> `train`."""
    own = stem.lower().removeprefix("instances_").removesuffix(".coco")
    return split_name(own.rstrip("0123456789").rstrip("_-") or own or stem)


def annotation_files(root: Path) -> dict[str, list[Path]]:
    """Split -> the JSON files that hold it."""
    found: dict[str, list[Path]] = {}
    for file in sorted(root.glob(f"*/{ROBOFLOW}")):
        found.setdefault(split_of(file.parent.name), []).append(file)
    if found:
        return found
    for file in sorted((root / "annotations").glob("instances_*.json")):
        found.setdefault(split_of(file.stem), []).append(file)
    if found:
        return found
    for file in sorted([*root.glob("annotations/*.json"), *root.glob("*.json")]):
        if looks_like_coco(file):
            found.setdefault(split_of(file.stem), []).append(file)
    return found


def looks_like_coco(file: Path) -> bool:
    """Whether the three sections are named in the file (a text search: a broken file is to be reported, not missed)."""
    try:
        with open(file, "rb") as stream:
            text = stream.read(1 << 27)
    except PermissionError as error:  # a split that is passed over without a word would be worse
        raise DataError(f"{file}: cannot be read ({error.strerror})", code="json") from error
    except OSError:
        return False
    return b'"images"' in text and (b'"annotations"' in text or b'"categories"' in text)


def splits(root: Path) -> tuple[str, ...]:
    """Names of the splits."""
    if root.is_file():
        return (split_of(root.stem),)
    if (root / ROBOFLOW).is_file():
        return (split_of(root.absolute().name),)
    return tuple(annotation_files(root))


def find_file(root: Path, split: str) -> Path:
    """The JSON of a split."""
    if root.is_file():
        return root
    if (root / ROBOFLOW).is_file():
        return root / ROBOFLOW
    found = annotation_files(root)
    exact = [
        file for files in found.values() for file in files if file.stem.lower().removeprefix("instances_") == split
    ]
    files = exact or found.get(split, [])
    if not files:
        raise DataError(f"{root} has no split {split!r}", code="split", hint=did_you_mean(split, found))
    if len(files) > 1:
        names = [str(file.relative_to(root)) for file in files]
        hint = "Give the path of the JSON itself."
        raise DataError(
            f"{root} has {len(files)} files for split {split!r}: {listed(names)}", code="ambiguous", hint=hint
        )
    return files[0]


def folder_of(file: Path, names: list[str]) -> Path:
    """The folder of the pictures."""
    split = split_of(file.stem)
    words = (file.stem.removeprefix("instances_"), split, *(("valid",) if split == "val" else ()))
    return picture_folder(file, words, names)


# ------------------------------------------------------------------------------------------------------------- reading


def read(root: Path, split: str, evidence: str) -> Draft:
    """One split as a draft."""
    file = find_file(root, split)
    reading = Reading(file, parse(file))
    categories = read_categories(reading, root)
    names, ids, sizes, index_of = read_pictures(reading)
    folder = folder_of(file, names)
    picture, labels, boxes, crowd, area, numbers = read_annotations(reading, index_of, categories)
    return Draft(
        split=split if not root.is_file() else split_of(file.stem),
        layout="coco",
        evidence=f"{evidence}; annotations in {file.name}, pictures in {folder.name or folder}",
        files=tuple(picture_path(folder, name) for name in names),
        ids=ids,
        sizes=sizes,
        picture=picture,
        labels=labels,
        boxes=boxes,
        crowd=crowd,
        area=area,
        annotation_ids=numbers,
        categories=categories,
        where=lambda row: f"{file.name}: annotation {numbers[row]}",
        notes=tuple(reading.notes),
    )


def parse(file: Path) -> dict[str, list[Any]]:
    """The three sections of a file."""
    try:
        content = json.loads(file.read_bytes())
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}:{error.lineno}:{error.colno}: not valid JSON ({error.msg})",
            code="json",
            hint="Was the file cut off while it was copied?",
        ) from error
    except (ValueError, OSError, RecursionError) as error:  # no text, or a number of thousands of digits
        raise DataError(f"{file}: cannot be read ({error})", code="json") from error
    if not isinstance(content, dict):
        raise DataError(f"{file}: wanted an object with {', '.join(KEYS)}; got a {type(content).__name__}", code="keys")
    missing = [key for key in KEYS if not isinstance(content.get(key), list)]
    if missing:
        raise DataError(
            f"{file}: wanted lists named {', '.join(KEYS)}; no list: {', '.join(missing)}",
            code="keys",
            hint=f"Found: {', '.join(sorted(map(str, content))) or 'nothing'}.",
        )
    return {key: content[key] for key in KEYS}


def read_categories(reading: Reading, root: Path) -> Categories:
    """The table of classes, in the order of their ids."""
    table: dict[int, str] = {}
    for number, item in enumerate(reading.content["categories"]):
        place = reading.entry("categories", number)
        if not isinstance(item, dict) or whole(item.get("id")) is None or item.get("name") is None:
            raise DataError(f"{place}: wanted an id (a whole number) and a name; got {item!r:.120}", code="keys")
        identity = int(item["id"])
        if abs(identity) >= LARGEST:
            raise DataError(f"{place}: the category id is too large", code="keys")
        if identity in table:
            raise DataError(f"{place}: category id {identity} is given twice", code="duplicate_id")
        table[identity] = str(item["name"])
    placeholder = unused_placeholder(reading, root)
    if placeholder is not None:
        message = f"category {placeholder} {table.pop(placeholder)!r} groups the others and no box uses it: left out."
        reading.note("placeholder", "info", message)
    if not table:
        raise DataError(f"{reading.path}: no categories", code="keys", hint="A detector needs at least one class.")
    ids = tuple(sorted(table))
    if ids != tuple(range(len(ids))):
        message = f"category ids {listed([str(i) for i in ids])} -> indices 0..{len(ids) - 1}. Results keep the ids."
        reading.note("class_gap", "info", message)
    names = tuple(table[i] for i in ids)
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        reading.note("class_names", "warn", f"several categories share a name: {listed(repeated)}", count=len(repeated))
    return Categories(ids, names)


def unused_placeholder(reading: Reading, root: Path) -> int | None:
    """Roboflow writes a category 0 that is only the parent of the others; its id if no split has a box of it."""
    items = [item for item in reading.content["categories"] if isinstance(item, dict)]
    zero = next((item for item in items if item.get("id") == 0), None)
    others = [item for item in items if item.get("id") != 0]
    if zero is None or not others or any(item.get("supercategory") != zero.get("name") for item in others):
        return None
    siblings = [] if root.is_file() or (root / ROBOFLOW).is_file() else annotation_files(root).values()
    contents = [reading.content, *(parse(f) for files in siblings for f in files if f != reading.path)]
    used = any(isinstance(a, dict) and a.get("category_id") == 0 for c in contents for a in c["annotations"])
    return None if used else 0


def read_pictures(reading: Reading) -> tuple[list[str], Any, Any, dict[Any, int]]:
    """Names, ids, sizes as annotated (0: not told), and the index of each id as the file writes it."""
    names: list[str] = []
    keys: list[Any] = []
    sizes = np.zeros((len(reading.content["images"]), 2), dtype=np.int32)
    index_of: dict[Any, int] = {}
    for number, item in enumerate(reading.content["images"]):
        if not isinstance(item, dict) or "id" not in item or not isinstance(item.get("file_name"), str):
            place = reading.entry("images", number)
            raise DataError(f"{place}: wanted an id and a file_name; got {item!r:.120}", code="keys")
        key = item["id"]
        if not isinstance(key, (int, str, float)):
            raise DataError(f"{reading.entry('images', number)}: id {key!r:.60} is no number", code="keys")
        if key in index_of:
            raise DataError(
                f"{reading.entry('images', number)}: image id {key} is given twice",
                code="duplicate_id",
                hint=f"First for {names[index_of[key]]!r}. Give every picture an id of its own.",
            )
        index_of[key] = number
        keys.append(key)
        names.append(item["file_name"])
        sizes[number] = told_size(item.get("width"), item.get("height"))
    if not names:
        raise DataError(f"{reading.path}: the list of images is empty", code="empty_split")
    return names, picture_ids(reading, keys), sizes, index_of


def picture_ids(reading: Reading, keys: list[Any]) -> Any:
    """Ids as unique non-negative integers; where the file's own are not, 1..N with a note."""
    numbers = [whole(key) for key in keys]
    if all(n is not None and 0 <= n < LARGEST for n in numbers) and len(set(numbers)) == len(numbers):
        return np.array(numbers, dtype=np.int64)
    reading.note("image_ids", "warn", f"image ids such as {keys[0]!r} are no whole numbers: renumbered from 1.")
    return np.arange(1, len(keys) + 1, dtype=np.int64)


def read_annotations(reading: Reading, index_of: dict[Any, int], categories: Categories) -> tuple[Any, ...]:
    """Parallel arrays: picture, label, xyxy, crowd, area, annotation id."""
    class_index = categories.index_of()
    rows, orphans, unusable = [], [], 0
    for number, item in enumerate(reading.content["annotations"]):
        if not isinstance(item, dict):
            raise DataError(f"{reading.entry('annotations', number)}: wanted an object; got {item!r:.80}", code="keys")
        absent = [key for key in ("image_id", "category_id", "bbox") if item.get(key) is None]
        if absent:
            raise DataError(f"{reading.entry('annotations', number)}: missing {', '.join(absent)}", code="keys")
        picture = index_of.get(item["image_id"]) if isinstance(item["image_id"], (int, str, float)) else None
        if picture is None:
            orphans.append(reading.entry("annotations", number))
            continue
        label = class_index.get(whole(item["category_id"]))  # type: ignore[arg-type]
        if label is None:
            known = f"{len(categories)} categories with ids {listed([str(i) for i in categories.ids])}"
            place = reading.entry("annotations", number)
            raise DataError(f"{place}: category_id {item['category_id']!r} is none of the {known}", code="class_range")
        box, area = numbers_of(reading, number, item)
        identity = whole(item.get("id"))
        identity = -1 if identity is None or abs(identity) >= LARGEST else identity
        crowd = item.get("iscrowd") not in (None, 0, "", "0", "false", "False")
        unusable += item.get("area") is not None and not 0 <= area < LARGEST
        rows.append((picture, label, *box, crowd, area if 0 <= area < LARGEST else math.nan, identity))
    note_left_out(reading)
    if orphans:
        message = f"{len(orphans)} annotations belong to no listed picture and are dropped: {listed(orphans)}"
        reading.note("orphan", "warn", message, tuple(orphans), len(orphans))
    if unusable:
        message = f"{unusable} areas are negative, too large or no numbers: width times height is taken instead."
        reading.note("area", "warn", message, count=unusable)
    table = np.array(rows, dtype=np.float64).reshape(-1, 9)
    identities = annotation_ids(reading, [row[8] for row in rows])
    with np.errstate(over="ignore"):  # a corner beyond all numbers is told as one that is not finite
        boxes = np.column_stack((table[:, 2:4], table[:, 2:4] + table[:, 4:6]))
    pictures, labels = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64)
    return pictures, labels, boxes, table[:, 6].astype(bool), table[:, 7], identities


def note_left_out(reading: Reading) -> None:
    """Counts what annotations say beside their boxes, such as outlines and keypoints."""
    counts = Counter(
        key for item in reading.content["annotations"] for key, value in item.items() if value and key not in READ
    )
    if counts:
        which = listed([f"{key} of {count}" for key, count in counts.most_common()])
        reading.note("left_out", "info", f"annotations say more than is read: {which}", tuple(counts), counts.total())


def numbers_of(reading: Reading, number: int, item: dict[str, Any]) -> tuple[tuple[float, ...], float]:
    """The four numbers of a box and its area (NaN: not given, or no number)."""
    try:
        area = float(item["area"])
    except (KeyError, TypeError, ValueError, OverflowError):
        area = math.nan
    try:
        box = tuple(float(value) for value in item["bbox"]) if isinstance(item["bbox"], list) else ()
    except (TypeError, ValueError, OverflowError):
        box = ()
    if len(box) != 4:
        place = reading.entry("annotations", number)
        raise DataError(
            f"{place}: wanted bbox as four numbers [x, y, width, height]; got {item['bbox']!r:.80}", code="box"
        )
    return box, area


def annotation_ids(reading: Reading, numbers: list[int]) -> Any:
    """Unique annotation ids: the file's own, or 1..T with a note where they are absent or repeat."""
    unique = set(numbers)
    if len(unique) == len(numbers) and (not unique or (min(unique) >= 0 and max(unique) < LARGEST)):
        return np.array(numbers, dtype=np.int64)
    repeated = [str(n) for n, count in Counter(numbers).items() if count > 1 and n >= 0]
    what = f"{len(repeated)} annotation ids repeat ({listed(repeated)})" if repeated else "annotation ids are absent"
    reading.note("duplicate_id", "warn", f"{what}: renumbered from 1.", tuple(repeated), max(1, len(repeated)))
    return np.arange(1, len(numbers) + 1, dtype=np.int64)
