from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from finedetr.errors import ConfigError, ModelError
from finedetr.train.ema import MovingAverage, ramped_decay


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))


def test_the_decay_follows_the_published_formula() -> None:
    assert ramped_decay(0.9999, 1000, 500) == pytest.approx(0.9999 * (1 - math.exp(-0.5)))
    assert ramped_decay(0.9999, 0, 1) == 0.9999


def test_a_constant_target_gives_the_closed_form() -> None:
    student = model()
    average = MovingAverage(student, decay=0.9, warmup=3.0)
    start = average.model[0].weight.clone()  # type: ignore[index, operator]
    with torch.no_grad():
        student[0].weight.fill_(2.0)  # type: ignore[index, operator, union-attr]
    for _ in range(7):
        average.update()
    left = math.prod(0.9 * (1 - math.exp(-n / 3.0)) for n in range(1, 8))
    torch.testing.assert_close(average.model[0].weight, left * start + (1 - left) * 2.0)  # type: ignore[index]


def test_a_decay_of_zero_copies_and_one_near_one_keeps() -> None:
    for decay, copies in ((0.0, True), (1 - 1e-9, False)):
        model = nn.Linear(2, 2)
        average = MovingAverage(model, decay, 0)
        before = average.model.weight.clone()
        with torch.no_grad():
            model.weight.add_(1.0)
        average.update()
        torch.testing.assert_close(average.model.weight, model.weight if copies else before)


def test_statistics_of_norms_are_averaged_and_counters_copied() -> None:
    student = model()
    average = MovingAverage(student, decay=0.5, warmup=0)
    student.train()(torch.randn(4, 1, 3, 3) + 5)
    average.update()
    norm, mean = student[1], average.model[1]  # type: ignore[index]
    torch.testing.assert_close(mean.running_mean, norm.running_mean / 2)
    assert mean.num_batches_tracked == norm.num_batches_tracked == 1


def test_the_average_is_in_eval_and_the_student_untouched() -> None:
    student = model().train()
    before = {name: value.clone() for name, value in student.state_dict().items()}
    average = MovingAverage(student)
    average.update()
    assert not average.model.training
    assert student.training
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())
    assert not any(p.requires_grad for p in average.model.parameters())


def test_a_restart_really_changes_the_decay() -> None:
    average = MovingAverage(model(), decay=0.9999, warmup=1000)
    average.update()
    average.restart(0.5)
    assert average.update() == 0.5


def test_its_state_continues_exactly() -> None:
    one, two = model(), model()
    a, b = MovingAverage(one, 0.9, 5), MovingAverage(two, 0.1, 1)
    for _ in range(3):
        with torch.no_grad():
            one[0].weight.add_(1.0)  # type: ignore[index, operator, union-attr]
        a.update()
    b.load_state_dict(a.state_dict())
    two.load_state_dict(one.state_dict())
    a.update(), b.update()
    assert all(
        torch.equal(x, y) for x, y in zip(a.model.state_dict().values(), b.model.state_dict().values(), strict=True)
    )
    assert b.updates == 4


def test_an_impossible_decay_and_a_foreign_state_are_refused() -> None:
    with pytest.raises(ConfigError, match="decay"):
        MovingAverage(model(), decay=1.0)
    with pytest.raises(ConfigError, match="decay"):
        MovingAverage(model()).restart(-1)
    with pytest.raises(ModelError, match="lacks"):
        MovingAverage(model()).load_state_dict({"decay": 0.9})
