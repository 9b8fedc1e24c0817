"""What a distilled run leaves: a detector like any other, in its weights, its card and its exported graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import finedetr
from finedetr.distill.queries import QueryPrior
from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.weights import load_weights, read_card
from finedetr.recipes import build
from finedetr.train.folder import RunFolder
from finedetr.train.recipe import Recipe
from tests.distill.small import WIDE, weights_of
from tests.model.classic import small
from tests.train.conftest import one_thread as one_thread
from tests.train.small import draw, small_recipe
from tests.train.tiny import TINY

HOST = small("conditional-detr-r50", layers=2, encoders=1)
NARROW = replace(
    HOST,
    name="narrow",
    encoder=replace(HOST.encoder, width=32),
    decoder=replace(HOST.decoder, width=32, layers=3, queries=9),
)


class Answers(nn.Module):
    """The final answers as tensors, as an export has them."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        matching = self.detector(images).matching
        return matching.logits[-1], matching.boxes[-1]


def recipe_of(config: ModelConfig, *papers: str) -> Recipe:
    base = "conditional-detr" if config is HOST else "deim"
    made = build(config, base, papers, random_start=config is not HOST, teacher=bool(papers))
    recipe = small_recipe()
    if config is HOST:
        made = replace(made, objective=made.objective.with_weights({"ContrastiveDistillation": 0.2}))
    teaching = replace(made.teaching, start=0.0, ramp=0.0, watch=2)
    kept = {"model": made.model, "objective": made.objective, "sources": made.sources, "denoise": made.denoise}
    return replace(recipe, **kept, teaching=teaching, epochs=2, batch=4)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"), train=4, val=2)


@pytest.mark.parametrize(("config", "teacher"), [(TINY, WIDE), (HOST, NARROW)], ids=["dfine", "conditional"])
def test_a_distilled_student_is_a_detector_like_any_other(
    config: ModelConfig, teacher: ModelConfig, data: Path, tmp_path: Path
) -> None:
    """Distilled by both papers through the front door: no tensor and no node of a teacher is left (I6)."""
    recipe = recipe_of(config, "od-detr")
    assert {type(source) for source in recipe.sources} >= {QueryPrior}
    weights = weights_of(tmp_path, teacher)
    run = finedetr.train(data, recipe=recipe, teacher=weights, out=tmp_path / "run", device="cpu", quiet=True)
    measured = run.metrics[-1]["teaching"]
    assert {"instability_student", "instability_average", "agreement_average", "hits_average"} <= measured.keys()
    assert ("agreement_frozen" in measured) == (config is TINY)  # learned queries of another detector are strangers

    folder = RunFolder(run.folder)
    detector, card = load_weights(folder.best_weights, torch.device("cpu"))
    plain = Detector(config, 6)
    state = detector.state_dict()
    assert list(state) == list(plain.state_dict())
    plain.load_state_dict(state)
    assert card == read_card(folder.best_weights)
    assert card.config == config
    # the card says how it was trained, as of every run, and nothing of who taught it
    assert str(tmp_path).encode() not in folder.best_weights.read_bytes()
    assert (card.config, card.recipe["name"]) == (config, recipe.name)
    if config is TINY:  # the other one shows it of the graph, in half the time
        return
    images = torch.rand(1, 3, 64, 64)
    exported = [torch.export.export(Answers(d.eval()), (images,), strict=False) for d in (detector, plain)]
    nodes = [[(node.op, str(node.target)) for node in e.graph.nodes] for e in exported]
    assert nodes[0] == nodes[1]
    with torch.no_grad():
        for found, wanted in zip(exported[0].module()(images), Answers(detector)(images), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert len(run.model("cpu")(str(next((data / "val").glob("*.jpg"))), threshold=0.0)) > 0
