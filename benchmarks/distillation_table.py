"""What each part of DETRDistill and OD-DETR is worth at equal steps of the student.

    python -m benchmarks.distillation_table --out FOLDER [--data drawings --warm 750 --steps 125 --seeds 3]
    python -m benchmarks.distillation_table --out FOLDER --data ../shared/data/dice --size 320 320 --teacher RUN \
        --crop .6 --quarter-turns .75 --warm 1000 --steps 200 --precision bf16
    python -m benchmarks.distillation_table --out FOLDER --start random --steps 750 --rows alone detrdistill od-detr
    python -m benchmarks.distillation_table --list

Trains a teacher (once for a data set, or takes `--teacher`) and a smaller student alone (once, or takes `--start`;
`--start random`: every row begins with random weights of its seed). From that student on, every row goes on for equal
steps, with one seed after the other: round by round, so that a table that is stopped has as many seeds of one row as
of another. Processes with rows of their own may share FOLDER once its teacher and student are there. Every run is what
`finedetr train` does; what counts is AP of the moving average after the last step. Each run is added to
FOLDER/runs.json when it ends, and the same command goes on where it stopped. The table is also written to
FOLDER/table.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finedetr.cli.demo import demo_recipe
from finedetr.data.drawing import draw_dataset
from finedetr.data.formats import open_dataset
from finedetr.distill.matching import TeacherVotes
from finedetr.distill.queries import AuxiliaryQueries, PredictionQueries, QueryPrior
from finedetr.distill.terms import FeatureDistillation, LogitsDistillation, PredictionDistillation
from finedetr.kernels.process import prepare_cpu
from finedetr.model.zoo import variant
from finedetr.recipes import PAPERS, build
from finedetr.supervise.terms import MatchabilityAware, Term, Varifocal
from finedetr.train.folder import RunFolder, find_weights
from finedetr.train.recipe import Recipe
from finedetr.train.session import Request, begin

SIDE, TRAIN, VAL = 128, 1000, 200  # of the drawings
Row = Callable[[Recipe], Recipe]


def adding(*terms: Term) -> Row:
    return lambda recipe: replace(recipe, objective=recipe.objective.plus(*terms))


def classes_x4(recipe: Recipe) -> Recipe:
    """A teacher's classes weigh as much beside its boxes as the table's own class loss does."""
    return replace(recipe, objective=recipe.objective.swap(LogitsDistillation, LogitsDistillation(label=4.0)))


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


JOINT = LogitsDistillation(pairing="joint", top=0, weighting="uniform", normalizer="queries")
LOGITS, FEATURES = adding(LogitsDistillation()), adding(FeatureDistillation(weight=5.0))
ROWS: dict[str, tuple[str, str, tuple[Row, ...]]] = {  # key: what the table says, the recipe, what is put on top
    "alone": ("student alone (D-FINE)", "dfine", ()),
    "logits": ("+ logits", "dfine", (LOGITS,)),
    "logits-no-edges": ("+ logits, no edges", "dfine", (adding(LogitsDistillation(edges=0.0)),)),
    "logits-t5": ("+ logits, edges at T = 5", "dfine", (adding(LogitsDistillation(temperature=5.0)),)),
    "logits-classes": ("+ logits, classes x 4", "dfine", (adding(LogitsDistillation(label=4.0)),)),  # as Varifocal here
    "logits-labels": (
        "+ logits, classes alone x 4",
        "dfine",
        (adding(LogitsDistillation(label=4.0, l1=0.0, giou=0.0, edges=0.0)),),
    ),
    "logits-joint": ("+ logits, joint (released)", "dfine", (adding(JOINT),)),
    "features": ("+ features", "dfine", (FEATURES,)),
    "features-x4": ("+ features, weight x 4", "dfine", (adding(FeatureDistillation(weight=20.0)),)),
    "prior": ("+ query prior", "dfine", (prior,)),
    "prior-answers": ("+ query prior, held to the answers", "dfine", (prior_answers,)),
    "logits-features": ("+ logits, features", "dfine", (LOGITS, FEATURES)),
    "detrdistill": ("DETRDistill, all three", "dfine", (PAPERS["detrdistill"],)),
    "detrdistill-classes": ("DETRDistill, classes of the logits x 4", "dfine", (PAPERS["detrdistill"], classes_x4)),
    "matching": ("+ matching (OD)", "dfine", (matching,)),
    "prediction": ("+ prediction (OD)", "dfine", (prediction,)),
    "auxiliary": ("+ auxiliary (OD)", "dfine", (auxiliary,)),
    "od-detr": ("OD-DETR, all three", "dfine", (PAPERS["od-detr"],)),
    "od-detr-paper": ("OD-DETR, all three, quality focal", "dfine", (PAPERS["od-detr-paper"],)),
    "deim": ("student alone (DEIM)", "deim", ()),
    "deim-od-detr": ("DEIM + OD-DETR", "deim", (PAPERS["od-detr"],)),
    "deim-detrdistill": ("DEIM + DETRDistill", "deim", (PAPERS["detrdistill"],)),
    "deim-both": ("DEIM + both", "deim", (PAPERS["detrdistill"], PAPERS["od-detr"])),
}


@dataclass(frozen=True)
class Bench:
    """One data set with its teacher, its student and the runs that are done."""

    args: argparse.Namespace
    data: Path
    per_epoch: int  # steps

    @property
    def folder(self) -> Path:
        """Of this data set."""
        return Path(self.args.out) / (self.data.name if self.data.is_dir() else self.data.stem)

    def teacher_recipe(self, seconds: float) -> Recipe:
        """The demo's detector with a third layer, or `--teacher-model`, for as long as it may take."""
        recipe = self._settings(demo_recipe(seconds), self.args.teacher_model)
        if not self.args.teacher_model:
            model = replace(recipe.model, decoder=replace(recipe.model.decoder, layers=3))
            recipe = replace(recipe, model=model)
        return replace(recipe, epochs=200, evaluating=replace(recipe.evaluating, every=10))

    def student_recipe(self, steps: int, seed: int, paper: str) -> Recipe:
        """Half as wide and two layers deep, or `--model`; D-FINE's or DEIM's losses, the demo's settings."""
        demo = self._settings(demo_recipe(0), self.args.model)
        model = demo.model
        if not self.args.model:
            model = replace(
                model,
                encoder=replace(model.encoder, width=64, feedforward=256),
                decoder=replace(model.decoder, width=64, feedforward=256),
            )
        recipe = build(model, paper, random_start=True)
        heavy = Varifocal if paper == "dfine" else MatchabilityAware
        return replace(
            demo,
            name=recipe.name,
            model=model if self.args.model else recipe.model,
            objective=recipe.objective.with_weights({heavy.__name__: 4.0}),
            epochs=-(-steps // self.per_epoch),
            max_time=0.0,
            seed=seed,
            schedule=replace(demo.schedule, curve="flat-cosine", flat=0.5, plain=0.9),
            evaluating=replace(demo.evaluating, every=1000),
            teaching=replace(recipe.teaching, watch=0),
        )

    def _settings(self, demo: Recipe, model: str | None) -> Recipe:
        args = self.args
        return replace(
            demo,
            model=variant(model) if model else demo.model,
            size=tuple(args.size),
            batch=args.batch,
            lr=args.lr,
            workers=args.workers,
            precision=args.precision,
            augmentation=replace(demo.augmentation, crop=args.crop, quarter_turns=args.quarter_turns),
        )

    def weights(self, given: str | None, name: str, recipe: Callable[[], Recipe]) -> Path:
        """Those that the user gave, or of a run that is done here once."""
        if given:
            return find_weights(given)
        run = RunFolder(self.folder / name)
        if not run.best_weights.is_file():
            begin(Request(self.data, recipe(), run.root, device=self.args.device, overwrite=True))
        return run.best_weights

    def measure(self, row: str, seed: int, teacher: Path, start: Path | None) -> dict[str, Any]:
        """One run of one row."""
        _, paper, parts = ROWS[row]
        recipe = self.student_recipe(self.args.steps, seed, paper)
        for part in parts:
            recipe = part(recipe)
        folder, begun = self.folder / f"run-{row}-{seed}", time.monotonic()
        request = Request(self.data, recipe, folder, weights=start, device=self.args.device, overwrite=True, quiet=True)
        result = begin(replace(request, teacher=teacher if "frozen" in recipe.teachers else None))
        assert result.evaluation is not None
        shutil.rmtree(folder)
        return {
            **{"data": self.folder.name, "row": row, "seed": seed, "steps": self.args.steps, "start": str(start)},
            **{"model": recipe.model.name, "teacher": str(teacher)},
            **{"ap": result.evaluation.ap, "ap50": result.evaluation.ap50},
            "seconds_a_step": (time.monotonic() - begun) / result.steps,
        }


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and spread (sample standard deviation) of every row that has a run, for each data set and length."""
    lines = []
    for data, steps, start in sorted({(run["data"], run["steps"], run["start"]) for run in runs}):
        lines += [
            f"{data}, {steps} steps from {'random weights' if start == 'None' else start}",
            "",
            "| row | seeds | AP | AP50 | against alone | s/step |",
        ]
        lines.append("|---|---|---|---|---|---|")
        here = [run for run in runs if (run["data"], run["steps"], run["start"]) == (data, steps, start)]
        for key, (title, paper, parts) in ROWS.items():
            own = [run for run in here if run["row"] == key]
            if not own:
                continue
            alone = {run["seed"]: run["ap"] for run in here if run["row"] == ("alone" if paper == "dfine" else "deim")}
            gains = [run["ap"] - alone[run["seed"]] for run in own if run["seed"] in alone]
            against = f"{statistics.mean(gains):+.3f}" if gains and parts else ""
            pace = statistics.median(run["seconds_a_step"] for run in own)
            cells = [_spread([run[name] for run in own]) for name in ("ap", "ap50")]
            lines.append(f"| {title} | {len(own)} | {' | '.join(cells)} | {against} | {pace:.2f} |")
        lines.append("")
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.3f}" + (f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else "")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/distillation"))
    parser.add_argument("--data", default="drawings", help="drawings, or a data set")
    parser.add_argument("--size", type=int, nargs=2, default=(SIDE, SIDE), metavar=("H", "W"))
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--warm", type=int, default=750, help="steps of the student before the table")
    parser.add_argument("--steps", type=int, default=125, help="of every row, rounded up to whole epochs")
    parser.add_argument("--teacher", help="weights; unset: trained here")
    parser.add_argument("--teacher-minutes", type=float, default=18)
    parser.add_argument("--teacher-model", help="of the table of models; unset: the demo's with a third layer")
    parser.add_argument("--start", help="weights that all rows begin with, or random; unset: trained here")
    parser.add_argument("--crop", type=float, default=0.0, help="share of pictures that are cropped")
    parser.add_argument("--quarter-turns", type=float, default=0.0, help="share of pictures that are turned")
    parser.add_argument("--model", help="the student, of the table of models; unset: half of the demo's")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--minutes", type=float, default=60, help="no run begins later")
    parser.add_argument("--list", action="store_true", help="say which rows there are")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.list:
        print("\n".join(f"{key:20} {title}" for key, (title, *_) in ROWS.items()))
        return
    begun = time.monotonic()
    if args.device == "cpu":
        torch.set_num_threads(1)
        prepare_cpu()
    data = Path(args.data)
    if args.data == "drawings":
        data = args.out / "drawings"
        if not data.is_dir():
            draw_dataset(data, train=TRAIN, val=VAL, size=(SIDE, SIDE), seed=0)
    bench = Bench(args, data, max(len(open_dataset(data, "train")) // args.batch, 1))
    teacher = bench.weights(args.teacher, "teacher", lambda: bench.teacher_recipe(60 * args.teacher_minutes))
    start = None
    if args.start != "random":
        start = bench.weights(args.start, "student", lambda: bench.student_recipe(args.warm, 1000, "dfine"))
    note = args.out / "runs.json"

    def done() -> list[dict[str, Any]]:
        runs = json.loads(note.read_text()) if note.is_file() else []
        return [{"start": "not noted", **run} for run in runs]  # older files do not say it

    place = {"data": bench.folder.name, "steps": args.steps, "start": str(start)}
    for seed in range(args.seeds):
        for row in args.rows:
            wanted = {**place, "row": row, "seed": seed}
            if any(wanted.items() <= run.items() for run in done()):
                continue
            if time.monotonic() - begun > 60 * args.minutes:
                return
            run = bench.measure(row, seed, teacher, start)
            runs = [*done(), run]  # read again: another process may have added its own
            note.write_text(json.dumps(runs, indent=1))
            (args.out / "table.md").write_text(table(runs))
            print(run, flush=True)
    print(table(done()))


if __name__ == "__main__":
    main()
