"""`finedetr models`: the table of models; `finedetr models convert`: weights from and for other people's code."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

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
    "rtdetrv2-r18": 48.1,
    "rtdetrv2-r34": 49.9,
    "rtdetrv2-r50-m": 51.9,
    "rtdetrv2-r50": 53.4,
    "rtdetrv2-r101": 54.3,
    "rtdetrv2-hgnet-l": 52.9,
    "rtdetrv2-hgnet-x": 54.7,
    "rtdetrv2-hgnet-h": 56.3,
    "deim-rtdetrv2-r18": 49.0,
    "deim-rtdetrv2-r34": 50.9,
    "deim-rtdetrv2-r50-m": 53.2,
    "deim-rtdetrv2-r50": 54.3,
    "deim-rtdetrv2-r101": 55.5,
    "conditional-detr-r50": 41.0,
    "conditional-detr-r50-dc5": 43.8,
    "dab-detr-r50": 42.2,
    "deformable-detr-r50": 44.5,
    "deformable-detr-r50-refine": 46.2,
    "deformable-detr-r50-two-stage": 46.9,
    "deformable-detr-r50-single": 39.4,
    "deformable-detr-r50-single-dc5": 41.5,
    "dino-r50": 49.0,
    "dino-r50-5scale": 49.4,
}


@dataclass(frozen=True)
class Models:
    """List the models that can be trained, with their parameters (80 classes) and the AP that the papers report.

    `finedetr models convert` carries weights from and to other people's code.
    """

    json: bool = False
    """Print one JSON document."""


@dataclass(frozen=True)
class Convert:
    """Write weights for finedetr, from an official .pth or a folder of transformers, or a folder for transformers."""

    source: Annotated[Path, tyro.conf.Positional]
    """A run's folder, a .safetensors file, an official .pth file, or a folder that transformers saved."""
    out: Annotated[Path, tyro.conf.Positional]
    """The .safetensors file to write, or with --to transformers the folder."""
    to: Literal["finedetr", "transformers"] = "finedetr"
    """For whom."""
    overwrite: bool = False
    """Replace what is there."""
    json: bool = False
    """Print one JSON document."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    words = list(words)
    if words[:1] == ["convert"]:
        return _convert(parse(Convert, spell(words[1:]), "finedetr models convert"))
    if words[:1] == ["list"]:
        words = words[1:]
    elif words and not words[0].startswith("-"):
        raise UsageError(
            f"models {words[0]!r} is no action", code="verb", hint="finedetr models lists them; there is convert, too."
        )
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


def _convert(flags: Convert) -> dict[str, Any] | None:
    from finedetr.model.transformers import write_transformers
    from finedetr.model.weights import load_weights, save_weights
    from finedetr.train.folder import find_weights

    target = flags.out / "model.safetensors" if flags.to == "transformers" else flags.out
    if target.exists() and not flags.overwrite:
        raise UsageError(f"{target} exists", code="exists", hint="Use --overwrite, or another name.")
    if flags.to == "finedetr" and target.suffix != ".safetensors":
        raise UsageError(f"a file that ends in .safetensors is wanted, {target} came", code="range")
    detector, card = load_weights(find_weights(flags.source))
    if flags.to == "transformers":
        write_transformers(flags.out, detector, card.names, card.size)
    else:
        save_weights(target, detector, card)
    if flags.json:
        return {"result": {"model": card.config.name, "classes": len(card.names), "file": str(target)}, "warnings": []}
    output(f"{card.config.name}, {len(card.names)} classes: {target}")
    return None
