"""One step of training: what the student answers, what it costs, and the update that follows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from finedetr.errors import DivergedError, RunError, UsageError
from finedetr.records import Guidance, QueryGroup, Targets
from finedetr.supervise.objective import Losses, Objective
from finedetr.train.distributed import World
from finedetr.train.ema import MovingAverage
from finedetr.train.recipe import Recipe

__all__ = [
    "Precision",
    "Source",
    "StepReport",
    "Teaching",
    "Updater",
    "generator_for",
    "out_of_memory",
    "parts_of",
    "sources_of",
    "step",
]

Source = Callable[[Targets, "Guidance | None"], "QueryGroup | None"]
Teaching = Callable[[Tensor, Targets], Guidance]
NOISE = 3  # the stream of random numbers, beside those of the loader
OVERFLOWS = 50  # so many fp16 steps in a row without finite gradients end a run


def step(
    student: nn.Module,
    images: Float[Tensor, "B 3 H W"],
    targets: Targets,
    sources: tuple[Source, ...],
    objective: Objective,
    precision: Precision,
    teacher: Teaching | None = None,
) -> Losses:
    """One batch, seen by the student beside the query groups of all sources, in the light of what teachers say."""
    with precision.forward():
        guidance = teacher(images, targets) if teacher else None
    extra = tuple(group for source in sources if (group := source(targets, guidance)) is not None)
    with precision.forward():
        output = student(images, extra)
    return objective(output, targets, guidance)


def _cpu_computes_in_bfloat16() -> bool:
    """Whether products of bfloat16 have instructions of their own; emulated, they are slower than float32."""
    tests = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, test, lambda: False)() for test in tests)


@dataclass(frozen=True)
class Precision:
    """In what numbers the forward pass runs. Losses are always fp32."""

    name: Literal["fp32", "bf16", "fp16"]
    device: torch.device

    @classmethod
    def choose(cls, wanted: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> Precision:
        """Resolves `auto`: bf16 where the device computes in it, fp16 on older GPUs, fp32 elsewhere.

        Raises:
            UsageError: fp16 on a CPU, whose range is too small without a loss scaler that CPUs lack.
        """
        if wanted == "auto":
            if device.type != "cuda":
                wanted = "bf16" if device.type == "cpu" and _cpu_computes_in_bfloat16() else "fp32"
            else:
                wanted = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
        if wanted == "fp16" and device.type != "cuda":
            raise UsageError(
                f"fp16 training needs a CUDA device, this run is on {device}",
                code="conflict",
                hint="Use --precision bf16 or fp32.",
            )
        return cls(wanted, device)

    def forward(self) -> AbstractContextManager[object]:
        """The context of the forward pass."""
        if self.name == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16 if self.name == "bf16" else torch.float16)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss in fp16, and does nothing otherwise."""
        return torch.amp.GradScaler(self.device.type, enabled=self.name == "fp16")


@dataclass(frozen=True)
class StepReport:
    """What a step did, as numbers."""

    losses: dict[str, float]
    gradient: float  # norm before clipping

    @property
    def loss(self) -> float:
        """What was minimized."""
        return sum(self.losses.values())


class Updater:
    """Backward, clipping, optimizer and moving average: the part of a step that changes weights."""

    def __init__(
        self,
        student: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: MovingAverage,
        precision: Precision,
        world: World,
        clip: float,
    ) -> None:
        self.student, self.optimizer, self.average = student, optimizer, average
        self.precision, self.world, self.clip = precision, world, clip
        self.scaler = precision.scaler()
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.statistics = Statistics(student)
        inside = set(student.parameters())
        self.outside = [p for p in self.parameters if p not in inside]  # adapters, whose gradients DDP does not see
        self.overflows = 0

    def __call__(
        self,
        images: Float[Tensor, "B 3 H W"],
        targets: Targets,
        names: tuple[str, ...],
        sources: tuple[Source, ...],
        objective: Objective,
        accumulate: int = 1,
        teacher: Teaching | None = None,
    ) -> StepReport:
        """One update of the weights from one batch, worked off in `accumulate` parts.

        Each part weighs as much as it has targets, over all processes, so that the sum over parts is what the whole
        batch gives, up to what sees a part at a time: the norms' statistics, the union over stages, the number of
        denoising groups, and the sums by which distillation divides.

        Raises:
            DivergedError: A loss or gradient is not finite, in this process or in another; all of them raise it, and
                nothing was changed.
            torch.OutOfMemoryError: On the way to the gradient; nothing was changed, and more parts may help.
            RunError: Out of memory in the update, which cannot be repeated.
        """
        self.statistics.keep()
        try:
            total, fault = self._backward(parts_of(images, targets, names, accumulate), sources, objective, teacher)
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            self.statistics.bring_back()
            raise
        try:
            return StepReport(total, self._update(fault, names))
        except torch.OutOfMemoryError as error:
            raise out_of_memory(error, len(images)) from error

    def _backward(
        self, parts: tuple[Part, ...], sources: tuple[Source, ...], objective: Objective, teacher: Teaching | None
    ) -> tuple[dict[str, float], DivergedError | None]:
        """The gradient of all parts. A fault is given, not raised: the other processes wait for this one's gradient."""
        counts = self.world.total([float(len(part.targets)) for part in parts]) if len(parts) > 1 else [1.0]
        floor = float(self.world.size)  # the objective divides by one target a process at least
        total: dict[str, float] = {}
        fault: DivergedError | None = None
        for index, part in enumerate(parts):
            share = max(counts[index], floor) / max(sum(counts), floor) if len(parts) > 1 else 1.0
            with self._no_sync(last=index == len(parts) - 1):
                losses = step(self.student, part.images, part.targets, sources, objective, self.precision, teacher)
                self.scaler.scale(losses.total * share).backward()
            try:
                values = losses.by_name(part.names)
            except DivergedError as error:
                fault = fault or error
                continue
            for name, value in values.items():
                total[name] = total.get(name, 0.0) + share * value
        return total, fault

    def _update(self, fault: DivergedError | None, names: tuple[str, ...]) -> float:
        self.world.average([p.grad for p in self.outside if p.grad is not None])
        self.scaler.unscale_(self.optimizer)
        limit = self.clip if self.clip > 0 else float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.parameters, limit, foreach=True))
        finite = bool(np.isfinite(norm))
        (faults,) = self.world.total([float(fault is not None)])
        if faults:
            fault = fault or DivergedError("a loss of another process is not finite; this one's are")
        elif not finite:
            fault = self._overflow(norm, names)
        else:
            self.overflows = 0
        if fault is None:
            self.scaler.step(self.optimizer)
        if self.scaler.is_enabled():
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if fault is not None:
            self.statistics.bring_back()
            raise fault
        if finite:
            self.average.update()
        return norm

    def _overflow(self, norm: float, names: tuple[str, ...]) -> DivergedError | None:
        """What a gradient that is not finite means; in fp16 the scaler passes over a few of them."""
        if self.precision.name != "fp16":
            return DivergedError(
                f"the gradient's norm is {norm}, all losses are finite; pictures: {', '.join(names[:8])}",
                hint="A lower learning rate, or a look at the named pictures helps most often.",
            )
        self.overflows += 1
        if self.overflows <= OVERFLOWS:
            return None
        return DivergedError(f"{OVERFLOWS} steps in a row overflowed in fp16", hint="Use --precision bf16 or fp32.")

    def _no_sync(self, *, last: bool) -> AbstractContextManager[object]:
        """Gradients travel between processes once, with the last part."""
        if isinstance(self.student, DistributedDataParallel) and not last:
            return self.student.no_sync()
        return nullcontext()


