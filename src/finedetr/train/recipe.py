"""Everything that a run is made of, as one tree of frozen dataclasses: it is the command line and `config.json` too.

A recipe is made by functions (`finedetr.recipes`). Each default has one home, the field; what follows from something
else is a property or a method. Everything that is a length is a share of the run, so that ten epochs on 200 pictures
and the published schedules on COCO come from the same numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from finedetr.data.transforms import Augmentation, Windows
from finedetr.distill.queries import QuerySource
from finedetr.errors import ConfigError, DataError
from finedetr.model.config import ModelConfig
from finedetr.model.zoo import variant
from finedetr.records import Who
from finedetr.supervise.denoising import Denoising
from finedetr.supervise.matching import QualityCost, UnionOfStages
from finedetr.supervise.objective import Objective, describe
from finedetr.supervise.terms import (
    BoxGIoU,
    BoxL1,
    FineGrainedLocalization,
    LocalizationDistillation,
    Varifocal,
)
from finedetr.train.optimizer import Grouping
from finedetr.train.schedule import Curve, Drop, FlatCosine, WarmupConstant

__all__ = ["Average", "Evaluating", "Optimizer", "Recipe", "Saving", "Schedule", "Teaching"]


@dataclass(frozen=True)
class Optimizer:
    """AdamW: its rate at a reference batch, and what becomes of it at another one."""

    lr: float = 2e-4
    """Learning rate at the reference batch; see also --lr."""
    batch: int = 32
    """The reference batch, in pictures a step over all processes."""
    scaling: Literal["sqrt", "linear", "none"] = "sqrt"
    """How the rate follows the batch. Adam's steps scale with the root of the batch (Malladi et al., 2022)."""
    backbone: float = 0.5
    """The backbone's rate as a multiple of the rate."""
    aim: float = 1.0
    """The rate of what decides where to look (sampling offsets, learned points) as a multiple of the rate."""
    weight_decay: float = 1e-4
    """Decoupled weight decay of everything but norms, biases and affine scalars."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Memory of the two moments."""
    clip: float = 0.1
    """Largest norm of the whole gradient; 0 is off."""
    grouping: Grouping = field(default_factory=Grouping)
    """Which parameters decay."""

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.batch < 1 or min(self.backbone, self.aim) < 0 or self.weight_decay < 0 or self.clip < 0:
            raise ConfigError(f"the optimizer needs a rate above 0, a batch of 1 or more and no negatives, got {self}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas: two numbers from 0 to below 1 are wanted, {self.betas} came")

    def rate_at(self, batch: int) -> float:
        """The learning rate for a batch of so many pictures."""
        match self.scaling:
            case "sqrt":
                return self.lr * math.sqrt(batch / self.batch)
            case "linear":
                return self.lr * batch / self.batch
            case "none":
                return self.lr


