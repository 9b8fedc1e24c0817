"""`finedetr models`: the table of models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finedetr.cli.flags import output, parse, spell
from finedetr.errors import UsageError

PUBLISHED = {  # COCO val2017 AP of the papers, COCO training only (spec section 5); not reproduced here
    "dfine-n": 42.8,
    "dfine-s": 48.5,
    "dfine-m": 52.3,
    "dfine-l": 54.0,
    "dfine-x": 55.8,
    "deim-dfine-n": 43.0,
    "deim-dfine-s": 49.0,
    "deim-dfine-m": 52.7,
    "deim-dfine-l": 54.7,
    "deim-dfine-x": 56.5,
}


@dataclass(frozen=True)
class Models:
    """List the models that can be trained, with their parameters (80 classes) and the AP that the papers report."""

    json: bool = False
    """Print one JSON document."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    words = list(words)
    if words[:1] == ["list"]:
        words = words[1:]
    elif words and not words[0].startswith("-"):
        raise UsageError(f"models {words[0]!r} is no action", code="verb", hint="finedetr models lists them.")
    flags = parse(Models, spell(words), "finedetr models")
    import torch

    from finedetr.model.detector import Detector
    from finedetr.model.zoo import ZOO

    rows = []
    for name, config in ZOO.items():
        with torch.device("meta"):
            parameters = sum(p.numel() for p in Detector(config, 80).parameters())
        rows.append({"name": name, "parameters": parameters, "published_ap": PUBLISHED.get(name)})
    if flags.json:
        return {"result": {"models": rows}, "warnings": []}
    output("name\tparameters\tpublished COCO AP")
    for row in rows:
        output(f"{row['name']}\t{row['parameters']:,}\t{row['published_ap'] or '-'}")
    return None
