from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finedetr
from finedetr.cli import ALIASES, VERBS, main
from finedetr.cli.flags import SPELLINGS, spell
from finedetr.data.folder import open_beside
from finedetr.data.formats import open_dataset
from finedetr.data.loader import TrainingLoader
from finedetr.data.transforms import Augmentation, Windows
from tests.train.small import draw

SMALL = {
    "model.encoder.width": 16,
    "model.encoder.feedforward": 16,
    "model.encoder.heads": 2,
    "model.encoder.expansion": 0.34,
    "model.encoder.depth": 0.34,
    "model.decoder.width": 16,
    "model.decoder.feedforward": 16,
    "model.decoder.heads": 2,
    "model.decoder.layers": 2,
    "model.decoder.queries": 12,
    "imgsz": 64,
    "batch-size": 4,
    "num-workers": 0,
    "device": "cpu",
}
TINY = ["--model", "dfine-n", "--quiet", *(word for name, value in SMALL.items() for word in (f"--{name}", str(value)))]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"), train=4, val=2)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "a"
    assert main(["train", "--data", str(data), "--out", str(out), "--epochs", "1", *TINY]) == 0
    return out


def document(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """The one document on stdout."""
    parsed = json.loads(capsys.readouterr().out)
    assert isinstance(parsed, dict)
    return parsed


def test_help_answers_without_torch_and_at_once() -> None:
    code = (
        "import sys; from finedetr.cli import main; main(['--help']); "
        "print(*[m for m in ('torch', 'numpy', 'tyro', 'rich') if m in sys.modules])"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 1.5  # 0.04 s on a quiet machine
    assert done.stdout.splitlines()[-1] == ""
    assert all(verb in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", [*VERBS, *ALIASES])
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main([verb, "--help"])
    except SystemExit as done:
        status = int(done.code or 0)
    said = capsys.readouterr().out
    assert status == 0
    assert "usage: finedetr" in said


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["trian"], 2, "use.verb: no command is called 'trian'\n  Did you mean train"),
        (["train"], 2, "use.required: train needs --data"),
        (["train", "--data", "x", "--epoch", "3"], 2, "use.unknown_key: Unrecognized options: --epoch, 3\n  Perhaps"),
        (["train", "--data", "x", "--epochs", "many"], 2, "use.type: Error parsing --epochs"),
        (["train", "--data", "x", "--recipe", "demi"], 2, "no recipe is called 'demi'\n  Did you mean deim"),
        (["train", "--data", "x", "--with", "lat-matching"], 2, "Did you mean late-matching"),
        (["train", "--data", "x", "--model", "dfine-z"], 2, "no model is called 'dfine-z'"),
        (["train", "--data", "x", "--size", "100", "64"], 2, "The nearest legal ones are 96 and 128"),
        (["train", "--data", "x", "--objective.BoxGioU.wight", "1"], 2, "Unrecognized options"),
        (["train", "--data", "x", "--objective.Giou.weight", "1"], 2, "the objective has no term 'Giou'"),
        (["train", "--data", "nowhere"], 3, "data.none: nowhere does not exist"),
        (["train", "--resume", "nowhere"], 4, "model.not_found: nowhere holds no run"),
        (["train", "--weights", "nowhere", "--data", "x"], 4, "model.not_found: no weights at nowhere"),
        (["eval", "nowhere"], 4, "model.not_found"),
        (["predict", "nowhere", "x.jpg"], 4, "model.not_found"),
        (["predict"], 2, "use.type: Missing from finedetr predict"),
        (["predict", "nowhere"], 2, "use.required: predict needs a source"),
        (["data"], 2, "data needs an action"),
        (["data", "chekc"], 2, "Did you mean check"),
        (["data", "check", "nowhere"], 3, "data.none"),
        (["data", "check", "nowhere", "--size", "0", "64"], 2, "at least 1"),
        (["data", "convert", "nowhere", "x", "--to", "coco"], 3, "data.none"),
        (["info", "nowhere"], 4, "model.not_found"),
        (["models", "shwo"], 2, "use.verb: models 'shwo' is no action\n  Did you mean show"),
        (["models", "show", "dfine-z"], 2, "no model is called 'dfine-z'"),
        (["models", "pull", "dfine-s"], 4, "'dfine-s' names nothing on the Hub\n  Did you mean dfine-s-coco"),
        (["train", "--data", "x", "--teacher", "nowhere"], 4, "model.not_found: no weights at nowhere"),
        (
            ["train", "--data", "x", "--with", "od-detr", "--sources.Prior.weight", "1"],
            2,
            "the recipe has no source 'Prior'",
        ),
        (["demo", "--minutes", "0"], 2, "minutes: more than 0 is wanted"),
        (["demo", "--minutes", "nan"], 2, "minutes: more than 0 is wanted, nan came"),
    ],
)
def test_a_mistake_is_one_clear_message_and_its_status(
    words: list[str], status: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == status
    said = capsys.readouterr()
    assert message in said.err
    assert said.out == ""
    assert "Traceback" not in said.err


def test_errors_are_one_document_in_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "nowhere", "--json"]) == 3
    said = document(capsys)
    assert (said["ok"], said["command"], said["finedetr"]) == (False, "train", finedetr.__version__)
    assert said["error"]["code"] == "data.none"
    assert said["error"]["exit"] == 3


