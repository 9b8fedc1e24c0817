"""YOLO: a `data.yaml` with names, and one text file of normalized boxes (or polygons) beside each picture."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from finedetr.data.dataset import COMMON, Categories, Draft, Note, absolute, listed, split_name
from finedetr.data.images import SUFFIXES
from finedetr.errors import DataError, did_you_mean
from finedetr.files import walk

__all__ = ["evidence", "read", "splits"]

OUTSIDE = 1.1  # a normalized coordinate beyond this was meant in pixels


def evidence(root: Path) -> str:
    """Why this path reads as YOLO, or an empty string."""
    if root.is_file():
        return f"{root.name} has names" if root.suffix.lower() in (".yaml", ".yml") and has_names(root) else ""
    file = find_yaml(root)
    return f"{file.name} has names" if file else ""


def has_names(file: Path) -> bool:
    """Whether a YAML names classes (a text search: a broken file is to be reported, not missed)."""
    try:
        text = file.read_text(encoding="utf-8-sig", errors="replace")
    except PermissionError as error:  # "no known layout" would send the reader the wrong way
        raise DataError(f"{file}: cannot be read ({error.strerror})", code="yaml") from error
    except OSError:
        return False
    return any(line.startswith(("names", '"names"', "'names'")) for line in text.splitlines())


def find_yaml(root: Path) -> Path | None:
    """`data.yaml`, or else the one YAML in the folder that has names."""
    if (root / "data.yaml").is_file() and has_names(root / "data.yaml"):
        return root / "data.yaml"
    found = [file for file in sorted([*root.glob("*.yaml"), *root.glob("*.yml")]) if has_names(file)]
    return found[0] if found else None


def load_yaml(root: Path) -> tuple[Path, dict[str, Any]]:
    """The file and what it says."""
    file = root if root.is_file() else find_yaml(root)
    assert file is not None  # sniffing found it
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise DataError(f"{file}: not valid YAML ({' '.join(str(error).split())})", code="yaml") from error
    if not isinstance(content, dict) or not content.get("names"):
        raise DataError(f"{file}: wanted `names` as a list or as index: name", code="yaml")
    return file, content


def splits(root: Path) -> tuple[str, ...]:
    """Names of the splits that the YAML gives."""
    _, content = load_yaml(root)
    return tuple(name for name in COMMON if name in entries(content))


def entries(content: dict[str, Any]) -> dict[str, Any]:
    """Split -> what the YAML gives for it, whatever its spelling; `val` goes before `valid`."""
    keys = sorted((key for key in content if content[key]), key=lambda key: key in COMMON)
    return {split_name(str(key)): content[key] for key in keys}


def read(root: Path, split: str, evidence: str) -> Draft:
    """One split as a draft."""
    file, content = load_yaml(root)
    categories = read_names(file, content["names"])
    files = picture_files(file, content, split)
    notes: list[Note] = []
    if categories.ids != tuple(range(len(categories))):
        message = f"class numbers {listed([str(i) for i in categories.ids])} -> indices 0..{len(categories) - 1}."
        notes.append(Note("data.class_gap", "info", message))
    twice = [name for name, count in Counter(categories.names).items() if count > 1]
    if twice:
        notes.append(
            Note("data.class_names", "warn", f"several classes share a name: {listed(twice)}", count=len(twice))
        )
    labels = [label_file(path) for path in files]
    rows, lines, pictures, polygons = [], [], [], 0
    class_index = categories.index_of()
    for picture, label in enumerate(labels):
        for line, values in read_label_file(label):
            rows.append((class_of(values[0], class_index, label, line, file), *box_of(values, label, line)))
            lines.append(line)
            pictures.append(picture)
            polygons += len(values) > 5
    if polygons:
        notes.append(Note("data.polygons", "info", f"{polygons} polygons are read as their boxes.", count=polygons))
    table = np.array(rows, dtype=np.float64).reshape(-1, 5)
    return Draft(
        split=split,
        layout="yolo",
        evidence=f"{evidence}; {len(files)} pictures, {sum(map(os.path.isfile, labels))} label files",
        files=tuple(files),
        ids=np.arange(1, len(files) + 1, dtype=np.int64),
        sizes=np.zeros((len(files), 2), dtype=np.int32),
        picture=np.array(pictures, dtype=np.int64),
        labels=table[:, 0].astype(np.int64),
        boxes=table[:, 1:],
        crowd=np.zeros(len(table), dtype=bool),
        area=np.full(len(table), np.nan),
        annotation_ids=np.arange(1, len(table) + 1, dtype=np.int64),
        categories=categories,
        where=lambda row: f"{labels[pictures[row]]}:{lines[row]}",
        relative=True,
        notes=tuple(notes),
    )


def read_names(file: Path, names: Any) -> Categories:
    """Class names from a list, or from a mapping of index to name."""
    if isinstance(names, list):
        table = dict(enumerate(names))
    elif isinstance(names, dict) and all(str(key).isdigit() for key in names):
        table = {int(key): value for key, value in names.items()}
    else:
        raise DataError(f"{file}: wanted `names` as a list or as index: name; got {names!r:.80}", code="yaml")
    nested = [name for name in table.values() if isinstance(name, (list, dict)) or name is None]
    if nested:
        raise DataError(f"{file}: wanted a word for each name; got {nested[0]!r:.80}", code="yaml")
    ids = tuple(sorted(table))
    return Categories(ids, tuple(str(table[i]) for i in ids))


def picture_files(file: Path, content: dict[str, Any], split: str) -> list[str]:
    """Absolute paths of a split's pictures, sorted within each folder or in the order of each list."""
    entry = entries(content).get(split)
    if entry is None:
        known = [name for name in COMMON if name in entries(content)]
        raise DataError(f"{file} has no split {split!r}", code="split", hint=did_you_mean(split, known))
    places = entry if isinstance(entry, list) else [entry]
    found: list[str] = []
    for item in places:
        place = resolve(file, content, str(item))
        found += listed_in(place, file, content) if place.is_file() else below(place)
    unique = list(dict.fromkeys(found))
    if not unique:
        raise DataError(f"split {split!r} of {file} has no pictures (looked in {listed(places)})", code="empty_split")
    return unique


