"""Teachers: detectors that answer the student's batch, in eval mode, at all stages, without gradient."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from finedetr.data.device import denormalize, normalize
from finedetr.distill.queries import TeacherSource
from finedetr.distill.terms import (
    ContrastiveDistillation,
    EncoderDistillation,
    FeatureDistillation,
    LogitsDistillation,
)
from finedetr.errors import ConfigError, DataError
from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.records import Guidance, Lesson, Prediction, Targets
from finedetr.supervise.matching import MatchingPolicy, PerStage

__all__ = ["Adapters", "ClassMap", "Normalization", "Teacher", "Teachers", "build_adapters", "map_classes"]

Normalization = tuple[tuple[float, float, float], tuple[float, float, float]]


@dataclass(frozen=True)
class ClassMap:
    """The teacher's classes in the student's order, matched by name."""

    columns: Int[Tensor, " C"]  # of the teacher, for each class of the student; any where it is unknown
    known: Bool[Tensor, " C"]
    missing: tuple[str, ...]  # classes of the student that the teacher does not know
    unused: tuple[str, ...]  # classes of the teacher that the student does not have


def map_classes(student: Sequence[str], teacher: Sequence[str]) -> ClassMap | None:
    """How a teacher's classes become the student's; None where they are the same.

    Raises:
        DataError: No name is the same, or a name stands twice.
    """
    if tuple(student) == tuple(teacher):
        return None
    if len(set(student)) < len(student) or len(set(teacher)) < len(teacher):
        raise DataError(
            "classes of student and teacher cannot be matched by name: a name stands twice", code="class_names"
        )
    place = {name: index for index, name in enumerate(teacher)}
    missing = tuple(name for name in student if name not in place)
    if len(missing) == len(student):
        raise DataError(
            f"the teacher knows {', '.join(teacher[:4])} ...; the data has {', '.join(student[:4])} ...: "
            "no name is the same",
            code="class_names",
            hint="A teacher has to know at least one class of the data, by the same name.",
        )
    columns = torch.tensor([place.get(name, 0) for name in student])
    known = torch.tensor([name in place for name in student])
    return ClassMap(columns, known, missing, tuple(name for name in teacher if name not in set(student)))


class Teacher:
    """One teacher.

    Args:
        detector: Answers; it is put into eval mode and never changed.
        classes: Where its classes differ from the student's.
        scale: It sees pictures so many times as large as the student.
        given: (mean, std) by which the student's pictures are normalized; None: not at all.
        wanted: Those by which the teacher's were.
        policy: Matches its answers to the targets.
        itself: It is the student or its average.
    """

    def __init__(
        self,
        detector: nn.Module,
        classes: ClassMap | None = None,
        *,
        scale: float = 1.0,
        given: Normalization | None = None,
        wanted: Normalization | None = None,
        policy: MatchingPolicy | None = None,
        itself: bool = False,
    ) -> None:
        assert isinstance(detector, Detector)
        self.detector = detector.eval()
        self.classes, self.scale, self.given, self.wanted = classes, scale, given, wanted
        self.policy, self.itself = policy or PerStage(), itself

    @torch.no_grad()
    def __call__(self, images: Float[Tensor, "B 3 H W"], targets: Targets, strength: float = 1.0) -> Lesson:
        """What it says about a batch."""
        output = self.detector(self._view(images), all_stages=True)
        answers, known = self._answers(output.matching), None
        if self.classes is not None:
            known = self.classes.known.to(images.device)
        match = self.policy(answers, targets).labels
        trace, score = output.trace, output.trace.score
        if score is not None:
            trace = replace(trace, score=lambda tokens: self._classes(score(tokens)))
        return Lesson(answers, trace, output.memory, match, known, strength, itself=self.itself)

    def _view(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 3 h w"]:
        """The pictures as the teacher was trained to see them."""
        if self.given != self.wanted:
            images = normalize(denormalize(images, *(self.given or _NONE)), *(self.wanted or _NONE))
        stride = self.detector.config.largest_stride
        size = tuple(max(stride, round(side * self.scale / stride) * stride) for side in images.shape[-2:])
        if size == tuple(images.shape[-2:]):
            return images
        return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=self.scale < 1)

    def _answers(self, said: Prediction) -> Prediction:
        """In fp32, in the student's classes; -inf for those of which the teacher knows nothing."""
        return replace(said, logits=self._classes(said.logits.float()), boxes=said.boxes.float())

    def _classes(self, logits: Float[Tensor, "*N D"]) -> Float[Tensor, "*N C"]:
        if self.classes is None:
            return logits
        known = self.classes.known.to(logits.device)
        return logits[..., self.classes.columns.to(logits.device)].masked_fill(~known, -torch.inf)


