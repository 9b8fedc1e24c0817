"""The objective: names, weights, counts over processes, formula, and what it says when a step goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import multiprocessing

from finedetr.errors import ConfigError, DivergedError
from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.zoo import variant
from finedetr.records import Guidance, Lesson, Output, Prediction, Targets, Trace
from finedetr.supervise.denoising import Denoising
from finedetr.supervise.matching import PerStage, QualityCost, UnionOfStages
from finedetr.supervise.objective import Objective, average_counts
from finedetr.supervise.terms import (
    BoxGIoU,
    BoxL1,
    FineGrainedLocalization,
    LocalizationDistillation,
    MatchabilityAware,
    Term,
    Varifocal,
)
from tests.supervise.test_terms import STAGES, answers, truth

DEIM = Objective((MatchabilityAware(), BoxL1(), BoxGIoU(), FineGrainedLocalization(), LocalizationDistillation()))


def judged(counts: tuple[int, ...] = (3, 0, 5)) -> tuple[Output, Targets]:
    torch.manual_seed(0)
    targets = truth(counts)
    group = Denoising(queries=10)(targets, classes=5)
    noisy = answers(len(counts), group.boxes.shape[1], names=STAGES[1:])
    return Output(answers(len(counts), 12), ((group, noisy),)), targets


def test_losses_are_named_by_group_stage_and_term() -> None:
    output, targets = judged()
    losses = DEIM(output, targets)
    assert len(losses) == 37
    assert "matching/encoder/BoxL1" in losses
    assert "denoising/initial/MatchabilityAware" in losses
    assert {name.split("/")[1] for name in losses if "Distillation" in name} == {"layer0", "layer1"}
    assert losses.total.item() == pytest.approx(sum(losses.by_name().values()), rel=1e-5)
    with pytest.raises(KeyError, match="Did you mean matching/encoder/BoxL1"):
        losses["matching/encoder/BoxL2"]


def test_weights_multiply_and_zero_is_a_weight() -> None:
    output, targets = judged()
    base, other = DEIM(output, targets), DEIM.with_weights({"BoxL1": 10.0, "BoxGIoU": 0.0})(output, targets)
    assert other["matching/layer0/BoxL1"].item() == pytest.approx(2 * base["matching/layer0/BoxL1"].item())
    assert other["matching/layer0/BoxGIoU"].item() == 0
    assert other["matching/layer0/MatchabilityAware"] == base["matching/layer0/MatchabilityAware"]


def test_a_misspelled_term_is_an_error_with_a_suggestion() -> None:
    for change in (
        lambda: DEIM.with_weights({"BoxGiou": 1.0}),
        lambda: DEIM.without("BoxGiou"),
        lambda: DEIM.swap("BoxGiou", BoxL1()),
    ):
        with pytest.raises(ConfigError, match="Did you mean BoxGIoU"):
            change()


def test_the_same_term_twice_is_an_error() -> None:
    with pytest.raises(ConfigError, match="BoxL1 more than once"):
        Objective((BoxL1(), BoxL1(weight=1.0)))
    with pytest.raises(ConfigError, match="no term"):
        Objective(())


def test_a_recipe_can_be_a_diff_on_another() -> None:
    objective = Objective((Varifocal(), BoxL1())).swap(Varifocal, MatchabilityAware(gamma=2.0)).plus(BoxGIoU())
    assert objective.names == ("MatchabilityAware", "BoxL1", "BoxGIoU")
    assert objective.without(BoxL1, "BoxGIoU").formula() == "1·MatchabilityAware(gamma=2), matched by UnionOfStages"
    assert Objective((BoxL1(),), PerStage(QualityCost(power=3.0))).formula() == (
        "5·BoxL1, matched by PerStage(cost=QualityCost(power=3))"
    )


def test_a_loss_that_is_not_finite_names_terms_stages_and_pictures() -> None:
    output, targets = judged()
    with torch.no_grad():
        output.matching.logits[3, 2, 4, 1] = torch.nan
    losses = DEIM(output, targets)
    with pytest.raises(DivergedError) as caught:
        losses.by_name(("a.jpg", "b.jpg", "c.jpg"))
    assert "matching/layer1/MatchabilityAware is nan (1 of 37 losses)" in str(caught.value)
    assert "c.jpg (first in matching/layer1)" in str(caught.value)
    assert "a.jpg" not in str(caught.value)


def test_boxes_that_are_not_finite_are_told_too() -> None:
    output, targets = judged()
    with torch.no_grad():
        output.groups[0][1].boxes[1, 0] = torch.inf
    with pytest.raises(DivergedError, match=r"picture 0 of the batch \(first in denoising/layer0\)"):
        DEIM(output, targets).by_name()


def test_counts_are_at_least_one_and_shared_pairs_stay_shared() -> None:
    output, targets = judged((0, 0))
    (own,) = average_counts([PerStage()(output.matching, targets)])
    assert own.labels.count.tolist() == [1] * 5
    assert own.labels is own.boxes
    output, targets = judged((3, 0, 5))
    (union,) = average_counts([UnionOfStages()(output.matching, targets)])
    assert union.labels.count.tolist() == [8] * 5
    assert union.boxes.count.tolist() == list(union.boxes.sizes)


def _count(rank: int, file: str, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    output, targets = judged((0, 0) if rank else (3, 4))
    matches = average_counts([UnionOfStages()(output.matching, targets), PerStage()(output.matching, targets)])
    torch.save([matches[0].labels.count, matches[1].boxes.count], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_their_mean_also_where_one_has_no_target(tmp_path: Path) -> None:
    multiprocessing.spawn(_count, (str(tmp_path / "meeting"), str(tmp_path)), nprocs=2)
    for rank in range(2):
        for count in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            assert count.tolist() == [3.5] * 5


def detector() -> Detector:
    config: ModelConfig = variant("dfine-n")
    torch.manual_seed(0)
    return Detector(config, classes=3).train()


def test_a_batch_without_targets_keeps_every_parameter_in_the_graph() -> None:
    model, targets = detector(), Targets.from_lists([torch.zeros(0)] * 2, [torch.zeros(0, 4)] * 2)
    group = Denoising()(targets, classes=3)
    losses = DEIM(model(torch.rand(2, 3, 128, 128), (group,)), targets)
    losses.total.backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert without == []
    values = losses.by_name()
    assert all(value == 0 for name, value in values.items() if name.startswith("denoising/"))
    assert all((value > 0) == ("Matchability" in name) for name, value in values.items() if "matching/enc" in name)
    assert bool((model.label_embedding.weight.grad == 0).all())


def test_supervision_of_a_group_can_see_the_matching_group() -> None:
    output, targets = judged()
    (_, _, matching), (name, weight, denoising) = DEIM.supervise(output, targets)
    assert (name, weight) == ("denoising", 1.0)
    assert denoising.matching is matching
    assert matching.matching is None


class Agreement(Term):
    """A term of a reader's own, as the documentation would show it."""

    def __call__(self, s):
        return (s.answers.logits - s.guidance.frozen.answers.logits).square().mean((1, 2, 3))


def test_a_new_term_needs_no_more_than_a_call_and_may_ask_a_teacher() -> None:
    output, targets = judged()
    matching = Output(output.matching)
    said = Prediction(output.matching.logits.detach() + 1, output.matching.boxes.detach(), STAGES)
    cells = Trace(((3, 4),), torch.arange(12).expand(3, 12), said.boxes[0], ())
    teacher = Lesson(said, cells, (), UnionOfStages()(said, targets).labels)
    losses = Objective((Agreement(weight=3.0),))(matching, targets, Guidance((64, 64), teacher))
    assert losses.names[0] == "matching/encoder/Agreement"
    assert losses.vector.tolist() == pytest.approx([3.0] * 5)
