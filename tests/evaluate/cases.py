"""Small data sets and detections for the tests of this folder."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from finedetr.data.dataset import Categories, Dataset
from finedetr.geometry import to_cxcywh
from finedetr.records import Output, Prediction


def make_dataset(
    sizes: Sequence[tuple[int, int]],
    boxes: Sequence[Sequence[Sequence[float]]],
    labels: Sequence[Sequence[int]],
    *,
    names: Sequence[str] = ("cat", "dog"),
    category_ids: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
    crowd: Sequence[Sequence[bool]] | None = None,
    area: Sequence[Sequence[float]] | None = None,
    files: Sequence[str] | None = None,
) -> Dataset:
    """A data set from lists of lists, one a picture; boxes are xyxy."""
    counts = [len(b) for b in boxes]
    total = sum(counts)
    flat = np.array([box for picture in boxes for box in picture], dtype=np.float32).reshape(-1, 4)
    return Dataset(
        split="val",
        layout="coco",
        evidence="made by a test",
        files=tuple(files or [f"/pictures/{i}.jpg" for i in range(len(sizes))]),
        ids=np.array(ids if ids is not None else range(len(sizes)), dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int32).reshape(-1, 2),
        starts=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
        labels=np.array([label for picture in labels for label in picture], dtype=np.int64),
        boxes=flat,
        crowd=np.array([c for picture in crowd for c in picture], dtype=bool) if crowd else np.zeros(total, dtype=bool),
        area=np.array([a for picture in area for a in picture], dtype=np.float32)
        if area
        else (flat[:, 2] - flat[:, 0]) * (flat[:, 3] - flat[:, 1]),
        annotation_ids=np.arange(1, total + 1),
        categories=Categories(tuple(category_ids or range(1, len(names) + 1)), tuple(names)),
        notes=(),
    )


def random_case(seed: int, pictures: int = 12, classes: int = 4) -> tuple[Dataset, list[tuple[Any, Any, Any]]]:
    """A data set with crowd, empty pictures, ids out of order and sizes of all kinds; and answers near the truth."""
    random = np.random.default_rng(seed)
    boxes, labels, crowd, area, answers = [], [], [], [], []
    for _ in range(pictures):
        n = int(random.integers(0, 9))
        low = random.random((n, 2)) * 300
        extent = np.exp(random.random((n, 2)) * 4) * 4
        truth = np.round(np.concatenate((low, low + extent), 1) * 4) / 4
        boxes.append(truth.tolist())
        labels.append(random.integers(0, classes, n).tolist())
        crowd.append((random.random(n) < 0.12).tolist())
        area.append((extent.prod(1) * random.uniform(0.5, 1, n)).tolist())
        m = int(random.integers(0, 3)) if random.random() < 0.9 else 150 // max(n, 1)
        near = np.repeat(truth, m, 0)
        near = near + random.normal(0, 1, near.shape) * np.repeat(extent, m, 0).repeat(2, 1) * 0.08
        noise = random.random((int(random.integers(0, 6)), 2)) * 300
        found = np.concatenate((near, np.concatenate((noise, noise + 40), 1)))
        found[:, 2:] = np.maximum(found[:, 2:], found[:, :2])
        label = np.concatenate((np.repeat(labels[-1], m), random.integers(0, classes, len(noise)))).astype(np.int64)
        score = np.round(random.random(len(found)), 1 if seed % 2 else 4)  # ties in every other case
        answers.append((found.astype(np.float32), score.astype(np.float32), label))
    dataset = make_dataset(
        [(400, 400)] * pictures,
        boxes,
        labels,
        names=[f"class {i}" for i in range(classes)],
        category_ids=random.choice(90, classes, replace=False).tolist(),
        ids=random.permutation(1000)[:pictures].tolist(),
        crowd=crowd,
        area=area,
    )
    return dataset, answers


def pycocotools_stats(dataset: Dataset, results: list[dict[str, Any]]) -> tuple[Any, Any]:
    """The oracle: twelve numbers and its precision array, from the same boxes as plain COCO dicts in original ids."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    owner = np.repeat(np.arange(len(dataset)), np.diff(dataset.starts))
    boxes = dataset.boxes.astype(np.float64)
    boxes[:, 2:] -= boxes[:, :2]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = {
            "images": [{"id": i, "width": 400, "height": 400} for i in dataset.ids.tolist()],
            "categories": [{"id": i, "name": str(i)} for i in dataset.categories.ids],
            "annotations": [
                {
                    "id": row + 1,
                    "image_id": int(dataset.ids[owner[row]]),
                    "category_id": dataset.categories.ids[dataset.labels[row]],
                    "bbox": boxes[row].tolist(),
                    "area": float(dataset.area[row]),
                    "iscrowd": int(dataset.crowd[row]),
                }
                for row in range(len(boxes))
            ],
        }
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats, evaluation.eval


class Oracle(nn.Module):
    """A detector that answers the truth: solid pictures tell by their red value which one of the data set they are."""

    def __init__(self, dataset: Dataset, queries: int = 12, classes: int | None = None) -> None:
        super().__init__()
        self.classes = classes or len(dataset.categories.names)
        logits = torch.full((len(dataset), queries, self.classes), -9.0)
        boxes = torch.rand(len(dataset), queries, 4, generator=torch.Generator().manual_seed(0)) * 0.1 + 0.3
        for i in range(len(dataset)):
            rows = dataset.rows(i)
            width, height = dataset.sizes[i].tolist()
            xyxy = torch.from_numpy(dataset.boxes[rows]) / torch.tensor([width, height, width, height])
            count = len(xyxy)
            boxes[i, :count] = to_cxcywh(xyxy)
            logits[i, torch.arange(count), torch.from_numpy(dataset.labels[rows])] = 4.0
        self.logits, self.boxes = nn.Parameter(logits), nn.Parameter(boxes)
        self.seen: list[tuple[torch.dtype, tuple[int, ...], bool]] = []

    def forward(self, images: torch.Tensor) -> Output:
        self.seen.append(((images[:, 0] @ images[:, 0].mT).dtype, tuple(images.shape), self.training))
        index = (images[:, 0, 0, 0] * 255 / 10).round().long()
        return Output(Prediction(self.logits[index][None], self.boxes[index][None], ("layer2",)))


def solid_pictures(folder: Path) -> Dataset:
    """Five pictures of different sizes on disk, each of one color, and their truth (one has none, one has crowd)."""
    sizes = [(64, 48), (50, 90), (32, 32), (120, 40), (33, 77)]
    boxes = [
        [[2, 3, 30, 40], [10, 5, 60, 20]],
        [[0, 0, 50, 90]],
        [],
        [[5, 5, 25, 25], [30, 10, 110, 39], [60, 1, 70, 9]],
        [[1.5, 2.25, 30, 70]],
    ]
    labels = [[0, 1], [1], [], [0, 0, 1], [1]]
    crowd = [[False, False], [False], [], [False, True, False], [False]]
    files = []
    for index, size in enumerate(sizes):
        path = folder / f"{index}.png"
        Image.new("RGB", size, (index * 10, 7, 9)).save(path)
        files.append(str(path))
    return make_dataset(sizes, boxes, labels, category_ids=(5, 90), ids=[40, 30, 20, 10, 0], crowd=crowd, files=files)