def test_other_spellings_are_understood() -> None:
    assert spell(["--imgsz", "320", "--batch_size=8"]) == ["--size", "320", "320", "--batch", "8"]
    assert spell(["--size", "320", "640", "--conf", "0.3"]) == ["--size", "320", "640", "--threshold", "0.3"]
    assert not set(SPELLINGS) & set(SPELLINGS.values())


def test_a_dry_run_says_what_would_be_done_and_writes_nothing(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", str(data), "--out", str(tmp_path / "a"), "--dry-run", "--lr", "1e-3"]
    assert main([*words, "--objective.box-giou.weight", "3", *TINY]) == 0
    said = capsys.readouterr().out
    assert "objective  1·MatchabilityAware + 5·BoxL1 + 3·BoxGIoU" in said
    assert "batch 4, as asked" in said
    assert "learning rate 0.001, as asked" in said
    assert "objective.BoxGIoU.weight" in said
    assert "GiB" in said
    assert main([*words, *TINY, "--json"]) == 0
    result = document(capsys)["result"]
    assert result["origins"]["lr"] == "flag"
    assert result["origins"]["optimizer.clip"] == "deim"
    assert result["memory_bytes"] > 30e6  # weights, gradients, moments and average alone
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("off", "said"),
    [
        ((), "steps; mosaic and mixup from 2 to 6; plain from 9;"),
        (("mixup",), "steps; mosaic from 2 to 6; plain"),
        (("mosaic", "mixup"), "steps; no mosaic, no mixup; plain"),
    ],
)
def test_a_dry_run_says_how_dense_the_pictures_get(
    off: tuple[str, ...], said: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--epochs", "10", "--schedule.start", "0.2", "--schedule.flat", "0.6", "--schedule.plain", "0.9"]
    words += [word for name in off for word in (f"--augmentation.{name}", "0")]
    assert main(["train", "--data", str(data), "--dry-run", *words, *TINY]) == 0
    assert said in capsys.readouterr().out


def test_a_dry_run_says_what_is_rarer_because_the_run_is_short(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--data", str(data), "--dry-run", *TINY]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "schedule.long_steps is 20000: mosaic, mixup, zoom_out with 10% of their chances" in said
    assert "higher for a short run (schedule.long_steps)" in said
    assert main([*words, "--schedule.long-steps", "0"]) == 0
    assert "short run" not in capsys.readouterr().out
    assert main([*words, "--recipe", "dfine"]) == 0
    said = capsys.readouterr().out
    assert "short run" not in said
    assert "steps; no mosaic, no mixup; plain" in said  # D-FINE never has any


def test_a_dry_run_counts_the_pictures_that_balancing_repeats(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--data", str(data), "--dry-run", "--epochs", "1", *TINY]
    assert main([*words, "--batch", "1"]) == 0
    assert "1 epochs x 4 steps" in capsys.readouterr().out
    assert main([*words, "--batch", "1", "--balance", "1"]) == 0
    said = capsys.readouterr().out
    steps = int(said.split("1 epochs x ")[1].split(" ")[0])
    assert steps > 4
    assert f"an epoch has {steps} pictures" in said
    assert main([*words, "--balance", "2"]) == 2
    assert "balance: a share of the pictures, 0 to 1, is wanted, 2.0 came" in capsys.readouterr().err


def test_teachers_are_flags_and_the_plan_shows_them(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", "--data", str(data), "--out", str(tmp_path / "a"), *TINY, "--teacher", str(run)]
    words += ["--with", "od-detr", "--objective.LogitsDistillation.weight", "0.5", "--objective.policy.weight", "0.7"]
    words += ["--sources.auxiliary-queries.ranks", "1"]
    assert main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "0.5·LogitsDistillation + 5·FeatureDistillation, matched by TeacherVotes(weight=0.7)" in said
    assert "beside the own queries: denoising, PredictionQueries, AuxiliaryQueries(ranks=1), QueryPrior" in said
    assert f"teacher    {run / 'weights' / 'best.safetensors'}" in said
    assert main([*words, "--epochs", "1", "--json"]) == 0
    assert document(capsys)["ok"]
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["teacher"] == str(run / "weights" / "best.safetensors")
    assert config["recipe"]["sources"][1]["ranks"] == 1


def test_training_is_not_repeated_over_a_run_and_goes_on(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", "--data", str(data), "--out", str(run), *TINY]) == 2
    assert "use.exists" in capsys.readouterr().err
    for more in (["--weights", str(run)], ["--dry-run"], ["--train-split", "val"]):
        assert main(["train", "--resume", str(run), *more]) == 2
    assert "exclude each other" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--lr", "3"]) == 2
    assert "these differ: lr" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "--epochs", "2", "--device", "cpu", "--quiet", "--json"]) == 0
    result = document(capsys)["result"]
    assert (result["epochs"], result["run"]) == (2, str(run))
    assert "AP50" in result


def test_an_evaluation_prints_numbers_and_writes_results_in_original_ids(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["val", str(run), "--data", str(data), "--device", "cpu", "--workers", "0", "--out", str(tmp_path)]
    assert main(words) == 0
    said = capsys.readouterr()
    assert said.out.startswith("metric\tvalue\nAP\t")
    numbers = json.loads((tmp_path / "evaluation_val.json").read_text())
    assert numbers["AP"] == json.loads((run / "evaluation.json").read_text())["AP"]
    results = json.loads((tmp_path / "predictions_val.json").read_text())
    assert {row["image_id"] for row in results} == {1, 2}
    assert {row["category_id"] for row in results} <= {1, 2, 3, 5, 8, 13}
    assert main([*words, "--json"]) == 0
    assert document(capsys)["result"]["AP50"] == numbers["AP50"]


def test_predictions_are_lines_and_pictures(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["predict", str(run), str(data / "val"), "--out", str(tmp_path / "p"), "--device", "cpu"]
    assert main([*words, "--conf", "0"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [json.loads(line) for line in (tmp_path / "p" / "predictions.jsonl").read_text().splitlines()]
    assert [Path(line["picture"]).is_file() for line in lines] == [True, True]
    assert lines[0]["detections"]
    assert main([*words, "--no-draw", "--threshold", "1", "--json"]) == 0
    assert [p["detections"] for p in document(capsys)["result"]["pictures"]] == [[], []]
    one = str(next((data / "val").glob("*.jpg")))
    assert main(["predict", str(run), one, one, "--out", str(tmp_path / "q"), "--device", "cpu"]) == 0
    assert len(list((tmp_path / "q").glob("*.jpg"))) == 2


def test_a_resume_state_is_no_weight_file_and_the_message_names_the_one(
    run: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = str(run / "checkpoints" / "last.pt")
    for words in (["predict", state, str(data / "val")], ["eval", state, "--data", str(data)], ["info", state]):
        assert main(words) == 4
        said = capsys.readouterr().err
        assert said.startswith(f"model.mismatch: {state} is a state that a run of finedetr goes on from")
        assert f"Use {run} (its best weights), or a file of {run / 'weights'}." in said
    assert main(["train", "--data", str(data), "--weights", state, "--out", str(run.parent / "b")]) == 4
    assert "model.mismatch" in capsys.readouterr().err


def test_info_models_env_and_data_check_answer(run: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run), "--json"]) == 0
    assert document(capsys)["result"]["names"][0] == "disc"
    assert main(["info", str(run)]) == 0
    assert "input    64x64" in capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    table = {row["name"]: row for row in document(capsys)["result"]["models"]}
    assert table["dfine-n"]["parameters"] == 3_782_693
    assert table["deim-dfine-s"]["weights"] == []
    assert main(["models", "list"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert {len(line) for line in lines} == {9}
    assert lines[1][:5] == ["dfine-n", "3782693", "7.31", "42.8", "2.12"]
    assert main(["models", "show", "dfine-n", "--size", "320"]) == 0
    said = capsys.readouterr().out
    assert "3,782,693 parameters, 3,753,799 as deployed" in said
    assert "huggingface.co/ustc-community/dfine-nano-coco" in said
    assert main(["models", "show", "rtdetrv2-r18", "--size", "64", "--json"]) == 0
    result = document(capsys)["result"]
    assert 0 < result["counted"]["gflops"] < 2 < result["gflops"]
    assert main(["env", "--json"]) == 0
    assert document(capsys)["result"]["packages"]["torch"]
    assert main(["data", "check", str(data), "--size", "64"]) == 0
    assert "train: 4 pictures" in capsys.readouterr().out
    assert main(["data", "check", str(data), "--json"]) == 0
    assert document(capsys)["result"]["splits"][0]["pictures"] == 4


def test_the_table_of_models_fits_a_terminal() -> None:
    from finedetr.cli.models import _facts, _table
    from finedetr.model.catalog import CATALOG

    lines = _table([_facts(name) for name in CATALOG]).splitlines()
    assert max(map(len, lines)) <= 100
    assert any(line.startswith("dfine-s  ") and "10.3 M" in line and "Hub: coco, obj365" in line for line in lines)


def test_weights_are_converted_there_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from finedetr.model.detector import Detector
    from finedetr.model.weights import Card, load_weights, save_weights
    from finedetr.model.zoo import variant

    detector = Detector(variant("dfine-n"), 2)
    start = save_weights(tmp_path / "a.safetensors", detector, Card(detector.config, ("hen", "egg"), (1, 2)))
    assert main(["models", "convert", str(start), str(tmp_path / "hf"), "--to", "transformers"]) == 0
    assert main(["models", "convert", str(tmp_path / "hf"), str(tmp_path / "b.safetensors")]) == 0
    assert "dfine-n, 2 classes" in capsys.readouterr().out
    back, card = load_weights(tmp_path / "b.safetensors")
    assert card.names == ("hen", "egg")
    ours = detector.state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in back.state_dict().items() if "tracked" not in key)
    assert main(["models", "convert", str(start), str(tmp_path / "hf"), "--to", "transformers"]) == 2
    assert "use.exists" in capsys.readouterr().err
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("mine")
    assert main(["models", "convert", str(start), str(tmp_path / "mine"), "--to", "transformers"]) == 2
    assert "config.json exists" in capsys.readouterr().err
    assert (tmp_path / "mine" / "config.json").read_text() == "mine"
    assert main(["models", "convert", str(start), str(tmp_path / "c.bin")]) == 2
    (tmp_path / "broken.pth").write_bytes(b"no checkpoint")
    assert main(["models", "convert", str(tmp_path / "broken.pth"), str(tmp_path / "d.safetensors")]) != 0
    assert "no checkpoint that holds numbers only" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["CUDA out of memory.", "DefaultCPUAllocator: can't allocate memory: you tried ..."])
def test_out_of_memory_is_one_clear_message(
    words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finedetr.cli import env

    def fail(_: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr(env, "run", fail)
    assert main(["env"]) == 1
    assert f"run.oom: out of memory: {words}" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["weights/best.safetensors", "drawings/mine.jpg", "README.md"])
def test_the_demo_replaces_nothing_but_a_demo(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mine = tmp_path / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    assert main(["demo", "--out", str(tmp_path), "--minutes", "0.01"]) == 2
    assert "use.exists" in capsys.readouterr().err
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [mine]


def test_the_demo_goes_on_after_one_that_was_interrupted_while_it_drew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from finedetr.cli import demo

    for name, value in (("TRAIN", 2), ("VAL", 1), ("SIDE", 32)):
        monkeypatch.setattr(demo, name, value)
    flags = demo.Demo(tmp_path / "demo")
    draw = demo.draw_dataset

    def interrupted(*given: Any, **options: Any) -> None:
        draw(*given, **options)
        raise KeyboardInterrupt

    for again in range(2):  # into nothing, and beside an earlier demo whose note is damaged
        demo._check(flags)
        monkeypatch.setattr(demo, "draw_dataset", interrupted)
        with pytest.raises(KeyboardInterrupt):
            demo._drawings(flags)
        monkeypatch.setattr(demo, "draw_dataset", draw)
        demo._check(flags)
        folder = demo._drawings(flags)
        assert [path.name for path in flags.out.iterdir()] == ["drawings"]
        assert sorted(path.name for path in folder.iterdir()) == ["annotations", "drawn.json", "train", "val"]
        if not again:
            (folder / "drawn.json").write_text("")


@pytest.mark.slow
def test_the_demo_leaves_its_numbers_and_pictures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finedetr.cli import demo

    monkeypatch.setattr(demo, "TRAIN", 16)
    monkeypatch.setattr(demo, "VAL", 2)
    monkeypatch.setattr(demo, "SIDE", 64)
    out = tmp_path / "demo"
    for _ in range(2):  # the second one replaces the first
        assert main(["demo", "--out", str(out), "--minutes", "0.1", "--device", "cpu", "--quiet"]) == 0
    numbers = json.loads((out / "evaluation.json").read_text())
    assert {"AP", "AP50", "train_seconds", "steps", "model"} <= set(numbers)
    assert numbers["train_seconds"] > 0
    assert Path(numbers["sheet"]).is_file()
    assert len(list((out / "predictions").glob("*.jpg"))) == 2
    assert "pictures: " in capsys.readouterr().out


def test_detections_are_a_teacher_that_brings_its_pictures(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `predict --format coco` writes; classes by name, in another order, one of them unknown."""
    found = json.loads((data / "annotations" / "instances_train.json").read_text())
    names = {category["id"]: category["name"] for category in found["categories"]}
    renumbered = {identity: 90 - identity for identity in names}
    found["categories"] = [{"id": 90 - identity, "name": name} for identity, name in names.items()]
    found["categories"].append({"id": 99, "name": "unicorn"})
    for image in found["images"]:
        image["file_name"] = str(data / "train" / Path(image["file_name"]).name)
    for row in found["annotations"]:
        row |= {"category_id": renumbered[row["category_id"]], "score": 0.5}
    found["annotations"].append({**found["annotations"][0], "id": 10**6, "category_id": 99})
    file = tmp_path / "predictions.json"
    file.write_text(json.dumps(found))

    truth = open_dataset(data, "train")
    beside = open_beside(file, truth.categories)
    assert beside.labels.tolist() == truth.labels.tolist()
    np.testing.assert_allclose(beside.boxes, truth.boxes)
    assert "1 boxes of classes" in str(beside.notes[-1])
    loader = TrainingLoader(truth, Augmentation(), Windows(0, 0, 0), (64, 64), 2, 0, others=beside, beside=2)
    (first, *_) = loader.epoch(0)
    assert first.targets.annotated is None
    assert len(first.targets.counts) == 4
    assert sum(first.targets.counts[2:]) > 0
    words = ["train", "--data", str(data), "--dry-run", "--json", "--teacher", str(file), *TINY]
    assert main(words) == 0
    said = json.loads(capsys.readouterr().out)["result"]
    assert said["teacher"] is None
    assert said["unlabelled"] == {"folder": str(file), "pictures": 4, "in_a_batch": 4}
    assert "Distillation" not in said["objective"].replace("LocalizationDistillation", "")
    assert main([*words, "--unlabelled", str(data / "val")]) == 2
    assert "name their own pictures" in capsys.readouterr().out
    found["categories"] = [{**category, "name": f"{category['name']}s"} for category in found["categories"]]
    file.write_text(json.dumps(found))
    assert main(words) == 3
    assert "no name is the same" in capsys.readouterr().out


def test_a_dry_run_counts_pictures_without_labels(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "train",
        "--data",
        str(data),
        "--dry-run",
        "--json",
        "--with",
        "od-detr",
        "--unlabelled",
        str(data / "val"),
    ]
    assert main([*words, "--teaching.unlabelled", "0.5", *TINY]) == 0
    said = json.loads(capsys.readouterr().out)["result"]
    assert said["unlabelled"] == {"folder": str(data / "val"), "pictures": 2, "in_a_batch": 2}
    assert "PredictionDistillation" in said["objective"]
    assert main([*words[:4], "--unlabelled", str(data / "val"), *TINY]) == 2
    assert "no teacher says anything" in capsys.readouterr().err


@pytest.mark.parametrize("words", [["--help"], ["models"]])
def test_a_reader_that_has_had_enough_is_no_error(words: list[str]) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        command = [sys.executable, "-m", "finedetr", *words]
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_dry_run_says_what_a_split_decoder_costs(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--data", str(data), "--dry-run", "--json", *TINY]
    assert main(words) == 0
    assert json.loads(capsys.readouterr().out)["result"]["price"] is None
    assert main([*words, "--with", "sd-split"]) == 0
    price = json.loads(capsys.readouterr().out)["result"]["price"]
    assert set(price) == {"parameters", "gflops", "milliseconds"}
    assert all(0 < host < split for host, split in (price["parameters"], price["gflops"]))
    assert all(0 < time < math.inf for time in price["milliseconds"])
    assert main([word for word in [*words, "--with", "sd-split"] if word != "--json"]) == 0
    assert "ms a picture here" in capsys.readouterr().out
