"""`finedetr data check`: what would be trained on, and what is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from finedetr.cli.flags import output, parse, spell
from finedetr.data.doctor import check
from finedetr.data.formats import list_splits, open_dataset
from finedetr.errors import DataError, UsageError, did_you_mean

ACTIONS = ("check",)


@dataclass(frozen=True)
class Check:
    """Read all splits of a data set, count, and name what is wrong. Ends with status 3 where something is."""

    path: Annotated[Path, tyro.conf.Positional]
    """Folder of a data set, or its JSON or YAML."""
    layout: str | None = None
    """coco, yolo or voc, where it could be read as several."""
    size: tuple[int, int] = (640, 640)
    """Height and width of the network's input, at which boxes are measured."""
    queries: int = 300
    """How many objects the model can answer in a picture."""
    strict: bool = False
    """Pictures that stand in two splits are an error."""
    deep: bool = False
    """Read every file, to find pictures with the same bytes."""
    json: bool = False
    """Print one JSON document."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    if words and words[0] in ("-h", "--help"):
        output("usage: finedetr data check PATH [flags]\n\nfinedetr data check --help lists the flags.")
        return None
    if not words or words[0] not in ACTIONS:
        asked = words[0] if words else ""
        raise UsageError(
            f"data {asked!r} is no action" if asked else "data needs an action",
            code="verb",
            hint=did_you_mean(asked, ACTIONS) if asked else "Such as: finedetr data check PATH",
        )
    flags = parse(Check, spell(words[1:]), "finedetr data check")
    splits = [open_dataset(flags.path, split, layout=flags.layout) for split in list_splits(flags.path, flags.layout)]
    report = check(*splits, size=flags.size, queries=flags.queries, strict=flags.strict, bytes_too=flags.deep)
    if not flags.json:
        output(splits[0].evidence)
        names = splits[0].categories
        table = ", ".join(f"{i} -> {n} {name}" for n, (i, name) in enumerate(zip(names.ids, names.names, strict=True)))
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
        raise DataError(f"{worst.message}{more}", code=worst.code.removeprefix("data."))
    return {"result": report.to_json(), "warnings": []} if flags.json else None
