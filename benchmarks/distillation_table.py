"""What each part of DETRDistill and OD-DETR is worth at equal steps of the student, on drawn pictures.

    python -m benchmarks.distillation_table --out FOLDER [--warm 750 --steps 125 --seeds 3 --minutes 60]

Trains a teacher (once) and a smaller student alone (once: from random weights all rows would be noise for as long as
this takes). From that student on, every row of the table goes on for equal steps, with one seed after the other: round
by round, so that a table that is stopped has as many seeds of one row as of another. Every run is what `finedetr train`
does, on one thread; what counts is AP of the moving average after the last step. FOLDER keeps what is done, so the same
command goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from finedetr.cli.demo import demo_recipe
from finedetr.data.drawing import draw_dataset
from finedetr.distill.matching import TeacherVotes
from finedetr.distill.queries import AuxiliaryQueries, PredictionQueries, QueryPrior
from finedetr.distill.terms import FeatureDistillation, LogitsDistillation, PredictionDistillation
from finedetr.recipes import PAPERS, build
from finedetr.supervise.terms import MatchabilityAware, Varifocal
from finedetr.train.distributed import keep_freed_memory
from finedetr.train.folder import RunFolder
from finedetr.train.recipe import Recipe
from finedetr.train.session import Request, begin

SIDE, TRAIN, VAL = 128, 1000, 200
Row = Callable[[Recipe], Recipe]


def teacher_recipe(seconds: float) -> Recipe:
    """The demo's detector with a third layer, for as long as it may take."""
    recipe = demo_recipe(seconds)
    model = replace(recipe.model, decoder=replace(recipe.model.decoder, layers=3))
    return replace(recipe, model=model, epochs=200, evaluating=replace(recipe.evaluating, every=10))


