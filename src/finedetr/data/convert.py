"""A data set in another layout: annotations written anew, pictures copied or linked, what cannot be carried counted."""

from __future__ import annotations

import csv
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import yaml
from numpy.typing import NDArray
from PIL import Image

from finedetr.data.dataset import COMMON, Dataset, Note, listed, unions
from finedetr.data.images import SUFFIXES
from finedetr.errors import DataError, RunError, UsageError, did_you_mean
from finedetr.files import fresh_stem, write_text

__all__ = ["TARGETS", "convert", "deal"]

TARGETS = ("coco", "yolo", "voc", "csv")
DECIMALS = {"coco": 4, "yolo": 8, "voc": 4, "csv": 4}  # of pixels; of shares of the picture in YOLO


def deal(dataset: Dataset, shares: Sequence[float], seed: int = 0) -> tuple[Dataset, ...]:
    """Deals the pictures of one split to train, val and (with a third share) test, always the same for a seed.

    Raises:
        UsageError: The shares are not two or three positive numbers that add up to 1.
        DataError: A share comes to no picture.
    """
    if len(shares) not in (2, 3) or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise UsageError(
            f"wanted two or three shares that add up to 1, such as 0.8/0.2; got {'/'.join(f'{s:g}' for s in shares)}",
            code="range",
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    cuts = np.rint(np.cumsum(shares)[:-1] * len(dataset)).astype(int)
    parts = [np.sort(part) for part in np.split(order, cuts)]
    if any(len(part) == 0 for part in parts):
        raise DataError(f"{len(dataset)} pictures are too few to be dealt to {len(parts)} splits", code="empty_split")
    return tuple(replace(dataset.subset(p), split=s) for p, s in zip(parts, COMMON, strict=False))


def convert(datasets: Sequence[Dataset], out: str | Path, to: str, *, link: bool = False) -> tuple[Note, ...]:
    """Writes the splits of a data set in another layout.

    The folder is filled when everything is written, and nothing is ever replaced. COCO holds all that was read; of
    YOLO, VOC and CSV the notes say what they cannot hold.

    Args:
        datasets: The splits.
        out: A folder that does not exist yet, or is empty.
        to: `coco`, `yolo`, `voc` or `csv`.
        link: Link the pictures (symbolic links to where they are) instead of copying them.

    Returns:
        What was left out or changed, counted.

    Raises:
        UsageError: The folder holds something, or there is no such layout.
        DataError: The splits do not fit together, or the layout cannot hold a class name or a split.
        RunError: The folder cannot be written.
    """
    out = Path(out).absolute()  # "." has no name
    if to not in TARGETS:
        raise UsageError(f"no layout is called {to!r}", code="type", hint=did_you_mean(to, TARGETS))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is not empty" if out.is_dir() else "is a file"
        raise UsageError(f"{out} {what}", code="exists", hint="Give a folder that does not exist yet.")
    check_tables(datasets, to)
    notes: list[Note] = []
    splits = choose_splits(datasets, to, notes)
    if to in ("yolo", "voc"):
        splits = [one_entry_a_file(data, notes) for data in splits]
    notes += losses(splits, to)
    part = (out if out.exists() else out.parent) / f".{out.name}.{os.getpid()}.part"
    try:
        names = picture_names(splits, to, notes)
        for data, given in zip(splits, names, strict=True):
            place_pictures(data, given, part / picture_folder(to, data.split), link)
            write_split(part, data, given, to)
        if to == "yolo":
            write_yaml(part, splits)
        if out.exists():  # it may be where somebody stands, or a disk of its own: it is filled, not replaced
            for item in sorted(part.iterdir()):
                os.replace(item, out / item.name)
        else:
            os.replace(part, out)
    except OSError as error:
        raise RunError(f"{out} cannot be written ({error})", code="io") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return tuple(notes)


# ------------------------------------------------------------------------------------------------ what can be carried


def check_tables(datasets: Sequence[Dataset], to: str) -> None:
    """All splits share one table of classes, and the layout can hold its names."""
    table = datasets[0].categories
    for data in datasets[1:]:
        if data.categories != table:
            raise DataError(
                f"the classes of {datasets[0].split} and {data.split} differ",
                code="class_names",
                hint="finedetr data check says how. Give the JSON of one split to convert that one alone.",
            )
    if to in ("voc", "csv"):
        bad = [name for name in table.names if not name.strip() or not name.isprintable()]
        if bad:
            raise DataError(f"{to} cannot hold the class name {bad[0]!r}", code="class_names", hint="Rename the class.")


def choose_splits(datasets: Sequence[Dataset], to: str, notes: list[Note]) -> list[Dataset]:
    """The splits that are written: for all but VOC no `trainval` beside train and val; YOLO knows three names."""
    if to == "voc":
        return list(datasets)
    common, again = [data for data in datasets if data.split in COMMON], unions(datasets)
    kept = common.copy()
    for data in datasets:
        if data.split in COMMON:
            continue
        if data in again:
            message = f"{data.split} is left out: its {len(data)} pictures stand in {listed([d.split for d in common])}"
            notes.append(Note("data.split", "info", message, count=len(data)))
        elif to == "yolo" and not any(d.split == "train" for d in kept):
            notes.append(Note("data.split", "info", f"{data.split} becomes train: YOLO knows train, val and test"))
            kept.insert(0, replace(data, split="train"))
        elif to == "yolo":
            raise DataError(f"YOLO has no place for a split named {data.split!r}", code="split")
        else:
            kept.append(data)
    return kept


def one_entry_a_file(data: Dataset, notes: list[Note]) -> Dataset:
    """Entries of the same file made one, with the boxes of all: there is one label file for a picture."""
    first: dict[str, int] = {}
    owner = np.array([first.setdefault(file, index) for index, file in enumerate(data.files)])
    if len(first) == len(data):
        return data
    order = np.argsort(owner, kind="stable")
    together = data.subset(order)
    begins = np.flatnonzero(owner[order] == order)  # where the entries of another file begin
    message = f"{len(data) - len(first)} further entries of pictures of {data.split} join the first, with their boxes"
    notes.append(Note("data.duplicate_image", "info", message, count=len(data) - len(first)))
    return replace(
        together,
        files=tuple(together.files[i] for i in begins),
        ids=together.ids[begins],
        sizes=together.sizes[begins],
        starts=np.append(together.starts[begins], len(data.labels)),
    )


def losses(datasets: Sequence[Dataset], to: str) -> Iterator[Note]:
    """What a layout cannot hold, counted."""
    if to == "coco":
        return
    table = datasets[0].categories
    labels = np.concatenate([data.labels for data in datasets])
    crowd = np.concatenate([data.crowd for data in datasets])
    area = np.concatenate([data.area for data in datasets]).astype(np.float64)
    extents = np.concatenate([data.boxes[:, 2:] - data.boxes[:, :2] for data in datasets]).astype(np.float64)
    order = sorted(range(len(table)), key=lambda index: table.names[index])
    if to == "yolo":
        new_ids = tuple(range(len(table)))
        if crowd.any():
            message = f"{crowd.sum()} crowd or difficult boxes are left out: YOLO cannot mark them"
            yield Note("data.crowd", "warn", message, count=int(crowd.sum()))
    else:
        new_ids = tuple(order.index(index) for index in range(len(table)))
        absent = [name for index, name in enumerate(table.names) if index not in set(labels.tolist())]
        if absent:
            message = f"{len(absent)} classes without a box are lost, as {to} has no list of classes: {listed(absent)}"
            yield Note("data.class_absent", "warn", message, tuple(absent), len(absent))
        twice = [name for name, count in Counter(map(str.strip, table.names)).items() if count > 1]
        if twice:
            message = f"{len(twice)} names stand for several classes, which become one: {listed(twice)}"
            yield Note("data.class_names", "warn", message, tuple(twice), len(twice))
    if table.ids != new_ids:
        why = "numbers classes from 0" if to == "yolo" else "numbers classes in the order of their names"
        message = f"category ids {listed([str(i) for i in table.ids])} are lost: {to} {why}"
        yield Note("data.class_gap", "info", message, count=len(table))
    outlines = int(np.count_nonzero(np.abs(area - extents.prod(1)) > 1e-3 * np.maximum(area, 1)))
    if outlines:
        message = f"{outlines} areas that are not width times height are lost (they decide what counts as small)"
        yield Note("data.area", "info", message, count=outlines)
    clicks = int(np.count_nonzero(lost_in_voc(extents))) if to == "voc" else 0
    if clicks:
        message = f"{clicks} boxes of at most 1 pixel are left out: VOC cannot tell them from clicks"
        yield Note("data.degenerate", "warn", message, count=clicks)


def lost_in_voc(extents: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Boxes whose inclusive corners would coincide."""
    return np.asarray((np.round(extents, DECIMALS["voc"]) <= 1).any(1))


# ----------------------------------------------------------------------------------------------------------- pictures


def picture_folder(to: str, split: str) -> str:
    """Where the pictures of a split stand."""
    return {"coco": split, "yolo": f"images/{split}", "voc": "JPEGImages", "csv": split}[to]


def picture_names(datasets: Sequence[Dataset], to: str, notes: list[Note]) -> list[list[str]]:
    """A file name for each picture: its own where it is free; label files go by the name without its ending."""
    taken: set[str] = set()
    known: dict[object, str] = {}  # source -> name; in VOC a picture may stand in several splits, if its boxes agree
    names, renamed = [], []
    for data in datasets:
        if to != "voc":
            taken, known = set(), {}
        given = []
        for index, file in enumerate(data.files):
            key = (file, boxes_of(data, index)) if to == "voc" else file
            if key not in known:
                known[key] = fresh_name(Path(file), taken, labels=to in ("yolo", "voc"))
                if known[key] != os.path.basename(file):
                    renamed.append(f"{file} -> {known[key]}")
            given.append(known[key])
        names.append(given)
    if renamed:
        message = f"{len(renamed)} pictures get another name: {listed(renamed)}"
        notes.append(Note("data.renamed", "info", message, tuple(renamed[:1000]), len(renamed)))
    return names


def boxes_of(data: Dataset, index: int) -> tuple[tuple[float, ...], ...]:
    """The boxes of a picture with class and crowd mark, sorted, to tell whether another split says the same of it."""
    rows = data.rows(index)
    table = np.column_stack((data.labels[rows], data.crowd[rows], data.boxes[rows]))
    return tuple(sorted(map(tuple, table.tolist())))


def fresh_name(file: Path, taken: set[str], *, labels: bool) -> str:
    """The picture's name, printable and with a known ending; numbered where it (its stem, for labels) is taken.

    A backslash, which annotations made on Windows write between folders, becomes an underscore.
    """
    suffix = file.suffix
    if suffix.lower() not in SUFFIXES:
        with Image.open(file) as opened:
            suffix = f".{(opened.format or 'png').lower()}"
    own = "".join(c if c.isprintable() and c != "\\" else "_" for c in file.stem).strip() or "picture"
    return fresh_stem(own, taken, "" if labels else suffix) + suffix


def place_pictures(data: Dataset, names: Sequence[str], folder: Path, link: bool) -> None:
    """Copies or links the pictures of a split."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, name in zip(data.files, names, strict=True):
        target = folder / name
        if target.exists():  # the same picture in another split of VOC
            continue
        if link:
            target.symlink_to(file)
        else:
            shutil.copyfile(file, target)


# -------------------------------------------------------------------------------------------------------- annotations


def write_split(root: Path, data: Dataset, names: Sequence[str], to: str) -> None:
    """The annotations of one split."""
    match to:
        case "coco":
            write_coco(root, data, names)
        case "yolo":
            write_yolo(root, data, names)
        case "voc":
            write_voc(root, data, names)
        case _:
            write_csv(root, data, names)


def write_coco(root: Path, data: Dataset, names: Sequence[str]) -> None:
    """`annotations/instances_SPLIT.json`: all ids, crowd marks and areas as they are."""
    images = [
        {"id": identity, "file_name": name, "width": width, "height": height}
        for identity, name, (width, height) in zip(data.ids.tolist(), names, data.sizes.tolist(), strict=True)
    ]
    owner = np.repeat(data.ids, np.diff(data.starts)).tolist()
    boxes = data.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    annotations = [
        {
            "id": identity,
            "image_id": owner[row],
            "category_id": data.categories.ids[data.labels[row]],
            "bbox": boxes[row].round(DECIMALS["coco"]).tolist(),
            "area": round(float(data.area[row]), DECIMALS["coco"]),
            "iscrowd": int(data.crowd[row]),
        }
        for row, identity in enumerate(data.annotation_ids.tolist())
    ]
    categories = [{"id": i, "name": n} for i, n in zip(data.categories.ids, data.categories.names, strict=True)]
    content = {"images": images, "annotations": annotations, "categories": categories}
    write_text(
        root / "annotations" / f"instances_{data.split}.json", json.dumps(content, ensure_ascii=False), durable=False
    )


def write_yolo(root: Path, data: Dataset, names: Sequence[str]) -> None:
    """`labels/SPLIT/NAME.txt`: class and box as shares of the picture; an empty file for a background."""
    for index, name in enumerate(names):
        rows = data.rows(index)
        boxes = data.boxes[rows].astype(np.float64) / np.tile(data.sizes[index], 2)
        values = np.concatenate(((boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]), axis=1)
        lines = [
            f"{label} " + " ".join(f"{value:.{DECIMALS['yolo']}f}" for value in row) + "\n"
            for label, row, crowd in zip(data.labels[rows].tolist(), values.tolist(), data.crowd[rows], strict=True)
            if not crowd
        ]
        write_text(root / "labels" / data.split / f"{Path(name).stem}.txt", "".join(lines), durable=False)


def write_yaml(root: Path, datasets: Sequence[Dataset]) -> None:
    """`data.yaml`."""
    content: dict[str, object] = {data.split: picture_folder("yolo", data.split) for data in datasets}
    content["names"] = dict(enumerate(datasets[0].categories.names))
    write_text(root / "data.yaml", yaml.safe_dump(content, allow_unicode=True, sort_keys=False), durable=False)


def write_voc(root: Path, data: Dataset, names: Sequence[str]) -> None:
    """`Annotations/NAME.xml` with corners counted from 1, and `ImageSets/Main/SPLIT.txt`."""
    for index, name in enumerate(names):
        rows = data.rows(index)
        width, height = data.sizes[index].tolist()
        tree = element("annotation", element("folder", "JPEGImages"), element("filename", name))
        tree.append(element("size", element("width", width), element("height", height), element("depth", 3)))
        boxes = data.boxes[rows].astype(np.float64)
        lost = lost_in_voc(boxes[:, 2:] - boxes[:, :2])
        for box, label, crowd, gone in zip(boxes, data.labels[rows], data.crowd[rows], lost, strict=True):
            if gone:
                continue
            corners = np.round(box + np.array((1, 1, 0, 0)), DECIMALS["voc"]).tolist()
            named = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
            place = element("bndbox", *(element(key, f"{value:.10g}") for key, value in named))
            word = element("name", data.categories.names[label])
            tree.append(element("object", word, element("difficult", int(crowd)), place))
        ElementTree.indent(tree)
        text = ElementTree.tostring(tree, encoding="unicode")
        write_text(root / "Annotations" / f"{Path(name).stem}.xml", text + "\n", durable=False)
    stems = "".join(f"{Path(name).stem}\n" for name in names)
    write_text(root / "ImageSets" / "Main" / f"{data.split}.txt", stems, durable=False)


def element(name: str, *content: ElementTree.Element | str | int) -> ElementTree.Element:
    """One XML element of others, or of a text."""
    made = ElementTree.Element(name)
    for item in content:
        if isinstance(item, ElementTree.Element):
            made.append(item)
        else:
            made.text = str(item)
    return made


def write_csv(root: Path, data: Dataset, names: Sequence[str]) -> None:
    """`SPLIT.csv`: a row a box; a picture without boxes is a row with its name alone."""
    with open(root / f"{data.split}.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        crowded = bool(data.crowd.any())
        writer.writerow(["image", "xmin", "ymin", "xmax", "ymax", "label", *(["iscrowd"] if crowded else [])])
        for index, name in enumerate(names):
            path, rows = f"{data.split}/{name}", data.rows(index)
            if rows.start == rows.stop:
                writer.writerow([path, *[""] * (6 if crowded else 5)])
            boxes = data.boxes[rows].astype(np.float64).round(DECIMALS["csv"]).tolist()
            for box, label, crowd in zip(boxes, data.labels[rows], data.crowd[rows], strict=True):
                mark = [int(crowd)] if crowded else []
                writer.writerow([path, *(f"{v:.10g}" for v in box), data.categories.names[label], *mark])
