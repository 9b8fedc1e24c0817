"""The split decoder (SD-DETR): it begins as the plain one, and its branches are apart but for the self-attention."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from finedetr.errors import ConfigError, ModelError
from finedetr.model.config import ModelConfig, SplitConfig
from finedetr.model.decoder_layers import Both, SplitLayer
from finedetr.model.deploy import deployed
from finedetr.model.detector import Detector
from finedetr.model.transformers import has_twin
from finedetr.model.weights import Card, load_weights, save_weights, transfer_weights
from finedetr.model.zoo import variant
from tests.model.classic import CLASSES, random_detector, small
from tests.model.test_hosts import a_group_for, labels_and_boxes
from tests.train.tiny import TINY

NAMES = tuple("abcde")
PLAIN = replace(
    TINY,
    name="tiny-plain",
    decoder=replace(TINY.decoder, boxes="plain", projected=True, gateway=False, position_limit=None),
)
HOSTS: dict[str, ModelConfig] = {
    "dfine": TINY,
    "rtdetrv2": PLAIN,
    "deimv2": replace(TINY, decoder=replace(TINY.decoder, norm="rms", gated=True, select_raw=True, position_once=True)),
    **{
        name: small(row, layers=2, encoders=1)
        for name, row in {
            "conditional": "conditional-detr-r50",
            "dab": "dab-detr-r50",
            "deformable": "deformable-detr-r50",
            "refined": "deformable-detr-r50-refine",
            "two-stage": "deformable-detr-r50-two-stage",
            "dino": "dino-r50",
        }.items()
    },
}


def split(config: ModelConfig, joining: str = "token", **more: object) -> ModelConfig:
    parts = SplitConfig(joining=joining, **{"queries": "own", **more})  # type: ignore[arg-type]
    return replace(config, name=f"{config.name}-split", decoder=replace(config.decoder, split=parts))


def saved(config: ModelConfig, folder: Path) -> tuple[Detector, Path]:
    detector = random_detector(config)
    return detector, save_weights(folder / "plain.safetensors", detector, Card(config, NAMES, (1, 2, 3, 4, 5)))


@pytest.fixture(scope="module", params=HOSTS)
def host(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Detector, Path]:
    """A plain detector and its file."""
    return (request.param, *saved(HOSTS[request.param], tmp_path_factory.mktemp(request.param)))


def pictures(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("joining", ["token", "fused", "apart"])
def test_a_split_decoder_begins_as_the_plain_one(host: tuple[str, Detector, Path], joining: str) -> None:
    _, plain, path = host
    detector = Detector(split(plain.config, joining), CLASSES).eval()
    transfer = transfer_weights(detector, NAMES, path)
    assert (transfer.skipped, transfer.unused) == ((), ())
    assert {row.split(" (")[0] for row in transfer.copied} >= {
        f"decoder.layers.*.{branch} <- decoder.layers.*" for branch in Both._fields
    }
    assert all(row.endswith("without effect") for row in transfer.fresh)
    extra = (a_group_for(plain),) if plain.config.classic else ()
    with torch.no_grad():
        wanted, found = (model(pictures(), extra, all_stages=True) for model in (plain, detector))
    for (_, mine), (_, theirs) in zip(
        [(None, found.matching), *found.groups], [(None, wanted.matching), *wanted.groups], strict=True
    ):
        assert mine.stages == theirs.stages
        torch.testing.assert_close(mine.logits, theirs.logits, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(mine.boxes, theirs.boxes, atol=1e-6, rtol=1e-6)


def test_what_cannot_begin_as_before_is_said(tmp_path: Path) -> None:
    _, path = saved(TINY, tmp_path)
    channel = transfer_weights(Detector(split(TINY, "channel"), CLASSES), NAMES, path)
    assert any("self_attention.qk.weight" in row for row in channel.skipped)
    half = transfer_weights(Detector(split(TINY, "fused", half=True), CLASSES), NAMES, path)
    assert {row.split(":")[0].split(".")[-2] for row in half.skipped} == {"linear1", "linear2"}
    assert ("fresh", "decoder.task_moves (4), without effect") in half.rows()


def test_the_way_back_is_refused(tmp_path: Path) -> None:
    _, path = saved(split(TINY), tmp_path)
    with pytest.raises(ModelError, match="holds a 'tiny-split', the run trains a 'tiny'"):
        transfer_weights(Detector(TINY, CLASSES), NAMES, path)


def gradients(detector: Detector, part: str) -> set[str]:
    """Which parameters of the decoder the last stage's logits or boxes have a gradient for."""
    detector.zero_grad()
    getattr(detector(pictures(), all_stages=False).matching, part).square().sum().backward()
    return {name for name, p in detector.decoder.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("name", HOSTS)
def test_heads_read_their_own_branch(name: str) -> None:
    """What a loss of classes teaches of the branch for boxes, it teaches through the self-attention behind it."""
    detector = random_detector(split(HOSTS[name], "token", shared_memory=False))
    of_boxes = gradients(detector, "boxes")
    last = len(detector.decoder.layers) - 1
    assert not any(name.startswith(f"layers.{last}.scores.") for name in of_boxes if "norm1" not in name)
    assert f"layers.{last}.self_attention.v.weight" in of_boxes
    if name in ("dfine", "deimv2"):  # their quality of location is read by the scores
        return
    of_scores = gradients(detector, "logits")
    assert not any(name.startswith(f"layers.{last}.boxes.") for name in of_scores)
    assert f"layers.{last}.self_attention.v.weight" in of_scores
    assert {f"layers.{last}.scores.linear1.weight", f"layers.{last - 1}.boxes.linear1.weight"} <= of_scores


@pytest.mark.parametrize("joining", ["token", "channel", "fused", "apart"])
def test_branches_hear_of_one_another_only_by_self_attention(joining: str) -> None:
    torch.manual_seed(0)
    layer = SplitLayer(split(TINY, joining).decoder, 1e4, first=False).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    scores, boxes, positions = torch.randn(3, 1, 6, 16)
    moved = scores.clone()
    moved[:, 4] += 1
    memory = (torch.randn(1, 16, 4, 4), torch.randn(1, 16, 2, 2))
    where = Both.same(torch.rand(1, 6, 4) * 0.5 + 0.2)

    def of_boxes(scores: Tensor) -> Tensor:
        out: Tensor = layer(Both(scores, boxes), Both.same(positions), where, memory, None).boxes
        return out

    with torch.no_grad():
        changed = (of_boxes(scores) - of_boxes(moved)).abs().amax(dim=-1)[0]
        assert bool((changed > 1e-6).all()) == (joining != "apart")
        assert bool((changed == 0).all()) == (joining == "apart")
        if layer.self_attention is not None:
            nn.init.zeros_(layer.self_attention.out.weight)
            assert torch.equal(of_boxes(scores), of_boxes(moved))


@pytest.mark.parametrize("joining", ["token", "channel", "fused", "apart"])
def test_queries_stay_blind_to_groups_from_outside(joining: str) -> None:
    detector = random_detector(split(HOSTS["dino"], joining))
    extra = labels_and_boxes()
    with torch.no_grad():
        alone = detector(pictures(), all_stages=True).matching
        beside, moved = (
            detector(pictures(), (replace(extra, boxes=boxes),), all_stages=True)
            for boxes in (extra.boxes, 1 - extra.boxes)
        )
    assert torch.equal(beside.matching.logits, moved.matching.logits)
    torch.testing.assert_close(beside.matching.logits, alone.logits, atol=1e-5, rtol=1e-5)
    assert not torch.equal(beside.groups[0][1].boxes, moved.groups[0][1].boxes)


def test_a_group_sees_of_both_branches_what_its_mask_leaves() -> None:
    """Two queries of a group that do not see one another answer as each does alone."""
    detector = random_detector(split(HOSTS["dino"], "token"))
    group = labels_and_boxes(2)
    apart = replace(group, blocked=~torch.eye(2, dtype=torch.bool))
    alone = replace(group, boxes=group.boxes[:, :1], labels=group.labels[:, :1])  # type: ignore[index]
    with torch.no_grad():
        found, wanted = (detector(pictures(), (given,)).groups[0][1] for given in (apart, alone))
    torch.testing.assert_close(found.logits[:, :, :1], wanted.logits, atol=1e-5, rtol=1e-5)


def test_memory_norm_and_modulation_may_be_shared_or_not() -> None:
    host = HOSTS["conditional"]
    shared, own = (random_detector(split(host, "token", shared_memory=s, shared_norm=s)) for s in (True, False))
    extra = {name for name, _ in own.named_parameters()} - {name for name, _ in shared.named_parameters()}
    readers = [f"boxes.cross_attention.{part}.{kind}" for part in ("key", "value", "key_position") for kind in KINDS]
    assert extra == {f"decoder.layers.{i}.{name}" for i in (0, 1) for name in readers} | {
        f"decoder.score_norm.{kind}" for kind in KINDS
    }
    by_boxes = random_detector(split(host, "token"))
    by_own = random_detector(split(host, "token", modulation="own"))
    by_own.load_state_dict(by_boxes.state_dict())
    with torch.no_grad():
        first, second = (model(pictures()).matching for model in (by_boxes, by_own))
    assert not torch.equal(first.logits, second.logits)


KINDS = ("weight", "bias")


@pytest.mark.parametrize("joining", ["token", "channel", "fused", "apart"])
def test_deployment_and_card_keep_the_branches(joining: str, tmp_path: Path) -> None:
    config = split(TINY, joining)
    detector, path = saved(config, tmp_path)
    again, card = load_weights(path)
    assert card.config == config
    with torch.no_grad():
        wanted = detector(pictures()).matching
        for model in (again, deployed(detector)):
            found = model(pictures()).matching
            torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(found.boxes, wanted.boxes, atol=1e-4, rtol=0)


def test_branches_of_what_is_not_split_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"split.joining is 'none'"):
        split(TINY, "none")
    assert has_twin(variant("dfine-s"))
    assert not has_twin(split(variant("dfine-s")))


