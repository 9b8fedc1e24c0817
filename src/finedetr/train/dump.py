"""A batch whose loss or gradient was not finite, with all that is needed to look at it and to do its step again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finedetr.errors import DivergedError, ModelError
from finedetr.model.detector import Detector
from finedetr.records import Targets
from finedetr.train.build import freeze
from finedetr.train.checkpoint import load_state, save_state
from finedetr.train.config import from_dict, to_dict
from finedetr.train.recipe import Recipe
from finedetr.train.step import Precision, sources_of, step

__all__ = ["Dump", "Replay"]


@dataclass(frozen=True)
class Replay:
    """What the step of a dump gives when it is done again, in fp32 on the CPU and in one part."""

    losses: dict[str, float]  # those that are not finite
    gradient: float  # its norm
    first: str | None  # the first module whose answer was not finite
    weights: tuple[str, ...]  # parameters and statistics that were not finite before the step
    largest: tuple[str, float]  # the parameter with the largest number, and its size: after a rate too high, huge


@dataclass(frozen=True)
class Dump:
    """One batch as the detector got it, the weights before its step, and its place in the run.

    >>> dump = Dump.load("runs/a/nan_batch.pt")  # doctest: +SKIP
    >>> dump.pictures, dump.losses, dump.replay().first  # doctest: +SKIP

    The command `finedetr info runs/a/nan_batch.pt` says the same. Loading runs no code of the file.
    """

    recipe: Recipe
    classes: tuple[str, ...]
    place: Mapping[str, int]  # epoch, step of it and rank, from 0; total: steps before this one; epochs: planned
    images: Float[Tensor, "B 3 H W"]
    targets: Targets
    pictures: tuple[str, ...]
    message: str
    losses: Mapping[str, float]  # those that were not finite; none where it was the gradient
    model: Mapping[str, Tensor]

    def save(self, path: Path) -> Path:
        """Writes plain values and tensors, atomically."""
        targets = {name: getattr(self.targets, name) for name in ("labels", "boxes", "image", "counts", "annotated")}
        return save_state(
            path,
            {
                "dump": {
                    "recipe": to_dict(self.recipe),
                    "classes": self.classes,
                    "place": dict(self.place),
                    "images": self.images,
                    "targets": targets,
                    "pictures": self.pictures,
                    "message": self.message,
                    "losses": dict(self.losses),
                    "model": dict(self.model),
                }
            },
        )

    @classmethod
    def load(cls, path: str | Path) -> Dump:
        """Reads what `save` wrote, onto the CPU.

        Raises:
            ModelError: The file is absent, damaged or something else.
        """
        content: Any = load_state(path).get("dump")
        if not isinstance(content, dict):
            raise ModelError(f"{path} is no dump of a batch", code="schema", hint="A run names it nan_batch.pt.")
        try:
            values = {**content, "recipe": from_dict(content["recipe"], str(path))}
            return cls(**{**values, "targets": Targets(**content["targets"])})
        except (KeyError, TypeError) as error:
            raise ModelError(f"{path} is a dump of another version: {error}", code="schema") from error

    def replay(self) -> Replay:
        """Does the step again, up to the gradient, without what a teacher said.

        The arithmetic may differ from that of a run in half precision or on a GPU, and with it the outcome.
        """
        cpu = torch.device("cpu")
        detector = Detector(self.recipe.model, len(self.classes))
        try:
            detector.load_state_dict(dict(self.model))
        except RuntimeError as error:
            raise ModelError(f"the weights of the dump do not fit its recipe: {error}", code="mismatch") from error
        bad = tuple(name for name, tensor in self.model.items() if not tensor.isfinite().all())
        sizes = {name: float(parameter.detach().abs().max()) for name, parameter in detector.named_parameters()}
        still = freeze(detector, self.recipe)
        detector.train()
        for module in still:
            module.eval()
        place = {name: self.place[name] for name in ("epoch", "step", "rank")}
        sources = sources_of(self.recipe, len(self.classes), device=cpu, **place)
        seen = _watch(detector)
        objective = self.recipe.objective_at(self.place["epoch"], self.place["epochs"])
        losses = step(detector, self.images, self.targets, sources, objective, Precision("fp32", cpu))
        losses.total.backward()
        largest = max(sizes.items(), key=lambda size: size[1])
        gradients = [p.grad.norm() for p in detector.parameters() if p.grad is not None]
        try:
            losses.by_name(self.pictures)
            faults: dict[str, float] = {}
        except DivergedError as error:
            faults = error.losses
        return Replay(faults, float(torch.stack(gradients).norm()), seen[0] if seen else None, bad, largest)


def _watch(detector: nn.Module) -> list[str]:
    """A list that the names of modules enter in the order in which they give an answer that is not finite."""
    seen: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, given: Any, answer: Any) -> None:
            if isinstance(answer, Tensor) and not answer.isfinite().all():
                seen.append(name)

        return look

    for name, module in detector.named_modules():
        module.register_forward_hook(hook(name))
    return seen
