"""Some steps of a run whose norms are at rest; each process writes its losses and weights.

torchrun --nproc-per-node N -m tests.train.pair DATA OUT BATCH CASE
"""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finedetr.errors import Interrupted
from finedetr.recipes import PAPERS
from finedetr.supervise.terms import LocalizationDistillation
from finedetr.train.distributed import open_world
from finedetr.train.folder import RunFolder
from finedetr.train.log import Reporter
from finedetr.train.loop import Run
from finedetr.train.recipe import Teaching
from finedetr.train.session import Request, begin, open_data, resume
from tests.distill.small import weights_of
from tests.train.small import small_recipe


def stopped(data: str, out: str) -> None:
    """A run with evaluations that somebody stops by a signal to its last process alone, between two epochs."""
    from finedetr.train import loop

    real, rank = loop.evaluate_detector, int(os.environ["RANK"])

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        answer = real(*args, **kwargs)
        if rank:
            signal.raise_signal(signal.SIGINT)
        return answer

    loop.evaluate_detector = evaluate
    request = Request(Path(data), small_recipe(epochs=2), Path(out) / "run", device="cpu", quiet=True)
    try:
        begin(request)
    except Interrupted as error:
        torch.save({"losses": [], "model": {}, "said": error.hint}, Path(out) / f"stopped-2-{rank}.pt")


def resumed(out: str) -> None:
    """The same run to its end."""
    result, rank = resume(Path(out) / "run", device="cpu", quiet=True), int(os.environ["RANK"])
    torch.save({"losses": [], "model": {}, "epochs": result.epochs}, Path(out) / f"resumed-2-{rank}.pt")


def main(data: str, out: str, batch: str, case: str) -> None:
    torch.set_num_threads(1)
    match case:
        case "stopped":
            stopped(data, out)
        case "resumed":
            resumed(out)
        case _:
            steps(data, out, batch, case)


def steps(data: str, out: str, batch: str, case: str) -> None:
    """Some steps whose losses are kept."""
    recipe = small_recipe(epochs=1, batch=int(batch), precision="fp32")
    recipe = replace(recipe, augmentation=replace(recipe.augmentation, mixup=0.0), lr=1e-3)
    if case != "denoising":  # its noise differs from process to process
        # the balance of matched and unmatched queries is each process's own, as published
        objective = recipe.objective.without(LocalizationDistillation)
        recipe = replace(recipe, denoise=False, objective=objective)
    if case == "teachers":
        recipe = replace(recipe, teaching=Teaching(start=0.0, ramp=0.0))
        recipe = PAPERS["od-detr"](PAPERS["detrdistill"](recipe))
    with open_world("cpu") as world, Reporter(quiet=True) as reporter:
        folder = RunFolder(Path(out) / f"rank{world.rank}of{world.size}")
        folder.root.mkdir(parents=True)
        folder.write_json(folder.config, {})
        opened = replace(open_data(Path(data)), val=None)
        teacher = weights_of(folder.root, names=opened.train.categories.names) if case == "teachers" else None
        run = Run(recipe, opened, folder, world, reporter, teacher=teacher)
        if case == "poisoned" and world.rank == world.size - 1:
            _poison(run)
        norms = tuple(m for m in run.student.detector.modules() if isinstance(m, nn.BatchNorm2d))
        run.student = replace(run.student, frozen=norms)
        losses: list[dict[str, float]] = []
        run._tell = lambda report, rate, batch: losses.append(report.losses)  # type: ignore[method-assign]
        run.train()
        state: dict[str, Any] = {"losses": losses, "model": run.student.detector.state_dict()}
        if run.student.adapters is not None:
            state["model"] |= run.student.adapters.state_dict()
        torch.save(state, Path(out) / f"{case}-{world.size}-{world.rank}.pt")


def _poison(run: Run) -> None:
    """Makes a picture of this process's second batch no number."""
    healthy = run.on_device

    def poisoned(batch: Any, *, epoch: int, step: int) -> Any:
        images, targets = healthy(batch, epoch=epoch, step=step)
        return (images * (float("nan") if step == 1 else 1.0), targets)

    run.on_device = poisoned  # type: ignore[assignment]


if __name__ == "__main__":
    main(*sys.argv[1:])
