"""DAB-DETR as published."""

from __future__ import annotations

from dataclasses import replace

from finedetr.recipes.conditional import classic
from finedetr.train.recipe import Recipe

__all__ = ["dab_detr"]


def dab_detr(base: Recipe) -> Recipe:
    """DAB-DETR (Liu et al., ICLR 2022): queries are boxes that every layer refines.

    Command: `finedetr train --data coco --recipe dab-detr --model dab-detr-r50 --weights ...`.
    Time: 50 epochs of COCO; batch 16.
    Expect (published, COCO val2017 AP, ImageNet backbone): R50 42.2. Not checked by us on COCO.
    """
    recipe = classic(base, "dab-detr", drop=40)
    return replace(recipe, objective=recipe.objective.with_weights({"Focal": 1.0}))
