from __future__ import annotations

import pytest
import torch

from finedetr.errors import ConfigError
from finedetr.train.schedule import Drop, FlatCosine, WarmupConstant, apply_rate

GOLDEN = FlatCosine(total=5800, warmup=200, flat=2900, plain=800, gamma=0.5)  # spec 4.1


@pytest.mark.parametrize(
    ("iteration", "rate"),
    [
        (1, 1e-8),
        (100, 1e-4),
        (200, 4e-4),
        (2900, 4e-4),
        (3000, 3.98883e-4),
        (3950, 3e-4),
        (4999, 2.000001e-4),
        (5000, 2e-4),
        (5800, 2e-4),
    ],
)
def test_flat_cosine_gives_the_golden_rates(iteration: int, rate: float) -> None:
    assert 4e-4 * GOLDEN.factor(iteration) == pytest.approx(rate, rel=2e-6)


def test_linear_warm_up_reaches_the_full_rate_at_its_last_iteration_and_stays() -> None:
    curve = WarmupConstant(500)
    assert [curve.factor(i) for i in (1, 250, 500, 501, 10**6)] == [1 / 500, 0.5, 1, 1, 1]


@pytest.mark.parametrize("curve", [WarmupConstant(0), FlatCosine(100, warmup=0, flat=50, plain=10)])
def test_a_warm_up_of_zero_starts_at_the_full_rate(curve: WarmupConstant | FlatCosine) -> None:
    assert curve.factor(1) == 1


def test_no_iteration_runs_at_rate_zero() -> None:
    assert all(GOLDEN.factor(iteration) > 0 for iteration in range(1, 5801))


@pytest.mark.parametrize("total", [1, 2, 3, 7])
def test_the_shortest_runs_have_finite_rates(total: int) -> None:
    curve = FlatCosine(total, warmup=total, flat=total, plain=total)
    assert all(0 < curve.factor(iteration) <= 1 for iteration in range(1, total + 2))


def test_gamma_one_is_constant_after_the_warm_up() -> None:
    curve = FlatCosine(1000, warmup=10, flat=300, plain=100, gamma=1.0)
    assert {curve.factor(i) for i in range(10, 1001)} == {1.0}


def test_an_impossible_schedule_is_refused() -> None:
    with pytest.raises(ConfigError, match="gamma"):
        FlatCosine(10, gamma=1.5)


def test_every_group_keeps_its_own_rate() -> None:
    a, b = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    groups = [{"params": [a], "lr": 1.0, "initial_lr": 1.0}, {"params": [b], "lr": 0.1, "initial_lr": 0.1}]
    optimizer = torch.optim.AdamW(groups)
    assert apply_rate(optimizer, 0.5) == 0.5
    assert apply_rate(optimizer, 0.25) == 0.25
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.025]


def test_a_drop_comes_once_and_stays() -> None:
    curve = Drop(at=10, gamma=0.1, warmup=4)
    assert [curve.factor(i) for i in (1, 4, 10, 11, 99)] == [0.25, 1.0, 1.0, 0.1, 0.1]
    assert Drop(at=0).factor(1) == 0.1
