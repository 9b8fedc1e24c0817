"""Weights at work: detections for whatever a user points at, and a detector measured on a data set."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed, nn

from finedetr.data.dataset import Categories, Dataset
from finedetr.data.images import resize
from finedetr.data.loader import EvaluationLoader
from finedetr.detections import THRESHOLD, Detections
from finedetr.errors import DataError, FineDETRError, RunError, UsageError
from finedetr.evaluate.address import is_address
from finedetr.evaluate.coco import Evaluator
from finedetr.evaluate.evaluation import Evaluation
from finedetr.evaluate.inference import Inference, Precision, at_rest
from finedetr.evaluate.sources import Pictures, Source, each_picture, find_pictures, read_source
from finedetr.evaluate.tiles import cut, merge
from finedetr.evaluate.video import Frame
from finedetr.model.classes import match_names

if TYPE_CHECKING:
    from finedetr.model.weights import Card

__all__ = ["Predictor", "evaluate_detector"]

log = logging.getLogger("finedetr.evaluate")
Loaded: TypeAlias = "tuple[Source | Frame, NDArray[np.uint8], Tensor]"


class Predictor:
    """A detector, ready to be asked.

    Args:
        detector: Its forward gives `Output`. It is moved to the device and put in eval mode.
        card: Class names, input size and preprocessing, as they travel with the weights.
        device: Where it runs.
        batch: Pictures that go through the detector together.
        precision: `fp32`, `bf16`, `fp16` or `auto`.
        workers: Threads that read and resize pictures ahead of the detector.
        top: Detections kept of each picture; None: see `top_detections`, with tiles so many of each.

    Attributes:
        broken: file -> message of the pictures that were passed over, over the life of the predictor.
    """

    def __init__(
        self,
        detector: nn.Module,
        card: Card,
        device: torch.device | str = "cpu",
        batch: int = 8,
        *,
        precision: Precision = "fp32",
        workers: int = 2,
        top: int | None = None,
    ) -> None:
        if batch < 1 or workers < 1:
            raise UsageError(f"batch and workers are at least 1; got {batch} and {workers}", code="range")
        self.detector = detector.to(device).eval()
        self.card = card
        self.batch, self.workers = batch, workers
        self.inference = Inference(device, precision, card.mean, card.std, top)
        self.broken: dict[str, str] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The class names."""
        return self.card.names

    def __call__(
        self,
        source: Source | Iterable[Source],
        threshold: float | None = None,
        batch: int | None = None,
        *,
        nms: float | None = None,
        tile: int | None = None,
    ) -> Detections | list[Detections] | Iterator[Detections]:
        """Detects in one picture (one `Detections`), in a folder, a glob or a list (a list), in a video (an iterator).

        Args:
            source: A file, an http(s) address, a folder, a glob, a video, a PIL image, a uint8 RGB array [H, W, 3],
                or a list of these.
            threshold: Detections with a lower score are left out; None: the thresholds of the weights, one a class, or
                0.4 where they have none.
            batch: Another batch size for this call.
            nms: Suppress overlaps of one class above this IoU; off by default, as the detector needs none.
            tile: Cut larger pictures into overlapping tiles of this side in pixels, and merge what is found in them and
                in the whole: for objects that are too small at the detector's input size.

        Raises:
            DataError: A file that was named cannot be read. In a folder or a glob it is passed over with a warning.
            RunError: An address gives no picture.
            UsageError: A source or a number that cannot be.
        """
        found = find_pictures(source)
        answers = self._stream(found, self._asked(threshold, batch, nms, tile))
        if found.video:
            return answers
        if found.single:
            (answer,) = answers
            return answer
        # Ten thousand results must not hold ten thousand pictures: those from files are read again to be drawn.
        return [
            answer if answer.path is None or is_address(answer.path) else replace(answer, image=None)
            for answer in answers
        ]

    def stream(
        self,
        source: Source | Iterable[Source],
        threshold: float | None = None,
        batch: int | None = None,
        *,
        nms: float | None = None,
        tile: int | None = None,
    ) -> Iterator[Detections]:
        """As a call, but one `Detections` after the other, each with its picture, in little memory."""
        return self._stream(find_pictures(source), self._asked(threshold, batch, nms, tile))

    def _asked(self, threshold: float | None, batch: int | None, nms: float | None, tile: int | None) -> _Asked:
        if not 0 <= (threshold or 0) <= 1 or not 0 <= (nms or 0) <= 1:
            raise UsageError(f"threshold and nms are in 0..1; got {threshold} and {nms}", code="range")
        batch = self.batch if batch is None else batch
        if batch < 1:
            raise UsageError(f"batch is at least 1; got {batch}", code="range")
        if tile is not None:
            cut(1, 1, tile)
        scores = self.card.thresholds if threshold is None and self.card.thresholds else (THRESHOLD,)
        scores = scores if threshold is None else (threshold,)
        return _Asked(np.broadcast_to(np.array(scores, dtype=np.float32), len(self.names)), batch, nms, tile)

    def _stream(self, found: Pictures, asked: _Asked) -> Iterator[Detections]:
        for line in found.left_out:
            log.warning("data.left_out: %s", line)
        with ThreadPoolExecutor(self.workers) as pool:
            loaded = self._loaded(pool, found, 2 * asked.batch)
            while group := list(itertools.islice(loaded, asked.batch)):
                if asked.tile is None:
                    answers = self._detect(group, asked.thresholds)
                else:
                    answers = (self._detect_in_tiles(one, asked.tile, asked) for one in group)
                yield from answers if asked.nms is None else (answer.nms(asked.nms) for answer in answers)

    def _loaded(self, pool: ThreadPoolExecutor, found: Pictures, ahead: int) -> Iterator[Loaded]:
        """What the threads read, in order, so many pictures ahead; without those that may be passed over."""
        rest = each_picture(found.items)
        waiting = deque((item, pool.submit(self._load, item)) for item in itertools.islice(rest, ahead))
        broken = 0
        try:
            while waiting:
                item, future = waiting.popleft()
                waiting.extend((item, pool.submit(self._load, item)) for item in itertools.islice(rest, 1))
                try:
                    yield future.result()
                except DataError as error:
                    if not found.forgiving:
                        raise
                    broken += 1
                    self.broken[str(item)] = error.message
                    log.warning("%s: %s; it is passed over", error.code, error.message)
        finally:
            for _, future in waiting:
                future.cancel()
        if broken:
            log.warning("data.corrupt_image: %d of %d pictures were passed over", broken, len(found.items))

    def _load(self, item: Source | Frame) -> Loaded:
        """In a thread: pixels, and the detector's input as bytes."""
        pixels = read_source(item)
        return item, pixels, resize(pixels, self.card.size)

    def _detect(self, group: Sequence[Loaded], thresholds: NDArray[np.float32]) -> Iterator[Detections]:
        sizes = np.array([(pixels.shape[1], pixels.shape[0]) for _, pixels, _ in group])
        images = torch.stack([tensor for _, _, tensor in group])
        boxes, scores, labels = self.inference(self.detector, images, sizes)
        if not (np.isfinite(boxes).all() and np.isfinite(scores).all()):
            raise RunError(
                "the detector answers NaN or infinity",
                code="not_finite",
                hint="The weights have diverged, or half precision overflows: try fp32.",
            )
        for row, (item, pixels, _) in enumerate(group):
            keep = scores[row] >= thresholds[labels[row]]
            width, height = (int(value) for value in sizes[row])
            xyxy = np.clip(boxes[row][keep], 0, np.array([width, height, width, height], dtype=np.float32))
            answer = Detections(xyxy, scores[row][keep], labels[row][keep], self.names, (width, height))
            yield _signed(answer, item, pixels)

    def _detect_in_tiles(self, one: Loaded, side: int, asked: _Asked) -> Detections:
        """The whole picture and its tiles, so many at a time, as one answer."""
        item, pixels, small = one
        size = (pixels.shape[1], pixels.shape[0])
        regions = cut(*size, side)
        answers: list[Detections] = []
        for start in range(0, len(regions), asked.batch):
            crops = [
                (region, pixels[region[1] : region[3], region[0] : region[2]])
                for region in regions[start:][: asked.batch]
            ]
            group = [(crop, crop, small if r == regions[0] else resize(crop, self.card.size)) for r, crop in crops]
            answers += self._detect(group, asked.thresholds)
        merged = answers[0] if len(regions) == 1 else merge(answers, regions, size)[: self.inference.top]
        return _signed(merged, item, pixels)


