"""`finedetr data`: check what would be trained on; convert a data set to another layout."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from finedetr.cli.flags import output, parse, spell
from finedetr.data.convert import convert, deal
from finedetr.data.dataset import Dataset, listed
from finedetr.data.doctor import check
from finedetr.data.formats import list_splits, open_dataset
from finedetr.data.hugging_face import is_hugging_face, unpack
from finedetr.errors import DataError, UsageError, did_you_mean
from finedetr.evaluate.evaluation import plain

ACTIONS = ("check", "convert")


@dataclass(frozen=True)
class Check:
    """Read all splits of a data set, count, and name what is wrong. Ends with status 3 where something is."""

    path: Annotated[Path, tyro.conf.Positional]
    """Folder of a data set, or its JSON, YAML or CSV."""
    layout: str | None = None
    """coco, yolo, voc or csv, where it could be read as several."""
    size: tuple[int, int] = (640, 640)
    """Height and width of the network's input, at which boxes are measured."""
    queries: int = 300
    """How many objects the model can answer in a picture."""
    strict: bool = False
    """Pictures that stand in two splits are an error."""
    skip_missing: bool = False
    """Go on without pictures that are listed but absent, however many they are."""
    deep: bool = False
    """Read and decode every file, to find broken pictures and those with the same bytes."""
    json: bool = False
    """Print one JSON document."""


@dataclass(frozen=True)
class Convert:
    """Write a data set in another layout. What the layout cannot hold is counted; nothing is ever overwritten."""

    source: Annotated[str, tyro.conf.Positional]
    """Folder of a data set, its JSON, YAML or CSV; of Hugging Face's datasets a saved folder or hf://owner/name."""
    out: Annotated[Path, tyro.conf.Positional]
    """A folder that does not exist yet."""
    to: Literal["coco", "yolo", "voc", "csv"]
    """The layout."""
    layout: str | None = None
    """coco, yolo, voc or csv, where the source could be read as several."""
    skip_missing: bool = False
    """Go on without pictures that are listed but absent, however many they are."""
    link: bool = False
    """Link the pictures instead of copying them."""
    split: str | None = None
    """Deal the pictures of the only split anew: 0.8/0.2 to train and val, 0.7/0.2/0.1 to train, val and test."""
    seed: int = 0
    """Of --split."""
    json: bool = False
    """Print one JSON document."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    if words and words[0] in ("-h", "--help"):
        output("usage: finedetr data check PATH [flags]\n       finedetr data convert SOURCE OUT --to LAYOUT [flags]\n")
        output("finedetr data check --help lists the flags.")
        return None
    if not words or words[0] not in ACTIONS:
        asked = words[0] if words else ""
        raise UsageError(
            f"data {asked!r} is no action" if asked else "data needs an action",
            code="verb",
            hint=did_you_mean(asked, ACTIONS) if asked else "Such as: finedetr data check PATH",
        )
    rest = spell(words[1:])
    if words[0] == "convert":
        return _convert(parse(Convert, rest, "finedetr data convert"))
    return _check(parse(Check, rest, "finedetr data check"))


def _check(flags: Check) -> dict[str, Any] | None:
    if min(flags.size) < 1 or flags.queries < 1:
        raise UsageError(f"size and queries are at least 1; got {flags.size} and {flags.queries}", code="range")
    splits = _open(flags.path, flags)
    report = check(*splits, size=flags.size, queries=flags.queries, strict=flags.strict, bytes_too=flags.deep)
    if not flags.json:
        output(report.evidence)
        table = ", ".join(f"{row.id} -> {row.index} {plain(row.name)}" for row in report.classes)
        output(f"classes (id -> index name): {table}")
        for fact in report.facts:
            output(
                f"{fact.split}: {fact.pictures} pictures ({fact.backgrounds} without boxes), {fact.boxes} boxes, "
                f"{fact.crowd} crowd, at most {fact.densest} in a picture"
            )
        for line in dict.fromkeys(f"{note.level}: {note}" for note in report.notes):  # splits may say the same
            output(line)
    if report.errors:
        worst = report.errors[0]
        more = f" (and {len(report.errors) - 1} more)" if len(report.errors) > 1 else ""
        raise DataError(f"{worst.message}{more}", code=worst.code.removeprefix("data."), details=report.to_json())
    return {"result": report.to_json(), "warnings": []} if flags.json else None


def _open(path: Path, flags: Check | Convert) -> list[Dataset]:
    """All splits."""
    return [
        open_dataset(path, split, layout=flags.layout, skip_missing=flags.skip_missing)
        for split in list_splits(path, flags.layout)
    ]


def _convert(flags: Convert) -> dict[str, Any] | None:
    if not is_hugging_face(flags.source):
        return _rewrite(Path(flags.source), flags)
    beside = flags.out.absolute().parent
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".unpacked-") as folder:
        unpack(flags.source, Path(folder))
        return _rewrite(Path(folder), replace(flags, layout="coco", link=False))


def _rewrite(source: Path, flags: Convert) -> dict[str, Any] | None:
    splits = _open(source, flags)
    if flags.split is not None:
        if len(splits) > 1:
            raise UsageError(
                f"--split deals the pictures of one split; {source} has {listed([data.split for data in splits])}",
                code="conflict",
                hint="Leave --split out, or give the file of one split.",
            )
        splits = list(deal(splits[0], _shares(flags.split), flags.seed))
    lost = ("data.left_out", "data.polygons")  # told here, where they do not come along
    notes = [note for data in splits for note in data.notes if note.level == "warn" or note.code in lost]
    notes += convert(splits, flags.out, flags.to, link=flags.link)
    said = list(dict.fromkeys(f"{note.level}: {note}" for note in notes))
    written = [open_dataset(flags.out, split, layout=flags.to) for split in list_splits(flags.out, flags.to)]
    if flags.json:
        counts = {data.split: {"pictures": len(data), "boxes": len(data.labels)} for data in written}
        return {"result": {"out": str(flags.out), "layout": flags.to, "splits": counts}, "warnings": said}
    for line in said:
        print(line, file=sys.stderr)
    for data in written:
        output(f"{data.split}: {len(data)} pictures, {len(data.labels)} boxes")
    output(f"{flags.to}: {flags.out}")
    return None


def _shares(text: str) -> tuple[float, ...]:
    """0.8/0.2 as numbers."""
    try:
        return tuple(float(word) for word in text.split("/"))
    except ValueError:
        raise UsageError(f"--split wants shares such as 0.8/0.2; got {text!r}", code="type") from None
