"""`finedetr info`: what a weight file or a run holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from finedetr.cli.flags import output, parse, spell
from finedetr.model.weights import read_card
from finedetr.train.folder import RunFolder, find_weights


@dataclass(frozen=True)
class Info:
    """Show what weights are made for: model, classes, input, recipe, numbers."""

    target: Annotated[Path, tyro.conf.Positional]
    """A run's folder or a .safetensors file."""
    json: bool = False
    """Print one JSON document."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    flags = parse(Info, spell(words), "finedetr info")
    file = find_weights(flags.target)
    card = asdict(read_card(file))
    state = RunFolder(flags.target).status
    document: dict[str, Any] = {"file": str(file), **json.loads(json.dumps(card))}
    if state.is_file():
        document["status"] = json.loads(state.read_text(encoding="utf-8"))
    if flags.json:
        return {"result": document, "warnings": []}
    classes = ", ".join(f"{i} {name}" for i, name in zip(card["category_ids"], card["names"], strict=True))
    output(f"file     {file}")
    output(f"model    {card['config']['name']}")
    output(f"classes  {len(card['names'])}: {classes}")
    output(
        f"input    {card['size'][0]}x{card['size'][1]}, values / 255"
        + (f", mean {card['mean']}" if card["mean"] else "")
    )
    recipe = card["recipe"]
    if recipe:
        output(f"recipe   {recipe.get('name')}, epoch {recipe.get('epoch', -1) + 1}, step {recipe.get('step')}")
    if card["thresholds"]:
        limits = zip(card["names"], card["thresholds"], strict=True)
        output(f"scores   from {', '.join(f'{name} {limit:.2f}' for name, limit in limits)}")
    for name, value in card["metrics"].items():
        output(f"{name:8} {value:.4f}")
    if "status" in document:
        status = document["status"]
        output(f"run      {status['state']}, epoch {status['epoch']} of {status['epochs']}")
    return None