_NONE = (None, None)


class Adapters(nn.Module):
    """What fits widths to one another: trained along, part of no detector.

    1×1 convolutions bring the student's maps to the teacher's width, linear layers what a teacher's queries start with
    to the student's. The projections of `ContrastiveDistillation` stand here, too.
    """

    def __init__(
        self,
        maps: dict[tuple[str, int], tuple[int, int]],
        queries: dict[str, tuple[int, int]] | None = None,
        contrast: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(
            {f"{tap}{level}": nn.Conv2d(here, there, 1) for (tap, level), (here, there) in maps.items()}
        )
        for name, (here, there) in (queries or {}).items():
            self.layers[f"{name}0"] = nn.Linear(here, there)
        if contrast is not None:
            for name, width in zip(("contrast0", "contrasted0"), contrast, strict=True):
                self.layers[name] = nn.Sequential(
                    nn.Linear(width, 512), nn.Linear(512, 512), nn.BatchNorm1d(512), nn.ReLU(), nn.Linear(512, 512)
                )

    def forward(self, tap: str, level: int, x: Float[Tensor, "B ..."]) -> Float[Tensor, "B ..."]:
        """A map as the teacher's, or vectors of its queries as the student's; the same where they need no adapter."""
        name = f"{tap}{level}"
        return self.layers[name](x) if name in self.layers else x


def build_adapters(
    terms: Sequence[object],
    student: Detector,
    teacher: Detector,
    scale: float = 1.0,
    sources: Sequence[object] = (),
) -> Adapters:
    """What the feature terms of an objective and the groups of queries need; empty where nothing is to adapt.

    Raises:
        ConfigError: Widths differ where a term forbids adapters, the two have no level in common, or the student can
            make no queries of the teacher's.
    """
    check_identity(terms, student.config, teacher.config)
    borrowed = {
        name
        for source in sources
        if isinstance(source, TeacherSource) and source.weight and source.teacher == "frozen"
        for name in source.borrows(student.config, teacher.config)
    }
    there, here = teacher.config.decoder.width, student.config.decoder.width
    contrast = any(isinstance(term, ContrastiveDistillation) and term.weight for term in terms)
    return Adapters(
        _map_widths(terms, student, teacher, scale),
        {name: (there, here) for name in sorted(borrowed) if here != there},
        (here, there) if contrast else None,
    )


def check_identity(terms: Sequence[object], student: ModelConfig, teacher: ModelConfig) -> None:
    """Refuses to pair queries or scores of two detectors by cells where one of them has none.

    Raises:
        ConfigError: Says which.
    """
    for term in terms:
        if not isinstance(term, LogitsDistillation | EncoderDistillation) or not term.weight:
            continue
        without = [model.name for model in (student, teacher) if model.decoder.source not in ("tokens", "mixed")]
        if isinstance(term, EncoderDistillation):
            if without:
                raise ConfigError(
                    f"EncoderDistillation: the encoder of {' and '.join(without)} scores no classes",
                    code="conflict",
                    hint="Leave it away; DINO and the real-time families have such encoders.",
                )
            continue
        if term.teacher != "frozen":
            continue
        learned = [model.name for model in (student, teacher) if not model.decoder.selects]
        if term.pairing == "token" and learned:
            raise ConfigError(
                f"pairing by token: queries of {' and '.join(learned)} are learned and come from no cell",
                code="conflict",
                hint="Use --objective.LogitsDistillation.pairing joint, split or common.",
            )


def _map_widths(
    terms: Sequence[object], student: Detector, teacher: Detector, scale: float
) -> dict[tuple[str, int], tuple[int, int]]:
    """The widths of the student's and the teacher's maps, by tap and level, where they need an adapter."""
    widths: dict[tuple[str, int], tuple[int, int]] = {}
    for term in terms:
        if not isinstance(term, FeatureDistillation) or not term.weight or term.teacher != "frozen":
            continue
        theirs = {stride / scale: level for level, stride in enumerate(_strides(teacher, term.tap))}
        own = _strides(student, term.tap)
        both = [(here, theirs[stride]) for here, stride in enumerate(own) if stride in theirs]
        if not both:
            raise ConfigError(
                f"student and teacher have no level in common: strides {own} and "
                f"{tuple(theirs)} of the student's pictures",
                hint="Use --objective.FeatureDistillation.weight 0, or another --teaching.scale.",
            )
        for here, there in both:
            narrow, wide = _width(student, term.tap, here), _width(teacher, term.tap, there)
            if narrow != wide and term.adapter == "none":
                raise ConfigError(f"maps of {narrow} and {wide} channels cannot be compared without an adapter")
            if narrow != wide or term.adapter == "conv":
                widths[term.tap, here] = (narrow, wide)
    return widths


def _strides(detector: Detector, tap: str) -> tuple[int, ...]:
    """Of the levels that a tap has; an encoder may make more levels than it is given."""
    levels = {"backbone": len(detector.backbone.channels), "neck": len(detector.encoder.input_proj)}
    return detector.config.strides[: levels.get(tap)]


def _width(detector: Detector, tap: str, level: int) -> int:
    return int(detector.backbone.channels[level]) if tap == "backbone" else detector.config.encoder.width


@dataclass
class Teachers:
    """The teachers of a run, and what belongs to the training because of them.

    Attributes:
        frozen: Another detector.
        average: The student's moving average.
        adapters: Of the frozen teacher's feature terms.
        seconds: Spent here; on a GPU true for the first steps only.
    """

    frozen: Teacher | None = None
    average: Teacher | None = None
    adapters: Adapters | None = None
    seconds: float = 0.0
    _steps: int = 0  # counted for their price ...
    _since: float = 0.0  # ... and what `seconds` was when a process had warmed up
    _total: float = 0.0  # seconds of the steps since then

    def __call__(self, images: Float[Tensor, "B 3 H W"], targets: Targets, strength: float = 1.0) -> Guidance:
        """What they say about a batch; the average with so much strength, and not at all with none."""
        begin = self._clock(images)
        frozen = self.frozen(images, targets) if self.frozen else None
        if frozen is not None and self.adapters is not None:
            frozen = replace(frozen, adapt=self.adapters)
        average = self.average(images, targets, strength) if self.average and strength > 0 else None
        self.seconds += self._clock(images) - begin
        return Guidance((int(images.shape[-2]), int(images.shape[-1])), frozen, average)

    def price(self, step: float) -> str | None:
        """What they add to a step, said once, after the first steps of a process.

        Args:
            step: Seconds of the step that has just been done.
        """
        self._steps += 1
        self._total += step
        if self._steps == _WARMING:
            self._since, self._total = self.seconds, 0.0
        if self._steps != _PRICED:
            return None
        spent, steps = self.seconds - self._since, _PRICED - _WARMING
        return (
            f"teachers add {spent / max(self._total - spent, 1e-9):.0%} to a step ({spent / steps:.3f} of "
            f"{self._total / steps:.3f} s), and what their terms and queries need"
        )

    def lines(self) -> list[str]:
        """Who teaches, for the beginning of a log."""
        said = []
        for name, teacher in (("frozen", self.frozen), ("average", self.average)):
            if teacher is None:
                continue
            count = sum(parameter.numel() for parameter in teacher.detector.parameters())
            said.append(
                f"teacher: {name}, {teacher.detector.config.name}, {count / 1e6:.1f} M parameters"
                + (f", {count * 4 / 2**20:.0f} MiB" if name == "frozen" else ", which the run keeps anyway")
            )
            if teacher.classes is not None:
                found = teacher.classes
                said.append(
                    f"teacher: classes are matched by name, {int(found.known.sum())} in common"
                    + (f"; it does not know {', '.join(found.missing)}" if found.missing else "")
                    + (f"; not used: {', '.join(found.unused)}" if found.unused else "")
                )
        return said

    def _clock(self, images: Tensor) -> float:
        if images.is_cuda and self._steps < _PRICED:
            torch.cuda.synchronize(images.device)
        return time.perf_counter()


_WARMING = 2  # steps of a process that say nothing about the speed
_PRICED = 14  # steps after which the price is known; on a GPU later ones do not wait for it
