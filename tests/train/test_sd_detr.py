"""SD-DETR as a recipe: its parts, from the weights of a plain host, and what a dry run says of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from finedetr.cli import main
from finedetr.errors import UsageError
from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.weights import Card, load_weights, save_weights
from finedetr.model.zoo import ZOO, variant
from finedetr.recipes import build
from finedetr.recipes.published import DEIM, DFINE, row
from tests.distill.small import NAMES
from tests.model.test_split import HOSTS, PLAIN
from tests.train.small import draw
from tests.train.tiny import TINY


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"), train=4, val=2)


def weights(config: ModelConfig, folder: Path) -> Path:
    torch.manual_seed(0)
    card = Card(config, NAMES, tuple(range(len(NAMES))), (64, 64))
    return save_weights(folder / "plain.safetensors", Detector(config, len(NAMES)), card)


def words(data: Path, path: Path, paper: str, out: Path) -> list[str]:
    small = ["--batch", "4", "--workers", "0", "--device", "cpu", "--epochs", "1", "--quiet"]
    return ["train", "--data", str(data), "--weights", str(path), "--with", paper, "--out", str(out), *small]


def test_a_run_goes_on_from_a_plain_detector(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = weights(TINY, tmp_path), tmp_path / "a"
    assert main([*words(data, path, "sd-detr", out), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "objective  2·TaskAligned + 5·BoxL1" in said
    assert "M parameters (+" in said
    assert main([*words(data, path, "sd-detr", out), "--lr", "1e-9"]) == 0
    log = (out / "train.log").read_text()
    assert "weights: copied   decoder.layers.*.boxes <- decoder.layers.*" in log
    assert "weights: fresh    decoder.task_moves (4), without effect" in log
    split, card = load_weights(out / "weights" / "last.safetensors")
    assert (card.config.name, card.config.decoder.split.joining) == ("tiny-sd", "fused")
    plain = load_weights(path)[0]
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():  # a rate of nothing has changed nothing but the norms' statistics
        plain.backbone, plain.encoder = split.backbone, split.encoder
        plain.decoder_input_proj = split.decoder_input_proj
        torch.testing.assert_close(split(images).matching.boxes, plain(images).matching.boxes, atol=1e-4, rtol=0)


def test_distributions_go_on_from_plain_boxes(data: Path, tmp_path: Path) -> None:
    path, out = weights(PLAIN, tmp_path), tmp_path / "a"
    assert main(words(data, path, "fdr", out)) == 0
    log = (out / "train.log").read_text()
    assert "weights: copied   decoder.initial_box_head <- decoder.box_heads (6)" in log
    assert "weights: fresh    decoder.edge_heads (12), without effect" in log
    assert "weights: unused   decoder.box_heads (6)" in log  # those of the second layer
    losses = json.loads((out / "metrics.jsonl").read_text().splitlines()[0])
    assert load_weights(out / "weights" / "last.safetensors")[1].config.decoder.boxes == "distributions"
    assert losses


def test_every_part_is_a_name() -> None:
    def parts(host: str, *names: str) -> tuple[str, str, bool, str]:
        recipe = build(HOSTS[host], "conditional-detr" if host == "conditional" else "dfine", names, random_start=False)
        decoder = recipe.model.decoder
        return decoder.split.joining, decoder.split.queries, decoder.salient.queries, recipe.objective.names[0]

    assert parts("conditional", "sd-split") == ("token", "own", False, "Focal")
    assert parts("conditional", "sd-queries") == ("none", "shared", True, "Focal")
    assert parts("conditional", "sd-alignment") == ("none", "shared", False, "TaskAligned")
    assert parts("conditional", "sd-detr") == ("token", "shared", True, "TaskAligned")
    assert parts("conditional", "sd-split", "sd-queries", "sd-alignment") == parts("conditional", "sd-detr")
    assert parts("dfine", "sd-split") == ("fused", "shared", False, "Varifocal")
    assert parts("dfine", "sd-detr") == ("fused", "own", False, "TaskAligned")
    assert parts("dfine", "sd-detr", "sd-detr") == parts("dfine", "sd-detr")
    with pytest.raises(UsageError, match="tokens of the picture already"):
        parts("dfine", "sd-queries")


def test_alignment_takes_the_weight_of_a_focal_loss_and_twice_that_of_others() -> None:
    def weight(model: ModelConfig, recipe: str, *papers: str) -> float:
        return build(model, recipe, papers, random_start=False).objective.terms[0].weight

    assert weight(HOSTS["conditional"], "conditional-detr", "sd-alignment") == 2.0
    assert weight(HOSTS["dino"], "dino", "sd-alignment") == 1.0
    assert weight(HOSTS["dino"], "dino", "od-detr", "sd-alignment") == 1.0
    assert weight(TINY, "dfine", "sd-alignment") == weight(TINY, "deim", "sd-alignment") == 2.0


def test_what_papers_made_of_a_model_keeps_its_published_numbers() -> None:
    assert row(DFINE, "dfine-n-sd") == DFINE["n"]
    assert row(DEIM, "deim-dfine-x-split-queries") == DEIM["x"]
    made = build(variant("dfine-n"), "deim", ("sd-detr",), random_start=False).model
    assert made.name == "deim-dfine-n-sd"
    assert made.whole == replace(ZOO["deim-dfine-n"], name=made.name)
    assert build(made, "deim", random_start=False).epochs == 160
