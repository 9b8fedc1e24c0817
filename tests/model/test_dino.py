"""DINO: the loop of spec 2.4, written down once more, and how far its gradients reach."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from finedetr.geometry import inverse_sigmoid
from finedetr.model.decoder import PlainDecoder
from finedetr.model.decoder_layers import Both
from finedetr.model.detector import Detector
from finedetr.model.queries import QuerySelection, anchor_table
from finedetr.model.sines import SineMap, sine_code
from finedetr.model.token_encoders import DeformableEncoder, as_maps
from tests.model.classic import random_detector, small


def waves(value: float, channels: int, temperature: float) -> list[float]:
    """Spec 2.1, number by number."""
    angles = [2 * math.pi * value / temperature ** (2 * (k // 2) / channels) for k in range(channels)]
    return [math.cos(angle) if k % 2 else math.sin(angle) for k, angle in enumerate(angles)]


def test_sine_codes_are_those_of_the_formula() -> None:
    torch.testing.assert_close(
        sine_code(torch.tensor([0.3, 0.8]), 6), torch.tensor(waves(0.3, 6, 1e4) + waves(0.8, 6, 1e4))
    )
    for centered in (False, True):
        table = SineMap(8, 20.0, centered=centered)(2, 3, torch.device("cpu"))
        shift = 0.5 if centered else 0.0
        wanted = [
            waves((row - shift) / (2 + 1e-6), 4, 20) + waves((column - shift) / (3 + 1e-6), 4, 20)
            for row in (1, 2)
            for column in (1, 2, 3)
        ]
        torch.testing.assert_close(table, torch.tensor(wanted))


def by_the_formulas(detector: Detector, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and boxes of all layers, and the encoder's boxes, step by step as spec 2.4 has them."""
    encoder, selection, decoder = detector.encoder, detector.selection, detector.decoder
    assert isinstance(encoder, DeformableEncoder)
    assert isinstance(selection, QuerySelection)
    assert isinstance(decoder, PlainDecoder)
    assert selection.content is not None
    assert decoder.norm is not None
    maps = detector.backbone(images)
    levels = [encoder.input_proj[i](x) for i, x in enumerate(maps)]
    levels.append(encoder.input_proj[3](maps[-1]))
    shapes = tuple((x.shape[-2], x.shape[-1]) for x in levels)
    tokens = torch.cat([x.flatten(2).mT for x in levels], dim=1)
    code, centers = [], []
    for (height, width), own in zip(shapes, encoder.level_embedding, strict=True):
        for row in range(height):
            for column in range(width):
                place = waves((row + 1) / (height + 1e-6), 32, 20) + waves((column + 1) / (width + 1e-6), 32, 20)
                code.append(torch.tensor(place) + own)
                centers.append(((column + 0.5) / width, (row + 0.5) / height))
    for layer in encoder.layers:
        tokens = layer(tokens, torch.stack(code), torch.tensor(centers), shapes)

    anchors, usable = anchor_table(shapes, images.device)
    scored = selection.norm(selection.proj(tokens * usable))
    chosen = selection.score_head(scored).amax(-1).topk(selection.queries, dim=1).indices
    proposals = (selection.box_head(scored) + anchors).sigmoid()
    reference = proposals.gather(1, chosen[..., None].expand(-1, -1, 4))
    state = selection.content.weight.expand(len(images), -1, -1)
    before, logits, boxes, memory = reference, [], [], as_maps(tokens, shapes)
    for layer in decoder.layers:
        x, y, w, h = reference.unbind(-1)
        assert decoder.query_position_head is not None
        positions = decoder.query_position_head(torch.cat([sine_code(v[..., None], 32) for v in (y, x, w, h)], dim=-1))
        state = layer(*map(Both.same, (state, positions, reference)), memory, None).boxes
        seen = decoder.norm(state)
        logits.append(decoder.score_heads[0](seen))
        boxes.append((decoder.box_heads[0](seen) + inverse_sigmoid(before, 1e-3)).sigmoid())
        before = reference = (decoder.box_heads[0](state) + inverse_sigmoid(reference, 1e-3)).sigmoid()
    return torch.stack(logits), torch.stack(boxes), proposals.gather(1, chosen[..., None].expand(-1, -1, 4))


def test_answers_are_those_of_the_formulas() -> None:
    detector = random_detector(small("dino-r50"))
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        answers = detector(images, all_stages=True).matching
        logits, boxes, proposals = by_the_formulas(detector, images)
    assert answers.stages == ("encoder", "layer0", "layer1", "layer2")
    torch.testing.assert_close(answers.logits[1:], logits, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answers.boxes[1:], boxes, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(answers.boxes[0], proposals, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "reached"),
    [("dino-r50", ({0}, {0, 1}, {1, 2})), ("deformable-detr-r50-refine", ({0}, {1}, {2}))],
)
def test_only_dinos_boxes_reach_the_layer_before(name: str, reached: tuple[set[int], ...]) -> None:
    detector = random_detector(small(name, shared_boxes=False)).train()
    answers = detector(torch.rand(2, 3, 64, 64)).matching
    assert isinstance(detector.decoder, PlainDecoder)
    heads = [list(head.parameters()) for head in detector.decoder.box_heads]
    for layer, wanted in enumerate(reached):
        total = answers.boxes[answers.stages.index(f"layer{layer}")].sum()
        grads = [torch.autograd.grad(total, head, retain_graph=True, allow_unused=True) for head in heads]
        assert {i for i, own in enumerate(grads) if any(g is not None and g.any() for g in own)} == wanted


def test_content_is_learned_and_places_are_chosen() -> None:
    detector = random_detector(small("dino-r50")).train()
    detector(torch.rand(2, 3, 64, 64)).matching.logits[1:].sum().backward()
    content = detector.selection.content.weight  # type: ignore[union-attr]
    assert content.grad is not None
    assert content.grad.abs().sum() > 0
    assert detector.selection.proj.weight.grad is None or not detector.selection.proj.weight.grad.any()  # type: ignore[union-attr]