def student_recipe(steps: int, seed: int, paper: str) -> Recipe:
    """Half as wide and two layers deep, D-FINE's or DEIM's losses, the demo's settings."""
    demo = demo_recipe(0)
    model = replace(
        demo.model,
        encoder=replace(demo.model.encoder, width=64, feedforward=256),
        decoder=replace(demo.model.decoder, width=64, feedforward=256),
    )
    recipe = build(model, paper, random_start=True)
    heavy = Varifocal if paper == "dfine" else MatchabilityAware
    per_epoch = TRAIN // (demo.batch or 8)
    return replace(
        demo,
        name=recipe.name,
        model=recipe.model,
        objective=recipe.objective.with_weights({heavy.__name__: 4.0}),
        epochs=-(-steps // per_epoch),
        max_time=0.0,
        seed=seed,
        schedule=replace(demo.schedule, curve="flat-cosine", flat=0.5, plain=0.9),
        evaluating=replace(demo.evaluating, every=1000),
        teaching=replace(recipe.teaching, watch=0),
    )


def logits(recipe: Recipe) -> Recipe:
    return replace(recipe, objective=recipe.objective.plus(LogitsDistillation()))


def features(recipe: Recipe) -> Recipe:
    return replace(recipe, objective=recipe.objective.plus(FeatureDistillation(weight=5.0)))


def prior(recipe: Recipe) -> Recipe:
    return replace(recipe, sources=(*recipe.sources, QueryPrior()))


def prior_answers(recipe: Recipe) -> Recipe:
    objective = recipe.objective.plus(PredictionDistillation())
    return replace(recipe, objective=objective, sources=(*recipe.sources, QueryPrior(answers=True)))


def matching(recipe: Recipe) -> Recipe:
    policy = PAPERS["od-detr"](recipe).objective.policy
    assert isinstance(policy, TeacherVotes)
    return replace(recipe, objective=replace(recipe.objective, policy=policy))


def prediction(recipe: Recipe) -> Recipe:
    objective = recipe.objective.plus(PredictionDistillation())
    return replace(recipe, objective=objective, sources=(*recipe.sources, PredictionQueries()))


def auxiliary(recipe: Recipe) -> Recipe:
    return replace(recipe, sources=(*recipe.sources, AuxiliaryQueries()))


ROWS: dict[str, tuple[str, tuple[Row, ...]]] = {
    "student alone (D-FINE)": ("dfine", ()),
    "+ logits": ("dfine", (logits,)),
    "+ features": ("dfine", (features,)),
    "+ query prior": ("dfine", (prior,)),
    "+ query prior, held to the answers": ("dfine", (prior_answers,)),
    "DETRDistill, all three": ("dfine", (PAPERS["detrdistill"],)),
    "+ matching (OD)": ("dfine", (matching,)),
    "+ prediction (OD)": ("dfine", (prediction,)),
    "+ auxiliary (OD)": ("dfine", (auxiliary,)),
    "OD-DETR, all three": ("dfine", (PAPERS["od-detr"],)),
    "OD-DETR, all three, quality focal": ("dfine", (PAPERS["od-detr-paper"],)),
    "student alone (DEIM)": ("deim", ()),
    "DEIM + OD-DETR": ("deim", (PAPERS["od-detr"],)),
    "DEIM + DETRDistill": ("deim", (PAPERS["detrdistill"],)),
    "DEIM + both": ("deim", (PAPERS["detrdistill"], PAPERS["od-detr"])),
}


def measure(args: argparse.Namespace, name: str, seed: int, data: Path, teacher: Path, start: Path) -> dict[str, float]:
    """One run of one row."""
    paper, parts = ROWS[name]
    recipe = student_recipe(args.steps, seed, paper)
    for part in parts:
        recipe = part(recipe)
    folder = args.out / "run"
    begun = time.monotonic()
    request = Request(data, recipe, folder, weights=start, device="cpu", overwrite=True, quiet=True)
    result = begin(replace(request, teacher=teacher if "frozen" in recipe.teachers else None))
    assert result.evaluation is not None
    seconds = time.monotonic() - begun
    shutil.rmtree(folder)
    return {"ap": result.evaluation.ap, "ap50": result.evaluation.ap50, "steps": result.steps, "seconds": seconds}


def table(done: dict[str, list[dict[str, float]]]) -> str:
    """Mean and spread (sample standard deviation) of every row that has a run."""
    lines = ["| row | seeds | AP | AP50 | s/step |", "|---|---|---|---|---|"]
    for name in ROWS:
        if not done.get(name):
            continue
        cells = []
        for key in ("ap", "ap50"):
            values = [run[key] for run in done[name]]
            spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.3f}{spread}")
        pace = statistics.median(run["seconds"] / run["steps"] for run in done[name])
        lines.append(f"| {name} | {len(done[name])} | {' | '.join(cells)} | {pace:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--teacher-minutes", type=float, default=18)
    parser.add_argument("--warm", type=int, default=750, help="steps of the student before the table")
    parser.add_argument("--steps", type=int, default=125, help="of every row, in whole epochs of 125")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--minutes", type=float, default=60, help="no run begins later")
    parser.add_argument("--rows", nargs="*", default=list(ROWS))
    args = parser.parse_args()
    begun = time.monotonic()
    torch.set_num_threads(1)
    keep_freed_memory()
    data = args.out / "drawings"
    if not data.is_dir():
        draw_dataset(data, train=TRAIN, val=VAL, size=(SIDE, SIDE), seed=0)
    folder = RunFolder(args.out / "teacher")
    if not folder.best_weights.is_file():
        begin(Request(data, teacher_recipe(60 * args.teacher_minutes), folder.root, device="cpu", overwrite=True))
    start = RunFolder(args.out / "student")
    if not start.best_weights.is_file():
        recipe = student_recipe(args.warm, 1000, "dfine")
        begin(Request(data, recipe, start.root, device="cpu", overwrite=True))
    note = args.out / f"table-{args.steps}.json"
    done: dict[str, list[dict[str, float]]] = json.loads(note.read_text()) if note.is_file() else {}
    for seed in range(args.seeds):
        for name in args.rows:
            if len(done.get(name, [])) > seed:
                continue
            if time.monotonic() - begun > 60 * args.minutes:
                print(table(done))
                return
            done.setdefault(name, []).append(measure(args, name, seed, data, folder.best_weights, start.best_weights))
            note.write_text(json.dumps(done, indent=1))
            print(name, seed, done[name][-1], flush=True)
    print(table(done))


if __name__ == "__main__":
    main()
