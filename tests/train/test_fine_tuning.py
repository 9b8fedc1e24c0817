"""The traps of fine-tuning (spec section 7): what goes wrong elsewhere, held to go right here."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import finedetr
from finedetr.cli import main
from finedetr.model import hgnet
from finedetr.model.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.hgnet import HGNetTable, StageRow
from finedetr.model.weights import Card, load_weights, save_weights
from finedetr.model.zoo import variant
from finedetr.recipes import build
from finedetr.train.recipe import Recipe

SMALLEST = HGNetTable((8, 16), (StageRow(16, 8, 16, 1, False, False, 3, 1), StageRow(16, 16, 32, 1, True, False, 3, 1)))
MODEL = ModelConfig(
    "smallest",
    BackboneConfig("smallest", stages=(1,)),
    EncoderConfig(width=32, feedforward=64, expansion=0.34, depth=0.34, heads=4),
    DecoderConfig(width=32, feedforward=64, layers=2, heads=4, points=(3,), queries=16),
)
CHANNELS = {"red": 0, "green": 1}


def draw(folder: Path, categories: dict[int, str], train: int, val: int = 8, seed: int = 0) -> Path:
    """Two bright rectangles a picture of 64x64, in one channel each: something that is learned in seconds."""
    random = np.random.default_rng(seed)
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", train), ("val", val)):
        (folder / split).mkdir()
        images, annotations = [], []
        for index in range(count):
            pixels = random.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            for _ in range(2):
                identity = int(random.choice(list(categories)))
                w, h = (int(side) for side in random.integers(16, 28, 2))
                x, y = int(random.integers(0, 64 - w)), int(random.integers(0, 64 - h))
                pixels[y : y + h, x : x + w] = random.integers(0, 60, (h, w, 3))
                pixels[y : y + h, x : x + w, CHANNELS[categories[identity]]] += 160
                box = {"bbox": [x, y, w, h], "area": w * h, "iscrowd": 0, "category_id": identity}
                annotations.append({"id": len(annotations) + 1, "image_id": index + 1, **box})
            Image.fromarray(pixels).save(folder / split / f"{index}.png")
            images.append({"id": index + 1, "file_name": f"{index}.png", "width": 64, "height": 64})
        table = [{"id": identity, "name": name} for identity, name in categories.items()]
        document = {"images": images, "annotations": annotations, "categories": table}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))
    return folder


def recipe(epochs: int, *, random_start: bool = False, **changes: Any) -> Recipe:
    made = build(MODEL, random_start=random_start)
    plain = replace(made.schedule, start=0.0, flat=0.0, plain=0.0, restart=False, curve="constant")
    base = replace(
        made, model=MODEL, size=(64, 64), epochs=epochs, batch=4, workers=0, precision="fp32", schedule=plain
    )
    return replace(base, denoise=False, evaluating=replace(made.evaluating, every=epochs), **changes)


@pytest.fixture(scope="module", autouse=True)
def smallest_backbone() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(hgnet.HGNETS, "smallest", SMALLEST)
        yield


@pytest.fixture(scope="module")
def checkpoint(smallest_backbone: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has learned red (1) and green (2)."""
    folder = tmp_path_factory.mktemp("checkpoint")
    data = draw(folder / "data", {1: "red", 2: "green"}, train=128)
    made = recipe(6, random_start=True, lr=6e-3)
    run = finedetr.train(data, recipe=replace(made, batch=8), out=folder / "run", device="cpu", quiet=True)
    assert run.best is not None
    assert run.best.ap50 > 0.2
    return run.folder


def test_twenty_pictures_from_a_checkpoint_beat_twenty_from_random_weights(checkpoint: Path, tmp_path: Path) -> None:
    # other pictures, other ids, the classes in another order: only the names are the same
    data = draw(tmp_path / "data", {4: "green", 9: "red"}, train=20, val=16, seed=1)
    found = {}
    for name, start in (("tuned", checkpoint), ("random", None)):
        made = recipe(6, random_start=start is None, lr=3e-3)
        run = finedetr.train(data, recipe=made, weights=start, out=tmp_path / name, device="cpu", quiet=True)
        assert run.best is not None
        found[name] = run.best
    assert found["tuned"].ap > 2 * found["random"].ap + 0.05
    lines = (tmp_path / "tuned" / "train.log").read_text()
    assert all(f"kept     {name}" in lines for name in CHANNELS)


@pytest.mark.parametrize("ids", [(1, 2), (3, 70), (0, 1), (5,)], ids=str)
def test_classes_of_any_ids_train_and_are_reported_under_them(
    checkpoint: Path, tmp_path: Path, ids: tuple[int, ...]
) -> None:
    names = ("green", "red")
    data = draw(tmp_path / "data", dict(zip(ids, names, strict=False)), train=8, seed=2)
    run = finedetr.train(
        data, recipe=recipe(1, lr=1e-3), weights=checkpoint, out=tmp_path / "a", device="cpu", quiet=True
    )
    assert run.best is not None
    assert [(score.id, score.name) for score in run.best.per_class] == list(zip(ids, names, strict=False))
    assert run.best.ap50 > 0.1
    results = json.loads((run.folder / "predictions_val.json").read_text())
    assert {row["category_id"] for row in results} == set(ids)
    assert run.model("cpu").card.category_ids == ids
    by_hand = finedetr.load(run.folder, device="cpu").evaluate(data, workers=0)
    assert by_hand.metrics() == run.best.metrics()


