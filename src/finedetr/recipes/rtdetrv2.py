"""RT-DETRv2 as published."""

from __future__ import annotations

from dataclasses import replace

from finedetr.recipes.dfine import with_numbers
from finedetr.recipes.published import RTDETRV2, row
from finedetr.supervise.denoising import Denoising
from finedetr.supervise.matching import PerStage
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import BoxGIoU, BoxL1, Varifocal
from finedetr.train.recipe import Recipe

__all__ = ["rtdetrv2"]


def rtdetrv2(base: Recipe) -> Recipe:
    """RT-DETRv2 (Lv et al., 2024): plain boxes, every stage matched by itself, varifocal classes.

    Command: `finedetr train --data coco --recipe rtdetrv2 --model rtdetrv2-r18`.
    Time: 120 epochs of COCO for R18 and R34, 84 for R50-m, 72 for the others; batch 16.
    Expect (published, COCO val2017 AP, ImageNet backbone): R18 48.1, R34 49.9, R50-m 51.9, R50 53.4, R101 54.3.
    The `-dsp` models (discrete sampling) start from the weights of their twins, `--weights rtdetrv2-r18-coco`, for 36
    (R18, R50-m) or 12 epochs; expect R18 47.4, R34 49.2, R50-m 51.4, R50 52.9.
    Not checked by us on COCO.
    """
    recipe = with_numbers(base, row(RTDETRV2, base.model.name))
    return replace(
        recipe,
        name="rtdetrv2",
        schedule=replace(recipe.schedule, curve="constant", warmup_steps=2000, restart=False),
        denoise=base.model.decoder.boxes_are_queries,
        denoising=Denoising(),
        objective=Objective((Varifocal(), BoxL1(), BoxGIoU()), PerStage()),
    )
