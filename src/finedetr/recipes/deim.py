"""DEIM on a D-FINE detector."""

from __future__ import annotations

from dataclasses import replace

from finedetr.model.zoo import ZOO
from finedetr.recipes.dfine import dfine, with_numbers
from finedetr.recipes.published import DEIM, row
from finedetr.supervise.terms import MatchabilityAware, Varifocal
from finedetr.train.recipe import Recipe

__all__ = ["deim"]


def deim(base: Recipe) -> Recipe:
    """DEIM (Huang et al., CVPR 2025): dense one-to-one targets and a matchability-aware loss; the default.

    A published D-FINE variant becomes its DEIM twin (SiLU in the decoder, nothing of the backbone frozen).

    Command: `finedetr train --data coco --model dfine-s` (this recipe is the default).
    Time: 132 epochs of COCO for S, 58 for L; the authors used 4 GPUs with batch 32.
    Expect (published, COCO val2017 AP, ImageNet backbone): N 43.0, S 49.0, M 52.7, L 54.7, X 56.5.
    Not checked by us on COCO.
    """
    name, twin = base.model.name, f"deim-{base.model.name}"
    if base.model == ZOO.get(name) and twin in ZOO:
        base = replace(base, model=ZOO[twin])
    recipe = with_numbers(dfine(base), row(DEIM, name))
    return replace(
        recipe,
        name="deim",
        schedule=replace(recipe.schedule, curve="flat-cosine", warmup_steps=2000),
        objective=recipe.objective.swap(Varifocal, MatchabilityAware()),
    )
