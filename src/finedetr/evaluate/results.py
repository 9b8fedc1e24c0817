"""Detections of many pictures as the files of other tools: labels to correct, or to train on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finedetr.detections import Detections

__all__ = ["as_files"]


def as_files(
    kind: str, found: Sequence[Detections], stems: Sequence[str], names: Sequence[str], category_ids: Sequence[int]
) -> dict[Path, str]:
    """Relative path -> text.

    Args:
        kind: `coco`: one JSON that reads as a data set, with scores; `csv`: the table of CSV data sets, with scores;
            `yolo`: a label file a picture, without scores, and the names.
        found: For each picture, in order.
        stems: A name for each picture, no two alike.
        names: Of the classes.
        category_ids: The original id of each class.
    """
    if kind == "coco":
        return {Path("predictions.json"): _coco(found, names, category_ids)}
    if kind == "csv":
        return {Path("predictions.csv"): _csv(found)}
    labels = {
        Path("labels") / f"{stem}.txt": "".join(f"{line}\n" for line in answer.to_yolo(scores=False))
        for stem, answer in zip(stems, found, strict=True)
    }
    return {**labels, Path("classes.txt"): "".join(f"{name}\n" for name in names)}


def _coco(found: Sequence[Detections], names: Sequence[str], category_ids: Sequence[int]) -> str:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, answer in enumerate(found, start=1):
        width, height = answer.size
        images.append({"id": number, "file_name": _place(answer), "width": width, "height": height})
        for row in answer.to_coco(number, category_ids):
            area = round(row["bbox"][2] * row["bbox"][3], 3)
            annotations.append({"id": len(annotations) + 1, **row, "area": area, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in zip(category_ids, names, strict=True)]
    return json.dumps({"images": images, "annotations": annotations, "categories": categories}, ensure_ascii=False)


def _csv(found: Sequence[Detections]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("image", "xmin", "ymin", "xmax", "ymax", "label", "score"))
    for answer in found:
        for box in answer:
            writer.writerow((_place(answer), *(round(v, 3) for v in box.xyxy), box.name, round(box.score, 6)))
        if not len(answer):
            writer.writerow((_place(answer), *[""] * 6))
    return stream.getvalue()


def _place(answer: Detections) -> str:
    """The picture's absolute path, so that the file may be moved; an address as it is."""
    path = answer.path or ""
    return path if "://" in path or not path else str(Path(path).absolute())
