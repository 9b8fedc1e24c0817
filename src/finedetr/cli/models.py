"""`finedetr models`: the table of models (list, show); weights from and for others (pull, push, convert)."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from finedetr.cli.flags import output, parse, spell
from finedetr.errors import UsageError, did_you_mean
from finedetr.files import refuse_existing
from finedetr.model.catalog import CATALOG, CODE_LICENSE, PRETRAINED_AP, conditions, family_of, weights_of

ACTIONS = ("list", "show", "pull", "push", "convert")


@dataclass(frozen=True)
class Models:
    """List the models that can be trained: size, cost, the AP and latency that their authors report, their weights.

    `finedetr models show NAME` says all that is known of one; `finedetr models convert` carries weights from and to
    other people's code, `finedetr models push` uploads them to the Hugging Face Hub.
    """

    json: bool = False
    """Print one JSON document."""


@dataclass(frozen=True)
class Show:
    """Say all that is known of a model, and count its parameters and operations."""

    name: Annotated[str, tyro.conf.Positional]
    """Of the table."""
    size: tuple[int, int] | None = None
    """Height and width of the picture for which operations are counted. Unset: that of the published model."""
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


@dataclass(frozen=True)
class Pull:
    """Fetch published weights into the cache of the Hugging Face Hub, for a machine that will have no network."""

    name: Annotated[str, tyro.conf.Positional]
    """Such as dfine-s-coco or hf://owner/name@revision."""
    json: bool = False
    """Print one JSON document."""