@dataclass(frozen=True)
class _Asked:
    """What a call asks for: a threshold for each class, and the rest."""

    thresholds: NDArray[np.float32]
    batch: int
    nms: float | None
    tile: int | None


def _signed(answer: Detections, item: Source | Frame, pixels: NDArray[np.uint8]) -> Detections:
    """An answer that knows where its picture came from, and the picture."""
    if isinstance(item, Frame):
        return replace(answer, path=item.path, image=pixels, frame=item.number, seconds=item.seconds)
    return replace(answer, path=item if isinstance(item, str) else None, image=pixels)


def evaluate_detector(
    detector: nn.Module,
    dataset: Dataset,
    size: tuple[int, int],
    inference: Inference,
    *,
    batch: int = 8,
    workers: int = 2,
    rank: int = 0,
    world: int = 1,
    names: Sequence[str] | None = None,
    max_detections: int = 100,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Evaluation, Evaluator]:
    """Measures a detector on a data set by the published evaluation.

    Where the data set is the work of several processes, each takes every `world`-th picture and the first one measures;
    all return the same numbers. Only the first process's evaluator then holds all detections.

    Pictures that cannot be read are left out of the truth, too: the evaluator's data set then lacks them.

    Args:
        detector: Its forward gives `Output`; already on the device. It is left in the mode in which it came.
        dataset: The truth.
        size: (height, width) of the detector's input.
        inference: How the detector is run.
        batch: Pictures of one process that go through the detector together.
        workers: Processes that read pictures; 0 reads in this one.
        rank: The number of this process.
        world: How many processes there are; more than one need `torch.distributed`.
        names: The detector's class names. Where they are not the data set's, classes are matched by name.
        max_detections: Detections of each picture and class that count; COCO's numbers are at 100.
        progress: Called after each batch with how many of this process's batches are done, and how many there are.

    Raises:
        RunError: The detector answers NaN, or another process failed.
        DataError: No class of the detector is in the data set, or none of its pictures can be read.
    """
    evaluator = Evaluator(dataset, max_detections)
    failure: FineDETRError | None = None
    try:
        to_truth = _class_table(names, dataset.categories)
        loader = EvaluationLoader(dataset, size, batch, workers, rank, world)
        try:
            with at_rest(detector):
                for done, (pictures, indices) in enumerate(loader, start=1):
                    answer = inference(detector, pictures.images, dataset.sizes[list(indices)])
                    _collect(evaluator, indices, answer, to_truth)
                    if progress is not None:
                        progress(done, len(loader))
        finally:
            loader.close()
    except FineDETRError as error:
        if world == 1:
            raise
        failure = error  # the others wait for this process: it must come to the meeting and tell them
    if world == 1:
        return _measure(evaluator)
    return _measure_together(evaluator, failure, rank)