@dataclass(frozen=True)
class Schedule:
    """How a run is divided. Ends are shares of the run: 0.5 is half of its epochs."""

    curve: Literal["constant", "flat-cosine", "drop"] = "constant"
    """The learning rate after the warm-up: D-FINE's, DEIM's or that of the classic DETRs."""
    warmup: float = 0.05
    """The warm-up is at most this share of the run ..."""
    warmup_steps: int = 500
    """... and at most so many steps (published: 500 for D-FINE, 2000 for DEIM)."""
    start: float = 0.0
    """Until here only flips and sizes vary (DEIM's start without strong augmentation)."""
    flat: float = 0.0
    """Until here: mosaic and mixup are on, and the rate of the flat-cosine curve is flat."""
    plain: float = 0.9
    """From here on: no strong augmentation, one size, and the flat tail of the flat-cosine curve."""
    gamma: float = 0.5
    """Where the cosine ends, or to what the rate drops, as a multiple of the rate."""
    drop: float = 0.8
    """Where the rate drops."""
    late_matching: float = 1.0
    """From here on matching goes by score and overlap alone (DEIMv2); 1 is never."""
    restart: bool = False
    """Begin the plain part from the best weights so far, and go back to them after each epoch that is no better."""
    long_steps: int = 0
    """A run of fewer steps is short: its rate is higher, and what makes objects smaller or pictures denser (mosaic,
    mixup, pasted objects, zoom-out) is rarer, in proportion. 0: every run is as published."""
    hasten: float = 2.0
    """The rate of a short run rises by the root of how much shorter it is, at most so many times (see also --lr)."""

    def __post_init__(self) -> None:
        if not 0 <= self.start <= max(self.start, self.flat) <= self.plain <= 1:
            raise ConfigError(
                f"schedule: wanted 0 <= start <= flat <= plain <= 1, got {self.start}, {self.flat} and {self.plain}"
            )
        for name in ("warmup", "drop", "gamma", "late_matching"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"schedule.{name}: 0 to 1 is wanted, {getattr(self, name)} came", code="range")
        for name in ("warmup_steps", "long_steps"):
            if getattr(self, name) < 0:
                raise ConfigError(f"schedule.{name}: 0 or more is wanted, {getattr(self, name)} came", code="range")
        if self.hasten < 1:
            raise ConfigError(f"schedule.hasten: 1 or more is wanted, {self.hasten} came", code="range")

    def windows(self, epochs: int) -> Windows:
        """The epochs at which the augmentation changes, in a run of so many epochs."""
        plain = round(self.plain * epochs)
        mosaic = min(round(self.flat * epochs), plain)
        return Windows(min(round(self.start * epochs), mosaic), mosaic, plain)

    def haste(self, total: int) -> float:
        """By how much the rate of a run of so many steps is higher than that of a long one."""
        return min(self.hasten, math.sqrt(max(self.long_steps / total, 1.0)))

    def strength(self, total: int) -> float:
        """The share of the strong augmentation in a run of so many steps: tenths, and at least one of them."""
        return min(max(round(total / self.long_steps, 1), 0.1), 1.0) if self.long_steps else 1.0

    def warmup_of(self, total: int) -> int:
        """Steps of the warm-up in a run of so many steps."""
        return _share(self.warmup, total, self.warmup_steps)

    def rates(self, epochs: int, steps: int) -> Curve:
        """The curve of the learning rate over a run of so many epochs of so many steps."""
        total, windows = epochs * steps, self.windows(epochs)
        warmup = self.warmup_of(total)
        if self.curve == "constant":
            return WarmupConstant(warmup)
        if self.curve == "drop":
            return Drop(round(self.drop * epochs) * steps, self.gamma, warmup)
        plain = (epochs - windows.plain_from) * steps
        return FlatCosine(total, warmup, windows.mosaic_end * steps, plain, self.gamma)


def _share(share: float, total: int, most: int) -> int:
    """A share of a run's steps, and at most so many."""
    return min(most, round(share * total))