@dataclass(frozen=True)
class Push:
    """Upload weights with a model card to the Hugging Face Hub, from where `hf://owner/name` loads them."""

    source: Annotated[Path, tyro.conf.Positional]
    """A run's folder or a weight file."""
    repository: Annotated[str, tyro.conf.Positional]
    """owner/name; made where it is absent."""
    license: str | None = None
    """Of these weights, as the Hub spells it: apache-2.0, cc-by-4.0, other. Required."""
    private: bool = False
    """Make a private repository."""
    dataset: str | None = None
    """What the numbers in the card were measured on."""
    folder: Path | None = None
    """Write the files into this folder instead, and upload nothing."""
    overwrite: bool = False
    """Replace files that are in --folder already."""
    json: bool = False
    """Print one JSON document."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    action, *rest = words if words and not words[0].startswith("-") else ["list", *words]
    match action:
        case "list":
            return _list(parse(Models, spell(rest), "finedetr models"))
        case "show":
            return _show(parse(Show, spell(rest), "finedetr models show"))
        case "pull":
            return _pull(parse(Pull, spell(rest), "finedetr models pull"))
        case "push":
            return _push(parse(Push, spell(rest), "finedetr models push"))
        case "convert":
            return _convert(parse(Convert, spell(rest), "finedetr models convert"))
    raise UsageError(f"models {action!r} is no action", code="verb", hint=did_you_mean(action, ACTIONS))


def _list(flags: Models) -> dict[str, Any] | None:
    rows = [_facts(name) for name in CATALOG]
    if flags.json:
        return {"result": {"models": rows}, "warnings": []}
    if not sys.stdout.isatty():
        keys = [key for key in rows[0] if key not in ("paper", "weights")]
        output("\t".join([*keys, "weights"]))
        for row in rows:
            cells = ["" if row[key] is None else str(row[key]) for key in keys]
            output("\t".join([*cells, ",".join(weights["name"] for weights in row["weights"])]))
        return None
    output(_table(rows))
    return None


def _facts(name: str) -> dict[str, Any]:
    """What the catalog knows of a model."""
    entry, family = CATALOG[name], family_of(name)
    assert family is not None
    return {
        "name": name,
        "parameters": entry.parameters,
        "gflops": entry.gflops,
        "published_ap": entry.ap,
        "t4_ms": entry.latency,
        "code_license": CODE_LICENSE,
        "weights_license": family.weights_license,
        "weights_from": "huggingface.co" if weights_of(name) else family.elsewhere,
        "paper": family.paper,
        "weights": [
            {"name": weights, "repository": place, "published_ap": _ap(name, weights)}
            for weights, place in weights_of(name).items()
        ],
    }


def _ap(name: str, weights: str) -> float | None:
    return CATALOG[name].ap if weights == f"{name}-coco" else PRETRAINED_AP.get(weights)


def _table(rows: list[dict[str, Any]]) -> str:
    """At most 100 columns: for a terminal."""
    width = max(len(row["name"]) for row in rows)
    lines = [f"{'model':{width}} {'params':>8} {'GFLOPs':>7} {'AP':>5} {'T4 ms':>6} {'weights':11} from"]
    for row in rows:
        gflops = "-" if row["gflops"] is None else f"{row['gflops']:.1f}"
        kinds = [weights["name"].removeprefix(f"{row['name']}-") for weights in row["weights"]]
        place = f"Hub: {', '.join(kinds)}" if kinds else "-" if row["weights_license"] == "none" else "authors' .pth"
        lines.append(
            f"{row['name']:{width}} {row['parameters'] / 1e6:6.1f} M {gflops:>7} {row['published_ap'] or '-':>5} "
            f"{_number(row['t4_ms']):>6} {row['weights_license']:11} {place}"
        )
    return "\n".join(
        [
            *lines,
            "",
            "AP: COCO val2017, trained on COCO; T4 latency (TensorRT, FP16, batch 1): as the authors report.",
            "weights: their license; the code is all Apache-2.0. By name: finedetr predict dfine-s-coco a.jpg",
            "More of a model: finedetr models show dfine-s",
        ]
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _show(flags: Show) -> dict[str, Any] | None:
    import torch

    from finedetr.model.cost import count_operations
    from finedetr.model.deploy import deployed
    from finedetr.model.detector import Detector
    from finedetr.model.pretrained import official_file
    from finedetr.model.zoo import published_input, variant

    config = variant(flags.name)
    with torch.device("meta"):
        detector = Detector(config, 80)
    facts, published = _facts(flags.name), published_input(config).size
    size = flags.size or published
    counted = {
        "parameters": sum(p.numel() for p in detector.parameters()),
        "deployed_parameters": sum(p.numel() for p in deployed(detector, everything=False).parameters()),
        "size": list(size),
        "gflops": round(count_operations(deployed(detector), size) / 1e9, 3),
    }
    if flags.json:
        return {"result": {**facts, "counted": counted, "config": asdict(config)}, "warnings": []}
    family, entry = family_of(flags.name), CATALOG[flags.name]
    assert family is not None
    output(f"model     {flags.name}: {family.paper}, github.com/{family.repository}")
    output(
        f"made of   {config.backbone.name}; strides {', '.join(map(str, config.strides))}; encoder "
        f"{config.encoder.width} wide; {config.decoder.layers} decoder layers, {config.decoder.width} wide; "
        f"{config.decoder.queries} queries; {config.decoder.sampling} sampling"
    )
    output(f"counted   {counted['parameters']:,} parameters, {counted['deployed_parameters']:,} as deployed")
    output(f"counted   {counted['gflops']:.2f} GFLOPs at {size[0]}x{size[1]}")
    boxes = " (the official code computes boxes of all cells)" if config.decoder.boxes == "plain" else ""
    if entry.gflops is not None:
        output(f"reported  {entry.gflops:g} GFLOPs at {published[0]}x{published[1]}{boxes}")
    output(
        f"reported  AP {entry.ap or '-'} on COCO val2017, {_number(entry.latency)} ms on a T4 (TensorRT, FP16, batch 1)"
    )
    for weights in facts["weights"]:
        ap = f", AP {weights['published_ap']}" if weights["published_ap"] else ""
        output(f"weights   {weights['name']}: huggingface.co/{weights['repository']}{ap}")
    output(f"weights   official .pth: {family.elsewhere}")
    if official_file(config.backbone.name):
        output(f"backbone  {official_file(config.backbone.name)} (ImageNet; train --backbone-weights)")
    output(f"license   code {CODE_LICENSE}; weights {family.weights_license}")
    for condition in conditions(config.name):
        output(f"          {condition}")
    return None


def _pull(flags: Pull) -> dict[str, Any] | None:
    from finedetr.model.hub import fetch

    folder = fetch(flags.name)
    if flags.json:
        return {"result": {"name": flags.name, "folder": str(folder)}, "warnings": []}
    output(str(folder))
    return None


def _push(flags: Push) -> dict[str, Any] | None:
    from finedetr.model.publish import FILES, license_chain, push, write_repository
    from finedetr.model.weights import load_weights
    from finedetr.train.folder import find_weights

    if flags.folder is not None and not flags.overwrite:
        refuse_existing((flags.folder / name for name in FILES), "Use --overwrite, or another --folder.")
    detector, card = load_weights(find_weights(flags.source))
    chain = license_chain(card)
    print("\n".join(chain), file=sys.stderr)
    if not flags.license:
        raise UsageError("models push needs --license", code="required", hint="Such as: --license apache-2.0")
    options: dict[str, Any] = {"license": flags.license, "dataset": flags.dataset}
    if flags.folder is not None:
        address = str(write_repository(flags.folder, flags.repository, detector, card, **options))
    else:
        address = push(flags.repository, detector, card, private=flags.private, **options)
    if flags.json:
        return {"result": {"repository": flags.repository, "address": address}, "warnings": list(chain)}
    output(address)
    return None


def _convert(flags: Convert) -> dict[str, Any] | None:
    from finedetr.model.transformers import FILES, write_transformers
    from finedetr.model.weights import load_weights, save_weights
    from finedetr.train.folder import find_weights

    target = flags.out / "model.safetensors" if flags.to == "transformers" else flags.out
    if not flags.overwrite:
        targets = [flags.out / name for name in FILES] if flags.to == "transformers" else [target]
        refuse_existing(targets, "Use --overwrite, or another name.")
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
