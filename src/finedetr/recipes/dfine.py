"""D-FINE as published."""

from __future__ import annotations

from dataclasses import replace

from finedetr.errors import UsageError
from finedetr.recipes.published import DFINE, Published, row
from finedetr.supervise.denoising import Denoising
from finedetr.train.recipe import Average, Optimizer, Recipe, Schedule

__all__ = ["dfine", "with_numbers"]


def dfine(base: Recipe) -> Recipe:
    """D-FINE (Peng et al., ICLR 2025): boxes as refined distributions, shallow layers taught by the last one.

    Command: `finedetr train --data coco --recipe dfine --model dfine-s`.
    Time: 132 epochs of COCO; the authors used 4 GPUs with batch 32.
    Expect (published, COCO val2017 AP, ImageNet backbone): N 42.8, S 48.5, M 52.3, L 54.0, X 55.8.
    Not checked by us on COCO.

    Raises:
        UsageError: The model's boxes are no distributions.
    """
    if base.model.decoder.boxes != "distributions":
        raise UsageError(
            f"the recipe dfine refines distributions of edges, and {base.model.name} has plain boxes",
            code="conflict",
            hint="Use --recipe deim or rtdetrv2, or a dfine model.",
        )
    published = row(DFINE, base.model.name)
    recipe = with_numbers(base, published)
    return replace(
        recipe,
        name="dfine",
        schedule=replace(recipe.schedule, curve="constant", warmup_steps=500),
        denoise=True,
        denoising=Denoising(),
        objective=Recipe().objective,  # what a recipe minimizes if nobody says anything is D-FINE's
    )


def with_numbers(base: Recipe, published: Published) -> Recipe:
    """A recipe with the numbers of one published row, as shares of its epochs."""
    epochs = published.epochs
    return replace(
        base,
        epochs=epochs,
        optimizer=replace(
            Optimizer(),
            lr=published.lr,
            batch=published.batch,
            backbone=published.backbone_lr / published.lr,
            weight_decay=published.weight_decay,
        ),
        schedule=Schedule(
            start=published.start / epochs,
            flat=published.mosaic_end / epochs,
            plain=published.plain_from / epochs,
            gamma=published.gamma,
            restart=True,
        ),
        average=Average(restart_decay=published.restart_decay),
        augmentation=replace(base.augmentation, multi_scale_repeat=published.repeat),
    )
