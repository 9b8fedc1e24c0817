"""Every host with every paper that applies: a training step, and what is shipped. The README's matrix is this table."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import pytest
import torch

from finedetr.distill.teachers import Teacher, Teachers, build_adapters
from finedetr.model.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.hgnet import HGNETS, HGNetTable, StageRow
from finedetr.model.zoo import variant
from finedetr.recipes import PAPERS, build
from finedetr.train.config import from_dict, to_dict
from finedetr.train.recipe import Recipe
from finedetr.train.step import Precision, step
from tests.distill.small import batch
from tests.model.classic import CLASSES, answers_and_exported, random_detector

HGNETS["matrix"] = HGNetTable(
    (8, 16), (StageRow(16, 8, 16, 1, False, False, 3, 1), StageRow(16, 16, 32, 1, True, False, 3, 1))
)
DFINE = ModelConfig(
    "tiny-dfine",
    BackboneConfig("matrix", stages=(1,)),
    EncoderConfig(width=32, feedforward=32, expansion=0.34, depth=0.34, heads=4),
    DecoderConfig(width=32, feedforward=32, layers=2, heads=4, points=(3,), queries=12),
)


def of_family(name: str, **decoder: Any) -> ModelConfig:
    """A host of the real-time family."""
    return replace(DFINE, name=f"tiny-{name}", decoder=replace(DFINE.decoder, **decoder))


def classic(name: str, stages: tuple[int, ...]) -> ModelConfig:
    """A classic host on the same backbone."""
    row = variant(name)
    return replace(
        row,
        name=f"tiny-{name}",
        backbone=replace(DFINE.backbone, stages=stages),
        encoder=replace(row.encoder, width=32, feedforward=32, layers=1, heads=4, extra_levels=0),
        decoder=replace(
            row.decoder, width=32, feedforward=32, layers=2, heads=4, queries=12, points=(2,) * len(stages)
        ),
    )


HOSTS = {
    "dfine": DFINE,
    "rtdetrv2": of_family("rtdetrv2", boxes="plain", projected=True, gateway=False, position_limit=None),
    "deimv2": of_family("deimv2", norm="rms", gated=True, select_raw=True, position_once=True, position_layers=3),
    "conditional": classic("conditional-detr-r50", (1,)),
    "dab": classic("dab-detr-r50", (1,)),
    "deformable": classic("deformable-detr-r50", (0, 1)),
    "dino": classic("dino-r50", (0, 1)),
}
MATRIX: dict[str, tuple[str, ...]] = {
    "dfine": ("", "deim", "detrdistill", "od-detr", "sd-detr", "deim detrdistill od-detr sd-detr"),
    "rtdetrv2": ("", "deim", "fdr", "detrdistill", "od-detr", "sd-detr", "deim fdr detrdistill od-detr sd-detr"),
    "deimv2": ("deim", "detrdistill", "od-detr", "sd-detr", "deim detrdistill od-detr sd-detr"),
    "conditional": ("", "deim", "fdr", "detrdistill", "od-detr", "sd-detr", "deim fdr detrdistill od-detr sd-detr"),
    "dab": ("", "deim", "fdr", "detrdistill", "od-detr", "sd-detr", "deim fdr detrdistill od-detr sd-detr"),
    "deformable": ("", "deim", "fdr", "detrdistill", "od-detr", "sd-detr", "deim fdr detrdistill od-detr sd-detr"),
    "dino": ("", "deim", "fdr", "detrdistill", "od-detr", "sd-detr", "deim fdr detrdistill od-detr sd-detr"),
}
"""A host, and the papers on it, in the order of `--with`."""

PAIRS = [(host, papers) for host, row in MATRIX.items() for papers in row]
OWN = {
    "dfine": "dfine",
    "rtdetrv2": "rtdetrv2",
    "deimv2": "deimv2",
    "conditional": "conditional-detr",
    "dab": "dab-detr",
    "deformable": "deformable-detr",
    "dino": "dino",
}


def recipe_of(host: str, papers: str) -> Recipe:
    names = papers.split()
    base = "deim" if "deim" in names else OWN[host]
    return build(HOSTS[host], base, tuple(name for name in names if name != "deim"), random_start=False)


def teacher_of(student: ModelConfig) -> ModelConfig:
    """A deeper detector: D-FINE's for the real-time family, the plain host for a classic one."""
    host = student.whole if student.classic else DFINE
    return replace(host, decoder=replace(host.decoder, layers=3, boxes="plain" if student.classic else "distributions"))


