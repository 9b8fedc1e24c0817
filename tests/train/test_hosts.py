"""The classic hosts in training: every host takes every recipe, and every parameter learns."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finedetr.errors import UsageError
from finedetr.model.detector import Detector
from finedetr.model.zoo import ZOO, variant
from finedetr.recipes import build
from finedetr.records import Output, Prediction, QueryGroup, Targets
from finedetr.supervise.matching import PerStage, UnionOfStages
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import BoxGIoU, BoxL1, Focal
from finedetr.train.optimizer import parameter_groups
from finedetr.train.recipe import Recipe
from finedetr.train.schedule import Drop
from finedetr.train.step import Precision, Source, step
from tests.model.classic import CLASSES, RECIPES, random_detector, small

CPU = torch.device("cpu")


def batch(counts: tuple[int, ...] = (3, 0)) -> tuple[torch.Tensor, Targets]:
    generator = torch.Generator().manual_seed(1)
    boxes = 0.2 + 0.4 * torch.rand(sum(counts), 4, generator=generator)
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    labels = torch.randint(0, CLASSES, (sum(counts),), generator=generator)
    return torch.rand(len(counts), 3, 64, 64, generator=generator), Targets(labels, boxes, image, counts)


def recipe_of(host: str, name: str, *extras: str) -> Recipe:
    return build(small(host, layers=2, encoders=1), name, extras, random_start=False)


def denoising(recipe: Recipe) -> Source:
    """Denoising queries of a batch's targets."""
    return lambda targets, _: recipe.denoising(targets, CLASSES)


@pytest.mark.parametrize("extras", [(), ("fdr",)])
@pytest.mark.parametrize("deim", [False, True])
@pytest.mark.parametrize("host", RECIPES)
def test_a_step_reaches_every_trainable_parameter(host: str, deim: bool, extras: tuple[str, ...]) -> None:
    recipe = recipe_of(host, "deim" if deim else RECIPES[host], *extras)
    detector = random_detector(recipe.model).train()
    sources = (denoising(recipe),) if recipe.denoise else ()
    images, targets = batch()
    losses = step(detector, images, targets, sources, recipe.objective, Precision("fp32", CPU))
    losses.total.backward()
    assert all(map(torch.isfinite, losses.values()))
    silent = [
        name for name, p in detector.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    ]
    if not recipe.denoise:
        silent = [name for name in silent if not name.startswith("label_embedding")]
    if recipe.model.decoder.attention == "conditional":  # its queries' content starts at zero, as published
        zero = [f"decoder.layers.0.self_attention.{part}.weight" for part in ("qk", "v")]
        assert silent == zero
    else:
        assert silent == []
    label = "MatchabilityAware" if deim else "Focal"
    layers = ["encoder"] * (host == "dino-r50") + ["initial"] * bool(extras) + ["layer0", "layer1"]
    assert [name for name in losses if name.startswith("matching") and name.endswith(label)] == [
        f"matching/{stage}/{label}" for stage in layers
    ]
    assert ("proposals/encoder/BoxL1" in losses) == host.endswith("two-stage")
    assert ("denoising/layer0/BoxL1" in losses) == (host == "dino-r50")
    assert ("matching/layer1/FineGrainedLocalization" in losses) == bool(extras)


@pytest.mark.parametrize("host", ["conditional-detr-r50", "dab-detr-r50", "deformable-detr-r50-refine", "dino-r50"])
def test_a_step_in_bfloat16_keeps_places_exact(host: str) -> None:
    recipe = recipe_of(host, RECIPES[host])
    detector = random_detector(recipe.model).train()
    seen: list[torch.dtype] = []
    for layer in detector.decoder.layers:
        layer.cross_attention.register_forward_pre_hook(lambda _, given: seen.append(given[-2].dtype))  # type: ignore[union-attr]
    losses = step(detector, *batch(), (), recipe.objective, Precision("bf16", CPU))
    losses.total.backward()
    assert all(map(torch.isfinite, losses.values()))
    if not host.startswith(("conditional", "dab")):  # there it is a query, not a place
        assert set(seen) == {torch.float32}


