"""Small changes for `--with`: single ideas of later papers, and quirks of the official code for comparisons."""

from __future__ import annotations

from dataclasses import replace

from finedetr.errors import UsageError
from finedetr.recipes.published import HOSTS, row
from finedetr.train.recipe import Recipe

__all__ = ["constant_rate", "late_matching", "official_groups"]


def late_matching(base: Recipe) -> Recipe:
    """DEIMv2 (Huang et al., 2025): from 3/4 of the run on, matching goes by score x IoU^4 alone.

    Published switches lie at epoch 100 of 132 (S) to 50 of 68 (L). Expect: no separate number is published.
    """
    return replace(base, schedule=replace(base.schedule, late_matching=100 / 132))


def official_groups(base: Recipe) -> Recipe:
    """The official code's groups of the optimizer, quirks included (spec 4.1): for comparisons with it.

    The published numbers were reached with these; whether they differ from the intended ones is not known.

    Raises:
        UsageError: The model is none of D-FINE's, DEIM's or RT-DETRv2's.
    """
    if base.model.classic or base.model.name.startswith("deimv2"):
        raise UsageError(
            f"the official groups are those of dfine and rtdetrv2 models, {base.model.name} is none", code="conflict"
        )
    table = HOSTS[base.model.decoder.boxes][base.name.startswith("deim")]
    return replace(base, optimizer=replace(base.optimizer, grouping=row(table, base.model.name).groups))


def constant_rate(base: Recipe) -> Recipe:
    """The learning rate stays where it is after the warm-up, as in D-FINE, whatever the augmentation does."""
    return replace(base, schedule=replace(base.schedule, curve="constant"))
