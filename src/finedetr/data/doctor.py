"""What is wrong, or merely worth knowing, about a data set before the first step: static checks, no model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finedetr.data.dataset import Dataset, Note, listed, unions
from finedetr.data.images import decode, read_bytes
from finedetr.errors import DataError

__all__ = ["Report", "SplitFacts", "check"]

TINY = 8  # pixels at network resolution
TINY_SHARE = 0.1  # of all boxes, from which on it is worth a warning
BACKGROUND_SHARE = 0.9  # of pictures without boxes
RARE_SHARE = 0.1  # a class this much rarer than the mean is named
WHERE = 1000  # how many places a note keeps


@dataclass(frozen=True, slots=True)
class SplitFacts:
    """Counts of one split. `box_sizes` are quantiles (min, 5 %, median, 95 %, max) of sqrt(w h) in network pixels."""

    split: str
    pictures: int
    backgrounds: int
    boxes: int
    crowd: int
    densest: int  # boxes of the fullest picture, crowd left out
    per_class: tuple[int, ...]
    box_sizes: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class ClassFacts:
    """One class: the data set's own id, the index that stands for it here, its name."""

    id: int
    index: int
    name: str


@dataclass(frozen=True, slots=True)
class Report:
    """All notes, those of reading included, worst first, and the counts of each split.

    `evidence` says why the layout was chosen; it and `classes` are those of the first split.
    """

    notes: tuple[Note, ...]
    facts: tuple[SplitFacts, ...]
    evidence: str
    classes: tuple[ClassFacts, ...]

    @property
    def errors(self) -> tuple[Note, ...]:
        """Notes that should stop a run."""
        return tuple(note for note in self.notes if note.level == "error")

    def to_json(self) -> dict[str, Any]:
        """Plain values for `data_report.json`."""
        names = ("split", "pictures", "backgrounds", "boxes", "crowd", "densest", "per_class", "box_sizes")
        return {
            "evidence": self.evidence,
            "classes": [asdict(row) for row in self.classes],
            "notes": [
                {"code": n.code, "level": n.level, "message": n.message, "where": list(n.where), "count": n.count}
                for n in self.notes
            ],
            "splits": [
                {k: list(v) if isinstance(v, tuple) else v for k, v in ((k, getattr(f, k)) for k in names)}
                for f in self.facts
            ],
        }


def check(
    first: Dataset,
    *others: Dataset,
    size: tuple[int, int] = (640, 640),
    queries: int = 300,
    strict: bool = False,
    bytes_too: bool = True,
) -> Report:
    """Static checks of the splits of one data set.

    Args:
        first: A split, training best; its classes are the ones that the others are held against.
        others: The other splits; notes of reading them are part of the report.
        size: (H, W) of the network's input, at which boxes are measured.
        queries: How many objects the model can answer in a picture.
        strict: A picture that stands in two splits is an error, not a warning.
        bytes_too: Read and decode every file, to find broken ones and pictures with the same bytes.

    Returns:
        The report; faults are notes of level `error` in it, nothing is raised for them.
    """
    notes: list[Note] = []
    datasets = (first, *others)
    for data in datasets:
        notes += data.notes
        notes += check_counts(data, queries)
        notes += check_sizes(data, size)
    notes += check_classes(datasets)
    if bytes_too:
        again = unions(datasets)  # the pictures of trainval are meant to stand in train, too
        notes += check_bytes([data for data in datasets if data not in again], strict)
    order = {"error": 0, "warn": 1, "info": 2}
    notes.sort(key=lambda note: order[note.level])
    names = zip(first.categories.ids, first.categories.names, strict=True)
    return Report(
        tuple(notes),
        tuple(facts(data, size) for data in datasets),
        first.evidence,
        tuple(ClassFacts(identity, index, name) for index, (identity, name) in enumerate(names)),
    )


def boxes_per_picture(data: Dataset) -> NDArray[np.int64]:
    """How many boxes each picture has, crowd left out."""
    kept = np.concatenate(([0], np.cumsum(~data.crowd)))
    counts: NDArray[np.int64] = kept[data.starts[1:]] - kept[data.starts[:-1]]
    return counts


def network_sizes(data: Dataset, size: tuple[int, int]) -> NDArray[np.float64]:
    """(width, height) of each box that is no crowd, in pixels of the network's input."""
    scale = np.array((size[1], size[0])) / np.repeat(data.sizes, np.diff(data.starts), axis=0)
    extents: NDArray[np.float64] = ((data.boxes[:, 2:] - data.boxes[:, :2]) * scale)[~data.crowd]
    return extents


def facts(data: Dataset, size: tuple[int, int]) -> SplitFacts:
    """Counts of a split."""
    counts = boxes_per_picture(data)
    sides = np.sqrt(network_sizes(data, size).prod(1))
    quantiles = tuple(round(float(v), 1) for v in np.quantile(sides, (0, 0.05, 0.5, 0.95, 1))) if len(sides) else ()
    per_class = np.bincount(data.labels[~data.crowd], minlength=len(data.categories))
    return SplitFacts(
        split=data.split,
        pictures=len(data),
        backgrounds=int((counts == 0).sum()),
        boxes=int(counts.sum()),
        crowd=int(data.crowd.sum()),
        densest=int(counts.max(initial=0)),
        per_class=tuple(int(v) for v in per_class),
        box_sizes=quantiles,
    )


