"""One reader for each layout of a data set, and the sniffing that chooses between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from finedetr.data.dataset import COMMON, Dataset, finish, split_name
from finedetr.data.formats import coco, table, voc, yolo
from finedetr.data.hugging_face import is_hugging_face
from finedetr.data.images import SUFFIXES
from finedetr.errors import DataError, did_you_mean

__all__ = ["LAYOUTS", "list_splits", "open_dataset"]

READERS: dict[str, Any] = {"coco": coco, "yolo": yolo, "voc": voc, "csv": table}
LAYOUTS = tuple(READERS)


def open_dataset(
    path: str | Path,
    split: str = "train",
    *,
    layout: str | None = None,
    skip_missing: bool = False,
) -> Dataset:
    """Reads one split of a data set whose layout is sniffed.

    Args:
        path: A folder (COCO, YOLO, Pascal VOC, CSV), a COCO JSON file, a YOLO `data.yaml` or a CSV.
        split: `train`, `val` (or `valid`, `validation`), `test`, or a name that the layout knows (`trainval`).
            Ignored where `path` is one COCO JSON or one CSV.
        layout: `coco`, `yolo`, `voc` or `csv`; None sniffs.
        skip_missing: Go on without absent pictures however many they are.

    Raises:
        DataError: With the codes of the data set table (`data.none`, `data.ambiguous`, `data.class_range` ...).
    """
    root = Path(path)
    chosen, evidence = sniff(root, layout)
    split = split_name(split)
    return finish(READERS[chosen].read(root, split, evidence), skip_missing=skip_missing)


def list_splits(path: str | Path, layout: str | None = None) -> tuple[str, ...]:
    """The splits of a data set, by their common names (`train`, `val`, `test` first).

    Raises:
        DataError: There is none, or the data set cannot be read.
    """
    root = Path(path)
    chosen, _ = sniff(root, layout)
    names: tuple[str, ...] = READERS[chosen].splits(root)
    if not names:  # only a YAML may name none
        raise DataError(f"{root} names no split", code="split", hint="data.yaml needs train: and val:")
    first = [name for name in COMMON if name in names]
    return (*first, *sorted(set(names) - set(first)))


def sniff(root: Path, layout: str | None = None) -> tuple[str, str]:
    """The layout of a path and the evidence for it; DataError where there is none, or more than one."""
    if layout is not None and layout not in LAYOUTS:
        raise DataError(f"unknown layout {layout!r}", code="layout", hint=did_you_mean(layout, LAYOUTS))
    if is_hugging_face(str(root)) or str(root).startswith("hf:"):
        raise DataError(
            f"{root} belongs to Hugging Face's datasets, whose pictures are no files",
            code="layout",
            hint="Write it out first: finedetr data convert SOURCE OUT --to coco",
        )
    if not root.exists():
        raise DataError(
            f"{root} does not exist", code="none", hint="Give the folder of a data set, or its JSON or YAML."
        )
    signs = {name: reader.evidence(root) for name, reader in READERS.items()}
    found = {name: sign for name, sign in signs.items() if sign}
    if layout is not None:
        if layout not in found:
            raise DataError(f"{root} does not read as {layout}. {looked_for(root)}", code="none")
        return layout, f"read as {layout} because it was asked for, and {found[layout]}"
    if len(found) > 1:
        reasons = "; ".join(f"{name}: {sign}" for name, sign in found.items())
        raise DataError(
            f"{root} reads as {' and as '.join(found)} ({reasons})",
            code="ambiguous",
            hint=f"Choose with --layout {'|'.join(found)}.",
        )
    if not found:
        raise DataError(f"no known layout under {root}. {looked_for(root)}", code="none")
    ((name, sign),) = found.items()
    return name, f"read as {name} because {sign}"


def looked_for(root: Path) -> str:
    """What a data set would have shown, and what the folder holds instead."""
    wanted = (
        "Looked for: data.yaml with names (YOLO); _annotations.coco.json, annotations/instances_*.json or a JSON "
        "with images, annotations and categories (COCO); JPEGImages/, Annotations/ and ImageSets/ (VOC); a CSV "
        "with the columns image, xmin, ymin, xmax, ymax, label."
    )
    if not root.is_dir():
        return f"{wanted} Found: a file named {root.name}."
    pictures = texts = 0
    for number, entry in enumerate(root.rglob("*")):
        pictures += entry.suffix.lower() in SUFFIXES
        texts += entry.suffix.lower() in (".txt", ".json", ".xml", ".yaml", ".csv")
        if number > 50_000:
            break
    return f"{wanted} Found: {pictures} pictures, {texts} files that could hold labels."
