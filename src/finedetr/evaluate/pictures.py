"""Sheets to look at: what was found beside what is there, and what a training batch really looks like."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from finedetr.data.dataset import Dataset
from finedetr.data.images import read_image
from finedetr.detections import THRESHOLD, annotate, class_color
from finedetr.errors import DataError, UsageError
from finedetr.evaluate.coco import Evaluator
from finedetr.evaluate.evaluation import Evaluation
from finedetr.files import write_atomically
from finedetr.records import Targets

__all__ = ["batch_sheet", "is_ours", "prediction_sheet", "save_picture", "worst_sheet"]

PAPER, INK, FAINT = (24, 26, 30), (236, 238, 240), (150, 155, 162)
GAP = 8
COMMENT = "finedetr"  # in each JPEG that is written, so that it is known again
TRUTH = (64, 255, 96)  # truth under predictions is dashed and of this one color, whatever its class


def prediction_sheet(
    dataset: Dataset,
    evaluator: Evaluator,
    indices: Sequence[int] | None = None,
    *,
    count: int = 8,
    threshold: float | Sequence[float] = THRESHOLD,
    columns: int = 2,
    tile: int = 320,
) -> Image.Image:
    """Pairs of pictures: on the left the truth, on the right the detections with their scores over the dashed truth.

    Args:
        dataset: The truth.
        evaluator: What was found.
        indices: Which pictures; without them `count` ones that are spread over the data set, always the same.
        count: How many pictures.
        threshold: Detections with a lower score are left out; one for all classes, or one each.
        columns: Pairs in a row.
        tile: The longer side of each picture on the sheet, in pixels.
    """
    if indices is None:
        indices = np.unique(np.linspace(0, len(dataset) - 1, min(count, len(dataset))).astype(int)).tolist()
    names = dataset.categories.names
    limits = np.broadcast_to(np.array(threshold, dtype=np.float32), len(names))
    cells = []
    for index in indices:
        try:
            picture = Image.fromarray(read_image(dataset.files[index]))
        except DataError:
            continue  # the evaluation has told it already
        scaled, factor = _scaled(picture, tile)
        rows = dataset.rows(index)
        truth = dataset.boxes[rows] * factor
        labels = dataset.labels[rows].tolist()
        words = [f"{names[i]} (ignored)" if c else names[i] for i, c in zip(labels, dataset.crowd[rows], strict=True)]
        left = annotate(scaled, truth, words, [class_color(i) for i in labels])
        xyxy, score, label = evaluator.detections(index)
        order = np.flatnonzero(score >= limits[label])
        order = order[np.argsort(score[order], kind="stable")]
        captions = [f"{names[label[i]]} {score[i]:.2f}" for i in order]
        right = annotate(scaled, truth, [""] * len(truth), [TRUTH] * len(truth), dashed=True)
        right = annotate(right, xyxy[order] * factor, captions, [class_color(int(label[i])) for i in order])
        cells.append((_beside(left, right, tile), Path(dataset.files[index]).name))
    least = f"a score of {threshold:g}" if isinstance(threshold, float) else "the threshold of their class"
    title = f"left: truth    right: detections from {least}, truth dashed"
    return _sheet(cells, title, columns)


def worst_sheet(evaluation: Evaluation, evaluator: Evaluator, count: int = 8) -> Image.Image | None:
    """A prediction sheet of the pictures with the most faults, at the thresholds of a diagnosis; None without any."""
    diagnosis = evaluation.diagnosis
    if diagnosis is None or not diagnosis.worst:
        return None
    place = {identity: index for index, identity in enumerate(evaluator.dataset.ids.tolist())}
    indices = [place[faults.id] for faults in diagnosis.worst[:count]]
    thresholds = [entry.threshold for entry in diagnosis.thresholds]
    return prediction_sheet(evaluator.dataset, evaluator, indices, threshold=thresholds)


def batch_sheet(
    images: UInt8[Tensor, "B 3 H W"],
    targets: Targets,
    names: Sequence[str],
    *,
    titles: Sequence[str] = (),
    count: int = 16,
    columns: int = 4,
    tile: int = 256,
) -> Image.Image:
    """A training batch as the detector gets it, with its boxes.

    Args:
        images: The pictures as bytes.
        targets: Their truth, boxes (cx, cy, w, h) in [0, 1].
        names: Class names.
        titles: A line under each picture, such as its file.
        count: How many pictures at most.
        columns: Pictures in a row.
        tile: The longer side of each picture on the sheet, in pixels.
    """
    if len(images) != targets.pictures:
        raise UsageError(
            f"a batch has as many pictures as truths; got {len(images)} and {targets.pictures}", code="shape"
        )
    boxes, labels = targets.boxes.detach().cpu().numpy(), targets.labels.cpu().tolist()
    cells = []
    for index, start in enumerate(targets.starts[:count]):
        rows = slice(start, start + targets.counts[index])
        picture, _ = _scaled(Image.fromarray(images[index].permute(1, 2, 0).cpu().contiguous().numpy()), tile)
        scale = np.array([*picture.size, *picture.size], dtype=np.float32)
        center, half = boxes[rows, :2], boxes[rows, 2:] / 2
        xyxy = np.concatenate((center - half, center + half), axis=1) * scale
        words, colors = [names[i] for i in labels[rows]], [class_color(i) for i in labels[rows]]
        drawn = annotate(picture, xyxy, words, colors)
        cells.append((drawn, Path(titles[index]).name if index < len(titles) else ""))
    more = f", the first {len(cells)}" if len(cells) < len(images) else ""
    title = f"{len(images)} pictures of {images.shape[3]} x {images.shape[2]}, {len(targets)} boxes{more}"
    return _sheet(cells, title, columns)


def save_picture(image: Image.Image, path: str | Path) -> Path:
    """Writes a JPEG or PNG, by the ending of its name, so that nobody ever sees half a file.

    Raises:
        UsageError: For another ending.
        RunError: Where the file cannot be written.
    """
    path = Path(path)
    kinds = {".jpg": "JPEG", ".jpeg": "JPEG", ".png": "PNG"}
    if path.suffix.lower() not in kinds:
        raise UsageError(f"{path}: pictures are written as .jpg or .png", code="range")
    options: dict[str, Any] = {"format": kinds[path.suffix.lower()], "quality": 90, "comment": COMMENT}
    return write_atomically(path, lambda file: image.save(file, **options), durable=False)


def is_ours(path: str | Path) -> bool:
    """Whether there is a JPEG that `save_picture` wrote."""
    try:
        with Image.open(path) as image:
            return bool(image.info.get("comment") == COMMENT.encode())
    except Exception:  # nothing is there, or what is there is no picture, in any of the ways in which Pillow says so
        return False


def _scaled(picture: Image.Image, tile: int) -> tuple[Image.Image, float]:
    """The picture with its longer side at `tile` pixels, and by how much that is larger."""
    factor = tile / max(picture.size)
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    smooth = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.BICUBIC
    return picture.resize(size, smooth), factor


def _beside(left: Image.Image, right: Image.Image, tile: int) -> Image.Image:
    """Two pictures of one size, each in the middle of its square (or lower, where both are wide)."""
    both = Image.new("RGB", (2 * tile + GAP // 2, left.height), PAPER)
    margin = (tile - left.width) // 2
    both.paste(left, (margin, 0))
    both.paste(right, (tile + GAP // 2 + margin, 0))
    return both


def _sheet(cells: Sequence[tuple[Image.Image, str]], title: str, columns: int) -> Image.Image:
    """A grid on dark paper: a title above, a name under each picture."""
    font, small = ImageFont.load_default(size=15), ImageFont.load_default(size=11)
    columns = max(1, min(columns, len(cells)))
    rows = [cells[start : start + columns] for start in range(0, len(cells), columns)]
    widest = max((cell.width for cell, _ in cells), default=320)
    heights = [max(cell.height for cell, _ in row) + 18 for row in rows]
    width = columns * (widest + GAP) + GAP
    sheet = Image.new("RGB", (width, 34 + sum(heights) + GAP * len(rows)), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 8), _fitting(draw, title, font, width - 2 * GAP), fill=INK, font=font)
    top = 34
    for row, height in zip(rows, heights, strict=True):
        for column, (cell, name) in enumerate(row):
            left = GAP + column * (widest + GAP)
            sheet.paste(cell, (left + (widest - cell.width) // 2, top))
            draw.text((left, top + cell.height + 2), _fitting(draw, name, small, widest), fill=FAINT, font=small)
        top += height + GAP
    return sheet


def _fitting(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int
) -> str:
    """The text, its end cut off where it is too long for the place."""
    while text and draw.textlength(text, font=font) > width:
        text = text[: -2 if len(text) < 8 else -4].rstrip("…") + "…" if len(text) > 2 else ""
    return text
