"""`finedetr demo`: the whole main job on pictures that it draws itself: draw, train, evaluate, predict."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finedetr._version import __version__
from finedetr.cli.flags import output, parse, spell
from finedetr.data.drawing import draw_dataset
from finedetr.errors import UsageError
from finedetr.evaluate.pictures import save_picture
from finedetr.evaluate.predictor import Predictor
from finedetr.files import read_records, write_text
from finedetr.model.config import ModelConfig
from finedetr.model.weights import load_weights
from finedetr.model.zoo import variant
from finedetr.recipes import build
from finedetr.train.distributed import choose_device
from finedetr.train.folder import RunFolder
from finedetr.train.recipe import Recipe
from finedetr.train.session import Request, begin

# ------------------------------------------------------------------------------ all that there is to tune in one place

TRAIN, VAL, SIDE = 1000, 100, 128  # pictures that are drawn, and their side in pixels
NOTE, PART = "drawings/drawn.json", "drawings.part"  # what was drawn, and where while it is drawn


def demo_model() -> ModelConfig:
    """D-FINE-N one level finer (strides 8 and 16 instead of 16 and 32) and one layer shorter, for 128 pixels.

    Without the last stage of the backbone a step is cheaper, and shapes of 20 pixels cover several cells: at equal
    steps from random weights this learned seven times as much as strides 16 and 32 at 160 pixels (LOG.md).
    """
    nano = variant("dfine-n")
    return replace(
        nano,
        backbone=replace(nano.backbone, stages=(1, 2)),
        encoder=replace(nano.encoder, depth=0.34),
        decoder=replace(nano.decoder, layers=2, points=(4, 4), queries=60),
    )


def demo_recipe(seconds: float) -> Recipe:
    """What the demo trains with: DEIM from random weights, sized for a few minutes on two cores.

    Dense pictures made of four need longer than that to pay off, and a thousand drawings vary enough, so only flips
    are on; a random backbone learns to tell classes apart sooner when the class loss weighs more.
    """
    recipe = build(demo_model(), "deim", random_start=True)
    return replace(
        recipe,
        size=(SIDE, SIDE),
        epochs=200,  # the most; the time budget makes them fewer
        batch=8,
        lr=2e-3,
        max_time=seconds,
        schedule=replace(recipe.schedule, flat=0.55, plain=0.95, gamma=0.05),
        optimizer=replace(recipe.optimizer, betas=(0.9, 0.99)),  # a thousand steps are too few for a longer memory
        objective=recipe.objective.with_weights({"MatchabilityAware": 4.0}),
        denoising=replace(recipe.denoising, queries=60),
        augmentation=replace(
            recipe.augmentation,
            multi_scale_repeat=None,
            mixup=0.0,
            mosaic=0.0,
            zoom_out=0.0,
            crop=0.0,
            photometric=0.0,
        ),
        evaluating=replace(recipe.evaluating, every=6),
    )


# ----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Demo:
    """Draw pictures, train a small detector on them from random weights, evaluate it, and show what it finds."""

    out: Path = Path("runs/demo")
    """Folder of everything; an earlier demo in it is replaced."""
    minutes: float = 5.0
    """How long the training may take."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    seed: int = 0
    """Of the pictures and the training."""
    quiet: bool = False
    """Say nothing while it trains."""
    json: bool = False
    """Print one JSON document."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    flags = parse(Demo, spell(words), "finedetr demo")
    _check(flags)
    data = _drawings(flags)
    recipe = replace(demo_recipe(flags.minutes * 60), seed=flags.seed)
    started = time.monotonic()
    result = begin(Request(data, recipe, flags.out, device=flags.device, overwrite=True, quiet=flags.quiet))
    seconds = time.monotonic() - started
    folder = RunFolder(flags.out)
    written = _predict(folder, data, flags)
    document = {
        **folder.read_json(folder.evaluation),
        "train_seconds": round(seconds, 1),
        "epochs": result.epochs,
        "steps": result.steps,
        "model": recipe.model.name,
        "sheet": str(folder.samples / "predictions_val.jpg"),
        "pictures_annotated": written,
    }
    folder.write_json(folder.evaluation, document)
    if flags.json:
        return {"result": document, "warnings": list(result.warnings)}
    output(f"AP {document['AP']:.4f}  AP50 {document['AP50']:.4f}  after {seconds:.0f} seconds, {result.steps} steps")
    output(f"pictures: {document['sheet']}")
    output(f"numbers: {folder.evaluation}")
    output(f"try: finedetr predict {flags.out} {data / 'val'} --out {flags.out / 'predictions'}")
    return None


def _check(flags: Demo) -> None:
    """There is time, and in the folder nothing but an earlier demo, be it one that was interrupted while it drew."""
    if not 0 < flags.minutes < math.inf:
        raise UsageError(f"minutes: more than 0 is wanted, {flags.minutes:g} came", code="range")
    out = flags.out
    used = out.is_file() or (out.is_dir() and any(out.iterdir()))
    if used and not (out / NOTE).is_file() and not (out / PART).is_dir():
        raise UsageError(f"{out} holds something that is no earlier demo", code="exists", hint="Give another --out.")


def _drawings(flags: Demo) -> Path:
    """The drawn data set: as it is where the same one is there already. It gets its name when it is complete."""
    note, part = flags.out / NOTE, flags.out / PART
    wanted = {"finedetr": __version__, "train": TRAIN, "val": VAL, "side": SIDE, "seed": flags.seed}
    if read_records(note) == [wanted]:
        return note.parent
    shutil.rmtree(part, ignore_errors=True)
    draw_dataset(part, train=TRAIN, val=VAL, size=(SIDE, SIDE), seed=flags.seed)
    write_text(part / note.name, json.dumps(wanted))
    shutil.rmtree(note.parent, ignore_errors=True)
    part.rename(note.parent)
    return note.parent


def _predict(folder: RunFolder, data: Path, flags: Demo) -> int:
    """Annotated copies of a few held-out drawings, by the very weights that were saved."""
    device = choose_device(flags.device)
    detector, card = load_weights(folder.best_weights, device)
    pictures = sorted((data / "val").glob("*.jpg"))[:8]
    found = Predictor(detector, card, device)([str(path) for path in pictures])
    assert isinstance(found, list)
    for path, detections in zip(pictures, found, strict=True):
        save_picture(detections.draw(), folder.root / "predictions" / path.name)
    return len(found)
