from __future__ import annotations

import pytest
import torch
from torch import nn

from finedetr.errors import ConfigError
from finedetr.model.detector import Detector
from finedetr.model.layers import LearnableAffine
from finedetr.model.zoo import variant
from finedetr.train.optimizer import NORMS, Grouping, adamw, parameter_groups
from tests.train.tiny import TINY


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector(TINY, 3)


def split(detector: nn.Module, grouping: Grouping | None = None) -> dict[str, set[int]]:
    groups = parameter_groups(detector, lr=1.0, weight_decay=0.1, backbone=0.5, grouping=grouping)
    return {str(g["name"]): {id(p) for p in g["params"]} for g in groups}  # type: ignore[attr-defined]


def test_groups_are_disjoint_and_complete(detector: Detector) -> None:
    groups = split(detector)
    trainable = {id(p) for p in detector.parameters() if p.requires_grad}
    assert sum(map(len, groups.values())) == len(trainable)
    assert set.union(*groups.values()) == trainable


def test_norms_biases_and_affine_scalars_do_not_decay(detector: Detector) -> None:
    groups = split(detector)
    spared = groups["main, no decay"] | groups["backbone, no decay"]
    for module in detector.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            free = isinstance(module, (*NORMS, LearnableAffine)) or name.endswith("bias")
            assert (id(parameter) in spared) == free, (type(module), name)
            assert free == (parameter.ndim == 1), (type(module), name)


def test_the_backbone_and_nothing_else_trains_at_its_own_rate(detector: Detector) -> None:
    groups = parameter_groups(detector, lr=2.0, weight_decay=0.1, backbone=0.25)
    inside = {id(p) for p in detector.backbone.parameters()}
    for group in groups:
        for parameter in group["params"]:  # type: ignore[attr-defined]
            assert group["lr"] == (0.5 if id(parameter) in inside else 2.0)


def test_the_official_split_of_d_fine_decays_backbone_norms_at_the_backbone_rate(detector: Detector) -> None:
    groups = split(detector, Grouping(decay_backbone_norms=True, decay_affine=True))
    assert set(groups) == {"main, decay", "main, no decay", "backbone, decay"}
    assert groups["backbone, decay"] == {id(p) for p in detector.backbone.parameters()}


def test_the_official_split_of_deim_s_trains_backbone_norms_at_the_main_rate(detector: Detector) -> None:
    grouping = Grouping(decay_affine=True, decay_biases=True, backbone_norms_at_main_rate=True)
    groups = split(detector, grouping)
    assert set(groups) == {"main, decay", "main, no decay", "backbone, decay"}
    norms = {id(p) for m in detector.modules() if isinstance(m, NORMS) for p in m.parameters()}
    assert groups["main, no decay"] == norms
    affine = {id(p) for m in detector.modules() if isinstance(m, LearnableAffine) for p in m.parameters()}
    assert affine <= groups["backbone, decay"]


def test_a_parameter_shared_between_groups_is_an_error() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = nn.Linear(2, 2)
            self.head = nn.Linear(2, 2)
            self.head.weight = self.backbone.weight

    with pytest.raises(ConfigError, match=r"backbone\.weight and head\.weight are one parameter"):
        parameter_groups(Odd(), lr=1.0, weight_decay=0.1)


def test_a_parameter_shared_within_a_group_is_counted_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
            self.b.weight = self.a.weight

    (group,) = parameter_groups(Tied(), lr=1.0, weight_decay=0.1)
    assert len(group["params"]) == 1  # type: ignore[arg-type]


def test_a_wholly_frozen_model_is_an_error(detector: Detector) -> None:
    with pytest.raises(ConfigError, match="nothing is left to train"):
        parameter_groups(nn.Linear(1, 1).requires_grad_(False), lr=1.0, weight_decay=0.1)


def test_the_fused_step_is_adamw() -> None:
    values = []
    for make in (adamw, torch.optim.AdamW):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        groups = parameter_groups(layer, lr=0.1, weight_decay=0.1)
        optimizer = make(groups)  # type: ignore[operator]
        for _ in range(3):
            optimizer.zero_grad()
            layer(torch.ones(1, 3)).square().sum().backward()
            optimizer.step()
        values.append(layer.weight.detach().clone())
    torch.testing.assert_close(values[0], values[1])


def test_only_the_transformer_of_an_adapted_backbone_trains_at_its_rate() -> None:
    with torch.device("meta"):
        detector = Detector(variant("deimv2-s"), 2)
    groups = parameter_groups(detector, lr=1.0, weight_decay=0.1, backbone=0.05)
    slow = {id(p) for group in groups if group["lr"] == 0.05 for p in group["params"]}
    assert slow == {id(p) for p in detector.backbone.vit.parameters()}
