from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from finedetr.errors import DivergedError, UsageError
from finedetr.model.detector import Detector
from finedetr.records import Guidance, QueryGroup, Targets
from finedetr.supervise.denoising import Denoising
from finedetr.supervise.matching import PerStage
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import BoxGIoU, BoxL1, MatchabilityAware
from finedetr.train.distributed import World
from finedetr.train.ema import MovingAverage
from finedetr.train.optimizer import adamw, parameter_groups
from finedetr.train.step import Precision, Updater, generator_for, parts_of
from tests.model.test_rtdetrv2 import TINY_RTDETR
from tests.train.tiny import TINY

NAMES = ("a.jpg", "b.jpg", "c.jpg", "d.jpg")
OBJECTIVE = Objective((MatchabilityAware(), BoxL1(), BoxGIoU()), PerStage())
CPU = torch.device("cpu")
STAGES = ("encoder", "initial", "layer0", "layer1")


def batch() -> tuple[torch.Tensor, Targets]:
    generator = torch.Generator().manual_seed(1)
    counts = (3, 0, 1, 2)
    boxes = 0.2 + 0.4 * torch.rand(6, 4, generator=generator)
    image = torch.repeat_interleave(torch.arange(4), torch.tensor(counts))
    labels = torch.randint(0, 3, (6,), generator=generator)
    return torch.rand(4, 3, 64, 64, generator=generator), Targets(labels, boxes, image, counts)


def updater(lr: float = 1e-3, clip: float = 0.0) -> Updater:
    torch.manual_seed(0)
    detector = Detector(TINY, 3).train()
    for module in detector.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()  # statistics of a batch are not those of its parts
    optimizer = adamw(parameter_groups(detector, lr=lr, weight_decay=0.0))
    return Updater(detector, optimizer, MovingAverage(detector, 0.5, 0), Precision("fp32", CPU), World(), clip)


def test_a_batch_in_parts_gives_the_losses_and_the_gradient_of_the_whole() -> None:
    whole, parts = updater(), updater()
    images, targets = batch()
    one = whole(images, targets, NAMES, (), OBJECTIVE)
    two = parts(images, targets, NAMES, (), OBJECTIVE, accumulate=2)
    assert two.gradient == pytest.approx(one.gradient, rel=1e-4)
    assert two.loss == pytest.approx(one.loss, rel=1e-5)
    assert two.losses == pytest.approx(one.losses, rel=1e-4, abs=1e-6)


def test_parts_count_their_pictures_from_zero() -> None:
    images, targets = batch()
    first, second = parts_of(images, targets, NAMES, 2)
    assert (first.names, second.names) == (NAMES[:2], NAMES[2:])
    assert (first.targets.counts, second.targets.counts) == ((3, 0), (1, 2))
    assert second.targets.image.tolist() == [0, 1, 1]
    assert torch.equal(second.targets.boxes, targets.boxes[3:])
    assert torch.equal(second.images, images[2:])


def test_steps_learn_clip_and_move_the_average() -> None:
    update = updater(lr=3e-3, clip=0.1)
    update.student.train()
    images, targets = batch()
    before = update.average.model.state_dict()["backbone.stem.stem1.conv.weight"].clone()
    losses = [update(images, targets, NAMES, (), OBJECTIVE).loss for _ in range(25)]
    assert sum(losses[-3:]) < 0.85 * sum(losses[:3])
    assert not torch.equal(before, update.average.model.state_dict()["backbone.stem.stem1.conv.weight"])
    assert update.average.updates == 25
    assert all(p.grad is None for p in update.parameters)


def test_plain_boxes_learn_with_denoising_queries() -> None:
    torch.manual_seed(0)
    detector = Detector(TINY_RTDETR, 3).train()
    optimizer = adamw(parameter_groups(detector, lr=3e-3, weight_decay=0.0))
    learner = Updater(detector, optimizer, MovingAverage(detector, 0.5, 0), Precision("fp32", CPU), World(), 0.1)
    images, targets = batch()

    def noisy(t: Targets, _: Guidance | None) -> QueryGroup:
        return Denoising()(t, 3, torch.Generator().manual_seed(0))

    reports = [learner(images, targets, NAMES, (noisy,), OBJECTIVE) for _ in range(20)]
    assert reports[-1].loss < 0.9 * reports[0].loss
    for stage in ("encoder", "layer0", "layer1", "layer2"):
        assert any(stage in name for name in reports[0].losses), stage


