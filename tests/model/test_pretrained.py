"""Backbone files: the official names, into a new detector; what does not fit is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, tensor

from finedetr.errors import ModelError
from finedetr.model.detector import Detector
from finedetr.model.pretrained import load_backbone, official_file
from finedetr.model.vit import VITS
from finedetr.model.zoo import ZOO, variant
from tests.model.oracle import randomize
from tests.model.test_foreign import official


def file_of(detector: Detector, path: Path) -> dict[str, Tensor]:
    """The backbone as its official file holds it: flat, without a prefix."""
    state = {key.removeprefix("backbone."): v for key, v in official(detector).items() if key.startswith("backbone.")}
    torch.save(state, path)
    return state


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("dfine-n", "stages.2.blocks.1.layers.0.conv2.lab.scale"),
        ("dfine-l", "stem.stem2a.bn.running_var"),
        ("rtdetrv2-r18", "res_layers.1.blocks.0.short.conv.norm.weight"),
        ("rtdetrv2-r50", "conv1.conv1_1.conv.weight"),
    ],
)
def test_an_official_file_fills_the_backbone_and_nothing_else(tmp_path: Path, name: str, key: str) -> None:
    torch.manual_seed(0)
    source, target = Detector(variant(name), 3), Detector(variant(name), 3)
    randomize(source)
    path = tmp_path / Path(official_file(source.config.backbone.name)).name
    assert key in file_of(source, path)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    ((what, which),) = load_backbone(target, path)
    assert what == "backbone"
    assert path.name in which
    theirs = source.state_dict()
    for k, v in target.state_dict().items():
        if not k.endswith("num_batches_tracked"):
            assert torch.equal(v, (theirs if k.startswith("backbone.") else before)[k]), k


@pytest.mark.parametrize("name", ["deimv2-s", "deimv2-x"])
def test_a_file_of_a_vision_transformer_leaves_the_adapter_alone(tmp_path: Path, name: str) -> None:
    source, target = Detector(variant(name), 3), Detector(variant(name), 3)
    inside = "backbone.dinov3._model." if name == "deimv2-s" else "backbone.dinov3."
    state = {key.removeprefix(inside): v for key, v in official(source).items() if key.startswith(inside)}
    torch.save(state, tmp_path / "vit.pth")
    assert "blocks.0.attn.qkv.weight" in state
    adapter = target.backbone.joins[0].conv.weight.clone()
    load_backbone(target, tmp_path / "vit.pth")
    theirs = source.backbone.vit.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in target.backbone.vit.state_dict().items())
    assert torch.equal(target.backbone.joins[0].conv.weight, adapter)


def test_stages_that_a_detector_does_not_have_are_said_to_be_dropped(tmp_path: Path) -> None:
    source = Detector(variant("dfine-n"), 3)
    file_of(source, tmp_path / "b0.pth")
    config = variant("dfine-s")
    config = replace(
        config,
        backbone=replace(config.backbone, stages=(1, 2)),
        decoder=replace(config.decoder, points=(3, 3)),
    )
    rows = load_backbone(Detector(config, 3), tmp_path / "b0.pth")
    assert [what for what, _ in rows] == ["backbone", "dropped"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stem.stem1.conv.weight": None}, r"missing stem\.stem1\.conv\.weight"),
        ({"fc.weight": torch.zeros(3)}, r"left over fc\.weight"),
        ({"stem.stem4.bn.bias": torch.zeros(3)}, r"stem\.stem4\.bn\.bias is \(3,\), expected \(16,\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_changed(
    tmp_path: Path, change: dict[str, Tensor | None], message: str
) -> None:
    source, target = Detector(variant("dfine-n"), 3), Detector(variant("dfine-n"), 3)
    state = {**file_of(source, tmp_path / "a.pth"), **change}
    torch.save({key: value for key, value in state.items() if value is not None}, tmp_path / "a.pth")
    before = target.backbone.stem.stem1.conv.weight.clone()  # type: ignore[union-attr, operator]
    with pytest.raises(ModelError, match=message) as error:
        load_backbone(target, tmp_path / "a.pth")
    assert "PPHGNetV2_B0_stage1.pth" in str(error.value)
    assert torch.equal(target.backbone.stem.stem1.conv.weight, before)  # type: ignore[union-attr, arg-type]


def test_the_file_of_another_backbone_is_refused_and_the_right_one_named(tmp_path: Path) -> None:
    file_of(Detector(variant("rtdetrv2-r18"), 3), tmp_path / "r18.pth")
    with pytest.raises(ModelError, match=r"(?s)does not fit the backbone B0 of dfine-n.*PPHGNetV2_B0_stage1\.pth"):
        load_backbone(Detector(variant("dfine-n"), 3), tmp_path / "r18.pth")


def test_every_model_of_hgnet_and_resnet_has_an_official_file() -> None:
    own = {*VITS, "Atto", "Femto", "Pico"}  # cut for DEIMv2, whose authors publish no weights of them alone
    for config in ZOO.values():
        assert official_file(config.backbone.name).endswith(".pth") == (config.backbone.name not in own)
    assert official_file("mine") == ""


def torchvision_names() -> set[str]:
    """Of a ResNet-50, but for the counts of batches."""
    norm = ("weight", "bias", "running_mean", "running_var")
    names = {"conv1.weight", *(f"bn1.{part}" for part in norm), "fc.weight", "fc.bias"}
    for layer, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            parts = [(f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
            parts += [("downsample.0", "downsample.1")] if block == 0 else []
            for conv, bn in parts:
                names |= {f"layer{layer}.{block}.{conv}.weight", *(f"layer{layer}.{block}.{bn}.{p}" for p in norm)}
    return names


def test_torchvisions_resnet_starts_a_classic_host(tmp_path: Path) -> None:
    torch.manual_seed(0)
    row = variant("conditional-detr-r50")
    config = replace(row, encoder=replace(row.encoder, layers=1), decoder=replace(row.decoder, layers=1))
    source, target = Detector(config, 3), Detector(config, 3)
    randomize(source)
    state = file_of(source, tmp_path / "resnet50-0676ba61.pth")
    state |= {"fc.weight": torch.zeros(1000, 2048), "fc.bias": torch.zeros(1000), "bn1.num_batches_tracked": tensor(1)}
    assert state.keys() - {"bn1.num_batches_tracked"} == torchvision_names()
    torch.save(state, tmp_path / "resnet50-0676ba61.pth")
    assert len(load_backbone(target, tmp_path / "resnet50-0676ba61.pth")) == 1
    theirs = source.backbone.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in target.backbone.state_dict().items())
    torch.save({**state, "extra.weight": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(ModelError, match=r"(?s)left over extra\.weight.*resnet50-0676ba61\.pth"):
        load_backbone(target, tmp_path / "other.pth")
