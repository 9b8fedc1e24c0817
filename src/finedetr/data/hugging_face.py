"""Data sets of Hugging Face's library `datasets` (an extra), written out as COCO: pictures in tables become files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from finedetr.errors import DataError, RunError, UsageError

__all__ = ["is_hugging_face", "unpack"]

BOX, CATEGORY, CROWD = ("bbox", "boxes"), ("category", "categories", "label", "labels"), ("iscrowd", "is_crowd")


def is_hugging_face(source: str) -> bool:
    """Whether this is `hf://owner/name`, or a folder that `save_to_disk` wrote."""
    folder = Path(source)
    saved = (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()
    return source.startswith("hf://") or saved


def unpack(source: str, folder: Path) -> None:
    """Writes a data set with the features `image` and `objects` (bbox: x, y, width, height; category) as COCO.

    Args:
        source: `hf://owner/name`, with `@revision` if wanted, or a folder that `save_to_disk` wrote.
        folder: Where; it gets `SPLIT/` and `annotations/instances_SPLIT.json`.

    Raises:
        UsageError: The library is not installed.
        RunError: The library cannot load it.
        DataError: The features are others, or a row is malformed.
    """
    for split, rows in load(source):
        features = rows.features
        if "image" not in features or "objects" not in features:
            raise DataError(
                f"{source}: wanted the features image and objects; got {', '.join(features)}",
                code="keys",
                hint="objects holds bbox (x, y, width, height in pixels) and category.",
            )
        content = collect(rows, class_names(features["objects"]), f"{source}, {split}", folder / split)
        path = folder / "annotations" / f"instances_{split}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content), encoding="utf-8")


def load(source: str) -> Iterator[tuple[str, Any]]:
    """The splits with undecoded pictures."""
    try:
        import datasets
    except ImportError as error:
        raise UsageError(
            f"{source} is read with the package datasets ({error})",
            code="extra",
            hint='Install it with: pip install "finedetr[hf]"',
        ) from error
    try:
        if source.startswith("hf://"):
            name, _, revision = source.removeprefix("hf://").partition("@")
            loaded = datasets.load_dataset(name, revision=revision or None)
        else:
            loaded = datasets.load_from_disk(source)
    except Exception as error:  # no network, no such repository, a damaged file: the library has a class for each
        raise RunError(f"{source}: cannot be loaded ({type(error).__name__}: {error})", code="download") from error
    splits = loaded if isinstance(loaded, Mapping) else {"train": loaded}
    for split, rows in splits.items():
        raw = rows.cast_column("image", datasets.Image(decode=False)) if "image" in rows.features else rows
        yield re.sub(r"\W", "_", str(split)), raw


def class_names(objects: Any) -> tuple[str, ...] | None:
    """The names of a `ClassLabel` in the feature `objects`, however it is nested; None where there is none."""
    if isinstance(objects, Mapping):
        inner = next((objects[key] for key in CATEGORY if key in objects), None)
        return None if inner is None else class_names(inner)
    if hasattr(objects, "names"):
        return tuple(objects.names)
    return class_names(objects.feature) if hasattr(objects, "feature") else None


def collect(rows: Any, names: tuple[str, ...] | None, where: str, folder: Path) -> dict[str, Any]:
    """Writes the pictures of a split and gives its annotations; classes go by name, by number where there are none."""
    folder.mkdir(parents=True, exist_ok=True)
    images, seen = [], set()
    annotations: list[dict[str, Any]] = []
    ids = rows["image_id"] if "image_id" in rows.features else []
    own_ids = len(set(ids)) == len(rows) and all(isinstance(i, int) and i >= 0 for i in ids)
    for number, row in enumerate(rows):
        identity = int(row["image_id"]) if own_ids else number + 1
        images.append({"id": identity, "file_name": write_picture(row["image"], folder, number)})
        for found in boxes_of(row["objects"], f"{where}, row {number}"):
            category = found["category_id"]
            if names is not None and isinstance(category, int) and not 0 <= category < len(names):
                raise DataError(
                    f"{where}, row {number}: category {category} has no name (0..{len(names) - 1})", code="class_range"
                )
            seen.add(category)
            annotations.append({"id": len(annotations) + 1, "image_id": identity, **found})
    table = dict(enumerate(names or ())) or {c: str(c) for c in sorted(seen, key=str) if isinstance(c, int)}
    if any(isinstance(category, str) for category in seen):
        words = sorted(map(str, seen))
        table = dict(enumerate(words))
        for annotation in annotations:
            annotation["category_id"] = words.index(str(annotation["category_id"]))
    categories = [{"id": identity, "name": name} for identity, name in table.items()]
    return {"images": images, "annotations": annotations, "categories": categories}


def boxes_of(objects: Any, where: str) -> Iterator[dict[str, Any]]:
    """bbox, category_id, iscrowd and area of each object: of a table of columns, or of a list of objects."""
    if isinstance(objects, Mapping):
        columns = {key: list(values) for key, values in objects.items()}
        entries = [dict(zip(columns, cells, strict=False)) for cells in zip(*columns.values(), strict=False)]
        if len({len(values) for values in columns.values()}) > 1:
            raise DataError(f"{where}: the columns of objects have different lengths", code="keys")
    else:
        entries = list(objects or ())
    for entry in entries:
        box, category = (next((entry[key] for key in keys if key in entry), None) for keys in (BOX, CATEGORY))
        if box is None or len(box) != 4 or not isinstance(category, (int, str)):
            raise DataError(f"{where}: wanted bbox as four numbers and a category; got {entry!r:.120}", code="box")
        crowd = next((int(bool(entry[key])) for key in CROWD if key in entry), 0)
        numbers = [float(value) for value in box]
        yield {"bbox": numbers, "category_id": category, "iscrowd": crowd, "area": entry.get("area")}


def write_picture(cell: Any, folder: Path, number: int) -> str:
    """Writes the bytes of a cell as they are, and gives the file's name; broken ones are judged by the reader."""
    data = cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()
    try:
        with Image.open(BytesIO(data)) as opened:
            suffix = f".{(opened.format or 'jpg').lower()}"
    except Exception:  # decoders raise whatever they like
        suffix = ".jpg"
    name = f"{number:06d}{suffix}"
    (folder / name).write_bytes(data)
    return name
