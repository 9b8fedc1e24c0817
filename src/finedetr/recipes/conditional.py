"""Conditional DETR as published, and what all classic DETRs have in common."""

from __future__ import annotations

from dataclasses import replace

from finedetr.recipes.dfine import with_numbers
from finedetr.recipes.published import CLASSIC
from finedetr.supervise.matching import PerStage
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import BoxGIoU, BoxL1, Focal
from finedetr.train.recipe import Recipe

__all__ = ["classic", "conditional_detr"]


def conditional_detr(base: Recipe) -> Recipe:
    """Conditional DETR (Meng et al., ICCV 2021): queries that look for content and place apart.

    Command: `finedetr train --data coco --recipe conditional-detr --model conditional-detr-r50 --weights ...`.
    Time: 50 epochs of COCO; batch 16 on 8 GPUs.
    Expect (published, COCO val2017 AP, ImageNet backbone): R50 41.0, R50-DC5 43.8. Not checked by us on COCO.
    """
    return classic(base, "conditional-detr", drop=40)


def classic(base: Recipe, name: str, *, drop: int) -> Recipe:
    """Focal loss, L1 and generalized IoU at 2/5/2, every stage matched by itself; flips and sizes; the rate drops once.

    What is not as published: all pictures have one size, and it is this size that varies, from 0.75 to 1.25 of it
    (published: the shorter side from 480 to 800, after crops); the moving average of the weights is evaluated.

    Args:
        base: What to start from.
        name: A row of `CLASSIC`, and the recipe's name.
        drop: The epoch at which the rate drops to a tenth.
    """
    published = CLASSIC[name]
    recipe = with_numbers(base, published)
    return replace(
        recipe,
        name=name,
        schedule=replace(
            recipe.schedule, curve="drop", warmup_steps=0, drop=drop / published.epochs, gamma=0.1, restart=False
        ),
        denoise=False,
        objective=Objective((Focal(weight=2.0), BoxL1(), BoxGIoU()), PerStage()),
    )