class Statistics:
    """The running statistics of a module's norms: all that a forward pass changes. A bad batch must not stay in them.

    Args:
        module: Its norms must stay the same objects.
    """

    def __init__(self, module: nn.Module) -> None:
        norms = [part for part in module.modules() if isinstance(part, _BatchNorm)]
        self._live = [buffer for norm in norms for buffer in norm.buffers(recurse=False)]
        self._kept = [buffer.clone() for buffer in self._live]

    def keep(self) -> None:
        """Remembers them as they are."""
        if self._live:
            torch._foreach_copy_(self._kept, self._live)

    def bring_back(self) -> None:
        """Makes them what they were at the last `keep`."""
        if self._live:
            torch._foreach_copy_(self._live, self._kept)


@dataclass(frozen=True)
class Part:
    """A piece of a batch."""

    images: Tensor
    targets: Targets
    names: tuple[str, ...]


def parts_of(
    images: Float[Tensor, "B 3 H W"], targets: Targets, names: tuple[str, ...], parts: int
) -> tuple[Part, ...]:
    """A batch cut into equal parts, picture after picture; the targets of each part count their pictures from 0.

    Each part has its share of the pictures without truth, as equal as can be.
    """
    if parts == 1:
        return (Part(images, targets, names),)
    known, rest = targets.with_truth, targets.pictures - targets.with_truth
    starts = (*targets.starts, len(targets))
    cut = []
    for part in range(parts):
        first, after = known * part // parts, known * (part + 1) // parts
        rows = slice(starts[first], starts[after])
        beside = slice(known + rest * part // parts, known + rest * (part + 1) // parts)
        own = Targets(
            targets.labels[rows],
            targets.boxes[rows],
            targets.image[rows] - first,
            targets.counts[first:after] + targets.counts[beside],
            None if targets.annotated is None else after - first,
        )
        pictures = torch.cat((images[first:after], images[beside])) if rest else images[first:after]
        cut.append(Part(pictures, own, names[first:after] + names[beside]))
    return tuple(cut)


def out_of_memory(error: BaseException, pictures: int) -> RunError:
    """What to raise where nothing helps but the user, with `pictures` in memory at a time."""
    return RunError(
        f"out of memory with {pictures} pictures at a time: {str(error).splitlines()[0]}",
        code="oom",
        hint="More parts of the same batch (--accumulate), a smaller --batch or --size, or another --precision.",
    )


def sources_of(
    recipe: Recipe, classes: int, *, epoch: int, step: int, rank: int, device: torch.device
) -> tuple[Source, ...]:
    """Where query groups come from in one step of one process. All random numbers of the step follow from its place."""
    generator = generator_for(recipe.seed, epoch, step, rank, device)  # also where nothing but dropout draws
    given: tuple[Source, ...] = tuple(partial(source, student=recipe.model) for source in recipe.sources)
    if not recipe.denoise:
        return given
    return (lambda targets, _: recipe.denoising(targets, classes, generator), *given)


def generator_for(seed: int, epoch: int, number: int, rank: int, device: torch.device) -> torch.Generator:
    """The random numbers of a step of a process: a function of its place in the run, so that resuming repeats them."""
    word = int(np.random.SeedSequence((seed, epoch, number, rank, NOISE)).generate_state(1, np.uint64)[0]) >> 1
    torch.manual_seed(word)  # whoever draws from the global generator (dropout, a loader) repeats itself too
    return torch.Generator(device if device.type == "cuda" else "cpu").manual_seed(word)
