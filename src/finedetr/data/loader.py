"""Batches from worker processes: the same for the same seed, whatever the number of workers or processes."""

from __future__ import annotations

import logging
import signal
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from finedetr.data.balance import draw_epoch, repeat_factors
from finedetr.data.dataset import Dataset
from finedetr.data.dense import plan_sample
from finedetr.data.images import read_image, resize
from finedetr.data.sampling import Scratch, draw, load
from finedetr.data.transforms import Augmentation, Truth, Windows
from finedetr.errors import ConfigError, DataError, RunError
from finedetr.records import Batch, Targets

__all__ = ["EvaluationLoader", "TrainingLoader"]

log = logging.getLogger("finedetr.data")
ORDER, SAMPLE, BESIDE = 0, 1, 4  # separate streams of random numbers; others have 2 and 3
REPLACEMENTS = 20  # how many broken pictures in a row one place of a batch puts up with


@dataclass(frozen=True, slots=True)
class Parcel:
    """What a worker sends: pictures in shared memory, the rest small."""

    images: UInt8[Tensor, "B 3 H W"]
    labels: NDArray[np.int64]
    boxes: NDArray[np.float32]  # [T, 4] cxcywh in [0, 1]
    counts: tuple[int, ...]
    indices: tuple[int, ...]
    broken: tuple[tuple[str, str], ...] = ()  # (file, message) of pictures that were replaced or left out
    annotated: int | None = None  # so many pictures have a truth; None: all

    def batch(self, files: Sequence[str]) -> Batch:
        """The record that the training sees."""
        counts = self.counts
        image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))
        targets = Targets(torch.from_numpy(self.labels), torch.from_numpy(self.boxes), image, counts, self.annotated)
        return Batch(self.images, targets, tuple(files[i] for i in self.indices))


def pack(
    images: UInt8[Tensor, "B H W 3"],
    truths: list[Truth],
    indices: list[int],
    broken: list[tuple[str, str]],
) -> Parcel:
    """Joins pictures and their truth in pixels; boxes become cxcywh in [0, 1]."""
    height, width = images.shape[1:3]
    truth = Truth.join(truths) if truths else None
    xyxy = np.zeros((0, 4)) if truth is None else truth.boxes / (width, height, width, height)
    boxes = np.concatenate(((xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]), 1).astype(np.float32)
    labels = np.zeros(0, dtype=np.int64) if truth is None else truth.labels
    counts = tuple(len(t.labels) for t in truths)
    return Parcel(images.permute(0, 3, 1, 2), labels, boxes, counts, tuple(indices), tuple(broken))


# ------------------------------------------------------------------------------------------------------------- training


