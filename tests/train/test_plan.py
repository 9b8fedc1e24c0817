from __future__ import annotations

from dataclasses import replace

import pytest

from finedetr.errors import ConfigError
from finedetr.model.zoo import variant
from finedetr.recipes import build
from finedetr.train.budget import Budget, epochs_in_time
from finedetr.train.plan import Plan, share_of
from finedetr.train.state import Progress
from tests.train.small import small_recipe


def test_a_batch_that_cannot_be_divided_names_batches_that_can() -> None:
    assert share_of(32, 4, 2) == 8
    with pytest.raises(ConfigError, match=r"batch 10 cannot be divided among 4 processes(.|\n)*8 and 12"):
        share_of(10, 4, 1)


@pytest.mark.parametrize(
    ("planned", "done", "spent", "budget", "epochs"),
    [
        (100, 2.0, 10.0, 50.0, 10),  # five seconds an epoch
        (6, 2.0, 10.0, 50.0, 6),  # never more than planned
        (100, 2.5, 100.0, 50.0, 3),  # too late: only to the end of this epoch
        (100, 2.0, 10.0, 51.5, 11),  # a third of an eleventh, which the budget ends
        (100, 2.0, 10.0, 51.0, 10),  # too little of it
        (100, 2.0, 10.0, 19.0, 3),  # too few for that
        (100, 0.0, 0.0, 50.0, 100),
        (100, 0.5, 100.0, 10.0, 1),
    ],
)
def test_a_time_budget_gives_the_epochs_that_fit(
    planned: int, done: float, spent: float, budget: float, epochs: int
) -> None:
    assert epochs_in_time(planned, done, spent, budget) == epochs


def test_a_slow_first_step_does_not_spend_a_budget() -> None:
    """An evaluation that was never measured costs what steps cost once the process is warm."""
    budget = Budget(100.0)
    p = Progress(steps=1000)
    for p.total in range(1, 21):
        p.step, seconds = p.total, 10.0 + p.total  # ten seconds before the first step ends
        assert not budget.is_spent(p, seconds, 40.0)  # 40 steps of 10 seconds would be too many
        budget.first_guess(p, seconds, 0.0)
    p.step = p.total = 50
    assert budget.is_spent(p, 60.0, 40.0)
    p.evaluating = 5.0  # measured: shorter
    assert not budget.is_spent(p, 60.0, 40.0)


def test_a_short_run_has_less_of_what_is_strong() -> None:
    recipe = build(variant("dfine-n"), random_start=False)
    epochs, published = recipe.schedule.long_steps // 100, recipe.augmentation
    for share, part in ((1.0, 1), (0.5, 2), (0.1, 10), (0.1, 50)):
        plan = Plan(recipe, epochs // part, 100)
        mild = plan.augmentation
        assert [mild.mosaic, mild.mixup, mild.zoom_out] == pytest.approx([0.5 * share] * 3)
        assert (mild.crop, mild.flip, mild.photometric) == (published.crop, published.flip, published.photometric)
        assert bool(plan.why_milder) == (share < 1)
    assert Plan(recipe, epochs, 100).augmentation == published
    assert "mosaic, mixup, zoom_out with 10% of their chances" in Plan(recipe, 1, 100).why_milder[0]
    dfine = build(variant("dfine-n"), "dfine", random_start=False)
    assert Plan(dfine, 1, 1).augmentation == dfine.augmentation  # the paper's original


def test_the_last_epoch_is_always_evaluated() -> None:
    recipe = small_recipe(epochs=7)
    plan = Plan(replace(recipe, evaluating=replace(recipe.evaluating, every=3)), 7, 10)
    assert [epoch for epoch in range(7) if plan.evaluates_after(epoch)] == [2, 5, 6]


def test_a_restart_comes_before_a_plain_epoch_that_is_not_the_first_of_the_run() -> None:
    recipe = small_recipe()
    recipe = replace(recipe, schedule=replace(recipe.schedule, plain=0.75, restart=True))
    assert [epoch for epoch in range(8) if Plan(recipe, 8, 1).restarts_at(epoch)] == [6, 7]  # the loop asks once
    assert not any(Plan(recipe, 1, 1).restarts_at(epoch) for epoch in range(1))
