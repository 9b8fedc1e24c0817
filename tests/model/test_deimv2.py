"""DEIMv2: counts, and the answers of the official code at weights that anybody can make again."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from finedetr.errors import ConfigError
from finedetr.model.config import BackboneConfig
from finedetr.model.deploy import deployed
from finedetr.model.detector import Detector
from finedetr.model.vit import AdaptedViT, ViT, ViTTable
from finedetr.model.weights import load_weights
from finedetr.model.zoo import published_input, variant
from tests.model.oracle import official, randomize

DEPLOYED = {  # spec 1.7, at 80 classes, with a fused encoder
    "deimv2-atto": 494_159,
    "deimv2-femto": 962_311,
    "deimv2-pico": 1_514_285,
    "deimv2-n": 3_571_527,
    "deimv2-s": 9_707_403,
    "deimv2-m": 18_106_355,
    "deimv2-l": 32_178_043,
    "deimv2-x": 50_260_163,
}
# What the official code (commit 0fff8d4) answers at the weights of `filled`, with 20 queries, to a picture of 128x128:
# the three largest logits, and the boxes of the two best queries.
GOLDEN = {
    "deimv2-atto": ((2.2647, 2.2646, 2.2631), (0.3981, 0.562, 0.0377, 0.0603)),
    "deimv2-n": ((3.1066, 3.0917, 3.0876), (0.3717, 0.4665, 0.018, 0.0741)),
    "deimv2-s": ((2.0874, 2.0405, 2.0199), (0.5195, 0.6519, 0.0524, 0.0923)),
    "deimv2-l": ((2.1281, 2.1028, 2.1024), (0.3111, 0.3375, 0.0378, 0.0569)),
}


def filled(name: str, tensor: Tensor, shared: bool) -> Tensor:
    """Numbers that follow from the official name of a tensor alone."""
    name = re.sub(r"dec_bbox_head\.\d", "dec_bbox_head.0", name) if shared else name
    shape, rng = tuple(tensor.shape), np.random.default_rng(zlib.crc32(name.encode()))
    if name.endswith(("up", "reg_scale", "periods", "num_points_scale", "num_batches_tracked", "mask", "anchors")):
        return tensor
    if name.endswith("running_var"):
        values = 0.5 + rng.random(shape)
    elif name.endswith((".scale", "gamma")) or (tensor.ndim == 1 and name.endswith("weight")):
        values = 0.8 + 0.4 * rng.random(shape)
    elif tensor.ndim == 1:
        values = 0.1 * rng.standard_normal(shape)
    else:
        values = rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values)).to(tensor.dtype)


@pytest.mark.parametrize("name", DEPLOYED)
def test_deployed_parameter_counts_are_the_published_ones(name: str) -> None:
    with torch.device("meta"):
        shipped = deployed(Detector(variant(name), 80), everything=False)
    assert sum(p.numel() for p in shipped.parameters()) == DEPLOYED[name]


@pytest.mark.parametrize("name", GOLDEN)
def test_answers_equal_the_official_ones(name: str, tmp_path: Path) -> None:
    shared = variant(name).decoder.shared_boxes
    state = official(Detector(variant(name), 80))
    torch.save({"model": {key: filled(key, value, shared) for key, value in state.items()}}, tmp_path / "deimv2.pth")
    detector, card = load_weights(tmp_path / "deimv2.pth")
    assert card.config == variant(name)
    detector.selection.queries = 20
    images = torch.from_numpy(np.random.default_rng(0).random((1, 3, 128, 128))).float()
    with torch.inference_mode():
        answers = detector(images).matching
    logits, boxes = GOLDEN[name]
    best = answers.logits[0, 0].flatten().sort(descending=True).values[:3]
    torch.testing.assert_close(best, torch.tensor(logits), atol=2e-4, rtol=0)
    torch.testing.assert_close(answers.boxes[0, 0].mean(dim=0), torch.tensor(boxes), atol=2e-4, rtol=0)


def test_the_vision_transformer_answers_as_dinov3_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    table = ViTTable(48, 3, (0, 1, 2), detail=4, outputs=32, gated=True, dinov3=True)
    torch.manual_seed(0)
    ours = ViT(table).eval()
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    config = transformers.DINOv3ViTConfig(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=192, num_register_tokens=4,
        use_gated_mlp=True, hidden_act="silu", key_bias=False,
    )  # fmt: skip
    theirs = transformers.DINOv3ViTModel(config).eval()
    theirs.load_state_dict({name: their_tensor(ours, name) for name in theirs.state_dict()})
    images = torch.rand(2, 3, 64, 96)
    with torch.inference_mode():
        maps, tokens = ours(images), theirs(pixel_values=images).last_hidden_state
    torch.testing.assert_close(maps[-1].flatten(2).transpose(1, 2), tokens[:, 5:], atol=1e-4, rtol=1e-4)


def their_tensor(vit: ViT, name: str) -> Tensor:
    """Our tensor for a name of transformers' DINOv3."""
    state, parts = vit.state_dict(), {"q_proj": 0, "k_proj": 1, "v_proj": 2, "gate_proj": 0, "up_proj": 1}
    name = name.removeprefix("model.").removeprefix("embeddings.")
    if name == "mask_token":
        return state[name][None]
    name = name.replace("register_", "storage_").replace("cls_", "class_").replace("patch_embeddings", "patches")
    name = re.sub(r"^layer\.", "blocks.", re.sub(r"layer_scale(\d)\.lambda1", r"scale\1", name))
    name = name.replace("attention.o_proj", "proj").replace("mlp.down_proj", "linear2")
    found = re.match(r"(blocks\.\d+)\.(?:attention|mlp)\.(\w+)\.(\w+)", name)
    if found is None:
        return state[name]
    layer, chunks = ("qkv", 3) if found[2] in ("q_proj", "k_proj", "v_proj") else ("linear1", 2)
    return state[f"{found[1]}.{layer}.{found[3]}"].chunk(chunks)[parts[found[2]]]


