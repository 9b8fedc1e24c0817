"""Structure of the detector: counts, sizes, query groups, gradients, what is cached."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finedetr.errors import ConfigError
from finedetr.model.backbones import build_backbone
from finedetr.model.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.encoders import sine_positions
from finedetr.model.layers import kept
from finedetr.model.postprocess import top_detections
from finedetr.model.zoo import ZOO, variant
from finedetr.records import QueryGroup
from tests.model.oracle import randomize

TRAINED = {  # parameters, at 80 classes (spec 1.4 and 1.5)
    "dfine-n": 3_782_691,
    "dfine-l": 31_219_222,
    "dfine-x": 62_596_118,
    "deim-dfine-l": 31_289_846,
}
TINY = ModelConfig(
    "tiny",
    BackboneConfig("B0", stages=(2, 3)),
    EncoderConfig(width=32, feedforward=64, expansion=0.34, depth=0.34),
    DecoderConfig(width=32, feedforward=64, layers=2, points=(3, 3), queries=20),
)


def tiny(**decoder: object) -> Detector:
    torch.manual_seed(0)
    detector = Detector(replace(TINY, decoder=replace(TINY.decoder, **decoder)), classes=5)
    randomize(detector)
    return detector


def group(detector: Detector, queries: int = 6, **fields: object) -> QueryGroup:
    generator = torch.Generator().manual_seed(3)
    boxes = 0.2 + 0.5 * torch.rand(2, queries, 4, generator=generator)
    labels = torch.randint(0, detector.classes + 1, (2, queries), generator=generator)
    return QueryGroup("extra", boxes, labels=labels, **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", TRAINED)
def test_as_many_parameters_are_trained_as_published(name: str) -> None:
    with torch.device("meta"):
        detector = Detector(variant(name), 80)
    assert sum(p.numel() for p in detector.parameters() if p.requires_grad) == TRAINED[name]


def test_frozen_stages_of_an_hgnet_are_at_rest() -> None:
    with torch.device("meta"):
        backbone = build_backbone(BackboneConfig("B0", freeze_stem=True, freeze_stages=2))
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(("stem.", "stages.0.", "stages.1.")), name


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BackboneConfig("B0", dilated=True), "dilated: B0 cannot be"),
        (BackboneConfig("vit-tiny", dilated=True), "dilated: vit-tiny cannot be"),
        (BackboneConfig("vit-tiny", freeze_norm=True), "(?s)vit-tiny has no stem.*--freeze backbone"),
        (BackboneConfig("dinov3-s", freeze_stages=1), "dinov3-s has no stem"),
    ],
)
def test_a_backbone_that_cannot_be_as_it_is_wanted_is_refused(config: BackboneConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_backbone(config)


def test_every_row_of_the_zoo_carries_its_own_name() -> None:
    assert all(name == config.name for name, config in ZOO.items())


@pytest.mark.parametrize("size", [(64, 64), (64, 128), (96, 160)])
def test_any_multiple_of_the_stride_is_a_legal_size(size: tuple[int, int]) -> None:
    output = tiny().eval()(torch.rand(2, 3, *size))
    assert output.matching.boxes.shape == (1, 2, 20, 4)
    assert output.matching.boxes.isfinite().all()


def test_a_wrong_size_names_the_two_nearest_legal_ones() -> None:
    with pytest.raises(ConfigError, match="Use 64x96 or 96x128"):
        tiny()(torch.rand(1, 3, 80, 100))


def test_queries_never_outnumber_the_tokens() -> None:
    output = tiny(queries=300).eval()(torch.rand(1, 3, 64, 64))
    assert output.matching.boxes.shape[2] == 4 * 4 + 2 * 2


def test_stages_are_named_and_edges_belong_to_the_layers() -> None:
    matching = tiny().train()(torch.rand(2, 3, 64, 64)).matching
    assert matching.stages == ("encoder", "initial", "layer0", "layer1")
    assert matching.logits.shape == (4, 2, 20, 5)
    assert matching.edges is not None
    assert matching.edges.logits.shape == (2, 2, 20, 4, 33)


def test_only_who_asks_for_all_stages_gets_the_trace() -> None:
    detector = tiny().eval()
    images = torch.rand(1, 3, 64, 96)
    assert detector(images).trace is None
    trace = detector(images, all_stages=True).trace
    assert trace.shapes == ((4, 6), (2, 3))
    assert [state.shape for state in trace.states] == [(1, 20, 32)] * 2
    chosen = detector.selection.of_tokens(trace.embedded * 0 + 1, trace.shapes, trace.tokens)
    assert chosen.shape == (1, 20, 32)
    memory = torch.rand(1, 30, 32)
    queries = detector.selection(memory, trace.shapes)
    assert torch.equal(detector.selection.of_tokens(memory, trace.shapes, queries.tokens), queries.content)
    training = detector.train()(images).trace
    assert [state.requires_grad for state in training.states] == [True] * 2
    assert training.embedded is None


def test_eval_answers_the_last_of_all_stages() -> None:
    detector = tiny().eval()
    images = torch.rand(2, 3, 64, 96)
    last, stages = detector(images).matching, detector(images, all_stages=True).matching
    assert last.stages == ("layer1",)
    assert torch.equal(last.logits[0], stages.logits[-1])
    assert torch.equal(last.boxes[0], stages.boxes[-1])


@pytest.mark.parametrize("sees_matching", [False, True])
def test_matching_group_is_blind_to_extra_groups(sees_matching: bool) -> None:
    detector = tiny().eval()
    images = torch.rand(2, 3, 64, 64)
    alone = detector(images, all_stages=True).matching
    extra = group(detector, sees_matching=sees_matching)
    for boxes in (extra.boxes, 1 - extra.boxes):
        beside = detector(images, (replace(extra, boxes=boxes),), all_stages=True).matching
        assert torch.equal(beside.logits, detector(images, (extra,), all_stages=True).matching.logits)
        torch.testing.assert_close(beside.logits, alone.logits, atol=1e-5, rtol=1e-5)


def test_extra_groups_are_blind_to_one_another() -> None:
    detector = tiny().eval()
    images = torch.rand(2, 3, 64, 64)
    first, second = group(detector), replace(group(detector, 9), name="second")
    together = detector(images, (first, second), all_stages=True).groups
    moved = detector(images, (first, replace(second, boxes=1 - second.boxes)), all_stages=True).groups
    alone = detector(images, (first,), all_stages=True).groups
    assert torch.equal(together[0][1].logits, moved[0][1].logits)
    torch.testing.assert_close(together[0][1].boxes, alone[0][1].boxes, atol=1e-5, rtol=1e-5)


def test_a_group_obeys_its_own_block() -> None:
    detector = tiny().eval()
    images = torch.rand(2, 3, 64, 64)
    blocked = torch.zeros(6, 6, dtype=torch.bool)
    blocked[:3, 3:] = blocked[3:, :3] = True
    extra = group(detector, blocked=blocked)
    boxes = extra.boxes.clone()
    boxes[:, 3:] = 0.5
    before = detector(images, (extra,)).groups[0][1]
    after = detector(images, (replace(extra, boxes=boxes),)).groups[0][1]
    assert torch.equal(before.logits[:, :, :3], after.logits[:, :, :3])
    assert not torch.equal(before.logits[:, :, 3:], after.logits[:, :, 3:])


def test_a_group_is_answered_at_the_last_stage_in_eval_as_the_matching_queries_are() -> None:
    detector = tiny().eval()
    output = detector(torch.rand(2, 3, 64, 64), (group(detector),))
    assert output.matching.stages == output.groups[0][1].stages == ("layer1",)
    assert output.matching.boxes.shape[0] == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_detector_in_half_precision_answers_about_the_same(dtype: torch.dtype) -> None:
    detector, images = tiny().eval(), torch.rand(1, 3, 64, 64)
    wanted = detector(images).matching.boxes
    answer = detector.to(dtype)(images.to(dtype)).matching.boxes
    # the best queries may come in another order: each box is near some wanted one
    assert torch.cdist(answer[0, 0].float(), wanted[0, 0], p=torch.inf).amin(dim=-1).median() < 0.02


def test_content_and_references_are_detached_but_the_encoder_stage_is_not() -> None:
    detector = tiny().train()
    matching = detector(torch.rand(2, 3, 64, 64)).matching
    matching.boxes[1:].sum().backward(retain_graph=True)
    # the stages share one tensor, so a gradient arrives: it has to be zero
    assert not any(p.grad is not None and p.grad.any() for p in detector.selection.parameters())
    matching.boxes[0].sum().backward()
    grad = detector.selection.box_head.last.weight.grad
    assert grad is not None
    assert grad.any()


def test_edge_logits_accumulate_with_gradient_and_previous_states_without() -> None:
    detector = tiny().train()
    matching = detector(torch.rand(2, 3, 64, 64)).matching
    assert matching.edges is not None
    matching.edges.logits[1].sum().backward()
    for head in detector.decoder.edge_heads:  # corners of layer 0 are part of those of layer 1, not detached
        assert head.last.weight.grad.abs().sum() > 0  # type: ignore[union-attr]


def test_the_training_step_reaches_every_trainable_parameter() -> None:
    detector = tiny().train()
    output = detector(torch.rand(2, 3, 64, 64), (group(detector),))
    total = output.matching.logits.square().sum() + output.matching.boxes.sum()
    answers = output.groups[0][1]
    total = total + answers.logits.square().sum() + answers.boxes.sum()
    total.backward()
    silent = [n for n, p in detector.named_parameters() if p.requires_grad and p.grad is None]
    assert silent == []


def test_tables_are_built_once_and_no_more_than_64_are_kept() -> None:
    built: list[int] = []

    @kept
    def table(number: int) -> torch.Tensor:
        built.append(number)
        return torch.ones(number)

    with torch.inference_mode():
        first = table(1)
    assert not first.is_inference()
    assert table(1) is first
    for number in range(2, 66):
        table(number)
    assert table(1) is not first
    assert built == [*range(1, 66), 1]
    cpu = torch.device("cpu")
    assert sine_positions(2, 3, 8, cpu) is sine_positions(2, 3, 8, cpu)


def test_positions_equal_the_published_golden_values() -> None:
    # spec 1.3, for w = 3, h = 2 and 8 channels: its t1 is one step along the official grid's h, t2 one along its w
    table = sine_positions(2, 3, 8, torch.device("cpu")).view(2, 3, 8)
    golden = torch.tensor([0.84147, 0.0099998, 0.54030, 0.99995])
    torch.testing.assert_close(table[1, 0], torch.cat((golden, torch.tensor([0.0, 0.0, 1.0, 1.0]))), atol=1e-5, rtol=0)
    torch.testing.assert_close(table[0, 1], torch.cat((torch.tensor([0.0, 0.0, 1.0, 1.0]), golden)), atol=1e-5, rtol=0)


def test_top_detections_are_flat_over_queries_and_classes() -> None:
    logits = torch.full((1, 3, 4), -9.0)
    logits[0, 2, 1], logits[0, 2, 3], logits[0, 0, 0] = 3.0, 2.0, 1.0
    boxes = torch.arange(12.0).view(1, 3, 4)
    scores, labels, found = top_detections(logits, boxes, k=300)
    assert scores.shape == (1, 12)
    assert labels[0, :3].tolist() == [1, 3, 0]
    assert torch.equal(found[0, :3], boxes[0, [2, 2, 0]])


def test_as_many_detections_are_kept_as_there_are_queries_beyond_300() -> None:
    for queries, count in ((200, 300), (400, 400)):
        logits, boxes = torch.zeros(1, queries, 2), torch.zeros(1, queries, 4)
        assert top_detections(logits, boxes)[0].shape == (1, count)
    assert top_detections(logits, boxes, k=350)[0].shape == (1, 350)
