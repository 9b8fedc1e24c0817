"""Time of one whole training step beside `transformers`: forward, matching, losses, backward, AdamW, and our EMA.

    python -m benchmarks.training_step [--model dfine-n --size 256 --batch 8 --rounds 12]

The contenders take turns, step by step, on the same batch in the same process, so that a machine that speeds up or
slows down does so for all of them. `transformers` runs its own loss and AdamW, as its users would; it keeps no moving
average. Each runs in float32 and under bfloat16 autocast. Writes `benchmarks/results/training_step-DEVICE.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tests.model.oracle import transformers_detector

from finedetr.kernels.library import state
from finedetr.kernels.process import prepare_cpu, settled
from finedetr.model.detector import Detector
from finedetr.model.zoo import variant
from finedetr.records import Targets
from finedetr.supervise.denoising import Denoising
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import (
    BoxGIoU,
    BoxL1,
    FineGrainedLocalization,
    LocalizationDistillation,
    Varifocal,
)
from finedetr.train.ema import MovingAverage
from finedetr.train.optimizer import adamw, parameter_groups
from finedetr.train.step import Precision, step

Step = Callable[[], float]


def truth(batch: int, per_picture: int, classes: int, device: str) -> Targets:
    """Random boxes of middling size."""
    generator = torch.Generator().manual_seed(0)
    center = 0.15 + 0.7 * torch.rand(batch, per_picture, 2, generator=generator)
    size = 0.05 + 0.2 * torch.rand(batch, per_picture, 2, generator=generator)
    labels = torch.randint(0, classes, (batch, per_picture), generator=generator)
    return Targets.from_lists(list(labels), list(torch.cat((center, size), dim=-1))).to(device)


def ours(args: argparse.Namespace, images: torch.Tensor, targets: Targets, precision: str, compiled: bool) -> Step:
    """A step of finedetr, as `finedetr train --recipe dfine` does it."""
    torch.manual_seed(0)
    detector = Detector(variant(args.model), args.classes).to(args.device, memory_format=torch.channels_last).train()
    optimizer = adamw(parameter_groups(detector, lr=1e-4, weight_decay=1e-4))
    average = MovingAverage(detector)
    student = torch.compile(detector) if compiled else detector
    objective = Objective((Varifocal(), BoxL1(), BoxGIoU(), FineGrainedLocalization(), LocalizationDistillation()))
    denoising = Denoising()
    context = Precision(precision, torch.device(args.device))
    images = images.to(memory_format=torch.channels_last)
    trainable = [p for p in detector.parameters() if p.requires_grad]

    def one() -> float:
        sources = (lambda t, _: denoising(t, args.classes),)
        losses = step(student, images, targets, sources, objective, context)
        total = losses.total
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 0.1)
        optimizer.step()
        average.update()
        return total.item()

    return one


def theirs(args: argparse.Namespace, images: torch.Tensor, targets: Targets, precision: str) -> Step:
    """A step of transformers with its own loss."""
    torch.manual_seed(0)
    detector = transformers_detector(variant(args.model), args.classes).to(args.device).train()
    optimizer = torch.optim.AdamW(detector.parameters(), lr=1e-4, weight_decay=1e-4)
    context = Precision(precision, torch.device(args.device))
    labels = [
        {"class_labels": labels, "boxes": boxes}
        for labels, boxes in zip(targets.labels.split(targets.counts), targets.boxes.split(targets.counts), strict=True)
    ]

    def one() -> float:
        with context.forward():
            total = detector(pixel_values=images, labels=labels).loss
        optimizer.zero_grad()
        total.backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 0.1)
        optimizer.step()
        return total.item()

    return one


def main() -> None:
    """Prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="dfine-n")
    for name, default in (("size", 256), ("batch", 8), ("classes", 80), ("targets", 7), ("rounds", 12), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="add a compiled contender (takes minutes to build)")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.device == "cpu":
        prepare_cpu()  # as `finedetr train` does; here it speeds up all contenders
    images = torch.rand(args.batch, 3, args.size, args.size, device=args.device)
    targets = truth(args.batch, args.targets, args.classes, args.device)
    contenders: dict[str, Step] = {
        "transformers fp32": theirs(args, images, targets, "fp32"),
        "transformers bf16": theirs(args, images, targets, "bf16"),
        "finedetr fp32": ours(args, images, targets, "fp32", False),
        "finedetr bf16": ours(args, images, targets, "bf16", False),
    }
    if args.compile:
        contenders["finedetr fp32 compiled"] = ours(args, images, targets, "fp32", True)
        contenders["finedetr bf16 compiled"] = ours(args, images, targets, "bf16", True)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    with settled():  # likewise
        for index in range(args.rounds + 4):
            for name, one in contenders.items():
                start = time.perf_counter()
                one()
                if args.device == "cuda":
                    torch.cuda.synchronize()
                if index >= 4:
                    times[name].append(time.perf_counter() - start)
    rows = {name: {"median_s": statistics.median(t), "min_s": min(t)} for name, t in times.items()}
    base = rows["transformers fp32"]
    for name, row in rows.items():
        row["times_faster_median"] = base["median_s"] / row["median_s"]
        row["times_faster_min"] = base["min_s"] / row["min_s"]
        print(
            f"{name:24s} median {row['median_s']:.3f} s  min {row['min_s']:.3f} s  "
            f"{row['times_faster_median']:.2f}x (median) {row['times_faster_min']:.2f}x (min)"
        )
    hardware = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()}, {args.threads} threads"
    )
    document = {
        "command": f"python -m benchmarks.training_step --model {args.model} --size {args.size} --batch {args.batch}",
        "hardware": hardware,
        "torch": torch.__version__,
        "kernels": state(),
        "rows": rows,
    }
    args.results.mkdir(exist_ok=True)
    path = args.results / f"training_step-{args.device}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
