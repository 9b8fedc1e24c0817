"""RT-DETRv2: the parts that D-FINE does not have, and the same answers as `transformers`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from finedetr.errors import ConfigError
from finedetr.model.config import BackboneConfig, EncoderConfig, ModelConfig
from finedetr.model.decoder import PlainDecoder
from finedetr.model.deploy import deployed
from finedetr.model.detector import Detector
from finedetr.model.zoo import variant
from tests.model.oracle import assert_same_answers, pair, randomize

DEPLOYED = {"rtdetrv2-r18": 19_980_176, "rtdetrv2-r50-m": 32_942_352, "deim-rtdetrv2-r50": 42_144_876}
TINY_RTDETR = ModelConfig(
    "tiny-rtdetr",
    BackboneConfig("R18", affine=False, stages=(2, 3)),
    EncoderConfig(width=32, feedforward=64, expansion=0.5, depth=0.34, fusion="csp"),
    replace(variant("rtdetrv2-r18").decoder, width=32, feedforward=64, points=(3, 3), queries=20),
)


def tiny(**decoder: object) -> Detector:
    torch.manual_seed(0)
    detector = Detector(replace(TINY_RTDETR, decoder=replace(TINY_RTDETR.decoder, **decoder)), classes=5)
    randomize(detector)
    return detector


@pytest.mark.parametrize("name", DEPLOYED)
def test_deployed_counts_are_the_published_ones_without_the_heads_of_training(name: str) -> None:
    config = variant(name)
    with torch.device("meta"):
        model = deployed(Detector(config, 80), everything=False)
    heads = (len(model.decoder.layers) - 1) * (config.decoder.width * 80 + 80)
    assert sum(p.numel() for p in model.parameters()) + heads == DEPLOYED[name]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("rtdetrv2-r18", (640, 640)),
        ("rtdetrv2-r18", (320, 448)),
        ("rtdetrv2-r34", (320, 320)),
        ("rtdetrv2-r50", (640, 640)),
        ("rtdetrv2-r101", (320, 320)),
        ("rtdetrv2-r18-dsp", (320, 320)),
        ("rtdetrv2-r18-dsp", (320, 448)),
    ],
)
def test_logits_and_boxes_equal_transformers(name: str, size: tuple[int, int]) -> None:
    pytest.importorskip("transformers")
    assert_same_answers(*pair(variant(name), 80), size)


def test_discrete_sampling_is_the_same_model_read_in_another_way() -> None:
    for name in ("rtdetrv2-r18", "rtdetrv2-r34", "rtdetrv2-r50-m", "rtdetrv2-r50"):
        plain, discrete = variant(name), variant(f"{name}-dsp")
        assert discrete.decoder == replace(plain.decoder, sampling="discrete")
        assert (discrete.backbone, discrete.encoder) == (plain.backbone, plain.encoder)


def test_a_box_reaches_the_layer_before_and_no_further() -> None:
    decoder = tiny().train()
    images = torch.rand(2, 3, 64, 96)
    answers = decoder(images).matching
    assert answers.stages == ("encoder", "layer0", "layer1", "layer2")
    assert answers.edges is None
    assert isinstance(decoder.decoder, PlainDecoder)
    heads = [list(head.parameters()) for head in decoder.decoder.box_heads]
    for stage, reached in ((1, {0}), (2, {0, 1}), (3, {1, 2})):
        for index, parameters in enumerate(heads):
            grads = torch.autograd.grad(answers.boxes[stage].sum(), parameters, retain_graph=True, allow_unused=True)
            assert any(g is not None and bool(g.any()) for g in grads) == (index in reached), (stage, index)


def test_layers_beyond_the_answering_one_run_in_training_only() -> None:
    detector = tiny(layers=3, answering=2)
    images = torch.rand(1, 3, 64, 64)
    assert detector.train()(images).matching.stages[-1] == "layer2"
    detector.eval()
    with torch.inference_mode():
        before, after = detector(images).matching, deployed(detector)(images).matching
    assert before.stages == after.stages == ("layer1",)
    torch.testing.assert_close(after.logits, before.logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(after.boxes, before.boxes, atol=1e-4, rtol=1e-4)
    with pytest.raises(ConfigError, match=r"decoder\.answering must lie in 1\.\.3"):
        replace(detector.config, decoder=replace(detector.config.decoder, layers=3, answering=4))