def test_keys_of_dinov3_have_no_bias() -> None:
    table = ViTTable(48, 3, (0, 0, 0), detail=4, outputs=32, dinov3=True)
    vit = ViT(table)
    vit(torch.rand(1, 3, 32, 32))[0].sum().backward()
    grad = vit.blocks[0].qkv.bias.grad
    assert grad is not None
    assert not grad[48:96].any()
    assert grad[96:].any()
    assert vit.mask_token is not None
    assert vit.mask_token.grad is not None  # so that no process of a distributed run waits for it


def test_positions_are_scaled_in_training_only() -> None:
    positions = ViT(ViTTable(48, 3, (0, 0, 0), detail=4, outputs=32, dinov3=True)).positions
    cos, sin = positions.eval()(2, 3)
    assert cos.shape == sin.shape == (5 + 6, 16)
    assert torch.equal(cos[:5], torch.ones(5, 16))
    assert torch.equal(positions(2, 3)[0], cos)
    assert not torch.equal(positions.train()(2, 3)[0], cos)


def test_every_parameter_of_a_training_step_has_a_gradient() -> None:
    for name in ("deimv2-atto", "deimv2-s"):
        torch.manual_seed(0)
        detector = Detector(variant(name), 3).train()
        randomize(detector)
        answers = detector(torch.rand(2, 3, 64, 96)).matching
        assert answers.edges is not None
        (answers.logits.sum() + answers.boxes.sum() + answers.edges.logits.square().sum()).backward()
        without = [key for key, p in detector.named_parameters() if p.requires_grad and p.grad is None]
        assert without == ["label_embedding.weight"]  # read by denoising queries only


def test_a_head_that_all_layers_share_is_one() -> None:
    detector = Detector(variant("deimv2-pico"), 2)
    assert len(detector.decoder.edge_heads) == 1
    assert detector.train()(torch.rand(1, 3, 64, 64)).matching.stages[-1] == "layer2"


def test_vision_transformers_have_their_own_preprocessing() -> None:
    assert published_input(variant("deimv2-s")).mean == (0.485, 0.456, 0.406)
    assert published_input(variant("deimv2-n")).mean is None
    assert published_input(variant("deimv2-atto")).size == (320, 320)


def test_the_adapter_has_three_stages() -> None:
    with pytest.raises(ConfigError, match="strides 8, 16 and 32"):
        AdaptedViT(BackboneConfig("vit-tiny", stages=(2, 3)))
    with pytest.raises(ConfigError, match="one stage"):
        replace(variant("deimv2-atto"), backbone=BackboneConfig("Pico", stages=(1, 2)))
