"""Recipes: functions Recipe -> Recipe, one file a paper, and the table of their names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from finedetr.errors import UsageError, did_you_mean
from finedetr.model.config import ModelConfig
from finedetr.model.weights import Card, read_card
from finedetr.model.zoo import published_input, variant
from finedetr.recipes.conditional import conditional_detr
from finedetr.recipes.dab import dab_detr
from finedetr.recipes.deformable import deformable_detr
from finedetr.recipes.deim import deim
from finedetr.recipes.deimv2 import deimv2
from finedetr.recipes.detrdistill import detrdistill, detrdistill_paper, detrdistill_released
from finedetr.recipes.dfine import dfine
from finedetr.recipes.dino import dino
from finedetr.recipes.extras import constant_rate, late_matching, official_groups
from finedetr.recipes.fdr import fdr
from finedetr.recipes.od_detr import od_detr, od_detr_paper
from finedetr.recipes.rtdetrv2 import rtdetrv2
from finedetr.recipes.scratch import scratch
from finedetr.recipes.sd_detr import sd_alignment, sd_detr, sd_queries, sd_split
from finedetr.train.recipe import Recipe
from finedetr.train.session import is_detections

__all__ = [
    "PAPERS",
    "RECIPES",
    "build",
    "conditional_detr",
    "dab_detr",
    "deformable_detr",
    "deim",
    "deimv2",
    "detrdistill",
    "dfine",
    "dino",
    "fdr",
    "od_detr",
    "recipe_for",
    "rtdetrv2",
    "scratch",
    "sd_detr",
]

MODEL = "dfine-s"  # where nobody says what to train

RECIPES: dict[str, Callable[[Recipe], Recipe]] = {
    "conditional-detr": conditional_detr,
    "dab-detr": dab_detr,
    "deformable-detr": deformable_detr,
    "deim": deim,
    "deimv2": deimv2,
    "dfine": dfine,
    "dino": dino,
    "rtdetrv2": rtdetrv2,
}
"""Bases, by the name that `--recipe` takes."""

PAPERS: dict[str, Callable[[Recipe], Recipe]] = {
    "fdr": fdr,
    "late-matching": late_matching,
    "official-groups": official_groups,
    "constant-rate": constant_rate,
    "scratch": scratch,
    "detrdistill": detrdistill,
    "detrdistill-released": detrdistill_released,
    "detrdistill-paper": detrdistill_paper,
    "od-detr": od_detr,
    "od-detr-paper": od_detr_paper,
    "sd-detr": sd_detr,
    "sd-split": sd_split,
    "sd-queries": sd_queries,
    "sd-alignment": sd_alignment,
}
"""What `--with` puts on top, in the order given."""


def recipe_for(
    model: str | None = None,
    recipe: str = "deim",
    extras: tuple[str, ...] = (),
    *,
    weights: Path | None = None,
    backbone_weights: bool = False,
    teacher: str | Path | None = None,
) -> Recipe:
    """The recipe of a run before its settings, from what a user says.

    Args:
        model: A name; None: that of the weights, else dfine-s.
        recipe: As in `build`.
        extras: As in `build`.
        weights: The file of the detector that the run starts from.
        backbone_weights: A backbone's weights are given.
        teacher: A frozen teacher, or a JSON of detections, which needs no part of the recipe.
    """
    card = read_card(weights) if weights else None
    chosen = variant(model) if model else card.config if card else variant(MODEL)
    random_start = card is None and not backbone_weights
    listens = teacher is not None and not is_detections(teacher)
    return build(chosen, recipe, extras, random_start=random_start, card=card, teacher=listens)


def build(
    model: ModelConfig,
    recipe: str = "deim",
    extras: tuple[str, ...] = (),
    *,
    random_start: bool,
    card: Card | None = None,
    teacher: bool = False,
) -> Recipe:
    """A recipe by its names.

    Args:
        model: What is trained.
        recipe: A name of `RECIPES`.
        extras: Names of `PAPERS`, applied in order.
        random_start: No weights are given: adapt what presumes a pretrained backbone (`scratch`).
        card: Of given weights: the model stays what it is (no twin of DEIM's), and so do its size and normalization;
            papers may add to it.
        teacher: A frozen teacher is given: where no name of `extras` makes use of it, `detrdistill` does.

    Raises:
        UsageError: A name is unknown; the message suggests the closest ones.
    """
    given = published_input(model)
    base = Recipe(model=model, size=given.size, mean=given.mean, std=given.std)
    base = _find(RECIPES, recipe, "recipe")(base)
    if random_start:
        base = scratch(base)
    if card is not None:
        base = replace(base, model=model, size=card.size, mean=card.mean, std=card.std)
    for name in extras:
        before = base.name
        base = _find(PAPERS, name, "paper for --with")(base)
        base = replace(base, name=f"{before}+{name}")
    if teacher and "frozen" not in base.teachers:
        base = replace(detrdistill(base), name=f"{base.name}+detrdistill")
    return base


def _find(table: dict[str, Callable[[Recipe], Recipe]], name: str, what: str) -> Callable[[Recipe], Recipe]:
    if name not in table:
        other = "--with" if table is RECIPES else "--recipe"
        found = name in RECIPES or name in PAPERS
        hint = f"It goes with another flag: {other} {name}" if found else did_you_mean(name, table)
        raise UsageError(f"no {what} is called {name!r}", code="unknown_key", hint=hint)
    return table[name]
