"""A run of a few seconds: real pictures, a real detector, all parts of the loop. Also a program, to be killed.

    python -m tests.train.small KILLS DATA OUT

forks a child for each kill point of KILLS (comma separated), which starts or resumes the run in OUT and is killed by
SIGKILL there; a last child runs to the end. A kill point is a step of this process ("3"), "save:N" (the N-th state is
written, but not yet in place), "eval:N" (after the N-th evaluation) or "commit:N" (the N-th state is in place).
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finedetr.data.drawing import draw_dataset
from finedetr.recipes import build
from finedetr.train.recipe import Recipe
from tests.train.tiny import TINY

if TYPE_CHECKING:  # the program that is killed needs none
    import pytest


def draw(folder: Path, train: int = 12, val: int = 3) -> Path:
    return draw_dataset(folder, train=train, val=val, size=(64, 64))


def small_recipe(**changes: Any) -> Recipe:
    recipe = build(TINY, random_start=True)
    recipe = replace(
        recipe,
        size=(64, 64),
        epochs=3,
        batch=4,
        workers=0,
        log_every=1,
        schedule=replace(recipe.schedule, start=0.0, flat=0.34, plain=0.67),
        saving=replace(recipe.saving, steps=2),
    )
    return replace(recipe, **changes)


def stop_after(monkeypatch: pytest.MonkeyPatch, steps: int, number: signal.Signals = signal.SIGINT) -> None:
    """Somebody stops the run of a test right after so many steps."""
    from finedetr.train import loop

    real = loop.Run._tell

    def tell(self: loop.Run, *args: Any) -> None:
        real(self, *args)
        if self.progress.total == steps:
            signal.raise_signal(number)

    monkeypatch.setattr(loop.Run, "_tell", tell)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arm(point: str) -> None:
    """Puts a kill into this process."""
    from finedetr.train import checkpoint, loop

    kind, _, number = point.rpartition(":")
    left = int(number)

    def count_down(original: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left <= 0 and before:
                die()
            answer = original(*args, **kwargs)
            if left <= 0:
                die()
            return answer

        return wrapped

    match kind:
        case "":
            loop.Run._tell = count_down(loop.Run._tell, before=False)  # type: ignore[method-assign]
        case "save":  # the temporary file is written, but not yet in place
            checkpoint._check_readable = count_down(checkpoint._check_readable, before=False)
        case "commit":
            loop.Run._save = count_down(loop.Run._save, before=False)  # type: ignore[method-assign]
        case "eval":
            loop.evaluate_detector = count_down(loop.evaluate_detector, before=False)
        case _:
            raise ValueError(point)


def main(points: str, data: str, out: str) -> int:
    import torch

    from finedetr.train.session import Request, begin, resume

    torch.set_num_threads(1)
    for point in [*filter(None, points.split(",")), ""]:
        child = os.fork()
        if child == 0:
            if point:
                arm(point)
            if (Path(out) / "checkpoints" / "last.pt").is_file():
                resume(Path(out), device="cpu", quiet=True)
            else:
                begin(Request(Path(data), small_recipe(), Path(out), device="cpu", quiet=True, overwrite=True))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        finished = os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0
        print(point or "end", "killed" if killed else status, flush=True)
        if not (killed or finished):
            return 1
        if finished:
            break
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
