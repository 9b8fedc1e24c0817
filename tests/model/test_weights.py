"""Weights on disk: what travels with them, what is refused, what becomes of another set of classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finedetr.errors import ModelError, UsageError
from finedetr.model.detector import Detector
from finedetr.model.layers import focal_bias
from finedetr.model.weights import Card, load_weights, read_card, save_weights, transfer_weights
from tests.model.classic import random_detector, small
from tests.model.test_detector import tiny

TINY = {"name": "tiny", "backbone": {"stages": (2, 3)}, "decoder": {"points": (3, 3)}}
NAMES = ("ant", "bee", "cat", "dog", "eel")


def saved(folder: Path) -> tuple[Path, Detector, Card]:
    detector = tiny().eval()
    card = Card(
        detector.config,
        NAMES,
        (1, 3, 4, 9, 90),
        (96, 128),
        (0.5, 0.5, 0.5),
        (0.2, 0.2, 0.2),
        {"name": "deim"},
        {"AP": 0.5},
    )
    return save_weights(folder / "some" / "best.safetensors", detector, card), detector, card


def test_weights_and_card_come_back_as_they_were(tmp_path: Path) -> None:
    path, detector, card = saved(tmp_path)
    again, card_again = load_weights(path)
    assert card_again == card
    assert not again.training
    images = torch.rand(1, 3, 96, 128)
    with torch.inference_mode():
        assert torch.equal(again(images).matching.logits, detector(images).matching.logits)
    assert read_card(path) == card
    assert [p.name for p in path.parent.iterdir()] == ["best.safetensors"]  # no temporary file stays


def test_a_missing_file_is_an_error_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights at") as error:
        load_weights(tmp_path / "none.safetensors")
    assert error.value.code == "model.not_found"


def test_a_broken_file_and_a_foreign_file_are_told_apart(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x09" * 100)
    with pytest.raises(ModelError, match="no readable safetensors file"):
        load_weights(broken)
    graph = tmp_path / "dfine.onnx"
    graph.write_bytes(b"\x08\x08\x12\x07pytorch")
    with pytest.raises(ModelError, match="is a graph, no weights"):
        load_weights(graph)
    foreign = tmp_path / "foreign.safetensors"
    save_file({"x": torch.zeros(1)}, foreign)
    with pytest.raises(ModelError, match="carries no finedetr card"):
        read_card(foreign)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path, _, card = saved(tmp_path)
    state = load_file(path)
    state["selection.score_head.weight"] = torch.zeros(7, 32)
    state["stranger"] = torch.zeros(1)
    del state["decoder.layers.0.norm1.bias"]
    save_file(state, path, metadata={"finedetr": card.to_json()})
    with pytest.raises(ModelError) as error:
        load_weights(path)
    for part in ("missing decoder.layers.0.norm1.bias", "unexpected stranger", "score_head.weight is (7, 32)"):
        assert part in str(error.value)


def test_bins_that_are_not_those_of_the_card_are_refused(tmp_path: Path) -> None:
    path, _, card = saved(tmp_path)
    state = load_file(path)
    state["decoder.bin_table.reg_scale"] = torch.tensor([8.0])
    save_file(state, path, metadata={"finedetr": card.to_json()})
    with pytest.raises(ModelError, match=r"reg_scale is 8, the card says 4"):
        load_weights(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99"),
        ({"nmaes": []}, "Did you mean names"),
        ({"size": 640}, "a list was expected"),
        ({"category_ids": [1]}, "one category id for each class name"),
        ({"names": [], "category_ids": []}, "at least one class"),
        ({"names": [1, 2, 3, 4, 5]}, "names: text was expected, got 1"),
        ({"size": ["a", "b"]}, "size: a whole number was expected, got 'a'"),
        ({"size": [0, 5]}, "a size of at least 1"),
        ({"mean": [0.5]}, "mean: a list of 3 was expected"),
        ({"metrics": 5}, "metrics: a table was expected"),
        ({"metrics": {"AP": "x"}}, "metrics.AP: a number was expected"),
        ({"schema": "x"}, "schema x"),
        ({"config": {**TINY, "decoder": {"layers": "3"}}}, "decoder.layers: a whole number was expected, got '3'"),
        ({"config": {**TINY, "decoder": {"heads": 0}}}, "decoder.heads: at least 1 is wanted, 0 came"),
        ({"config": {**TINY, "decoder": {"layers": 0}}}, "decoder.layers: at least 1 is wanted, 0 came"),
        ({"config": {**TINY, "decoder": {"points": [3, 0]}}}, "one point of each"),
        ({"config": {**TINY, "decoder": {"gateway": 1}}}, "decoder.gateway: true or false was expected, got 1"),
        ({"config": {**TINY, "decoder": {"scale": True}}}, "decoder.scale: a number was expected, got True"),
        ({"config": {**TINY, "decoder": {"source": "foo"}}}, "source: one of 'tokens', .* was expected, got 'foo'"),
        ({"config": {**TINY, "decoder": {"norm": "foo"}}}, "norm: one of"),
        ({"config": {**TINY, "encoder": {"fusion": "foo"}}}, "fusion: one of"),
        ({"config": {**TINY, "backbone": {"stages": ["a"]}}}, "stages: a whole number was expected"),
        ({"config": {**TINY, "backbone": {"stages": []}}}, "at least one of backbone.stages"),
    ],
)
def test_a_card_that_cannot_be_read_says_why(change: dict[str, object], message: str) -> None:
    document = json.loads(Card(tiny().config, NAMES, (1, 2, 3, 4, 5)).to_json())
    with pytest.raises(ModelError, match=message):
        Card.from_json(json.dumps({**document, **change}))


@pytest.mark.parametrize("text", ["[]", "3", "{", "[" * 100_000, "{}"])
def test_a_card_that_is_no_table_is_refused(text: str) -> None:
    with pytest.raises(ModelError, match="the card is"):
        Card.from_json(text)


@pytest.mark.parametrize(
    ("backbone", "message"), [({"name": "foo"}, "no backbone is called 'foo'"), ({"stages": (2, 9)}, r"in 0\.\.3")]
)
def test_a_card_of_a_backbone_that_is_none_is_an_error_of_the_file(
    tmp_path: Path, backbone: dict[str, Any], message: str
) -> None:
    path, _, card = saved(tmp_path)
    config = replace(card.config, backbone=replace(card.config.backbone, **backbone))
    save_file(load_file(path), path, metadata={"finedetr": replace(card, config=config).to_json()})
    with pytest.raises(ModelError, match=message):
        load_weights(path)


def test_class_rows_that_do_not_fit_their_card_start_nothing(tmp_path: Path) -> None:
    path, source, card = saved(tmp_path)
    state = load_file(path)
    state["selection.score_head.weight"] = torch.zeros(2, 32)
    save_file(state, path, metadata={"finedetr": card.to_json()})
    with pytest.raises(ModelError, match=r"score_head\.weight is \(2, 32\), expected \(5, 32\)"):
        transfer_weights(Detector(source.config, 3), ("dog", "eel", "ant"), path)


def test_classes_are_carried_over_by_name_and_new_ones_start_at_the_prior(tmp_path: Path) -> None:
    path, source, _ = saved(tmp_path)
    torch.manual_seed(1)
    detector = Detector(source.config, 3)
    begun = [detector.decoder.score_heads[1].weight[1].clone(), detector.selection.score_head.weight[1].clone()]
    transfer = transfer_weights(detector, ("dog", "fox", "bee"), path)
    assert transfer.kept == ("dog", "bee")
    assert transfer.new == ("fox",)
    assert transfer.dropped == ("ant", "cat", "eel")
    assert transfer.skipped == ()
    head, old = detector.decoder.score_heads[1], source.decoder.score_heads[1]
    assert torch.equal(head.weight[[0, 2]], old.weight[[3, 1]])
    assert head.bias[1].item() == pytest.approx(focal_bias())
    torch.testing.assert_close(head.weight[1], begun[0] + old.weight.mean(dim=0))  # an object of an unknown kind
    ranks = source.selection.score_head.weight.mean(dim=0)
    torch.testing.assert_close(detector.selection.score_head.weight[1], begun[1] + ranks)
    assert torch.equal(detector.label_embedding.weight[[0, 2, 3]], source.label_embedding.weight[[3, 1, 5]])
    assert torch.equal(detector.backbone.stem.stem1.conv.weight, source.backbone.stem.stem1.conv.weight)


def test_what_ranks_the_proposals_of_all_classes_is_kept_whatever_the_classes(tmp_path: Path) -> None:
    source = random_detector(small("deformable-detr-r50-two-stage", layers=1, encoders=1))
    path = save_weights(tmp_path / "best.safetensors", source, Card(source.config, NAMES, (1, 2, 3, 4, 5)))
    target = Detector(source.config, 3)
    transfer_weights(target, ("dog", "fox", "ant"), path)
    for row in ("weight", "bias"):
        mine, theirs = (getattr(detector.selection.score_head, row) for detector in (target, source))
        assert torch.equal(mine[0], theirs[0])
    head, old = target.decoder.score_heads[0], source.decoder.score_heads[0]
    assert torch.equal(head.weight[[0, 2]], old.weight[[3, 0]])


def test_what_is_frozen_or_dropped_in_training_is_no_part_of_the_model(tmp_path: Path) -> None:
    source = random_detector(small("conditional-detr-r50", layers=1, encoders=1))
    config = source.config
    path = save_weights(tmp_path / "best.safetensors", source, Card(config, NAMES, (1, 2, 3, 4, 5)))
    other = replace(
        config,
        backbone=replace(config.backbone, freeze_stem=False, freeze_norm=False, freeze_stages=0),
        encoder=replace(config.encoder, dropout=0.0),
        decoder=replace(config.decoder, dropout=0.0),
    )
    assert transfer_weights(Detector(other, 5), NAMES, path).skipped == ()


@pytest.mark.parametrize("host", ["conditional-detr-r50", "dab-detr-r50", "deformable-detr-r50", "dino-r50"])
def test_learned_queries_are_as_many_as_in_the_weights(tmp_path: Path, host: str) -> None:
    source = random_detector(small(host, layers=1, encoders=1))
    path = save_weights(tmp_path / "best.safetensors", source, Card(source.config, NAMES, (1, 2, 3, 4, 5)))
    assert load_weights(path, queries=7)[1].config == source.config
    with pytest.raises(UsageError, match=r"whose 7 queries are learned one by one; 9 came"):
        load_weights(path, queries=9)
    more = Detector(replace(source.config, decoder=replace(source.config.decoder, queries=9)), 5)
    with pytest.raises(ModelError, match=r"decoder\.queries 7 -> 9"):
        transfer_weights(more, NAMES, path)


def test_chosen_queries_are_as_many_as_one_likes(tmp_path: Path) -> None:
    source = random_detector(small("deformable-detr-r50-two-stage", layers=1, encoders=1))
    path = save_weights(tmp_path / "best.safetensors", source, Card(source.config, NAMES, (1, 2, 3, 4, 5)))
    assert load_weights(path, queries=9)[0](torch.rand(1, 3, 64, 64)).matching.boxes.shape[2] == 9


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    path, source, _ = saved(tmp_path)
    other = Detector(replace(source.config, name="other", decoder=replace(source.config.decoder, layers=3)), 5)
    with pytest.raises(ModelError, match="holds a 'tiny', the run trains a 'other'"):
        transfer_weights(other, NAMES, path)
