"""OD-DETR: the moving average as a teacher beside any of our recipes."""

from __future__ import annotations

from dataclasses import replace

from finedetr.distill.matching import TeacherVotes
from finedetr.distill.queries import AuxiliaryQueries, PredictionQueries
from finedetr.distill.terms import PredictionDistillation, SecondBox
from finedetr.supervise.matching import UnionOfStages
from finedetr.supervise.terms import Focal, MatchabilityAware, QualityFocal, Varifocal
from finedetr.train.recipe import Recipe

__all__ = ["od_detr", "od_detr_paper"]


def od_detr(base: Recipe) -> Recipe:
    """OD-DETR (Wu et al., IJCAI 2024): the moving average of the student steadies the student's matching.

    Its matching is a second opinion (a voter where boxes go by the union of stages), its queries are asked of the
    student and held to its answers, and its two best queries for each target are trained to find that target. Queries
    are the same by the cell they come from (spec 6.4). Focal classes become quality focal ones with two targets;
    varifocal ones and DEIM's know quality already and keep their form, on two targets, too (`od-detr-paper` does not).

    Command: `finedetr train --data pictures/ --with od-detr`.
    Time: a forward pass of the average, and the extra queries of the decoder (LOG.md).
    Expect: the paper reports gains on Deformable DETR, DAB and DINO in 12 and 24 epochs; its tables were not at hand,
    so no number is promised. On drawn pictures: see LOG.md.
    """
    objective = base.objective
    for term in objective.terms:
        if isinstance(term, Focal):
            objective = objective.swap(type(term), QualityFocal(term.weight))
    if not isinstance(objective.policy, UnionOfStages):
        objective = objective.plus(SecondBox())
    if "PredictionDistillation" not in objective.names:
        objective = objective.plus(PredictionDistillation())
    return replace(
        base,
        objective=replace(objective, policy=TeacherVotes(objective.policy)),
        sources=(*base.sources, PredictionQueries(), AuxiliaryQueries()),
    )


def od_detr_paper(base: Recipe) -> Recipe:
    """OD-DETR with its multi-target quality focal loss, whatever the host's classes are.

    Command: `finedetr train --data pictures/ --with od-detr-paper`.
    Expect: on drawn pictures less than `od-detr` in short runs (LOG.md): near its target this loss has little gradient.
    """
    recipe = od_detr(base)
    for term in recipe.objective.terms:
        if isinstance(term, (Varifocal, MatchabilityAware)):
            recipe = replace(recipe, objective=recipe.objective.swap(type(term), QualityFocal(term.weight)))
    return recipe