class TrainingPictures(TorchDataset[Parcel]):
    """Answers for (epoch, step) with its whole batch. Every worker has one."""

    def __init__(
        self,
        dataset: Dataset,
        augmentation: Augmentation,
        windows: Windows,
        size: tuple[int, int],
        batch: int,
        seed: int,
        rank: int,
        world: int,
        balance: float,
        others: Dataset | None,
        beside: int,
    ) -> None:
        self.others, self.beside = others, beside if others else 0
        self.dataset, self.augmentation, self.windows, self.size = dataset, augmentation, windows, size
        self.batch, self.seed, self.rank, self.world = batch, seed, rank, world
        self.factors = repeat_factors(dataset, balance) if balance > 0 else None
        self.scratch = Scratch()
        self.reading = ""  # the file that was asked for last: an error is about it
        self.latest: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))
        self.round: tuple[int, NDArray[np.int64]] = (-1, np.zeros(0, dtype=np.int64))

    @property
    def length(self) -> int:
        """Pictures of an epoch, repeated ones counted; an epoch may have one more."""
        return len(self.dataset) if self.factors is None else int(self.factors.sum())

    @property
    def steps(self) -> int:
        """Steps of an epoch: whole global batches, at least one."""
        return max(1, self.length // (self.batch * self.world))

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Which picture stands at each position of an epoch, for all processes together.

        A set that is smaller than one global batch is gone through as often as it takes to fill one.
        """
        if self.latest[0] != epoch:
            total, needed = self.length, self.batch * self.world
            rng = np.random.default_rng((self.seed, epoch, ORDER))
            rounds = 1 if total >= needed else -(-needed // total)
            drawn = [
                rng.permutation(total) if self.factors is None else draw_epoch(rng, self.factors) for _ in range(rounds)
            ]
            self.latest = (epoch, np.concatenate(drawn))
        return self.latest[1]

    def other(self, place: int) -> int:
        """Which of the other pictures stands at a place of the whole run: all of them in turn, in ever new orders."""
        assert self.others is not None
        turn, position = divmod(place, len(self.others))
        if self.round[0] != turn:
            rng = np.random.default_rng((self.seed, turn, BESIDE))
            self.round = (turn, rng.permutation(len(self.others)))
        return int(self.round[1][position])

    def __getitem__(self, key: tuple[int, int]) -> Parcel:
        epoch, step = key
        first = (step * self.world + self.rank) * self.batch
        images = torch.empty((self.batch + self.beside, *self.size, 3), dtype=torch.uint8)
        truths: list[Truth] = []
        indices: list[int] = []
        broken: list[tuple[str, str]] = []
        for offset, index in enumerate(self.order(epoch)[first : first + self.batch]):
            rng = np.random.default_rng((self.seed, epoch, SAMPLE, first + offset))
            truth, used = self.sample(rng, self.dataset, epoch, int(index), images[offset], broken)
            truths.append(truth)
            indices.append(used)
        if self.others is None:
            return pack(images, truths, indices, broken)
        for offset in range(self.beside):
            position = self.rank * self.beside + offset
            index = self.other((epoch * self.steps + step) * self.world * self.beside + position)
            rng = np.random.default_rng((self.seed, epoch, step, position, BESIDE))
            truth, used = self.sample(rng, self.others, epoch, index, images[self.batch + offset], broken)
            truths.append(truth)
            indices.append(len(self.dataset) + used)
        parcel = pack(images, truths, indices, broken)
        return parcel if len(self.others.labels) else replace(parcel, annotated=self.batch)

    def sample(
        self,
        rng: np.random.Generator,
        data: Dataset,
        epoch: int,
        index: int,
        out: UInt8[Tensor, "H W 3"],
        broken: list[tuple[str, str]],
    ) -> tuple[Truth, int]:
        """Draws one picture into `out`; another one in its place where a file cannot be read."""
        active = self.windows.kind(epoch)
        for _ in range(REPLACEMENTS):
            plan = plan_sample(rng, data, index, self.augmentation, active, self.size)
            try:
                draw(plan, partial(self.load, data), out, self.scratch)
            except DataError as error:
                broken.append((self.reading, error.message))
                index = int(rng.integers(len(data)))
                continue
            return plan.truth, index
        raise DataError(
            f"{REPLACEMENTS} pictures in a row cannot be read, the last: {broken[-1][1]}", code="corrupt_image"
        )

    def load(self, data: Dataset, index: int, reduce: int) -> tuple[NDArray[np.uint8], int]:
        """Pixels of a picture."""
        width, height = data.sizes[index]
        self.reading = data.files[index]
        return load(self.reading, reduce, (int(width), int(height)), self.scratch.encoded)


def check_ranges(batch: int, size: tuple[int, int], rank: int, world: int) -> None:
    """ConfigError where a batch, a size or a rank cannot be."""
    if batch < 1:
        raise ConfigError(f"batch: wanted 1 or more; got {batch}", code="range")
    if min(size) < 1:
        raise ConfigError(f"size: wanted 1 or more; got {size[0]} and {size[1]}", code="range")
    if not 0 <= rank < world:
        raise ConfigError(f"rank: wanted 0 to {world - 1} of {world} processes; got {rank}", code="range")


class Keys(Sampler[Any]):
    """The keys that a loader hands to its workers next."""

    def __init__(self) -> None:
        self.keys: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return iter(self.keys)

    def __len__(self) -> int:
        return len(self.keys)


def ignore_interrupts(_: int) -> None:
    """A worker leaves Ctrl-C to its parent, which ends it in an orderly way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def unchanged(parcel: Any) -> Any:
    """A dataset of whole batches needs no collation."""
    return parcel


class Workers:
    """Worker processes that live as long as their loader, and what they report about broken files."""

    def __init__(self, pictures: TorchDataset[Parcel], workers: int) -> None:
        if workers < 0:
            raise ConfigError(f"workers: wanted 0 or more; got {workers}", code="range")
        self.keys = Keys()
        self.broken: dict[str, int] = {}  # file -> how often it was met
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # more workers than cores is the user's choice
            self.loader: DataLoader[Parcel] | None = DataLoader(
                pictures,
                batch_size=None,
                sampler=self.keys,
                num_workers=workers,
                collate_fn=unchanged,
                worker_init_fn=ignore_interrupts if workers else None,
                persistent_workers=workers > 0,
                prefetch_factor=2 if workers else None,
            )

    def run(self, keys: list[Any]) -> Iterator[Parcel]:
        """The parcels of these keys, in order."""
        if self.loader is None:
            raise RunError("the loader is closed")
        self.keys.keys = keys
        try:
            for parcel in self.loader:
                self.report(parcel.broken)
                yield parcel
        except RuntimeError as error:
            text = str(error)
            if "worker" in text and ("exited unexpectedly" in text or "killed" in text or "Bus error" in text):
                hint = "Out of memory, or of shared memory (/dev/shm)? Use fewer workers, or --workers 0."
                raise RunError(f"a data worker died: {text.splitlines()[0]}", code="worker", hint=hint) from error
            raise

    def report(self, broken: tuple[tuple[str, str], ...]) -> None:
        """Warns of each file once, and counts."""
        for file, message in broken:
            if file not in self.broken:
                log.warning("data.corrupt_image: %s It is passed over.", message)
            self.broken[file] = self.broken.get(file, 0) + 1

    def close(self) -> None:
        """Ends the processes."""
        iterator = getattr(self.loader, "_iterator", None)
        if iterator is not None and hasattr(iterator, "_shutdown_workers"):
            iterator._shutdown_workers()
        self.loader = None


class TrainingLoader:
    """Shuffled, augmented batches for training.

    The pictures at each place of each step, and all that happens to them, follow from (seed, epoch, position) alone:
    neither the number of workers nor where a run was resumed changes a batch. Of `world` processes, `rank` gets its
    slice of each global batch, so that all of them together see what one process with the whole batch would see.

    Attributes:
        length: Pictures of an epoch.
        steps: Steps of an epoch, the same for every rank. What does not fill a batch is dropped, as published;
            a set smaller than one global batch is repeated to fill one.
        broken: Files that could not be read so far, and how often they were met; other pictures took their place.
    """

    def __init__(
        self,
        dataset: Dataset,
        augmentation: Augmentation,
        windows: Windows,
        size: tuple[int, int],
        batch: int,
        workers: int = 2,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        balance: float = 0.0,
        others: Dataset | None = None,
        beside: int = 0,
    ) -> None:
        """Batches of `batch` pictures for each process, of `size` (H, W).

        `balance` is the threshold of `repeat_factors`; 0 has each picture once in an epoch. `beside` pictures of
        `others` follow in each batch; they change neither the rest of it nor the length of an epoch. If none of them
        has a box nobody knows their truth.

        Raises:
            ConfigError: A batch, size, seed or rank that cannot be.
        """
        check_ranges(batch, size, rank, world)
        if seed < 0:
            raise ConfigError(f"seed: wanted 0 or more; got {seed}", code="range")
        self.dataset = dataset
        self.pictures = TrainingPictures(
            dataset,
            augmentation,
            windows,
            (int(size[0]), int(size[1])),
            batch,
            seed,
            rank,
            world,
            balance,
            others,
            beside,
        )
        self.files = dataset.files + (others.files if others else ())
        self.workers = Workers(self.pictures, workers)
        self.length, self.steps = self.pictures.length, self.pictures.steps

    @property
    def broken(self) -> dict[str, int]:
        """File -> how often it could not be read."""
        return self.workers.broken

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from a step on (images uint8 [B, 3, H, W], channels last in memory)."""
        for parcel in self.workers.run([(epoch, step) for step in range(first_step, self.steps)]):
            yield parcel.batch(self.files)

    def close(self) -> None:
        """Ends the workers."""
        self.workers.close()


# ----------------------------------------------------------------------------------------------------------- evaluation


class EvaluationPictures(TorchDataset[Parcel]):
    """Answers for a tuple of picture numbers with their batch, by the published preprocessing."""

    def __init__(self, dataset: Dataset, size: tuple[int, int]) -> None:
        self.dataset, self.size = dataset, size

    def __getitem__(self, key: tuple[int, ...]) -> Parcel:
        data, (height, width) = self.dataset, self.size
        images = torch.empty((len(key), *self.size, 3), dtype=torch.uint8)
        truths: list[Truth] = []
        indices: list[int] = []
        broken: list[tuple[str, str]] = []
        for index in key:
            try:
                pixels = read_image(data.files[index])
            except DataError as error:
                broken.append((data.files[index], error.message))
                continue
            images[len(indices)] = resize(pixels, self.size).permute(1, 2, 0)
            truth = Truth.of(data, index)
            scale = np.array((width, height, width, height)) / np.tile(data.sizes[index], 2)
            truths.append(Truth(truth.boxes * scale, truth.labels, truth.area))
            indices.append(index)
        return pack(images[: len(indices)], truths, indices, broken)


class EvaluationLoader:
    """Every picture once, in order, squashed to (H, W); iterates (batch, picture numbers).

    Rank r of `world` gets the pictures r, r + world, ...; nothing is padded. A file that cannot be read is left out
    with a warning.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: tuple[int, int],
        batch: int = 8,
        workers: int = 2,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        check_ranges(batch, size, rank, world)
        self.dataset = dataset
        own = list(range(rank, len(dataset), world))
        self.keys = [tuple(own[start : start + batch]) for start in range(0, len(own), batch)]
        self.workers = Workers(EvaluationPictures(dataset, (int(size[0]), int(size[1]))), workers)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def broken(self) -> dict[str, int]:
        """File -> how often it could not be read."""
        return self.workers.broken

    def __iter__(self) -> Iterator[tuple[Batch, tuple[int, ...]]]:
        for parcel in self.workers.run(list(self.keys)):
            if parcel.indices:
                yield parcel.batch(self.dataset.files), parcel.indices

    def close(self) -> None:
        """Ends the workers."""
        self.workers.close()