@pytest.mark.parametrize("name", ["conditional", "refined", "dino", "rtdetrv2"])
def test_distributions_begin_at_the_first_box_of_the_plain_host(name: str, tmp_path: Path) -> None:
    """`--with fdr` from a plain host's weights: the first box is that of its first layer, and all edges stay there."""
    plain, path = saved(HOSTS[name], tmp_path)
    config = replace(plain.config, decoder=replace(plain.config.decoder, boxes="distributions", shared_boxes=False))
    detector = Detector(config, CLASSES).eval()
    transfer = transfer_weights(detector, NAMES, path)
    assert transfer.skipped == ()
    assert "decoder.initial_box_head <- decoder.box_heads (6)" in transfer.copied
    heads = {"edge_heads", "quality_heads", "bin_table"}
    assert {row.split(" (")[0] for row in transfer.fresh} == {f"decoder.{name}" for name in heads}
    with torch.no_grad():
        wanted, found = (model(pictures(), all_stages=True).matching for model in (plain, detector))
    first = {stage: index for index, stage in reversed(list(enumerate(found.stages)))}
    theirs = wanted.stages.index("layer0")
    torch.testing.assert_close(found.logits[first["initial"]], wanted.logits[theirs], atol=1e-6, rtol=1e-6)
    for stage in ("initial", "layer0"):
        torch.testing.assert_close(found.boxes[first[stage]], wanted.boxes[theirs], atol=2e-6, rtol=0)