def _measure(evaluator: Evaluator) -> tuple[Evaluation, Evaluator]:
    """The numbers, of the pictures that were answered: all that could be read."""
    whole = evaluator.result()
    lost = whole.unanswered
    if not lost:
        return whole, evaluator
    if lost == whole.pictures:
        raise DataError(
            f"none of {lost} pictures can be read, first: {evaluator.dataset.files[0]}",
            code="corrupt_image",
            hint="finedetr data check --deep says what is wrong with each.",
        )
    log.warning("data.corrupt_image: %d of %d pictures cannot be read and are not measured", lost, whole.pictures)
    part = evaluator.answered()
    return replace(part.result(), unreadable=lost), part


def _collect(
    evaluator: Evaluator,
    indices: Sequence[int],
    answer: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]],
    to_truth: NDArray[np.int64] | None,
) -> None:
    """Hands a batch to the evaluator, in the data set's classes."""
    xyxy, score, label = answer
    if to_truth is None:
        evaluator.add_batch(indices, xyxy, score, label)
        return
    label = to_truth[label]
    keep = label >= 0
    evaluator.add_rows(indices, keep.sum(axis=1), xyxy[keep], score[keep], label[keep])


def _class_table(names: Sequence[str] | None, categories: Categories) -> NDArray[np.int64] | None:
    """For each class of the detector the data set's class of that name, or -1; None where the classes are the same."""
    if names is None or tuple(names) == categories.names:
        return None
    pairs = [(own, truth) for truth, own in enumerate(match_names(categories.names, names)) if own is not None]
    table = np.full(len(names), -1, dtype=np.int64)
    for own, truth in sorted(pairs, key=lambda pair: names[pair[0]] == categories.names[pair[1]]):
        table[own] = truth  # the very same name comes last and stays
    known = np.flatnonzero(table >= 0)
    if not len(known):
        raise DataError(
            f"the detector knows {_some(names)}; the data set has {_some(categories.names)}: no name is the same",
            code="class_names",
        )
    if len(set(names)) < len(names) or len(set(categories.names)) < len(categories.names):
        raise DataError("classes cannot be matched by name: a name stands twice", code="class_names")
    foreign = [name for name, truth in zip(names, table, strict=True) if truth < 0]
    unknown = [name for truth, name in enumerate(categories.names) if truth not in table]
    found = [(names[own], categories.names[table[own]]) for own in known.tolist()]
    renamed = [f"{own} as {truth}" for own, truth in found if own != truth]
    log.warning(
        "data.class_names: classes are matched by name: %d in common%s%s%s",
        len(known),
        f"; under another name: {_some(renamed)}" if renamed else "",
        f"; not in the data set: {_some(foreign)}" if foreign else "",
        f"; not known to the detector, so never found: {_some(unknown)}" if unknown else "",
    )
    return table


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _measure_together(evaluator: Evaluator, failure: FineDETRError | None, rank: int) -> tuple[Evaluation, Evaluator]:
    """The first process merges what all have and measures; everybody gets the numbers, or the failure."""
    if not distributed.is_initialized():
        raise UsageError(
            "world is more than 1, but torch.distributed is not initialized", code="distributed", hint="Use torchrun."
        )
    own = (None, evaluator.to_bytes()) if failure is None else (f"process {rank}: {failure}", b"")
    parts: list[Any] | None = [None] * distributed.get_world_size() if rank == 0 else None
    distributed.gather_object(own, parts)
    outcome: list[str | None] = [None, None]
    if parts is not None:
        outcome[0] = next((error for error, _ in parts if error), None)
        if outcome[0] is None:
            try:
                for _, data in parts[1:]:
                    evaluator.merge(data)
                evaluation, evaluator = _measure(evaluator)
                outcome[1] = evaluation.to_json()
            except FineDETRError as error:
                failure = error
                outcome[0] = f"process 0: {error}"
    distributed.broadcast_object_list(outcome)
    if failure is not None:
        raise failure
    if outcome[1] is None:
        raise RunError(f"the evaluation failed in {outcome[0]}", code="evaluation")
    return Evaluation.from_json(outcome[1]), evaluator
