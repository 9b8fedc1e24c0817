"""The catalog: every model has a row, and what can be counted is counted."""

from __future__ import annotations

import pytest
import torch

from finedetr.model.catalog import CATALOG, PRETRAINED_AP, conditions, family_of, weights_of
from finedetr.model.cost import count_operations
from finedetr.model.deploy import deployed
from finedetr.model.detector import Detector
from finedetr.model.hub import PUBLISHED
from finedetr.model.zoo import ZOO, published_input, variant

SIZE = (640, 640)


def test_every_model_has_a_row_and_a_family() -> None:
    assert CATALOG.keys() == ZOO.keys()
    assert all(family_of(name) is not None for name in CATALOG)
    assert family_of("mine") is None


def test_what_weights_depend_on_is_said() -> None:
    assert "DINOv3" in conditions("deimv2-l")[0]
    assert "Objects365" in conditions("dfine-s")[0]
    assert conditions("deimv2-s") == conditions("rtdetrv2-r50") == ()


def test_weights_belong_to_their_models() -> None:
    assert weights_of("rtdetrv2-r50") == {"rtdetrv2-r50-coco": "PekingU/rtdetr_v2_r50vd"}
    assert set(weights_of("dfine-s")) == {"dfine-s-coco", "dfine-s-obj365", "dfine-s-obj2coco"}
    assert sum(len(weights_of(name)) for name in CATALOG) == len(PUBLISHED)
    assert PRETRAINED_AP.keys() == {name for name in PUBLISHED if name.endswith("-obj2coco")}


@pytest.mark.parametrize("name", CATALOG)
def test_parameters_are_as_many_as_are_counted(name: str) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in Detector(variant(name), 80).parameters()) == CATALOG[name].parameters


@pytest.mark.parametrize("name", [name for name in CATALOG if CATALOG[name].gflops])
def test_operations_are_as_many_as_are_counted(name: str) -> None:
    config = variant(name)
    with torch.device("meta"):
        detector = Detector(config, 80)
    counted = count_operations(deployed(detector), published_input(config).size)
    if config.decoder.boxes == "plain":
        # the official code moves the boxes of all cells, ours only of those that are chosen: the same answers
        cells = sum(SIZE[0] // stride * SIZE[1] // stride for stride in config.strides)
        head = sum(layer.numel() for key, layer in detector.selection.box_head.named_parameters() if "weight" in key)
        counted += 2 * head * (cells - config.decoder.queries)
    assert counted / 1e9 == pytest.approx(CATALOG[name].gflops, rel=0.005)


def test_operations_grow_with_the_picture_and_a_real_model_stays_what_it_is() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.nn.Flatten(2))
    assert count_operations(model, (8, 6)) == 2 * 3 * 4 * 9 * 8 * 6
    assert count_operations(model, (16, 6)) == 2 * count_operations(model, (8, 6))
    assert not next(model.parameters()).is_meta
