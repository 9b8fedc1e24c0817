"""`finedetr info`: what a weight file, a run or the dump of a bad batch holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from finedetr.cli.flags import output, parse, spell
from finedetr.errors import ModelError
from finedetr.model.weights import read_card
from finedetr.train.dump import Dump
from finedetr.train.folder import RunFolder, find_weights


@dataclass(frozen=True)
class Info:
    """Show what weights are made for: model, classes, input, recipe, numbers.

    Of a nan_batch.pt: which losses were not finite, in which pictures, and what its step gives when it is done again.
    """

    target: Annotated[Path, tyro.conf.Positional]
    """A run's folder, a weight file, or the nan_batch.pt of a run."""
    json: bool = False
    """Print one JSON document."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    flags = parse(Info, spell(words), "finedetr info")
    if flags.target.match("nan_batch*.pt"):
        return _bad_batch(flags)
    file = find_weights(flags.target)
    card = asdict(read_card(file))
    folder = RunFolder(flags.target)
    document: dict[str, Any] = {"file": str(file), **json.loads(json.dumps(card))}
    if folder.status.is_file():
        document["status"] = _status(folder)
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
        epoch = recipe.get("epoch")
        number = epoch + 1 if isinstance(epoch, int) else "unknown"
        output(f"recipe   {recipe.get('name')}, epoch {number}, step {recipe.get('step')}")
    if card["thresholds"]:
        limits = zip(card["names"], card["thresholds"], strict=True)
        output(f"scores   from {', '.join(f'{name} {limit:.2f}' for name, limit in limits)}")
    for name, value in card["metrics"].items():
        output(f"{name:8} {value:.4f}")
    if "status" in document:
        status = document["status"]
        output(f"run      {status['state']}, epoch {status['epoch']} of {status['epochs']}")
    return None


def _status(folder: RunFolder) -> dict[str, Any]:
    """What a run said of itself last."""
    status = folder.read_json(folder.status)
    if not isinstance(status, dict) or not {"state", "epoch", "epochs"} <= set(status):
        raise ModelError(
            f"{folder.status}: wanted an object with state, epoch and epochs; got {status!r:.80}",
            code="schema",
            hint="Remove the file: the weights can be read without it.",
        )
    return status


def _bad_batch(flags: Info) -> dict[str, Any] | None:
    """A batch that a run has passed over, and its step done again."""
    dump = Dump.load(flags.target)
    again, place = dump.replay(), dump.place
    finite = dump.images.isfinite().flatten(1).all(1).tolist()
    broken = [name for name, fine in zip(dump.pictures, finite, strict=True) if not fine]
    document = {
        "file": str(flags.target),
        **place,
        "message": dump.message,
        "losses": {name: str(value) for name, value in dump.losses.items()},
        "pictures": list(dump.pictures),
        "boxes": list(dump.targets.counts),
        "pictures_not_finite": broken,
        "weights_not_finite": list(again.weights),
        "again": {
            "losses": {name: str(value) for name, value in again.losses.items()},
            "gradient": str(again.gradient),
            "first_module": again.first,
            "largest_weight": [again.largest[0], str(again.largest[1])],
        },
    }
    if flags.json:
        return {"result": document, "warnings": []}
    output(f"step     {place['total'] + 1} (epoch {place['epoch'] + 1}, step {place['step'] + 1} of it)")
    output(f"what     {dump.message}")
    for name, count in zip(dump.pictures, dump.targets.counts, strict=True):
        output(f"picture  {name}, {count} boxes" + (", values that are not finite" if name in broken else ""))
    bad = f"{len(again.weights)} not finite, such as {again.weights[0]}" if again.weights else "all finite"
    output(f"weights  {bad}; the largest is {again.largest[1]:.3g}, in {again.largest[0]}")
    losses = f"{len(again.losses)} not finite, such as {next(iter(again.losses))}" if again.losses else "all finite"
    output(f"again    losses {losses}; gradient {again.gradient:.4g} (fp32 on the CPU)")
    output(f"         first module with an answer that is not finite: {again.first or 'none'}")
    return None
