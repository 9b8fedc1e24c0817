"""DETRDistill: a frozen teacher beside any of our recipes."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from finedetr.distill.queries import QueryPrior
from finedetr.distill.terms import (
    ContrastiveDistillation,
    EncoderDistillation,
    FeatureDistillation,
    LogitsDistillation,
)
from finedetr.train.recipe import Recipe

__all__ = ["detrdistill", "detrdistill_paper", "detrdistill_released"]

_JOINT = LogitsDistillation(pairing="joint", top=0, weighting="uniform", normalizer="queries")


def detrdistill(base: Recipe) -> Recipe:
    """DETRDistill (Chang et al., ICCV 2023): a teacher's answers, features and queries; what `--teacher` means.

    A student whose queries are learned (Conditional, Deformable and DAB-DETR) is taught as published: one assignment of
    all queries, maps before the encoder where there are several, the teacher's learned queries as they are.

    For queries that depend on the picture it is adapted (spec 6.3): only the teacher's best hundred queries teach,
    pairs count by the teacher's score, distributions of edges are compared in a common frame, and the teacher's queries
    reach the student as cells of its own pyramid. The features' weight makes them about a tenth of the whole.

    Off, and there to be switched on by a weight: `EncoderDistillation` (which cells are worth a query; not in the
    paper) and `ContrastiveDistillation` (in the released code alone).

    Command: `finedetr train --data pictures/ --model dfine-n --teacher runs/large`.
    Time: the teacher's forward pass, and less than 15 % of a step (LOG.md).
    Expect (published, COCO): Deformable DETR R50 44.1 -> 46.6, Conditional DETR R50 40.7 -> 42.9; of the parts, on
    AdaMixer, logits +1.4, features +1.2, query prior +0.6. By us: drawn pictures +7, `dice` +1.4 with DEIM and
    nothing without it; logits alone gained nothing there (LOG.md). Not checked by us on COCO.
    """
    objective, off = base.objective, ContrastiveDistillation(weight=0.0)
    if not base.model.decoder.selects:
        tap: Literal["neck", "encoder"] = "neck" if len(base.model.strides) > 1 else "encoder"
        objective = objective.plus(_JOINT, FeatureDistillation(tap=tap, space="map"), off)
        return replace(base, objective=objective, sources=(*base.sources, QueryPrior(top=0)))
    objective = objective.plus(LogitsDistillation(), FeatureDistillation(weight=5.0), off)
    if base.model.decoder.source != "proposals":
        objective = objective.plus(EncoderDistillation(weight=0.0))
    return replace(base, objective=objective, sources=(*base.sources, QueryPrior()))


def detrdistill_released(base: Recipe) -> Recipe:
    """DETRDistill as its authors' code has it: one assignment of all queries, a contrastive head, own matching.

    Command: `finedetr train --data pictures/ --teacher runs/large --with detrdistill-released`.
    Expect (published, COCO): Deformable DETR R50 46.6, re-run by the authors 46.5. Not checked by us.
    """
    recipe = detrdistill(base)
    return replace(
        recipe,
        objective=recipe.objective.swap(LogitsDistillation, _JOINT).swap(
            ContrastiveDistillation, ContrastiveDistillation()
        ),
        sources=(*base.sources, QueryPrior(assign="self", points="student", top=0)),
    )


def detrdistill_paper(base: Recipe) -> Recipe:
    """DETRDistill as its paper has it: two assignments, classes of the positive ones only; a mask for each query.

    Command: `finedetr train --data pictures/ --teacher runs/large --with detrdistill-paper`.
    Expect: the numbers of the paper were reached with the released code. Not checked by us.
    """
    recipe = detrdistill(base)
    split = LogitsDistillation(pairing="split", top=0, weighting="uniform", normalizer="pairs", negative_labels=False)
    mask = FeatureDistillation(mode="per_query", similarity="dot")
    objective = recipe.objective.swap(LogitsDistillation, split).swap(FeatureDistillation, mask)
    return replace(recipe, objective=objective, sources=(*base.sources, QueryPrior(top=0)))
