"""DEIMv2's training of DEIMv2's detectors."""

from __future__ import annotations

from dataclasses import replace

from finedetr.recipes.dfine import dfine, with_numbers
from finedetr.recipes.published import DEIMV2, LONG_STEPS, row
from finedetr.recipes.rtdetrv2 import rtdetrv2
from finedetr.supervise.matching import PerStage
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import BoxGIoU, BoxL1, MatchabilityAware, Varifocal
from finedetr.train.recipe import Recipe

__all__ = ["deimv2"]


def deimv2(base: Recipe) -> Recipe:
    """DEIMv2 (Huang et al., 2025): DEIM with objects pasted between pictures, and late matching by score and overlap.

    The three smallest learn plain boxes only, every stage matched by itself. What is not as published: CopyBlend ends
    with the strong augmentation in all sizes (N: with the mosaic), and its threshold counts pixels of the input; for
    the three smallest the rate's tail begins where the augmentation ends (published: epoch 468 and 400 of 500).

    Command: `finedetr train --data coco --model deimv2-s`.
    Time: 132 epochs of COCO for S, 58 for X, 500 for the three smallest.
    Expect (published, COCO val2017 AP, pretrained backbone): Atto 23.8, Femto 31.0, Pico 38.5, N 43.0, S 50.9, M 53.0,
    L 56.0, X 57.8. Not checked by us on COCO.
    """
    published = row(DEIMV2, base.model.name)
    host = dfine if base.model.decoder.boxes == "distributions" else rtdetrv2
    recipe = with_numbers(host(base), published)
    objective = (
        recipe.objective.swap(Varifocal, MatchabilityAware())
        if published.distributions
        else Objective((MatchabilityAware(), BoxL1(), BoxGIoU()), PerStage())
    )
    return replace(
        recipe,
        name="deimv2",
        schedule=replace(
            recipe.schedule,
            curve="flat-cosine",
            long_steps=LONG_STEPS,
            warmup_steps=published.warmup_steps,
            late_matching=published.late / published.epochs,
        ),
        augmentation=replace(
            recipe.augmentation,
            mosaic=published.mosaic,
            mixup=published.mixup,
            copy_blend=published.copy_blend,
            min_size=published.min_size,
        ),
        objective=objective,
    )
