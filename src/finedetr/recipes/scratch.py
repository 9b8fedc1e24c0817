"""Training from random weights: what the published recipes presume of a pretrained backbone is taken back."""

from __future__ import annotations

from dataclasses import replace

from finedetr.train.recipe import Recipe

__all__ = ["scratch"]


def scratch(base: Recipe) -> Recipe:
    """From random weights, on any number of pictures; applied whenever no `--weights` are given.

    The published rates are for an ImageNet backbone, which is to change little: 1/2 (N, S) to 1/100 (X) of the rate,
    and frozen norms and stem in D-FINE L and X. A random backbone has to learn, so it trains at the full rate with
    nothing frozen, and the rate is 8e-4 at batch 32 for all sizes, up to three times that in a short run of DEIM's
    recipes; the classic DETRs keep theirs. Restarts from the best epoch, which are made for the last percent of a long
    run, are off.

    Command: `finedetr train --data pictures/` (without `--weights`).
    Expect: depends on the pictures; LOG.md has the curves of `finedetr demo` and of small real sets.
    """
    backbone = replace(base.model.backbone, freeze_stem=False, freeze_norm=False, freeze_stages=0)
    optimizer = base.optimizer if base.model.classic else replace(base.optimizer, lr=8e-4, batch=32)
    return replace(
        base,
        model=replace(base.model, backbone=backbone),
        optimizer=replace(optimizer, backbone=1.0),
        schedule=replace(base.schedule, restart=False, hasten=3.0),
    )