def test_queries_and_detections_can_be_raised_wherever_weights_are_used(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = np.zeros((50, 70, 3), dtype=np.uint8)
    wanted = {(None, None): 16 * 2, (40, None): 40 * 2, (40, 50): 50, (None, 7): 7}
    for (queries, top), count in wanted.items():
        assert len(finedetr.load(checkpoint, device="cpu", queries=queries, top=top)(picture, threshold=0.0)) == count
    file = tmp_path / "picture.png"
    Image.fromarray(picture).save(file)
    words = ["predict", str(checkpoint), str(file), "--out", str(tmp_path / "p"), "--device", "cpu", "--conf", "0"]
    assert main([*words, "--queries", "40", "--top", "60", "--no-draw"]) == 0
    assert len(json.loads(capsys.readouterr().out)["detections"]) == 60
    data = draw(tmp_path / "data", {1: "red", 2: "green"}, train=4, val=2)
    words = [
        "train",
        "--data",
        str(data),
        "--weights",
        str(checkpoint),
        "--queries",
        "40",
        "--out",
        str(tmp_path / "a"),
    ]
    assert main([*words, "--epochs", "1", "--batch", "4", "--workers", "0", "--device", "cpu", "--quiet"]) == 0
    assert finedetr.load(tmp_path / "a", device="cpu").card.config.decoder.queries == 40
    words = [
        "eval",
        str(tmp_path / "a"),
        "--queries",
        "20",
        "--top",
        "9",
        "--device",
        "cpu",
        "--workers",
        "0",
        "--json",
    ]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["result"]["detections"] == 2 * 9
    assert main(["predict", str(checkpoint), str(file), "--queries", "0"]) == 2
    assert "decoder.queries: at least 1" in capsys.readouterr().err


def test_weights_of_one_size_are_used_and_trained_at_another(checkpoint: Path, tmp_path: Path) -> None:
    data = draw(tmp_path / "data", {1: "red", 2: "green"}, train=8, val=16, seed=3)
    square = finedetr.load(checkpoint, device="cpu").evaluate(data, workers=0)
    wide = finedetr.load(checkpoint, device="cpu", size=(64, 80)).evaluate(data, workers=0)
    assert wide.ap50 > 0.5 * square.ap50 > 0.1
    made = recipe(1, lr=1e-3)
    run = finedetr.train(
        data, recipe=replace(made, size=(96, 64)), weights=checkpoint, out=tmp_path / "a", device="cpu", quiet=True
    )
    assert run.model("cpu").card.size == (96, 64)
    assert run.best is not None
    assert run.best.ap50 > 0.1


def test_weights_for_640_are_asked_at_480_by_800(tmp_path: Path) -> None:
    torch.manual_seed(0)
    detector = Detector(variant("dfine-n"), 2)
    path = save_weights(tmp_path / "a.safetensors", detector, Card(detector.config, ("hen", "egg"), (1, 2)))
    model = finedetr.load(path, device="cpu", size=(480, 800))
    assert model.card.size == (480, 800)
    found = model(np.zeros((600, 1000, 3), dtype=np.uint8), threshold=0.0)
    assert isinstance(found, finedetr.Detections)
    assert found.xyxy.shape == (300, 4)
    assert np.isfinite(found.xyxy).all()
    # untrained boxes stand around the cells of the pyramid: they are spread over the whole width and height
    assert found.xyxy[:, 0].min() < 200
    assert found.xyxy[:, 2].max() > 800


def test_a_backbone_alone_starts_a_run_that_trusts_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    source = Detector(MODEL, 2)
    rules = {".norm.": ".bn.", ".squeeze.": ".aggregation.0.", ".expand.": ".aggregation.1.", ".affine.": ".lab."}
    state = {}
    for key, tensor in source.backbone.state_dict().items():
        for ours, theirs in rules.items():
            key = key.replace(ours, theirs)
        state[key] = tensor
    torch.save(state, tmp_path / "backbone.pth")
    data = draw(tmp_path / "data", {1: "red", 2: "green"}, train=4, val=2)
    run = finedetr.train(
        data,
        recipe=recipe(1, lr=1e-9),
        backbone_weights=tmp_path / "backbone.pth",
        out=tmp_path / "a",
        device="cpu",
        quiet=True,
    )
    assert "weights: backbone" in (run.folder / "train.log").read_text()
    trained = load_weights(run.folder / "weights" / "last.safetensors")[0]
    stem, began = trained.backbone.stem.stem1.conv.weight, source.backbone.stem.stem1.conv.weight  # type: ignore[union-attr]
    torch.testing.assert_close(stem, began, atol=1e-6, rtol=0)
    words = ["train", "--data", str(data), "--model", "dfine-l", "--backbone-weights", str(tmp_path / "backbone.pth")]
    assert main([*words, "--dry-run", "--json"]) == 0
    settings = json.loads(capsys.readouterr().out)["result"]["recipe"]
    assert settings["optimizer"]["backbone"] < 1  # the published rate of a backbone that knows something already
    assert main([*words, "--weights", str(run.folder)]) == 2
    assert "not from both" in capsys.readouterr().err
    assert main(["train", "--data", str(data), "--backbone-weights", "nowhere.pth", "--dry-run"]) == 4
    assert "no weights at nowhere.pth" in capsys.readouterr().err