def teachers_of(recipe: Recipe, student: Detector) -> Teachers | None:
    if not recipe.teachers:
        return None
    teachers = Teachers()
    if "average" in recipe.teachers:
        teachers.average = Teacher(copy.deepcopy(student).requires_grad_(False))
    if "frozen" in recipe.teachers:
        other = random_detector(teacher_of(recipe.model), seed=7).requires_grad_(False)
        teachers.frozen = Teacher(other)
        teachers.adapters = build_adapters(recipe.objective.terms, student, other)
    return teachers


@lru_cache(maxsize=1)
def differences(config: ModelConfig) -> tuple[float, float]:
    """How far the exported graph's logits and boxes are from those of the detector."""
    (logits, boxes), (exported, found) = answers_and_exported(random_detector(config))
    return float((exported - logits).abs().max()), float((found - boxes).abs().max())


# pairs with one architecture stand beside one another, for it is exported once
@pytest.mark.parametrize(
    ("host", "papers"),
    sorted(PAIRS, key=lambda pair: (pair[0], "fdr" in pair[1], "sd" in pair[1])),
    ids=lambda said: said.replace(" ", "+") or "alone",
)
@pytest.mark.filterwarnings("error:Mismatch dtype between input and weight")  # torch's root-mean-square norm
def test_a_host_with_papers_takes_a_step_and_is_shipped(host: str, papers: str) -> None:
    recipe = recipe_of(host, papers)
    assert from_dict(to_dict(recipe)) == recipe
    student = random_detector(recipe.model).train()
    teachers = teachers_of(recipe, student)
    sources = tuple(partial(source, student=recipe.model) for source in recipe.sources)
    if recipe.denoise:
        sources = (lambda targets, _: recipe.denoising(targets, CLASSES), *sources)
    learning: list[set[str]] = []
    for precision in ("fp32", "bf16"):
        student.zero_grad()
        losses = step(student, *batch(), sources, recipe.objective, Precision(precision, torch.device("cpu")), teachers)
        losses.total.backward()
        assert all(map(torch.isfinite, losses.values()))
        gradients = {name: p.grad for name, p in student.named_parameters() if p.grad is not None}
        learning.append(set(gradients))
    assert learning[0] == learning[1]
    assert all(bool(gradient.isfinite().all()) for gradient in gradients.values())
    parts = ("backbone", "encoder", "selection", "decoder.layers.0", "decoder.layers.1", "decoder.score_heads")
    assert all(any(name.startswith(part) and g.any() for name, g in gradients.items()) for part in parts)
    terms = {name.rpartition("/")[2] for name in losses}
    assert ("LogitsDistillation" in terms) == ("detrdistill" in papers)
    assert ("PredictionDistillation" in terms) == ("od-detr" in papers)
    assert ("TaskAligned" in terms) == ("sd-detr" in papers)
    assert (student.config.decoder.split.joining != "none") == ("sd-detr" in papers)
    assert max(differences(recipe.model)) < 1e-4


def test_the_table_knows_every_paper() -> None:
    variations = {"late-matching", "official-groups", "constant-rate", "scratch"}
    papers = {name for name in PAPERS if name not in variations and name.rpartition("-")[2] not in PARTS}
    used = {name for row in MATRIX.values() for papers in row for name in papers.split()}
    assert papers | {"deim"} == used


PARTS = ("released", "paper", "split", "queries", "alignment")