def test_a_batch_without_any_target_changes_every_parameter_group_without_a_fault() -> None:
    update = updater()
    images, _ = batch()
    nothing = Targets.from_lists([torch.zeros(0)] * 4, [torch.zeros(0, 4)] * 4)
    generator = generator_for(0, 0, 0, 0, CPU)

    def source(t: Targets, _: Guidance | None) -> QueryGroup:
        return Denoising()(t, 3, generator)

    report = update(images, nothing, NAMES, (source,), OBJECTIVE)
    assert report.losses["matching/layer1/BoxL1"] == 0
    assert all(torch.isfinite(p).all() for p in update.parameters)


def test_a_loss_that_is_not_finite_names_term_stage_and_pictures_and_changes_nothing() -> None:
    update = updater()
    images, targets = batch()
    images[2] = float("nan")
    with pytest.raises(DivergedError, match=r"matching/\w+/\w+ is nan.*c\.jpg") as raised:
        update(images, targets, NAMES, (), OBJECTIVE)
    assert "a.jpg" not in raised.value.message
    assert set(raised.value.losses) <= {f"matching/{s}/{t}" for s in STAGES for t in OBJECTIVE.names}


def test_a_bad_batch_changes_neither_weights_nor_the_statistics_of_norms() -> None:
    update = updater()
    update.student.train()
    images, targets = batch()
    update(images, targets, NAMES, (), OBJECTIVE)
    before = {name: tensor.clone() for name, tensor in update.student.state_dict().items()}
    with pytest.raises(DivergedError):
        update(images * float("nan"), targets, NAMES, (), OBJECTIVE)
    after = update.student.state_dict()
    assert [name for name, tensor in before.items() if not torch.equal(tensor, after[name])] == []
    assert update.average.updates == 1


def test_a_bad_part_of_a_batch_spoils_the_whole_batch_and_nothing_else() -> None:
    update = updater()
    images, targets = batch()
    poisoned = images.clone()
    poisoned[0] = float("nan")  # the first of two parts; the second one is worked off all the same
    with pytest.raises(DivergedError, match=r"a\.jpg"):
        update(poisoned, targets, NAMES, (), OBJECTIVE, accumulate=2)
    fresh = updater()
    assert update(images, targets, NAMES, (), OBJECTIVE) == fresh(images, targets, NAMES, (), OBJECTIVE)


def test_a_gradient_that_is_not_finite_stops_too() -> None:
    update = updater()
    images, targets = batch()
    update.parameters[0].register_hook(lambda grad: grad * float("inf"))
    before = [p.clone() for p in update.parameters]
    with pytest.raises(DivergedError, match=r"gradient's norm is .*a\.jpg"):
        update(images, targets, NAMES, (), OBJECTIVE)
    assert all(torch.equal(a, b) for a, b in zip(before, update.parameters, strict=True))


def test_bf16_keeps_the_losses_in_fp32() -> None:
    update = updater()
    update.precision = replace(update.precision, name="bf16")
    report = update(*batch(), NAMES, (), OBJECTIVE)
    exact = updater()(*batch(), NAMES, (), OBJECTIVE)
    assert report.loss == pytest.approx(exact.loss, rel=0.05)


def test_precision_is_chosen_by_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert Precision.choose("auto", CPU).name == "bf16"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
    assert Precision.choose("auto", CPU).name == "fp32"
    assert Precision.choose("bf16", CPU).name == "bf16"
    with pytest.raises(UsageError, match="fp16 training needs a CUDA device"):
        Precision.choose("fp16", CPU)


def test_random_numbers_follow_from_the_place_in_the_run() -> None:
    def draw(*place: int) -> list[float]:
        return torch.rand(3, generator=generator_for(*place, device=CPU)).tolist()

    assert draw(0, 1, 2, 0) == draw(0, 1, 2, 0)
    assert (
        len({tuple(draw(*place)) for place in [(0, 1, 2, 0), (1, 1, 2, 0), (0, 2, 2, 0), (0, 1, 3, 0), (0, 1, 2, 1)]})
        == 5
    )
    generator_for(0, 1, 2, 0, CPU)
    first = torch.rand(1)
    generator_for(0, 1, 2, 0, CPU)
    assert torch.equal(first, torch.rand(1))
