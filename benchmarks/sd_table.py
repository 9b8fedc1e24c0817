"""What each part of SD-DETR is worth at equal steps on drawn pictures; and D-FINE's boxes on Deformable DETR.

    python -m benchmarks.sd_table --out FOLDER [--steps 1500 --seeds 3 --minutes 60 --rows ROW ... --backbone RUN]

Small forms of three hosts on the demo's backbone are trained from random weights, or (`--backbone runs/demo`) with the
backbone of a trained detector, as the papers begin with ImageNet's; every row for equal steps with one seed after the
other: round by round, so that a table that is stopped has as many seeds of one row as of another. Every run is what
`finedetr train` does, on one thread; what counts is AP of the moving average after the last step. FOLDER keeps what is
done, so the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from finedetr.cli.demo import demo_model, demo_recipe
from finedetr.data.drawing import draw_dataset
from finedetr.kernels.process import prepare_cpu
from finedetr.model.config import ModelConfig
from finedetr.model.foreign_names import official_names
from finedetr.model.weights import load_weights
from finedetr.model.zoo import variant
from finedetr.recipes import build
from finedetr.train.folder import find_weights
from finedetr.train.recipe import Recipe
from finedetr.train.session import Request, begin

SIDE, TRAIN, VAL = 128, 1000, 200
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "Conditional DETR": ("conditional-detr", ()),
    "+ split decoder": ("conditional-detr", ("sd-split",)),
    "+ salient queries": ("conditional-detr", ("sd-queries",)),
    "+ alignment": ("conditional-detr", ("sd-alignment",)),
    "+ split, salient queries": ("conditional-detr", ("sd-split", "sd-queries")),
    "SD-DETR, all three": ("conditional-detr", ("sd-detr",)),
    "D-FINE": ("dfine", ()),
    "D-FINE + split decoder": ("dfine", ("sd-split",)),
    "D-FINE + SD-DETR": ("dfine", ("sd-detr",)),
    "Deformable DETR": ("deformable-detr", ()),
    "Deformable DETR + FDR": ("deformable-detr", ("fdr",)),
}
"""The host's recipe, and what is on top of it."""


def host(recipe: str) -> ModelConfig:
    """A host in small: strides 8, or 8 and 16, for shapes of 20 pixels."""
    demo = demo_model()
    if recipe == "dfine":
        return demo
    row = variant(f"{recipe}-r50")
    single = row.decoder.attention == "conditional"
    return replace(
        row,
        name=f"small-{recipe}",
        backbone=replace(demo.backbone, stages=(1,) if single else (1, 2)),
        encoder=replace(row.encoder, width=128, feedforward=512, layers=2, extra_levels=0, dropout=0.0),
        decoder=replace(
            row.decoder,
            width=128,
            feedforward=512,
            layers=3,
            points=(1,) if single else (4, 4),
            queries=60,
            dropout=0.0,
        ),
    )


def recipe_of(row: str, steps: int, seed: int, pretrained: bool, lr: float) -> Recipe:
    """The host's own objective with what is on top, and the demo's pictures and schedule."""
    name, extras = ROWS[row]
    made, demo = build(host(name), name, extras, random_start=True), demo_recipe(0)
    if name == "dfine":  # as in the demo: a random backbone tells classes apart sooner when their loss weighs more
        made = replace(made, objective=made.objective.with_weights({t: 4 * w for t, w in label_weights(made).items()}))
    return replace(
        made,
        size=(SIDE, SIDE),
        epochs=-(-steps // (TRAIN // (demo.batch or 8))),
        batch=demo.batch,
        lr=demo.lr if name == "dfine" else lr,
        seed=seed,
        workers=0,
        schedule=replace(demo.schedule, curve="flat-cosine", flat=0.55, plain=0.95),
        optimizer=replace(made.optimizer, betas=demo.optimizer.betas, backbone=0.1 if pretrained else 1.0),
        denoising=demo.denoising,
        augmentation=demo.augmentation,
        evaluating=replace(demo.evaluating, every=1000),
    )


def label_weights(recipe: Recipe) -> dict[str, float]:
    """The weights of the terms that judge classes."""
    labels = ("Varifocal", "TaskAligned")
    return {type(term).__name__: term.weight for term in recipe.objective.terms if type(term).__name__ in labels}


def measure(args: argparse.Namespace, row: str, seed: int, data: Path) -> dict[str, float]:
    """One run of one row."""
    folder, begun = args.out / "run", time.monotonic()
    backbone = args.out / "backbone.pth" if args.backbone else None
    recipe = recipe_of(row, args.steps, seed, pretrained=backbone is not None, lr=args.lr)
    result = begin(Request(data, recipe, folder, None, backbone, device="cpu", overwrite=True, quiet=True))
    assert result.evaluation is not None
    seconds = time.monotonic() - begun
    shutil.rmtree(folder)
    return {"ap": result.evaluation.ap, "ap50": result.evaluation.ap50, "steps": result.steps, "seconds": seconds}


def write_backbone(run: str, path: Path) -> None:
    """The backbone of a trained detector as a file of its own, under the official names."""
    detector, _ = load_weights(find_weights(run))
    own = detector.backbone.state_dict()
    names = {key: official_names(f"backbone.{key}", detector.config)[0].removeprefix("backbone.") for key in own}
    torch.save({names[key]: tensor for key, tensor in own.items()}, path)


def table(done: dict[str, list[dict[str, float]]]) -> str:
    """Mean and spread (sample standard deviation) of every row that has a run."""
    lines = ["| row | seeds | AP | AP50 | s/step |", "|---|---|---|---|---|"]
    for name in ROWS:
        runs = done.get(name)
        if not runs:
            continue
        cells = []
        for key in ("ap", "ap50"):
            values = [run[key] for run in runs]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        pace = statistics.median(run["seconds"] / run["steps"] for run in runs)
        lines.append(f"| {name} | {len(runs)} | {' | '.join(cells)} | {pace:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=1500, help="of every row, in whole epochs of 125")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="no run begins later")
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--lr", type=float, default=5e-4, help="of the hosts other than D-FINE")
    parser.add_argument("--backbone", metavar="RUN", help="a trained detector with the demo's backbone")
    args = parser.parse_args()
    begun = time.monotonic()
    torch.set_num_threads(1)
    prepare_cpu()
    data = args.out / "drawings"
    if not data.is_dir():
        draw_dataset(data, train=TRAIN, val=VAL, size=(SIDE, SIDE), seed=0)
    if args.backbone:
        write_backbone(args.backbone, args.out / "backbone.pth")
    note = args.out / f"table-{args.steps}.json"
    done: dict[str, list[dict[str, float]]] = json.loads(note.read_text()) if note.is_file() else {}
    for seed in range(args.seeds):
        for row in args.rows:
            if len(done.get(row, [])) > seed:
                continue
            if time.monotonic() - begun > 60 * args.minutes:
                print(table(done))
                return
            done.setdefault(row, []).append(measure(args, row, seed, data))
            note.write_text(json.dumps(done, indent=1))
            print(row, seed, done[row][-1], flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
