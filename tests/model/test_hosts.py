"""The classic hosts on the shared detector: groups, gradients, export, distributions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from finedetr.errors import ConfigError
from finedetr.model.config import ModelConfig
from finedetr.model.deploy import deployed
from finedetr.model.detector import Detector
from finedetr.model.zoo import ZOO, published_input, variant
from finedetr.records import QueryGroup
from tests.model.classic import CLASSES, answers_and_exported, random_detector, small

HOSTS = (
    "conditional-detr-r50-dc5",
    "dab-detr-r50",
    "deformable-detr-r50",
    "deformable-detr-r50-refine",
    "deformable-detr-r50-two-stage",
    "dino-r50",
)
COUNTS = {  # at COCO's 91 outputs; `transformers` has the same, DAB-DETR but for the labels of denoising queries
    "conditional-detr-r50": 43_418_401,
    "conditional-detr-r101": 62_358_305,
    "dab-detr-r50": 43_671_517 + 92 * 256,
    "deformable-detr-r50": 40_069_665,
    "deformable-detr-r50-refine": 40_849_660,
    "deformable-detr-r50-two-stage": 41_181_529,
    "dino-r50": 46_893_182,  # published: 47 M
}


def host(name: str, boxes: str) -> ModelConfig:
    config = small(name, layers=2, encoders=1)
    return (
        config
        if boxes == "plain"
        else replace(config, decoder=replace(config.decoder, boxes=boxes, shared_boxes=False))
    )


def labels_and_boxes(queries: int = 6) -> QueryGroup:
    generator = torch.Generator().manual_seed(3)
    boxes = 0.2 + 0.5 * torch.rand(2, queries, 4, generator=generator)
    labels = torch.randint(0, CLASSES + 1, (2, queries), generator=generator)
    return QueryGroup("extra", boxes, labels=labels)


def a_group_for(detector: Detector) -> QueryGroup:
    """What this detector takes from outside: boxes and labels, or all that a teacher of its kind would bring."""
    group = labels_and_boxes()
    if detector.config.decoder.boxes_are_queries:
        return group
    content, positions = torch.randn(2, 2, 6, 64, generator=torch.Generator().manual_seed(4))
    return replace(group, labels=None, content=content, positions=positions)


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        detector = Detector(variant(name), 91)
    assert sum(p.numel() for p in detector.parameters()) == COUNTS[name]


@pytest.mark.parametrize("boxes", ["plain", "distributions"])
@pytest.mark.parametrize("name", HOSTS)
def test_deployment_answers_the_same(name: str, boxes: str) -> None:
    detector = random_detector(host(name, boxes))
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        wanted, shipped = detector(images).matching, deployed(detector)(images).matching
    torch.testing.assert_close(shipped.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(shipped.boxes, wanted.boxes, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["deformable-detr-r50-refine", "deformable-detr-r50-two-stage"])
def test_exported_graphs_answer_the_same(name: str) -> None:
    """The other hosts are in `tests/train/test_matrix.py`."""
    (logits, boxes), (exported, found) = answers_and_exported(random_detector(host(name, "plain")))
    torch.testing.assert_close(exported, logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found, boxes, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", HOSTS)
def test_queries_are_blind_to_groups_from_outside(name: str) -> None:
    detector = random_detector(host(name, "plain"))
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    extra = a_group_for(detector)
    with torch.no_grad():
        alone = detector(images, all_stages=True).matching
        beside, moved = (
            detector(images, (replace(extra, boxes=boxes),), all_stages=True)
            for boxes in (extra.boxes, 1 - extra.boxes)
        )
    assert torch.equal(beside.matching.logits, moved.matching.logits)
    torch.testing.assert_close(beside.matching.logits, alone.logits, atol=1e-5, rtol=1e-5)
    assert beside.groups[0][1].boxes.shape == (2, 2, 6, 4)
    assert not torch.equal(beside.groups[0][1].boxes, moved.groups[0][1].boxes)


@pytest.mark.parametrize("name", ["conditional-detr-r50-dc5", "deformable-detr-r50", "deformable-detr-r50-two-stage"])
def test_learned_positions_take_no_boxes_for_queries(name: str) -> None:
    detector = random_detector(host(name, "plain"))
    with pytest.raises(ConfigError, match="learned positions"):
        detector(torch.rand(2, 3, 64, 64), (labels_and_boxes(),))
    if name.endswith("two-stage"):
        return  # it makes positions of boxes, for queries that are no labels
    content = replace(labels_and_boxes(), labels=None, content=torch.zeros(2, 6, 64))
    with pytest.raises(ConfigError, match="learned positions"):
        detector(torch.rand(2, 3, 64, 64), (content,))


def test_stages_are_those_of_the_host() -> None:
    images = torch.rand(2, 3, 64, 64)
    stages = {}
    for name in HOSTS:
        detector = random_detector(host(name, "plain")).train()
        output = detector(images)
        stages[name] = (output.matching.stages, [group.name for group, _ in output.groups])
    layers = ("layer0", "layer1")
    assert stages.pop("dino-r50") == (("encoder", *layers), [])
    assert stages.pop("deformable-detr-r50-two-stage") == (layers, ["proposals"])
    assert set(map(str, stages.values())) == {str((layers, []))}


def test_proposals_answer_for_all_tokens_in_training_only() -> None:
    detector = random_detector(host("deformable-detr-r50-two-stage", "plain"))
    images = torch.rand(2, 3, 64, 96)
    assert detector.eval()(images, all_stages=True).groups == ()
    group, answers = detector.train()(images).groups[0]
    assert group.agnostic
    assert answers.boxes.shape == (1, 2, 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2, 4)


def test_two_stages_read_every_token_once_and_choose_the_same_in_training() -> None:
    detector = random_detector(host("deformable-detr-r50-two-stage", "plain"))
    for module in detector.modules():
        module.dropout = 0.0
    read: list[int] = []
    detector.selection.proj.register_forward_hook(lambda _, given, __: read.append(given[0].shape[1]))  # type: ignore[union-attr]
    images = torch.rand(1, 3, 64, 96)
    boxes, answers = [], []
    for training in (False, True):
        answers.append(detector.train(training)(images, all_stages=True))
        boxes.append(answers[-1].matching.boxes)
    assert read == [8 * 12 + 4 * 6 + 2 * 3 + 1 * 2] * 2
    torch.testing.assert_close(boxes[0], boxes[1])
    answers[1].groups[0][1].boxes.sum().backward()
    assert detector.selection.proj.weight.grad.abs().sum() > 0  # type: ignore[union-attr, operator]


def test_points_stay_and_boxes_move() -> None:
    """Without refinement every layer looks at the learned point; with it, at the box before, of four numbers."""
    seen: list[Tensor] = []
    for name in ("deformable-detr-r50", "deformable-detr-r50-refine"):
        detector = random_detector(small(name, layers=3))
        for layer in detector.decoder.layers:
            layer.register_forward_pre_hook(lambda _, given: seen.append(given[2].boxes))
        detector(torch.rand(1, 3, 64, 64))
    assert [where.shape[-1] for where in seen] == [2, 2, 2, 2, 4, 4]
    assert torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("name", HOSTS)
def test_boxes_of_points_begin_small_only_where_the_host_has_them_so(name: str) -> None:
    torch.manual_seed(0)
    detector = Detector(small(name), CLASSES)
    boxes = detector(torch.rand(1, 3, 64, 64), all_stages=True).matching.boxes[0, 0, :, 2:]
    match detector.config.decoder.source, detector.config.decoder.attention:
        case "points", "deformable":
            wanted = torch.full_like(boxes, 0.1192)
        case "points", _:
            wanted = torch.full_like(boxes, 0.5)
        case "anchors", _:  # the learned ones
            wanted = detector.selection.anchors.weight[:, 2:].sigmoid()  # type: ignore[union-attr, operator, index]
        case _:  # the nearest of the levels' anchors; 1 where one is unusable, as at the border
            sides = torch.tensor([0.05, 0.1, 0.2, 0.4, 1.0])
            wanted = sides[(boxes[..., None] - sides).abs().argmin(dim=-1)]
    torch.testing.assert_close(boxes, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", HOSTS)
def test_training_goes_on_after_inference_at_a_new_size(name: str) -> None:
    detector = random_detector(host(name, "plain"))
    images = torch.rand(1, 3, 96, 160)  # no other test has built its tables
    with torch.inference_mode():
        detector(images)
    answers = detector.train()(images).matching
    (answers.logits.sum() + answers.boxes.sum()).backward()
    gradient = next(detector.encoder.input_proj[0].parameters()).grad
    assert gradient is not None
    assert gradient.isfinite().all()


def test_dropout_is_for_training() -> None:
    detector = random_detector(host("conditional-detr-r50-dc5", "plain"))
    images = torch.rand(1, 3, 64, 64)
    first, second = (detector(images).matching.logits for _ in range(2))
    assert torch.equal(first, second)
    detector.train()
    assert not torch.equal(detector(images).matching.logits, detector(images).matching.logits)


def test_what_is_frozen_in_the_published_backbones() -> None:
    with torch.device("meta"):
        detector = Detector(variant("deformable-detr-r50"), 91)
    still = {name for name, p in detector.backbone.named_parameters() if not p.requires_grad}
    assert still == {name for name, _ in detector.backbone.named_parameters() if name.startswith(("stem", "stages.0"))}
    assert not any("norm" in name for name, _ in detector.backbone.named_parameters())


def test_sizes_need_not_divide_by_the_stride_of_extra_levels() -> None:
    detector = random_detector(host("dino-r50", "plain"))
    assert detector.config.strides == (8, 16, 32, 64)
    assert detector.config.largest_stride == 32
    assert detector(torch.rand(1, 3, 96, 160)).matching.boxes.isfinite().all()
    assert published_input(variant("dino-r50")).mean == (0.485, 0.456, 0.406)
    assert variant("conditional-detr-r50-dc5").largest_stride == 16


def test_levels_and_queries_that_do_not_go_together_are_refused() -> None:
    row = variant("conditional-detr-r50")
    with pytest.raises(ConfigError, match="one level"):
        replace(row, backbone=replace(row.backbone, stages=(2, 3)))
    with pytest.raises(ConfigError, match="learned queries"):
        replace(row, decoder=replace(row.decoder, source="mixed"))
    deformable = variant("deformable-detr-r50-refine")
    with pytest.raises(ConfigError, match="learned boxes"):
        replace(deformable, decoder=replace(deformable.decoder, source="anchors"))
    with pytest.raises(ConfigError, match="extra_levels"):
        replace(variant("dino-r50"), encoder=replace(variant("dino-r50").encoder, fusion="elan"))


@pytest.mark.parametrize(
    ("part", "change", "message"),
    [
        ("decoder", {"position_layers": 4}, "position_layers must be 2 or 3; got 4"),
        ("decoder", {"bins": 32}, "bins must be odd, so that one bin means 'do not move'; got 32"),
        ("decoder", {"points": (3, 6)}, "points names 2 levels, the pyramid has 3"),
        ("decoder", {"heads": 7}, "decoder.width must be a multiple of its 7 heads and of 4; got 256"),
        ("decoder", {"width": 6, "heads": 2}, "decoder.width must be a multiple of its 2 heads and of 4; got 6"),
        ("encoder", {"heads": 7}, "encoder.width must be a multiple of its 7 heads and of 4; got 256"),
        ("decoder", {"answering": 7}, r"answering must lie in 1\.\.6"),
    ],
)
def test_numbers_that_do_not_go_together_are_refused(part: str, change: dict[str, object], message: str) -> None:
    row = variant("dfine-l")
    with pytest.raises(ConfigError, match=message):
        replace(row, **{part: replace(getattr(row, part), **change)})


def test_every_classic_row_is_known_as_one() -> None:
    names = [name for name, config in ZOO.items() if config.classic]
    assert len(names) == 13
    assert all(name.split("-")[0] in ("conditional", "dab", "deformable", "dino") for name in names)
