"""DEIM on a D-FINE or an RT-DETRv2 detector, or on one of the classic DETRs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from finedetr.model.config import ModelConfig
from finedetr.model.zoo import ZOO
from finedetr.recipes.conditional import conditional_detr
from finedetr.recipes.dab import dab_detr
from finedetr.recipes.deformable import deformable_detr
from finedetr.recipes.deimv2 import deimv2
from finedetr.recipes.dfine import dfine, with_numbers
from finedetr.recipes.dino import dino
from finedetr.recipes.published import DEIM_RTDETRV2, HOSTS, LONG_STEPS, row
from finedetr.recipes.rtdetrv2 import rtdetrv2
from finedetr.supervise.terms import Focal, MatchabilityAware, Varifocal
from finedetr.train.recipe import Recipe

__all__ = ["deim"]


def deim(base: Recipe) -> Recipe:
    """DEIM (Huang et al., CVPR 2025): dense one-to-one targets and a matchability-aware loss; the default.

    A published variant becomes its DEIM twin (SiLU in the decoder, nothing of the backbone frozen). What is not DEIM's,
    the objective of boxes and who answers for what, is the host's: D-FINE's, or RT-DETRv2's for plain boxes. For the
    classic DETRs nothing is published: they keep their own numbers, with the schedule of DEIM on RT-DETRv2-R50.

    Ours: but for the classic DETRs, a run of fewer than `LONG_STEPS` steps has a higher rate and less of the strong
    augmentation (LOG.md, "Short runs"); `--schedule.long-steps 0` is as published.

    Command: `finedetr train --data coco --model dfine-s` (this recipe is the default).
    Time: 132 epochs of COCO for S, 58 for L; the authors used 4 GPUs with batch 32.
    Expect (published, COCO val2017 AP, ImageNet backbone): N 43.0, S 49.0, M 52.7, L 54.7, X 56.5;
    on RT-DETRv2 R18 49.0, R34 50.9, R50-m 53.2, R50 54.3, R101 55.5.
    Not checked by us on COCO. DEIMv2's detectors are trained by their own recipe, `deimv2`.
    """
    if base.model.name.startswith("deimv2-"):
        return deimv2(base)
    if base.model.classic:
        return _on_classic(base)
    name, twin = base.model.name, f"deim-{base.model.name}"
    if base.model == ZOO.get(name) and twin in ZOO:
        base = replace(base, model=ZOO[twin])
    boxes = base.model.decoder.boxes
    host = dfine if boxes == "distributions" else rtdetrv2
    recipe = with_numbers(host(base), row(HOSTS[boxes][1], name))
    return replace(
        recipe,
        name="deim",
        schedule=replace(recipe.schedule, curve="flat-cosine", warmup_steps=2000, long_steps=LONG_STEPS),
        objective=recipe.objective.swap(Varifocal, MatchabilityAware()),
    )


def _on_classic(base: Recipe) -> Recipe:
    """The host's recipe with DEIM's classes, augmentation and curve."""
    recipe, shares = _host_of(base.model)(base), DEIM_RTDETRV2["r50"]
    return replace(
        recipe,
        name="deim",
        schedule=replace(
            recipe.schedule,
            curve="flat-cosine",
            warmup_steps=2000,
            gamma=shares.gamma,
            start=shares.start / shares.epochs,
            flat=shares.mosaic_end / shares.epochs,
            plain=shares.plain_from / shares.epochs,
        ),
        objective=recipe.objective.swap(Focal, MatchabilityAware()),
    )


def _host_of(model: ModelConfig) -> Callable[[Recipe], Recipe]:
    """The recipe of a classic detector."""
    match model.decoder.source:
        case "mixed" | "tokens":
            return dino
        case "anchors":
            return dab_detr
        case _:
            return conditional_detr if model.decoder.attention == "conditional" else deformable_detr
