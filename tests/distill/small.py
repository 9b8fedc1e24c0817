"""A tiny student, tiny teachers and a batch, with weights from which something follows."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from finedetr.distill.teachers import Teacher
from finedetr.model.config import DecoderConfig, ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.weights import Card, save_weights
from finedetr.records import Guidance, Lesson, Output, Supervision, Targets
from finedetr.supervise.matching import MatchingPolicy, UnionOfStages
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import BoxL1
from tests.model.test_rtdetrv2 import TINY_RTDETR
from tests.train.tiny import TINY

DEEP = replace(TINY, name="deep", decoder=replace(TINY.decoder, layers=4))
WIDE = replace(
    TINY,
    name="wide",
    encoder=replace(TINY.encoder, width=32),
    decoder=DecoderConfig(32, 32, 3, 2, (2, 2), 20, scale=8.0),
)
PLAIN = TINY_RTDETR
NAMES = ("disc", "square", "triangle", "star", "ring", "cross")


@lru_cache(maxsize=16)
def detector(config: ModelConfig = TINY, seed: int = 0, classes: int = 5) -> Detector:
    """With every weight moved away from where it starts, so that heads of zeros say something; do not change it."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    made = Detector(config, classes)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return made.eval()


def batch(counts: tuple[int, ...] = (3, 0), classes: int = 5, seed: int = 1) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(seed)
    boxes = [0.25 + 0.4 * torch.rand(n, 4, generator=generator) for n in counts]
    labels = [torch.randint(classes, (n,), generator=generator) for n in counts]
    return torch.rand(len(counts), 3, 64, 64, generator=generator), Targets.from_lists(labels, boxes)


@lru_cache(maxsize=32)
def lesson(teacher: Detector, counts: tuple[int, ...] = (3, 0)) -> Lesson:
    return Teacher(teacher)(*batch(counts))


@lru_cache(maxsize=32)
def output_of(student: Detector, counts: tuple[int, ...] = (3, 0)) -> Output:
    """What it answers at all stages, without a graph."""
    with torch.no_grad():
        output: Output = student(batch(counts)[0], all_stages=True)
    return output


def leaf(output: Output) -> tuple[Output, Tensor, Tensor]:
    """The same answers as leaves of a graph, to read gradients from."""
    logits, boxes = (t.detach().clone().requires_grad_() for t in (output.matching.logits, output.matching.boxes))
    return replace(output, matching=replace(output.matching, logits=logits, boxes=boxes)), logits, boxes


def supervision(
    student: Detector, taught: Lesson, counts: tuple[int, ...] = (3, 0), policy: MatchingPolicy | None = None
) -> Supervision:
    """Of the matching group, with one teacher who is both."""
    return judge(output_of(student, counts), batch(counts)[1], taught, policy)


def judge(output: Output, targets: Targets, taught: Lesson, policy: MatchingPolicy | None = None) -> Supervision:
    objective = Objective((BoxL1(),), policy or UnionOfStages())
    return objective.supervise(output, targets, Guidance((64, 64), taught, taught))[0][2]


def weights_of(folder: Path, config: ModelConfig = WIDE, names: tuple[str, ...] = NAMES) -> Path:
    torch.manual_seed(3)
    card = Card(config, names, tuple(range(len(names))), (64, 64))
    return save_weights(folder / "teacher.safetensors", Detector(config, len(names)), card)
