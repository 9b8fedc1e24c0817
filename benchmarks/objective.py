"""Time of matching and losses on the CPU, forward and backward, without a detector.

    python benchmarks/objective.py [--threads 2] [--targets 7] [--classes 80]

The sizes of one training step of D-FINE with three layers: five stages (encoder, initial box, three layers), a batch
of 8, 300 queries and the denoising queries that belong to so many targets.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from finedetr.geometry import bin_values
from finedetr.records import Edges, Output, Prediction, Targets
from finedetr.supervise.denoising import Denoising
from finedetr.supervise.matching import UnionOfStages
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import (
    BoxGIoU,
    BoxL1,
    FineGrainedLocalization,
    LocalizationDistillation,
    MatchabilityAware,
)


def median_ms(action: Callable[[], object], repeats: int) -> float:
    for _ in range(3):
        action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def answers(queries: int, args: argparse.Namespace, encoder: bool) -> tuple[Prediction, list[Tensor]]:
    """Random answers as a detector gives them at the start of a training, and their leaves."""
    names = ("encoder",) * encoder + ("initial", *(f"layer{i}" for i in range(args.layers)))
    shape = (len(names), args.batch, queries)
    logits = torch.randn(*shape, args.classes) - 4.6
    boxes = torch.rand(*shape, 4) * 0.4 + 0.3
    corners = torch.randn(args.layers, args.batch, queries, 4, 33)
    leaves = [logits.requires_grad_(), boxes.requires_grad_(), corners.requires_grad_()]
    return Prediction(logits, boxes, names, Edges(corners, boxes[0].detach(), bin_values(), 4.0)), leaves


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("threads", 2), ("batch", 8), ("queries", 300), ("classes", 80), ("targets", 7)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)

    targets = Targets.from_lists(
        [torch.randint(args.classes, (args.targets,)) for _ in range(args.batch)],
        [torch.rand(args.targets, 4) * 0.3 + 0.3 for _ in range(args.batch)],
    )
    denoise = Denoising()
    group = denoise(targets, args.classes)
    matching, leaves = answers(args.queries, args, encoder=True)
    noisy, more = answers(group.boxes.shape[1], args, encoder=False)
    output = Output(matching, ((group, noisy),))
    terms = (MatchabilityAware(), BoxL1(), BoxGIoU(), FineGrainedLocalization(), LocalizationDistillation())
    objective = Objective(terms)

    def step(objective: Objective = objective, backward: bool = True) -> None:
        losses = objective(output, targets)
        if backward:
            losses.total.backward()
            for leaf in (*leaves, *more):
                leaf.grad = None

    print(f"{platform.processor() or platform.machine()}, {args.threads} threads, torch {torch.__version__}")
    print(
        f"batch {args.batch}, {args.queries} queries + {group.boxes.shape[1]} denoising, {args.classes} classes, ",
        end="",
    )
    print(f"{args.layers + 2} stages, {args.targets} targets a picture; median of {args.repeats}, in milliseconds")
    rows = [
        ("denoising queries", lambda: denoise(targets, args.classes)),
        ("matching and union", lambda: UnionOfStages()(matching, targets)),
        ("objective, forward", lambda: step(backward=False)),
        ("objective, forward and backward", step),
    ]
    for term in terms:
        alone = Objective((term,))
        rows.append((f"  with {type(term).__name__} alone", lambda alone=alone: step(alone)))
    for name, action in rows:
        print(f"{name:44}{median_ms(action, args.repeats):8.2f}")


if __name__ == "__main__":
    main()