@dataclass(frozen=True)
class Average:
    """The moving average of the weights (EMA), whose memory follows the length of the run."""

    decay: float = 0.9999
    """Decay of a long run: a memory of 1 / (1 - decay) = 10 000 steps."""
    memory: float = 0.1
    """The memory is at most this share of the run's steps, so that a short run evaluates a converged average."""
    ramp: float = 1000.0
    """Steps over which the decay rises from 0; at most a tenth of the memory."""
    restart_decay: float = 0.9999
    """Decay after a restart (see schedule.restart)."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1 or not 0 <= self.restart_decay < 1 or not 0 < self.memory <= 1 or self.ramp < 0:
            raise ConfigError(f"average: wanted decays in [0, 1), a memory in (0, 1] and a ramp from 0, got {self}")

    def decay_for(self, total: int) -> float:
        """The decay in a run of so many steps."""
        return min(self.decay, 1 - 1 / max(self.memory * total, 1.0))

    def ramp_for(self, total: int) -> float:
        """Steps of the ramp in a run of so many steps."""
        return min(self.ramp, 0.1 / (1 - self.decay_for(total)))

    def decay_after(self, restarts: int, total: int) -> float:
        """The decay after so many restarts: the memory becomes 1/1, 1/2, 1/3 ... of what it was."""
        return max(0.0, 1 - restarts * (1 - min(self.restart_decay, self.decay_for(total))))


@dataclass(frozen=True)
class Teaching:
    """How teachers teach; what they teach are terms of the objective, its policy, and the sources of queries."""

    scale: float = 1.0
    """The frozen teacher sees pictures so many times as large as the student."""
    start: float = 0.1
    """The moving average begins to teach after this share of the run, at most ..."""
    start_steps: int = 1000
    """... so many steps."""
    ramp: float = 0.1
    """It then needs this share of the run, at most ..."""
    ramp_steps: int = 1000
    """... so many steps, until it teaches with full weight."""
    unlabelled: float = 1.0
    """Pictures of --unlabelled in a batch, for each one of the data set; the batch grows by them."""
    watch: int = 100
    """Pictures of the validation split on which the stability of the matching is measured; 0: none."""

    def __post_init__(self) -> None:
        if self.scale <= 0 or not 0 <= self.start <= 1 or not 0 <= self.ramp <= 1 or self.watch < 0:
            raise ConfigError(f"teaching: wanted a scale above 0, shares within 0..1 and watch from 0, got {self}")
        if self.unlabelled <= 0:
            raise ConfigError(f"teaching.unlabelled: a number above 0 is wanted, {self.unlabelled} came", code="range")

    def beside(self, pictures: int) -> int:
        """How many pictures without labels follow so many of the data set; at least one."""
        return max(1, round(self.unlabelled * pictures))

    def strength(self, step: int, total: int) -> float:
        """The weight of what the average teaches in a step (from 0) of a run of so many."""
        start, ramp = _share(self.start, total, self.start_steps), _share(self.ramp, total, self.ramp_steps)
        return min(1.0, max(0.0, (step - start + 1) / (ramp + 1)))


@dataclass(frozen=True)
class Saving:
    """When the resume state is written; always after an epoch, and when the run is interrupted."""

    seconds: float = 300.0
    """At least so often."""
    steps: int = 0
    """And every so many steps; 0 is off."""

    def __post_init__(self) -> None:
        if self.seconds <= 0 or self.steps < 0:
            raise ConfigError(f"saving: wanted seconds above 0 and steps from 0, got {self}", code="range")


@dataclass(frozen=True)
class Evaluating:
    """When and how the moving average is evaluated."""

    every: int = 1
    """Epochs between evaluations; the last epoch always has one."""
    batch: int | None = None
    """Pictures at a time and process; unset: as in training."""
    max_detections: int = 100
    """The best so many detections of a picture and class count (COCO: 100)."""

    def __post_init__(self) -> None:
        for name in ("every", "batch", "max_detections"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"evaluating.{name}: 1 or more is wanted, {value} came", code="range")


@dataclass(frozen=True)
class Recipe:
    """A whole run but for its data, its folder and its device."""

    name: str = "dfine"
    """The functions that made it, for the record."""
    model: ModelConfig = field(default_factory=lambda: variant("dfine-s"))
    """What the detector is made of."""
    size: tuple[int, int] = (640, 640)
    """Height and width of the network's input."""
    epochs: int = 132
    """Rounds through the data."""
    batch: int | None = None
    """Pictures a step, over all processes and accumulated parts. Unset: optimizer.batch, less on few pictures."""
    accumulate: int = 1
    """Parts in which a batch is worked off, one after the other, to save memory."""
    lr: float | None = None
    """The learning rate itself. Unset: optimizer.lr, scaled to the batch."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Of the forward pass; losses are always fp32. auto: bf16 where the GPU or the CPU computes in it."""
    seed: int = 0
    """Of all random numbers."""
    freeze: tuple[Literal["backbone", "encoder", "norms"], ...] = ()
    """Parts that are not trained; norms: the backbone's batch norms keep their statistics."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    average: Average = field(default_factory=Average)
    augmentation: Augmentation = field(default_factory=Augmentation)
    mean: tuple[float, float, float] | None = None
    """Subtracted from each channel on the scale 0..1. D-FINE and DEIM do not."""
    std: tuple[float, float, float] | None = None
    """Each channel is divided by it."""
    denoise: bool = True
    """Whether denoising queries take part in training."""
    denoising: Denoising = field(default_factory=Denoising)
    objective: Objective = field(
        default_factory=lambda: Objective(
            (Varifocal(), BoxL1(), BoxGIoU(), FineGrainedLocalization(), LocalizationDistillation()), UnionOfStages()
        )
    )
    balance: float = 0.0
    """Pictures with a class that stands in less than this share of them come more often in an epoch (repeat-factor
    sampling; LVIS: 0.001, small sets: such as 0.1). 0 is off."""
    sources: tuple[QuerySource, ...] = ()
    """Where groups of queries come from, beside denoising."""
    teaching: Teaching = field(default_factory=Teaching)
    evaluating: Evaluating = field(default_factory=Evaluating)
    saving: Saving = field(default_factory=Saving)
    patience: int = 0
    """Stop after so many evaluations without a better AP; 0 is off."""
    diverged_after: int = 10
    """A step whose loss or gradient is not finite is passed over; so many in a row end the run."""
    max_time: float = 0.0
    """Seconds that the run may take; the schedule is shortened to end in time. 0 is off."""
    workers: int | None = None
    """Processes that read pictures. Unset: up to 4, and no more than there are cores to spare. The batches are the
    same with any number."""
    compile: bool = False
    """Compile the detector with torch.compile."""
    channels_last: bool = True
    """Keep feature maps with the channels last in memory: faster convolutions, and tokens without a copy."""
    log_every: int = 20
    """Steps between two lines of the log."""
    sync_norms: bool = True
    """With several GPUs: batch norms see the pictures of all of them."""

    def __post_init__(self) -> None:
        stride = self.model.largest_stride
        for side in self.size:
            if side < stride or side % stride:
                low = max(stride, side // stride * stride)
                raise ConfigError(
                    f"size {self.size[0]} {self.size[1]}: multiples of {stride} are wanted, {side} is none",
                    code="size",
                    hint=f"The nearest legal ones are {low} and {low + stride}.",
                )
        for name, least in (
            ("epochs", 1),
            ("accumulate", 1),
            ("patience", 0),
            ("diverged_after", 1),
            ("max_time", 0),
            ("seed", 0),
            ("log_every", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(f"{name}: at least {least} is wanted, {getattr(self, name)} came", code="range")
        if self.seed >= 2**63:
            raise ConfigError(f"seed: less than 2**63 is wanted, {self.seed} came", code="range")
        if self.batch is not None and (self.batch < 1 or self.batch % self.accumulate):
            raise ConfigError(
                f"batch: {self.batch} pictures cannot be worked off in {self.accumulate} equal parts",
                code="range",
                hint="Choose a batch that is a multiple of --accumulate.",
            )
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise ConfigError(f"lr: a number above 0 is wanted, {self.lr} came", code="range")
        if not 0 <= self.balance <= 1:
            raise ConfigError(f"balance: a share of the pictures, 0 to 1, is wanted, {self.balance} came", code="range")
        kinds = [type(source).__name__ for source in self.sources]
        if len(set(kinds)) < len(kinds):
            twice = next(kind for kind in kinds if kinds.count(kind) > 1)
            raise ConfigError(
                f"the recipe {self.name} has two sources of queries of the kind {twice}: their losses would bear one "
                "name",
                code="conflict",
                hint="Name one form of a paper with --with, not two.",
            )
        if (self.mean is None) != (self.std is None):
            raise ConfigError("mean and std go together: give both or neither", code="conflict")

    @property
    def normalization(self) -> tuple[tuple[float, float, float], tuple[float, float, float]] | None:
        """(mean, std), or None."""
        return (self.mean, self.std) if self.mean and self.std else None

    @property
    def teachers(self) -> tuple[Who, ...]:
        """Who has a say: whoever a part with a weight names."""
        parts = (*self.objective.terms, self.objective.policy, *self.sources)
        named = {part.teacher for part in parts if hasattr(part, "teacher") and getattr(part, "weight", 1.0) != 0}
        return tuple(who for who in ("frozen", "average") if who in named)

    def formula(self) -> str:
        """What is minimized, over which groups of queries, in one line."""
        groups = ["denoising"] * self.denoise + [describe(source) for source in self.sources if source.weight]
        return self.objective.formula() + (f"; beside the own queries: {', '.join(groups)}" if groups else "")

    def objective_at(self, epoch: int, epochs: int) -> Objective:
        """The objective of an epoch of so many: only the cost of the matching may change, once."""
        if epoch < self.schedule.late_matching * epochs:
            return self.objective
        return replace(self.objective, policy=self.objective.policy.with_cost(QualityCost()))

    def resolve(self, pictures: int) -> Recipe:
        """The same recipe with batch and learning rate as numbers, for a data set of so many training pictures.

        Raises:
            DataError: There is no picture.
        """
        if pictures < 1:
            raise DataError("the training split has no pictures", code="empty_split")
        chosen = replace(self, batch=self.batch or self._batch_for(pictures))
        return replace(chosen, lr=self.lr or chosen._rate(pictures))

    def steps(self, pictures: int) -> int:
        """Steps of an epoch of a resolved recipe: whole batches, at least one."""
        return max(pictures // (self.batch or 1), 1)

    def _rate(self, pictures: int) -> float:
        return self.optimizer.rate_at(self.batch or 1) * self.schedule.haste(self.epochs * self.steps(pictures))

    def _batch_for(self, pictures: int) -> int:
        """The reference batch, or the largest power of two of which an epoch still has twenty; at least 4."""
        few = 1 << (max(pictures // 20, 4).bit_length() - 1)
        batch = min(self.optimizer.batch, few)
        return max(batch // self.accumulate, 1) * self.accumulate

    def evaluation_batch(self, processes: int) -> int:
        """Pictures at a time of one of so many processes in an evaluation."""
        return self.evaluating.batch or max((self.batch or 1) // processes, 1)

    def why_batch(self, resolved: Recipe, pictures: int) -> str:
        """One line on where the batch comes from."""
        if self.batch is not None:
            return f"batch {resolved.batch}, as asked"
        if resolved.batch == self.optimizer.batch:
            return f"batch {resolved.batch}, the recipe's"
        few = f"{pictures} pictures shall give about 20 steps an epoch"
        return f"batch {resolved.batch} instead of {self.optimizer.batch}: {few}"

    def why_rate(self, resolved: Recipe) -> str:
        """One line on where the learning rate comes from."""
        o, part = self.optimizer, f"; backbone {resolved.optimizer.backbone:g} of it"
        if self.lr is not None:
            return f"learning rate {resolved.lr:.3g}, as asked{part}"
        batch = resolved.batch or 1
        haste = (resolved.lr or o.lr) / o.rate_at(batch)
        factors, reasons = [f"{o.lr:g}"], [f"the recipe's for batch {o.batch}"]
        if o.scaling != "none" and batch != o.batch:
            factors.append(f"sqrt({batch}/{o.batch})" if o.scaling == "sqrt" else f"{batch}/{o.batch}")
            reasons = [f"scaled from batch {o.batch}"]
        if haste > 1 + 1e-9:
            factors.append(f"{haste:.2g}")
            reasons.append("higher for a short run (schedule.long_steps)")
        product = f" = {' x '.join(factors)}" if len(factors) > 1 else ""
        return f"learning rate {resolved.lr:.3g}{product}, {' and '.join(reasons)}{part}"