def check_counts(data: Dataset, queries: int) -> Iterable[Note]:
    """Splits without boxes, splits that are nearly all background, pictures fuller than the model can answer."""
    counts = boxes_per_picture(data)
    if not counts.sum():
        yield Note("data.empty_split", "error", f"{data.split} has no boxes: AP is undefined.")
        return
    empty = float((counts == 0).mean())
    if empty >= BACKGROUND_SHARE:
        message = f"{empty:.0%} of the {data.split} pictures have no boxes. Are their label files where they should be?"
        yield Note("data.all_background", "warn", message, count=int((counts == 0).sum()))
    full = np.flatnonzero(counts > queries)
    if len(full):
        message = (
            f"{len(full)} {data.split} pictures have more boxes than {queries} queries (densest: {counts.max()}): "
            "recall is capped."
        )
        yield Note("data.dense", "info", message, tuple(data.files[i] for i in full[:WHERE]), len(full))


def check_sizes(data: Dataset, size: tuple[int, int]) -> Iterable[Note]:
    """Boxes that are too small to see at the network's resolution."""
    extents = network_sizes(data, size)
    tiny = (extents.min(1) < TINY) if len(extents) else np.zeros(0, dtype=bool)
    if len(tiny) and tiny.mean() >= TINY_SHARE:
        message = (
            f"{tiny.mean():.0%} of the {data.split} boxes are under {TINY} px at {size[0]}x{size[1]}. "
            "Train at a larger size, or cut the pictures into tiles."
        )
        yield Note("data.tiny", "warn", message, count=int(tiny.sum()))


def check_classes(datasets: Sequence[Dataset]) -> Iterable[Note]:
    """Tables that differ between splits, classes that are rare or absent."""
    first = datasets[0]
    for other in datasets[1:]:
        if (other.categories.ids, other.categories.names) != (first.categories.ids, first.categories.names):
            message = f"the classes of {first.split} and {other.split} differ: {difference(first, other)}"
            yield Note("data.class_names", "error", message)
    counts = np.bincount(first.labels[~first.crowd], minlength=len(first.categories))
    names = first.categories.names
    absent = [names[i] for i in np.flatnonzero(counts == 0)]
    if absent and counts.sum():
        message = f"{len(absent)} of {len(names)} classes have no box in {first.split}: {listed(absent)}"
        yield Note("data.class_absent", "info", message, tuple(absent), len(absent))
    present = np.flatnonzero(counts > 0)
    if len(present) > 1:
        rarest = present[np.argmin(counts[present])]
        if counts[rarest] < RARE_SHARE * counts[present].mean():
            message = (
                f'rarest class in {first.split}: "{names[rarest]}", {counts[rarest]} boxes of {counts.sum()}. '
                "Training may show its pictures more often: --balance."
            )
            yield Note("data.imbalance", "info", message, (names[rarest],))


def difference(first: Dataset, other: Dataset) -> str:
    """How two tables of classes differ, with names that only differ in case side by side."""
    ours, theirs = set(first.categories.names), set(other.categories.names)
    if ours == theirs:
        return "the same names under other numbers"
    only, also = sorted(ours - theirs), sorted(theirs - ours)
    for name in only:
        alike = [word for word in also if word.casefold().strip() == name.casefold().strip()]
        if alike:
            return f'{first.split} has "{name}", {other.split} has "{alike[0]}"'
    return f"only in {first.split}: {listed(only) or 'none'}; only in {other.split}: {listed(also) or 'none'}"


def check_bytes(datasets: Sequence[Dataset], strict: bool) -> Iterable[Note]:
    """Pictures that cannot be decoded, and those with the same bytes, within a split and across splits."""
    broken: list[tuple[str, DataError]] = []
    seen: dict[bytes, tuple[str, str]] = {}  # digest -> the first split and file
    twice: dict[str, list[str]] = {}
    leaks: dict[tuple[str, str], list[str]] = {}
    for data in datasets:
        for file in data.files:
            try:
                content = read_bytes(file)
                decode(content, file)
            except DataError as error:
                broken.append((file, error))
                continue
            digest = hashlib.blake2b(content, digest_size=16).digest()
            split, _ = seen.setdefault(digest, (data.split, file))
            if seen[digest][1] == file and split == data.split:
                continue
            if split == data.split:
                twice.setdefault(split, []).append(file)
            else:
                leaks.setdefault((split, data.split), []).append(file)
    if broken:
        names = tuple(file for file, _ in broken)
        message = f"{len(names)} pictures cannot be decoded, first {broken[0][1].message}. Training leaves them out."
        yield Note("data.corrupt_image", "warn", message, names[:WHERE], len(names))
    for split, files in twice.items():
        message = f"{len(files)} pictures of {split} repeat another one (same bytes): {listed(files)}"
        yield Note("data.duplicate_image", "warn", message, tuple(files[:WHERE]), len(files))
    for (one, other), files in leaks.items():
        message = f"{len(files)} pictures are in {one} and {other} (same bytes): {listed(files)}"
        yield Note("data.leak", "error" if strict else "warn", message, tuple(files[:WHERE]), len(files))
