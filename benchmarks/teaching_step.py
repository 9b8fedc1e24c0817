"""What a teacher costs: a training step alone, with each part of DETRDistill faithful and fast, and with OD-DETR.

    python -m benchmarks.teaching_step [--student dfine-n --teacher dfine-s --size 256 --batch 4 --rounds 8]

The contenders take turns, step by step, on the same batch in the same process, each with detectors of its own from the
same random weights. A step is forward, losses, backward, AdamW and the moving average. The teacher's forward pass is
timed inside of the step; what is left is what matching, losses and extra queries add. Writes
`benchmarks/results/teaching_step-cpu.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.training_step import truth
from finedetr.distill.teachers import Teacher, Teachers, build_adapters
from finedetr.distill.terms import FeatureDistillation, LogitsDistillation
from finedetr.kernels.process import prepare_cpu
from finedetr.model.deploy import fold_norms
from finedetr.model.detector import Detector
from finedetr.model.zoo import variant
from finedetr.recipes import PAPERS, build
from finedetr.records import Guidance, QueryGroup, Targets
from finedetr.train.ema import MovingAverage
from finedetr.train.optimizer import adamw, parameter_groups
from finedetr.train.recipe import Recipe
from finedetr.train.step import Precision, step

JOINT = LogitsDistillation(pairing="joint", top=0, weighting="uniform", normalizer="queries")


def adding(recipe: Recipe, *terms: LogitsDistillation | FeatureDistillation) -> Recipe:
    return replace(recipe, objective=recipe.objective.plus(*terms))


ROWS: dict[str, Callable[[Recipe], Recipe]] = {
    "alone": lambda recipe: recipe,
    "logits, joint (released)": lambda recipe: adding(recipe, JOINT),
    "logits, split (paper)": lambda recipe: adding(recipe, LogitsDistillation(pairing="split", top=0)),
    "logits, common, top 100": lambda recipe: adding(recipe, LogitsDistillation()),
    "logits, by token": lambda recipe: adding(recipe, LogitsDistillation(pairing="token")),
    "features": lambda recipe: adding(recipe, FeatureDistillation()),
    "query prior": lambda recipe: replace(recipe, sources=PAPERS["detrdistill"](recipe).sources),
    "DETRDistill": PAPERS["detrdistill"],
    "OD-DETR": PAPERS["od-detr"],
}


@dataclass
class Contender:
    """A step, and the teachers that take part in it."""

    one: Callable[[], None]
    teachers: Teachers | None


def contender(args: argparse.Namespace, recipe: Recipe, images: torch.Tensor, targets: Targets) -> Contender:
    torch.manual_seed(0)
    detector = Detector(recipe.model, args.classes).to(memory_format=torch.channels_last).train()
    average, teachers = MovingAverage(detector), None
    trainable = [p for p in detector.parameters() if p.requires_grad]
    groups = parameter_groups(detector, lr=1e-4, weight_decay=1e-4)
    if recipe.teachers:
        teachers = Teachers()
        if "average" in recipe.teachers:
            teachers.average = Teacher(average.model)
        if "frozen" in recipe.teachers:
            other = Detector(variant(args.teacher), args.classes).to(memory_format=torch.channels_last)
            teachers.frozen = Teacher(fold_norms(other.eval()))
            teachers.adapters = build_adapters(recipe.objective.terms, detector, other)
            if list(teachers.adapters.parameters()):
                groups.append({"params": list(teachers.adapters.parameters())})
    optimizer = adamw(groups)
    precision = Precision(args.precision, torch.device("cpu"))

    def denoising(targets: Targets, _: Guidance | None) -> QueryGroup:
        return recipe.denoising(targets, args.classes)

    sources = (denoising, *(partial(source, student=recipe.model) for source in recipe.sources))

    def one() -> None:
        losses = step(detector, images, targets, sources, recipe.objective, precision, teachers)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.1)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    return Contender(one, teachers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--student", default="dfine-n")
    parser.add_argument("--teacher", default="dfine-s")
    for name, default in (("size", 256), ("batch", 4), ("classes", 80), ("targets", 7), ("rounds", 8), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    prepare_cpu()
    images = torch.rand(args.batch, 3, args.size, args.size).to(memory_format=torch.channels_last)
    targets = truth(args.batch, args.targets, args.classes, "cpu")
    base = build(variant(args.student), "dfine", random_start=True)
    contenders = {name: contender(args, row(base), images, targets) for name, row in ROWS.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    asked: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(args.rounds + 2):
        for name, each in contenders.items():
            teachers = each.teachers
            before = teachers.seconds if teachers else 0.0
            # of this process: what others do on the machine does not count
            start, clock = time.process_time(), time.perf_counter()
            each.one()
            seconds, share = time.process_time() - start, time.perf_counter() - clock
            if index >= 2:
                times[name].append(seconds)
                asked[name].append((teachers.seconds - before) * seconds / share if teachers else 0.0)
    alone = statistics.median(times["alone"])
    rows = {}
    for name in contenders:
        median, teacher = statistics.median(times[name]), statistics.median(asked[name])
        rest = median - teacher
        rows[name] = {
            "step_s": median,
            "teacher_s": teacher,
            "over_alone": median / alone - 1,
            "without_forward_over_alone": rest / alone - 1,
            "over_alone_and_forward": median / (alone + teacher) - 1,
        }
        print(
            f"{name:26s} {median:.3f} s  teacher {teacher:.3f} s  whole step {median / alone - 1:+.0%}  "
            f"beyond the teacher's forward {rest / alone - 1:+.0%} of the step alone, "
            f"{median / (alone + teacher) - 1:+.0%} of step and forward"
        )
    document = {
        "command": f"python -m benchmarks.teaching_step --size {args.size} --batch {args.batch}",
        "hardware": f"{platform.machine()}, {args.threads} thread(s)",
        "torch": torch.__version__,
        "rows": rows,
    }
    args.results.mkdir(exist_ok=True)
    path = args.results / "teaching_step-cpu.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
