"""`finedetr train`: from flags to a run, or to a description of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from finedetr.cli.flags import output, parse, peek, spell
from finedetr.errors import UsageError, did_you_mean
from finedetr.recipes import PAPERS, RECIPES, recipe_for
from finedetr.train.folder import RunFolder, find_weights
from finedetr.train.recipe import Recipe
from finedetr.train.session import Request, begin, default_folder, resume, saved_recipe, teacher_and_pictures
from finedetr.train.template import Template, read_template


@dataclass(frozen=True)
class Train:
    """Train or fine-tune a detector, or go on with a run.

    Every number of the recipe is a flag; a term of the objective goes by its name: --objective.BoxGIoU.weight 2.
    """

    data: Path | None = None
    """Folder of a data set (COCO, YOLO, VOC, CSV), or its JSON, YAML or CSV. Required but for --resume."""
    model: str | None = None
    """Name of a model (`finedetr models`). Unset: that of --weights, else dfine-s."""
    recipe: Annotated[str, tyro.conf.arg(help=f"Base of the recipe: {', '.join(RECIPES)}. deim fits every model.")] = (
        "deim"
    )
    with_: Annotated[
        tuple[str, ...], tyro.conf.arg(name="with", help=f"Papers and variations on top of it: {', '.join(PAPERS)}.")
    ] = ()
    config: Path | None = None
    """Start with the configuration of a run (its folder or config.json; also its data and weights where no flag says
    them), or with a recipe or a part of one in JSON. Flags go before it."""
    weights: Path | None = None
    """Start from these weights (a run, a weight file or a published name); classes are carried over by name."""
    backbone_weights: Path | None = None
    """Start the backbone alone from its official file (PPHGNetV2_B0_stage1.pth, ResNet18_vd_..., see models show)."""
    teacher: Path | None = None
    """Learn from this detector, too (a run, a weight file, a folder of transformers or a published name); or from what
    one has found: the JSON of `finedetr predict --format coco`, whose pictures join each batch."""
    unlabelled: Path | None = None
    """Folder of further pictures without labels, about which the teacher alone speaks (--teacher or --with od-detr).
    --teaching.unlabelled says how many of them stand beside each picture of the data set."""
    out: Path | None = None
    """Folder of the run. Unset: runs/DATA-MODEL."""
    resume: Path | None = None
    """Go on with the run in this folder, exactly where it stands."""
    overwrite: bool = False
    """Replace the run that is in the folder already; it goes when the new one has begun."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    layout: str | None = None
    """coco, yolo, voc or csv, where the data set could be read as several."""
    train_split: str = "train"
    """Split to train on."""
    val_split: str = "val"
    """Split to evaluate on."""
    skip_missing: bool = False
    """Go on without absent pictures, however many they are."""
    settings: Annotated[Recipe, tyro.conf.arg(name="")] = field(default_factory=Recipe)
    dry_run: bool = False
    """Say what would be done, and do nothing."""
    quiet: bool = False
    """Say nothing on the terminal."""
    json: bool = False
    """Print one JSON document at the end."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    words = [re.sub(r"^--queries$", "--model.decoder.queries", word) for word in spell(words)]
    changed = [word.removeprefix("--") for word in words if word.startswith("--")]
    made, template = _base_recipe(words), _template(words, changed)
    base = template.over(made, changed) if template else made
    flags = parse(Train, _name_terms(words, base), "finedetr train", _defaults(base, template, changed))
    if flags.resume is not None:
        return _resume(flags, words)
    if flags.data is None:
        raise UsageError("train needs --data", code="required", hint="Such as: finedetr train --data pictures/")
    recipe = flags.settings
    teacher, unlabelled = teacher_and_pictures(flags.teacher, flags.unlabelled)
    request = Request(
        flags.data,
        recipe,
        flags.out or default_folder(flags.data, recipe),
        weights=find_weights(flags.weights) if flags.weights else None,
        backbone_weights=flags.backbone_weights,
        teacher=teacher,
        unlabelled=unlabelled,
        train_split=flags.train_split,
        val_split=flags.val_split,
        skip_missing=flags.skip_missing,
        layout=flags.layout,
        device=flags.device,
        overwrite=flags.overwrite,
        quiet=flags.quiet,
        derived=template.derived(changed) if template else (),
    )
    if flags.dry_run:
        from finedetr.cli.dry import describe

        document, text = describe(request, base, made)
        if flags.json:
            return {"result": document, "warnings": []}
        output(text)
        return None
    result = begin(request)
    return {"result": _summary(result), "warnings": list(result.warnings)} if flags.json else None


def _resume(flags: Train, words: Sequence[str]) -> dict[str, Any] | None:
    assert flags.resume is not None
    fixed = (
        "config",
        "weights",
        "backbone-weights",
        "overwrite",
        "model",
        "recipe",
        "with",
        "teacher",
        "unlabelled",
        "out",
        "layout",
        "train-split",
        "val-split",
        "skip-missing",
        "dry-run",
    )
    for name in fixed:
        if f"--{name}" in words:
            raise UsageError(
                f"--resume and --{name} exclude each other: a resumed run keeps what it is",
                code="conflict",
                hint="To start anew from the weights of a run: --weights RUN --out ANOTHER",
            )
    result = resume(flags.resume, flags.settings, data=flags.data, device=flags.device, quiet=flags.quiet)
    return {"result": _summary(result), "warnings": list(result.warnings)} if flags.json else None


def _summary(result: Any) -> dict[str, Any]:
    metrics = {} if result.evaluation is None else result.evaluation.metrics()
    return {
        "run": str(result.folder),
        "epochs": result.epochs,
        "steps": result.steps,
        "train_seconds": round(result.seconds, 3),
        **metrics,
    }


def _base_recipe(words: Sequence[str]) -> Recipe:
    """The recipe before its flags: that of a saved run, or made by --recipe, --with, --model and --weights."""
    where = peek(words, "--resume")
    if where:
        return saved_recipe(RunFolder.existing(where[0]))[0]
    recipe, model, weights = (peek(words, f"--{name}")[:1] for name in ("recipe", "model", "weights"))
    return recipe_for(
        model[0] if model else None,
        recipe[0] if recipe else "deim",
        tuple(peek(words, "--with")),
        weights=find_weights(weights[0]) if weights else None,
        backbone_weights=bool(peek(words, "--backbone-weights")),
        teacher=next(iter(peek(words, "--teacher")), None),
    )


def _template(words: Sequence[str], changed: Sequence[str]) -> Template | None:
    """What --config gives."""
    path = peek(words, "--config")
    if not path or "resume" in changed:
        return None
    template = read_template(path[0])
    template.refuse(changed)
    return template


def _defaults(base: Recipe, template: Template | None, changed: Sequence[str]) -> Train:
    """The flags as they are where nothing is said: data and weights of the run that --config names."""
    if template is None or template.run is None:
        return Train(settings=base)
    data = template.run.get("data")
    defaults = Train(settings=base, **template.files(changed))  # type: ignore[arg-type]
    if "data" in changed or data is None:
        return defaults
    return replace(
        defaults,
        data=Path(data["path"]),
        train_split=data.get("train", "train"),
        val_split=data.get("val", "val"),
        skip_missing=bool(data.get("skip_missing", False)),
        layout=data.get("layout"),
    )


def _name_terms(words: Sequence[str], base: Recipe) -> list[str]:
    """Flags of parts by their name, as flags of their place: --objective.BoxL1.weight -> --objective.terms.1.weight."""
    sources = tuple(type(source).__name__ for source in base.sources)
    renamed = []
    for word in words:
        found = re.fullmatch(r"--(objective|sources)\.([A-Za-z][\w-]*)\.(.+)", word)
        if found and found[2] not in ("terms", "policy"):
            names, what = (base.objective.names, "term") if found[1] == "objective" else (sources, "source")
            places = {name.lower(): index for index, name in enumerate(names)}
            key = found[2].lower().replace("-", "")
            if key not in places:
                raise UsageError(
                    f"the {'objective' if what == 'term' else 'recipe'} has no {what} {found[2]!r}",
                    code="unknown_key",
                    hint=did_you_mean(found[2], names),
                )
            place = f"objective.terms.{places[key]}" if what == "term" else f"sources.{places[key]}"
            word = f"--{place}.{found[3]}"
        renamed.append(word)
    return renamed
