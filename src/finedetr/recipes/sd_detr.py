"""SD-DETR: a decoder that is split for classes and boxes, and what goes with it, on any of our detectors."""

from __future__ import annotations

from dataclasses import replace

from finedetr.errors import UsageError
from finedetr.model.config import SalientConfig, SplitConfig
from finedetr.recipes.fdr import with_decoder
from finedetr.supervise.terms import Focal, MatchabilityAware, QualityFocal, TaskAligned, Varifocal
from finedetr.train.recipe import Recipe

__all__ = ["sd_alignment", "sd_detr", "sd_queries", "sd_split"]

BY_BOX = (Varifocal, MatchabilityAware)  # class terms with targets of their own, at weight 1 where TaskAligned has 2


def sd_detr(base: Recipe) -> Recipe:
    """SD-DETR, or Decoupled DETR (Zhang et al., ICCV 2023): classes and boxes look at different parts of an object.

    Three parts, each a name for itself: `sd-split`, `sd-queries`, `sd-alignment`. From weights of the plain host it
    begins as that host where its queries are the host's (`--weights`; what became of each part is said).

    Command: `finedetr train --data coco --recipe conditional-detr --model conditional-detr-r50 --with sd-detr`.
    Time: `--dry-run` says what the second branch costs.
    Expect (published, COCO val2017 AP, Conditional DETR): R50 41.0 -> 45.5 in 50 epochs, 32.2 -> 39.5 in 12; of the
    parts, from the authors' 41.7: split +1.4, queries +0.5, alignment +1.9. On other hosts nothing is published, and we
    expect less of it. Not checked by us on COCO; on drawn pictures: see LOG.md.
    """
    made = sd_alignment(sd_queries(sd_split(base)))
    decoder = made.model.decoder
    return made if decoder == base.model.decoder else replace(made, model=with_decoder(base, "sd", decoder).model)


def sd_split(base: Recipe) -> Recipe:
    """SD-DETR's first part: a self-attention for both, then a branch for classes and one for boxes.

    The classic hosts join as many tokens as both branches have, as the paper draws it, and have learned queries for
    each. The real-time family joins the mean of both, which costs no more than one self-attention (spec 6.2).

    Command: `finedetr train --data pictures/ --with sd-split`.
    Expect: see `sd_detr`.
    """
    decoder = base.model.decoder
    if decoder.split.joining != "none":
        return base
    split = SplitConfig(
        joining="token" if base.model.classic else "fused", queries="own" if decoder.source == "points" else "shared"
    )
    return with_decoder(base, "split", replace(decoder, split=split))


def sd_queries(base: Recipe) -> Recipe:
    """SD-DETR's second part: queries of their own for classes and for boxes, made of the picture.

    Where queries are learned (Conditional and Deformable DETR, DAB-DETR), a small detector finds boxes, and points in
    them, for each task its own, make the queries; without `sd-split` before it, the same points for both. Where they
    are tokens of the pyramid, each branch moves them by a linear layer that begins with zero (spec 6.2).

    Command: `finedetr train --data pictures/ --with sd-split sd-queries`.
    Expect: see `sd_detr`.

    Raises:
        UsageError: Queries are tokens, and there is one branch.
    """
    decoder = base.model.decoder
    learned = decoder.source in ("points", "anchors")
    if decoder.salient.queries or (decoder.split.queries == "own" and not learned):
        return base
    if learned:
        split = replace(decoder.split, queries="shared")
        return with_decoder(base, "salient", replace(decoder, split=split, salient=SalientConfig(queries=True)))
    if decoder.split.joining == "none":
        raise UsageError(
            f"queries of {base.model.name} are tokens of the picture already; only two branches can have their own",
            code="conflict",
            hint="Give --with sd-split sd-queries, or --with sd-detr.",
        )
    return with_decoder(base, "queries", replace(decoder, split=replace(decoder.split, queries="own")))


def sd_alignment(base: Recipe) -> Recipe:
    """SD-DETR's loss of classes in the place of the host's: a score is to be as high as its box is good.

    Its factors make it small, so where the host's loss weighs 1 for targets of its own (D-FINE, RT-DETRv2, DEIM), it
    weighs 2; a focal loss gives it its weight (spec 3.4, 6.2).

    Command: `finedetr train --data pictures/ --with sd-alignment`.
    Expect: see `sd_detr`; D-FINE's loss has the same fixed point, so no gain is to be expected there.
    """
    objective = base.objective
    for term in objective.terms:
        if isinstance(term, (Focal, QualityFocal, *BY_BOX)):
            weight = 2 * term.weight if isinstance(term, BY_BOX) else term.weight
            objective = objective.swap(type(term), TaskAligned(weight))
    return replace(base, objective=objective)
