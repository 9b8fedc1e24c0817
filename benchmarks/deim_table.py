"""With and without DEIM under equal time: its loss alone, its dense pictures alone, both, neither.

    python -m benchmarks.deim_table [--data FOLDER] [--minutes 6 --seeds 3 --jobs 2]

The model and the other settings are the demo's; without `--data` it draws 400 pictures. Each row is trained from random
weights on one thread for the same time, with `--jobs` of them side by side, and is evaluated on the same pictures.
Prints the table, and writes it to `benchmarks/results/deim_table_DATE_HARDWARE_MINUTESmin.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

ROWS = {  # the class loss, and the chance of a dense picture
    "neither": ("Varifocal", 0.0),
    "matchability-aware loss": ("MatchabilityAware", 0.0),
    "dense one-to-one": ("Varifocal", 0.5),
    "DEIM: both": ("MatchabilityAware", 0.5),
}


def one(row: str, seed: int, data: Path, out: Path, seconds: float) -> dict[str, Any]:
    """Trains one row with one seed."""
    from finedetr.cli.demo import demo_recipe
    from finedetr.supervise.terms import MatchabilityAware, Varifocal
    from finedetr.train.session import Request, begin

    loss, dense = ROWS[row]
    recipe = demo_recipe(seconds)
    if loss == "Varifocal":
        recipe = replace(recipe, objective=recipe.objective.swap(MatchabilityAware, Varifocal(weight=4.0)))
    recipe = replace(
        recipe,
        seed=seed,
        workers=0,
        augmentation=replace(recipe.augmentation, mosaic=dense, mixup=dense, crop=0.2),
        schedule=replace(recipe.schedule, long_steps=0),  # all of it, however short the run: that is the question
    )
    result = begin(Request(data, recipe, out, device="cpu", overwrite=True, quiet=True))
    assert result.evaluation is not None
    found = result.evaluation
    return {"row": row, "seed": seed, "AP": found.ap, "AP50": found.ap50, "steps": result.steps}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--one", nargs=3, metavar=("ROW", "SEED", "OUT"), help="what the script starts itself with")
    args = parser.parse_args()
    if args.one:
        row, seed, out = args.one
        print(json.dumps(one(row, int(seed), args.data, Path(out), args.minutes * 60)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        data = args.data or draw(Path(scratch) / "drawings")
        jobs = [(row, seed) for seed in range(args.seeds) for row in ROWS]
        with ThreadPoolExecutor(args.jobs) as pool:
            found = list(pool.map(lambda job: start(*job, data, Path(scratch), args.minutes), jobs))
    print(f"written to {write(args, found)}", file=sys.stderr)
    print("| | AP (seeds; mean) | AP50 (mean) | steps |\n|---|---|---|---|")
    for row in ROWS:
        mine = [run for run in found if run["row"] == row]
        values, mean = " ".join(f"{run['AP']:.3f}" for run in mine), statistics.mean(run["AP"] for run in mine)
        half, steps = statistics.mean(run["AP50"] for run in mine), statistics.mean(run["steps"] for run in mine)
        print(f"| {row} | {values}; **{mean:.3f}** | {half:.3f} | {steps:.0f} |")


def write(args: argparse.Namespace, found: list[dict[str, Any]]) -> Path:
    """The runs, and where, when and on what they were made; a run of another length has a file of its own."""
    import torch

    from finedetr import __version__

    words = f"--minutes {args.minutes:g} --seeds {args.seeds} --jobs {args.jobs}"
    document = {
        "benchmark": "deim_table",
        "command": f"python -m benchmarks.deim_table {words}" + (f" --data {args.data.name}" if args.data else ""),
        "date": date.today().isoformat(),
        "hardware": f"{platform.machine()}, {args.jobs} processes of 1 thread",
        "torch": torch.__version__,
        "finedetr": __version__,
        "minutes": args.minutes,
        "runs": found,
    }
    args.results.mkdir(exist_ok=True)
    path = args.results / f"deim_table_{document['date']}_{platform.machine()}_{args.minutes:g}min.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return path


def draw(folder: Path) -> Path:
    """The drawings on which the rows are compared."""
    from finedetr.data.drawing import draw_dataset

    draw_dataset(folder, train=400, val=100, size=(128, 128), seed=0)
    return folder


def start(row: str, seed: int, data: Path, scratch: Path, minutes: float) -> dict[str, Any]:
    """One row in a process of its own, with one thread."""
    import os

    words = ["--data", str(data), "--minutes", str(minutes), "--one", row, str(seed), str(scratch / f"{row}-{seed}")]
    command = [sys.executable, "-m", "benchmarks.deim_table", *words]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    print(found, file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