def test_boxes_as_queries_can_be_denoised() -> None:
    recipe = replace(recipe_of("dab-detr-r50", "dab-detr"), denoise=True)
    detector = random_detector(recipe.model).train()
    source = denoising(recipe)
    losses = step(detector, *batch(), (source,), recipe.objective, Precision("fp32", CPU))
    losses.total.backward()
    assert losses["denoising/layer1/BoxL1"] > 0
    assert detector.label_embedding is not None
    assert detector.label_embedding.weight.grad is not None
    assert detector.label_embedding.weight.grad.any()


@pytest.mark.parametrize("host", RECIPES)
def test_a_batch_without_targets_teaches_only_the_background(host: str) -> None:
    recipe = recipe_of(host, RECIPES[host], "fdr")
    detector = random_detector(recipe.model).train()
    losses = step(detector, *batch((0, 0)), (), recipe.objective, Precision("fp32", CPU))
    losses.total.backward()
    assert all(map(torch.isfinite, losses.values()))
    assert not any(value for name, value in losses.items() if name.endswith(("BoxL1", "BoxGIoU")))


def test_recipes_have_the_published_numbers() -> None:
    terms = {}
    for host, name in RECIPES.items():
        recipe = build(variant(host), name, random_start=False)
        terms[name] = tuple((type(term).__name__, term.weight) for term in recipe.objective.terms)
        assert isinstance(recipe.objective.policy, PerStage)
        assert (recipe.mean, recipe.size) == ((0.485, 0.456, 0.406), (800, 1056))
        assert recipe.denoise == (name == "dino")
        optimizer = recipe.optimizer
        batch, rate = (32, 2e-4) if name == "deformable-detr" else (16, 1e-4)
        assert (optimizer.batch, optimizer.lr, optimizer.lr * optimizer.backbone) == (
            batch,
            rate,
            pytest.approx(rate / 10),
        )
        assert (optimizer.weight_decay, optimizer.clip) == (1e-4, 0.1)
        assert optimizer.aim == (0.1 if name == "deformable-detr" else 1.0)
        epochs, drop = (12, 11) if name == "dino" else (50, 40)
        assert recipe.epochs == epochs
        curve = recipe.schedule.rates(epochs, 100)
        assert isinstance(curve, Drop)
        assert [curve.factor(i) for i in (1, drop * 100, drop * 100 + 1)] == [1.0, 1.0, 0.1]
        windows = recipe.schedule.windows(epochs)
        assert {windows.kind(epoch).name for epoch in range(epochs)} == {"start"}
    assert terms["conditional-detr"] == terms["deformable-detr"] == (("Focal", 2.0), ("BoxL1", 5.0), ("BoxGIoU", 2.0))
    assert terms["dab-detr"] == terms["dino"] == (("Focal", 1.0), ("BoxL1", 5.0), ("BoxGIoU", 2.0))


def test_deim_keeps_the_numbers_of_the_host() -> None:
    recipe = build(variant("dino-r50"), "deim", random_start=False)
    assert recipe.objective.names == ("MatchabilityAware", "BoxL1", "BoxGIoU")
    assert (recipe.epochs, recipe.optimizer.lr, recipe.denoising.box_noise) == (12, 1e-4, 0.4)
    assert recipe.schedule.curve == "flat-cosine"
    assert recipe.schedule.windows(60).kind(10).mosaic


def test_fdr_is_for_plain_boxes() -> None:
    recipe = build(variant("deformable-detr-r50"), "deformable-detr", ("fdr",), random_start=False)
    assert recipe.model.name == "deformable-detr-r50-fdr"
    assert recipe.model.name not in ZOO
    assert recipe.objective.names[-2:] == ("FineGrainedLocalization", "LocalizationDistillation")
    assert recipe.objective.policy == UnionOfStages()
    with pytest.raises(UsageError, match="distributions already"):
        build(variant("dfine-s"), "dfine", ("fdr",), random_start=False)