def resolve(file: Path, content: dict[str, Any], item: str) -> Path:
    """A folder or list that the YAML names: relative to its `path`, else to the YAML itself.

    Roboflow writes `../train/images` for a folder that stands beside the YAML; that is looked for last.
    """
    base = file.parent / str(content.get("path") or ".")
    stripped = item
    while stripped.startswith(("../", "./")):
        stripped = stripped.partition("/")[2]
    for candidate in (base / item, file.parent / item, base / stripped, file.parent / stripped):
        if candidate.exists():
            return candidate
    raise DataError(
        f"{file}: {item!r} is neither a folder nor a list of pictures (looked under {base} and {file.parent})",
        code="split",
        hint="Mend `path`, or the split's entry.",
    )


def below(folder: Path) -> list[str]:
    """Every picture below a folder, sorted."""
    found = []
    for place, _, names in walk(absolute(folder)):
        found += [os.path.join(place, name) for name in names if os.path.splitext(name)[1].lower() in SUFFIXES]
    return sorted(found)


def listed_in(file: Path, yaml_file: Path, content: dict[str, Any]) -> list[str]:
    """Pictures named in a text file, one a line, relative to that file or to the data set."""
    base = yaml_file.parent / str(content.get("path") or ".")
    found = []
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: cannot be read ({error})", code="split", hint="A list is UTF-8 text.") from error
    for line in lines:
        name = line.strip()
        if name:
            places = [Path(name)] if os.path.isabs(name) else [file.parent / name, base / name]
            found.append(absolute(os.path.normpath(next((p for p in places if p.is_file()), places[-1]))))
    return found


def label_file(picture: str) -> str:
    """images/a/b.jpg -> labels/a/b.txt; beside the picture where no folder is called images."""
    head, separator, tail = picture.rpartition(f"{os.sep}images{os.sep}")
    path = f"{head}{os.sep}labels{os.sep}{tail}" if separator else picture
    return os.path.splitext(path)[0] + ".txt"


def read_label_file(path: str) -> list[tuple[int, list[float]]]:
    """(line number, numbers) of each row; an absent file is a picture without boxes."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            text = file.read()
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})", code="labels") from error
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split()
        if words:
            try:
                rows.append((number, [float(word) for word in words]))
            except ValueError as error:
                raise DataError(f"{path}:{number}: wanted numbers; got {line.strip()!r:.80}", code="labels") from error
    return rows


def class_of(value: float, class_index: dict[int, int], path: str, line: int, yaml_file: Path) -> int:
    """Index of a class number."""
    number = int(value) if math.isfinite(value) and value == int(value) else None
    if number is None:
        raise DataError(f"{path}:{line}: wanted a whole class number first; got {value}", code="class_range")
    if number not in class_index:
        known = f"{min(class_index)}..{max(class_index)}"
        raise DataError(
            f"{path}:{line}: class {number} is outside the {len(class_index)} names in {yaml_file} ({known})",
            code="class_range",
            hint="Did the file number classes from 1?",
        )
    return class_index[number]


def box_of(values: list[float], path: str, line: int) -> tuple[float, float, float, float]:
    """Normalized xyxy of one row: class and (cx, cy, w, h), or class and a polygon x1 y1 x2 y2 ..."""
    numbers = values[1:]
    if len(numbers) != 4 and (len(numbers) < 6 or len(numbers) % 2):
        raise DataError(
            f"{path}:{line}: wanted class cx cy w h, or class and the points of a polygon; got {len(values)} numbers",
            code="labels",
            hint="Six numbers are predictions with a score: take the last one off." if len(values) == 6 else "",
        )
    finite = [value for value in numbers if math.isfinite(value)]
    if finite and (max(finite) > OUTSIDE or min(finite) < 1 - OUTSIDE):
        worst = max(finite, key=lambda value: abs(value - 0.5))
        raise DataError(
            f"{path}:{line}: values outside 0..1 ({worst:g}): are these boxes in pixels?",
            code="not_normalised",
            hint="YOLO files hold cx cy w h divided by the picture's width and height.",
        )
    if len(numbers) == 4:
        cx, cy, w, h = numbers
        return cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
    if len(finite) < len(numbers):
        return math.nan, math.nan, math.nan, math.nan
    return min(numbers[0::2]), min(numbers[1::2]), max(numbers[0::2]), max(numbers[1::2])
