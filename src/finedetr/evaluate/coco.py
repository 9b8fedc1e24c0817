"""COCO's twelve numbers, per class and by size, from detections and a data set. The one evaluator of the product.

Matching runs in hotcoco (bit-identical to pycocotools, about 80 times faster); the numbers are taken from its precision
and recall arrays as pycocotools takes them, so that they agree to the last bit.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finedetr.data.dataset import Dataset
from finedetr.errors import RunError, UsageError
from finedetr.evaluate.evaluation import SIZES, ClassScore, Evaluation, SizeScore

__all__ = ["Evaluator", "Judged"]


@dataclass
class _Answers:
    """What came in, in the order in which it came: one entry for each picture, one row for each detection."""

    picture: list[NDArray[np.int64]] = field(default_factory=list)
    count: list[NDArray[np.int64]] = field(default_factory=list)
    xyxy: list[NDArray[np.float32]] = field(default_factory=list)
    score: list[NDArray[np.float32]] = field(default_factory=list)
    label: list[NDArray[np.int64]] = field(default_factory=list)


@dataclass(frozen=True)
class _Table:
    """All detections, sorted by picture; within a picture in the order in which they were given."""

    answered: NDArray[np.int64]  # indices of the pictures that were answered, sorted
    picture: NDArray[np.int64]  # [D] index of the picture
    xyxy: NDArray[np.float32]
    score: NDArray[np.float32]
    label: NDArray[np.int64]

    @property
    def counts(self) -> NDArray[np.int64]:
        """How many detections each answered picture has."""
        low, high = (np.searchsorted(self.picture, self.answered, side) for side in ("left", "right"))
        return high - low


@dataclass(frozen=True)
class Judged:
    """What became of each of D detections, matched by COCO's rules at IoU .5.

    Attributes:
        picture: [D] index of the picture.
        score: [D].
        label: [D] class indices.
        verdict: [D], 1: it found an object, 0: it did not, -1: it does not count (crowd, or too many in a picture).
        errors: TIDE's counts and gains, as the library gives them.
    """

    picture: NDArray[np.int64]
    score: NDArray[np.float32]
    label: NDArray[np.int64]
    verdict: NDArray[np.int8]
    errors: Mapping[str, Any]


class Evaluator:
    """Collects detections of a data set, picture by picture or batch by batch, and measures them.

    A picture that comes twice counts once (the later answer wins), so that samplers may pad and processes may overlap.
    A picture that never comes counts as one in which nothing was found.

    Args:
        dataset: The truth.
        max_detections: The best so many detections of each picture and class count. COCO's numbers are at 100.
    """

    def __init__(self, dataset: Dataset, max_detections: int = 100) -> None:
        if max_detections < 1:
            raise UsageError(f"max_detections is at least 1; got {max_detections}", code="range")
        self.dataset = dataset
        self.max_detections = max_detections
        self._answers = _Answers()
        self._joined: _Table | None = None
        self._matched: Any = None

    # ---- what comes in ------------------------------------------------------------------------------------------

    def add(self, index: int, xyxy: ArrayLike, score: ArrayLike, label: ArrayLike) -> None:
        """Takes the answer for one picture.

        Args:
            index: The picture's index in the data set.
            xyxy: [n, 4], corners in pixels of the original picture.
            score: [n].
            label: [n], class indices.

        Raises:
            RunError: Where a number is not finite.
            UsageError: Where a shape, an index or a label cannot be.
        """
        self.add_rows([index], [np.size(score)], xyxy, score, label)

    def add_batch(self, indices: Sequence[int], xyxy: ArrayLike, score: ArrayLike, label: ArrayLike) -> None:
        """Takes the answers for a batch: `xyxy` [B, K, 4], `score` [B, K], `label` [B, K]. Otherwise as `add`."""
        score = np.asarray(score, dtype=np.float32)
        if score.ndim != 2 or len(score) != len(indices):
            raise UsageError(
                f"a batch of {len(indices)} pictures has scores [{len(indices)}, K]; got {list(score.shape)}",
                code="shape",
            )
        counts = np.full(len(indices), score.shape[1])
        boxes, labels = np.asarray(xyxy, dtype=np.float32), np.asarray(label)
        self.add_rows(indices, counts, boxes.reshape(-1, 4), score.reshape(-1), labels.reshape(-1))

    def add_rows(
        self,
        indices: Sequence[int] | NDArray[Any],
        counts: Sequence[int] | NDArray[Any],
        xyxy: ArrayLike,
        score: ArrayLike,
        label: ArrayLike,
    ) -> None:
        """Takes the answers for several pictures in one: the first `counts[0]` rows belong to `indices[0]`, and so on.

        Otherwise as `add`. Copies are kept: the caller may use its arrays again.
        """
        picture, count = np.asarray(indices, dtype=np.int64), np.asarray(counts, dtype=np.int64)
        boxes = np.array(xyxy, dtype=np.float32).reshape(-1, 4)
        scores, labels = np.array(score, dtype=np.float32).reshape(-1), np.asarray(label).reshape(-1)
        if not len(boxes) == len(scores) == len(labels) == count.sum():
            raise UsageError(
                f"an answer has as many boxes as scores and labels; got {len(boxes)}, {len(scores)}, {len(labels)} "
                f"where {count.sum()} were announced",
                code="shape",
            )
        if picture.size and not (picture.min() >= 0 and picture.max() < len(self.dataset)):
            wrong = picture.min() if picture.min() < 0 else picture.max()
            raise UsageError(f"picture index {wrong} is outside the data set of {len(self.dataset)}", code="range")
        if labels.size and not (labels.min() >= 0 and labels.max() < len(self.dataset.categories.names)):
            wrong = labels.min() if labels.min() < 0 else labels.max()
            raise UsageError(
                f"label {wrong} is outside the data set's {len(self.dataset.categories.names)} classes; "
                "were the weights trained on another set of classes?",
                code="range",
            )
        if not (np.isfinite(scores).all() and np.isfinite(boxes).all()):
            bad = np.repeat(picture, count)[~(np.isfinite(scores) & np.isfinite(boxes).all(axis=1))]
            raise RunError(
                f"the detector's answer for {self.dataset.files[int(bad[0])]} holds NaN or infinity "
                f"({len(bad)} such detections)",
                code="not_finite",
                hint="The weights have diverged, or half precision overflows: evaluate in fp32 to tell which.",
            )
        self._joined = self._matched = None  # what was made of the answers so far
        answers = self._answers
        answers.picture.append(picture.copy())
        answers.count.append(count.copy())
        answers.xyxy.append(boxes)
        answers.score.append(scores)
        answers.label.append(labels.astype(np.int64))

    # ---- many processes -----------------------------------------------------------------------------------------

    def to_bytes(self) -> bytes:
        """All that came in, to be merged into the evaluator of another process. Holds arrays only, no code."""
        table = self._table()
        stream = io.BytesIO()
        np.savez(
            stream,
            truth=self._fingerprint(),
            picture=table.answered,
            count=table.counts,
            xyxy=table.xyxy,
            score=table.score,
            label=table.label,
        )
        return stream.getvalue()

    def merge(self, data: bytes) -> None:
        """Takes what another evaluator of the same data set holds.

        Raises:
            RunError: Where the bytes are damaged or belong to another data set.
        """
        try:
            with np.load(io.BytesIO(data), allow_pickle=False) as held:
                truth, picture, count = held["truth"], held["picture"], held["count"]
                xyxy, score, label = held["xyxy"], held["score"], held["label"]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise RunError(f"the other process's answers cannot be read ({error})", code="merge") from error
        if not np.array_equal(truth, self._fingerprint()):
            raise RunError(
                "the other process evaluates another data set (pictures, boxes or categories differ)",
                code="merge",
                hint="Do all machines see the same files?",
            )
        self.add_rows(picture, count, xyxy, score, label)

    def _fingerprint(self) -> NDArray[np.int64]:
        """Tells two data sets apart."""
        d = self.dataset
        parts = (d.ids, d.starts, d.labels, d.boxes, np.array(d.categories.ids, dtype=np.int64))
        sums = [zlib.crc32(np.ascontiguousarray(part).tobytes()) for part in parts]
        return np.array([len(d), len(d.labels), *sums], dtype=np.int64)

    def answered(self) -> Evaluator:
        """An evaluator of the same answers whose data set has the answered pictures only."""
        table = self._table()
        part = Evaluator(self.dataset.subset(table.answered), self.max_detections)
        part.add_rows(np.arange(len(table.answered)), table.counts, table.xyxy, table.score, table.label)
        return part

    # ---- what comes out -----------------------------------------------------------------------------------------

    def result(self) -> Evaluation:
        """Measures all that came in. More may come in afterwards."""
        table = self._table()
        precision, recall = self._curves()
        metrics: dict[str, Any] = {
            "ap": _mean(precision[:, :, :, 0, -1]),
            "ap50": _mean(precision[0, :, :, 0, -1]),
            "ap75": _mean(precision[5, :, :, 0, -1]),
            "ap_small": _mean(precision[:, :, :, 1, -1]),
            "ap_medium": _mean(precision[:, :, :, 2, -1]),
            "ap_large": _mean(precision[:, :, :, 3, -1]),
            "ar1": _mean(recall[:, :, 0, 0]),
            "ar10": _mean(recall[:, :, 0, 1]),
            "ar100": _mean(recall[:, :, 0, 2]),
            "ar_small": _mean(recall[:, :, 1, 2]),
            "ar_medium": _mean(recall[:, :, 2, 2]),
            "ar_large": _mean(recall[:, :, 3, 2]),
        }
        truth = self.dataset
        return Evaluation(
            **metrics,
            per_class=self._per_class(precision, recall),
            by_size=self._by_size(metrics),
            pictures=len(truth),
            boxes=int(np.count_nonzero(~truth.crowd)),
            detections=len(table.score),
            unanswered=len(truth) - len(table.answered),
            max_detections=self.max_detections,
        )

    def coco_results(self, decimals: int | None = 3) -> list[dict[str, Any]]:
        """All detections as COCO results in the data set's original ids.

        Args:
            decimals: Digits behind the point of boxes (scores keep three more); None keeps every bit.
        """
        table = self._table()
        boxes = table.xyxy.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        score = table.score.astype(np.float64)
        if decimals is not None:
            boxes, score = boxes.round(decimals), score.round(decimals + 3)
        images = self.dataset.ids[table.picture].tolist()
        categories = np.array(self.dataset.categories.ids, dtype=np.int64)[table.label].tolist()
        return [
            {"image_id": image, "category_id": category, "bbox": box, "score": value}
            for image, category, box, value in zip(images, categories, boxes.tolist(), score.tolist(), strict=True)
        ]

    def detections(self, index: int) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """The answer for one picture: xyxy [n, 4], score [n], label [n]; n is 0 where none came."""
        table = self._table()
        low, high = np.searchsorted(table.picture, [index, index + 1])
        return table.xyxy[low:high], table.score[low:high], table.label[low:high]

    def _table(self) -> _Table:
        """Joins what came in; of a picture that came twice the later answer stays."""
        if self._joined is not None:
            return self._joined
        a = self._answers
        picture = _join(a.picture, np.int64)
        count = _join(a.count, np.int64)
        last = np.full(len(self.dataset), -1, dtype=np.int64)
        np.maximum.at(last, picture, np.arange(len(picture)))
        entry = np.repeat(np.arange(len(picture)), count)
        owner = np.repeat(picture, count)
        rows = np.flatnonzero(last[owner] == entry)
        rows = rows[np.argsort(owner[rows], kind="stable")]
        table = _Table(
            np.flatnonzero(last >= 0),
            owner[rows],
            _join(a.xyxy, np.float32).reshape(-1, 4)[rows],
            _join(a.score, np.float32)[rows],
            _join(a.label, np.int64)[rows],
        )
        self._answers = _Answers([table.answered], [table.counts], [table.xyxy], [table.score], [table.label])
        self._joined = table
        return table

    def _evaluated(self) -> Any:
        """All that came in, matched with the truth: once for the numbers and for what goes wrong."""
        if self._matched is None:
            self._matched = self._prepared(self._table())
            self._matched.evaluate()
        return self._matched

    def _curves(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Precision [10 IoUs, 101 recalls, C, 4 areas, 3 limits] and recall [10, C, 4, 3]; -1: no truth."""
        evaluation = self._evaluated()
        evaluation.accumulate()
        curves: dict[str, Any] = evaluation.eval or {}
        return curves["precision"], curves["recall"]

    def judged(self) -> Judged:
        """What became of each detection and each object at IoU .5, and the six kinds of error."""
        table, evaluation = self._table(), self._evaluated()
        verdicts = evaluation.image_diagnostics(iou_thr=0.5)
        verdict = np.full(len(table.score), -1, dtype=np.int8)  # ids of detections are rows, from 1
        for identity, status in verdicts["dt_status"].items():
            verdict[identity - 1] = status == "tp"
        return Judged(table.picture, table.score, table.label, verdict, evaluation.tide_errors(0.5, 0.1))

    def confused(self, chosen: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Truth by answer at IoU .5, whatever the class, for some rows of `judged`: [C + 1, C + 1], last: nothing."""
        table = self._table()
        some = _Table(
            table.answered, table.picture[chosen], table.xyxy[chosen], table.score[chosen], table.label[chosen]
        )
        found = self._prepared(some, crowd=False).confusion_matrix(iou_thr=0.5, min_score=0.0)
        place = np.append(_ranks(self.dataset.categories.ids) - 1, len(self.dataset.categories))
        return np.asarray(np.asarray(found["matrix"], dtype=np.int64)[np.ix_(place, place)])

    def _prepared(self, table: _Table, *, crowd: bool = True) -> Any:
        """Truth and answers as the library wants them, nothing evaluated yet.

        Ids are ranks among the sorted original ids, from 1: pycocotools breaks ties of equal scores by the order of
        the pictures and adds up in the order of the classes, and takes an id of 0 for no match.
        """
        import hotcoco  # here: `finedetr predict` has no use for it

        truth = self.dataset
        rank, rank_of_class = _ranks(truth.ids), _ranks(truth.categories.ids)
        owner = np.repeat(np.arange(len(truth)), np.diff(truth.starts))
        images = [
            {"id": identity, "width": width, "height": height}
            for identity, (width, height) in zip(rank.tolist(), truth.sizes.tolist(), strict=True)
        ]
        categories = [{"id": i + 1, "name": str(i)} for i in range(len(rank_of_class))]
        truth_boxes = truth.boxes.astype(np.float64)
        truth_boxes[:, 2:] -= truth_boxes[:, :2]
        used = np.ones(len(truth.labels), dtype=bool) if crowd else ~truth.crowd
        reference = hotcoco.COCO.from_arrays(
            images,
            categories,
            rank[owner][used],
            rank_of_class[truth.labels][used],
            truth_boxes[used],
            area=truth.area.astype(np.float64)[used],
            iscrowd=truth.crowd[used],
        )
        found = np.empty((len(table.score), 7))
        found[:, 0] = rank[table.picture]
        found[:, 1:5] = table.xyxy
        found[:, 3:5] -= found[:, 1:3]
        found[:, 5] = table.score
        found[:, 6] = rank_of_class[table.label]
        evaluation = hotcoco.COCOeval(reference, reference.load_res(found), "bbox")
        evaluation.params.max_dets = _limits(self.max_detections)
        return evaluation

    def _per_class(self, precision: NDArray[np.float64], recall: NDArray[np.float64]) -> tuple[ClassScore, ...]:
        categories = self.dataset.categories
        boxes = np.bincount(self.dataset.labels[~self.dataset.crowd], minlength=len(categories.names))
        rank = _ranks(categories.ids) - 1
        return tuple(
            ClassScore(
                name=name,
                id=identity,
                ap=_mean(precision[:, :, k, 0, -1]),
                ap50=_mean(precision[0, :, k, 0, -1]),
                ar=_mean(recall[:, k, 0, -1]),
                boxes=int(boxes[index]),
            )
            for index, (identity, name, k) in enumerate(zip(categories.ids, categories.names, rank, strict=True))
        )

    def _by_size(self, metrics: Mapping[str, float]) -> dict[str, SizeScore]:
        area = self.dataset.area[~self.dataset.crowd]
        return {
            name: SizeScore(
                ap=metrics[f"ap_{name}"],
                ar=metrics[f"ar_{name}"],
                boxes=int(np.count_nonzero((area >= low) & (area < high))),
            )
            for name, (low, high) in SIZES.items()
        }


def _limits(most: int) -> list[int]:
    """COCO's limits 1, 10 and 100, the last replaced; none above it."""
    return [min(1, most), min(10, most), most]


def _ranks(ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """The place of each id among the sorted ones, from 1."""
    ranks = np.empty(len(ids), dtype=np.int64)
    ranks[np.argsort(np.asarray(ids, dtype=np.int64), kind="stable")] = np.arange(1, len(ids) + 1)
    return ranks


def _mean(values: NDArray[np.float64]) -> float:
    """The mean of what is defined, as pycocotools takes it; -1 where nothing is."""
    defined = values[values > -1]
    return float(np.mean(defined)) if defined.size else -1.0


def _join(parts: list[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=dtype)
