"""Folders of transformers with Conditional, DAB- and Deformable DETR: as it writes them, and as they lie on the Hub."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from finedetr.errors import ModelError
from finedetr.model.classic_names import BACKBONES
from finedetr.model.config import ModelConfig
from finedetr.model.foreign_names import look_up, transformers_names
from finedetr.model.transformers import transformers_config
from finedetr.model.weights import load_weights, read_card
from finedetr.model.zoo import ZOO, variant
from tests.model.classic import CLASSES, classic_pair, small

HOSTS = (
    "conditional-detr-r50",
    "dab-detr-r50",
    "deformable-detr-r50",
    "deformable-detr-r50-refine",
    "deformable-detr-r50-two-stage",
    "deformable-detr-r50-single",
)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModelConfig]:
    """The hosts in small, as the only rows of the table."""
    rows = {name: small(name) for name in (*HOSTS, "conditional-detr-r50-dc5", "deformable-detr-r50-single-dc5")}
    monkeypatch.setattr("finedetr.model.foreign.ZOO", rows)
    return rows


@pytest.mark.parametrize("name", HOSTS)
def test_what_transformers_saves_is_read(name: str, table: dict[str, ModelConfig], tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    ours, theirs = classic_pair(table[name])
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    detector, card = load_weights(tmp_path)
    assert card.config == table[name]
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        torch.testing.assert_close(detector(images).matching.boxes, ours(images).matching.boxes)
    as_published(tmp_path)
    again, _ = load_weights(tmp_path)
    assert all(torch.equal(again.state_dict()[key], value) for key, value in detector.state_dict().items())


def as_published(folder: Path) -> None:
    """The backbone of timm, and tied heads under several names."""
    state = load_file(folder / "model.safetensors")
    for pattern, new in BACKBONES:
        state = {re.sub(pattern, new, key): value for key, value in state.items()}
    for key in list(state):
        if "model.decoder.bbox_embed" in key or "model.decoder.class_embed" in key:
            state[key.removeprefix("model.decoder.")] = state[key].clone()
    save_file(state, folder / "model.safetensors")


def test_names_are_those_of_the_published_files() -> None:
    backbone, layer = "model.backbone.conv_encoder.model", "model.decoder.layers.0"
    conditional, refined = variant("conditional-detr-r50"), variant("deformable-detr-r50-refine")
    for config, key, published in (
        (conditional, "backbone.stem.0.conv.weight", [f"{backbone}.conv1.weight"]),
        (conditional, "backbone.stem.0.norm.running_mean", [f"{backbone}.bn1.running_mean"]),
        (conditional, "backbone.stages.2.0.shortcut.norm.bias", [f"{backbone}.layer3.0.downsample.1.bias"]),
        (conditional, "backbone.stages.0.0.shortcut.conv.weight", [f"{backbone}.layer1.0.downsample.0.weight"]),
        (conditional, "backbone.stages.3.2.convs.1.norm.weight", [f"{backbone}.layer4.2.bn2.weight"]),
        (conditional, "encoder.layers.5.self_attention.out.bias", ["model.encoder.layers.5.self_attn.out_proj.bias"]),
        (conditional, "encoder.layers.5.linear2.bias", ["model.encoder.layers.5.fc2.bias"]),
        (
            conditional,
            "decoder.layers.0.self_attention.qk.weight",
            [f"{layer}.sa_qcontent_proj.weight", f"{layer}.sa_kcontent_proj.weight"],
        ),
        (
            conditional,
            "decoder.layers.0.self_attention.position.bias",
            [f"{layer}.sa_qpos_proj.bias", f"{layer}.sa_kpos_proj.bias"],
        ),
        (conditional, "decoder.layers.0.self_attention.v.bias", [f"{layer}.sa_v_proj.bias"]),
        (conditional, "decoder.layers.0.cross_attention.query.bias", [f"{layer}.ca_qcontent_proj.bias"]),
        (conditional, "decoder.layers.0.cross_attention.key_position.bias", [f"{layer}.ca_kpos_proj.bias"]),
        (conditional, "decoder.layers.0.cross_attention.spatial.bias", [f"{layer}.ca_qpos_sine_proj.bias"]),
        (conditional, "decoder.layers.0.cross_attention.out.bias", [f"{layer}.encoder_attn.out_proj.bias"]),
        (conditional, "decoder.score_heads.0.weight", ["class_labels_classifier.weight"]),
        (conditional, "decoder.spatial.scale.layers.1.bias", ["model.decoder.query_scale.layers.1.bias"]),
        (refined, "decoder.layers.0.norm1.weight", [f"{layer}.self_attn_layer_norm.weight"]),
        (refined, "decoder.layers.0.norm2.weight", [f"{layer}.encoder_attn_layer_norm.weight"]),
        (refined, "decoder.box_heads.3.layers.2.bias", ["bbox_embed.3.layers.2.bias"]),
        (refined, "decoder.score_heads.5.bias", ["class_embed.5.bias"]),
        (refined, "encoder.level_embedding", ["model.level_embed"]),
        (refined, "selection.point.layers.0.weight", ["model.reference_points.weight"]),
    ):
        given = {name: torch.zeros(1) for name in published}
        found = [look_up(given, name) for name in transformers_names(key, config)]
        assert [entry and entry[0] for entry in found] == published, key


def test_the_settings_tell_apart_what_the_tensors_cannot(table: dict[str, ModelConfig], tmp_path: Path) -> None:
    """DC5 has the tensors of its host; other numbers of queries, and classes without a name, are read as they are."""
    pytest.importorskip("transformers")
    few = replace(table["conditional-detr-r50"], decoder=replace(table["conditional-detr-r50"].decoder, queries=4))
    _, theirs = classic_pair(few)
    theirs.save_pretrained(tmp_path)  # type: ignore[operator]
    settings = json.loads((tmp_path / "config.json").read_text())
    assert read_card(tmp_path).config == few
    labels = {str(index): "N/A" if index in (0, 3) else f"thing {index}" for index in range(CLASSES)}
    changes = [{"dilation": True}, {"backbone_config": {**settings["backbone_config"], "output_stride": 16}}]
    for change in changes:
        (tmp_path / "config.json").write_text(json.dumps({**settings, "id2label": labels, **change}))
        card = read_card(tmp_path)
        assert card.config.backbone.dilated
        assert card.names == ("N/A 0", "thing 1", "thing 2", "N/A 3", "thing 4")
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "deformable_detr"}))
    with pytest.raises(ModelError, match="fits no model"):
        read_card(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**settings, "model_type": "yolos"}))
    with pytest.raises(ModelError, match="yolos"):
        read_card(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_feature_levels": 2}, "no model of `finedetr models`"),
        ({"num_feature_levels": "4"}, "no model of `finedetr models`"),
        ({"two_stage": True, "with_box_refine": False}, "no model of `finedetr models`"),
        ({"backbone_config": "resnet50"}, "fits no model"),
        ({"backbone_config": [1], "backbone_kwargs": 3}, "fits no model"),
        ({"id2label": {"a": "b"}}, "fits no model"),
        ({"num_queries": True}, "at least 1 query is wanted, True came"),
        ({"num_queries": 0}, "at least 1 query is wanted, 0 came"),
    ],
)
def test_a_configuration_that_cannot_be_says_so(
    table: dict[str, ModelConfig], tmp_path: Path, change: dict[str, object], message: str
) -> None:
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deformable_detr", **change}))
    with pytest.raises(ModelError, match=message):
        read_card(tmp_path)


def test_they_are_read_and_not_written() -> None:
    for name, config in ZOO.items():
        if config.classic:
            with pytest.raises(ModelError, match=f"{name} is read"):
                transformers_config(config, ("thing",))