def test_what_decides_where_to_look_has_a_rate_of_its_own() -> None:
    with torch.device("meta"):
        detector = Detector(small("deformable-detr-r50"), CLASSES)
    names = {id(p): name for name, p in detector.named_parameters()}
    groups = parameter_groups(detector, lr=1e-3, weight_decay=0.1, backbone=0.5, aim=0.1)
    found = {str(group["name"]): group for group in groups}
    assert {name: group["lr"] for name, group in found.items()} == {
        "main, no decay": 1e-3,
        "main, decay": 1e-3,
        "backbone, decay": 5e-4,
        "aim, no decay": 1e-4,
        "aim, decay": 1e-4,
    }
    slow = {names[id(p)] for part in ("aim, decay", "aim, no decay") for p in found[part]["params"]}  # type: ignore[attr-defined]
    assert slow == {name for name in names.values() if "sampling_offsets" in name or "selection.point" in name}
    assert len(slow) == 2 * (2 + 3 + 1)
    plain = parameter_groups(detector, lr=1e-3, weight_decay=0.1)
    assert not any(str(group["name"]).startswith("aim") for group in plain)


def test_losses_and_matches_are_those_of_transformers() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("scipy")
    from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher, DeformableDetrImageLoss

    generator = torch.Generator().manual_seed(0)
    logits, boxes = torch.randn(3, 9, CLASSES, generator=generator), torch.rand(3, 9, 4, generator=generator)
    _, targets = batch((2, 0, 4))
    starts = (*targets.starts, len(targets))
    rows = [slice(starts[i], starts[i + 1]) for i in range(3)]
    theirs = [{"class_labels": targets.labels[row], "boxes": targets.boxes[row]} for row in rows]
    matcher = DeformableDetrHungarianMatcher(class_cost=2, bbox_cost=5, giou_cost=2)
    answers = {"logits": logits, "pred_boxes": boxes}
    wanted = DeformableDetrImageLoss(matcher, CLASSES, 0.25, ["labels", "boxes"])(answers, theirs)
    output = Output(Prediction(logits[None], boxes[None], ("layer0",)))
    losses = Objective((Focal(), BoxL1(weight=1.0), BoxGIoU(weight=1.0)), PerStage())(output, targets)
    for term, name in (("Focal", "loss_ce"), ("BoxL1", "loss_bbox"), ("BoxGIoU", "loss_giou")):
        torch.testing.assert_close(losses[f"matching/layer0/{term}"], wanted[name])
    pairs = PerStage()(output.matching, targets).labels
    for image, (queries, own) in enumerate(matcher(answers, theirs)):
        here = pairs.image == image
        assert sorted(zip(queries.tolist(), own.tolist(), strict=True)) == sorted(
            zip(pairs.query[here].tolist(), (pairs.target[here] - starts[image]).tolist(), strict=True)
        )


def test_proposals_are_held_to_objects_of_any_class() -> None:
    """The encoder of two stages learns class 0 for all objects (spec 2.3); other groups keep their labels."""
    generator = torch.Generator().manual_seed(0)
    answers = Prediction(
        torch.randn(1, 2, 9, CLASSES, generator=generator), torch.rand(1, 2, 9, 4, generator=generator), ("encoder",)
    )
    _, targets = batch((3, 1))
    group = QueryGroup("proposals", answers.boxes[0], content=torch.zeros(2, 9, 0), agnostic=True)
    output = Output(answers, ((group, answers), (replace(group, name="other", agnostic=False), answers)))
    objective = Objective((Focal(), BoxL1()), PerStage())
    losses = objective(output, targets)
    anything = objective(Output(answers), replace(targets, labels=torch.zeros_like(targets.labels)))
    assert losses["proposals/encoder/Focal"] == anything["matching/encoder/Focal"]
    assert losses["other/encoder/Focal"] == losses["matching/encoder/Focal"] != losses["proposals/encoder/Focal"]
