from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from finedetr.train.checkpoint import load_state
from finedetr.train.folder import RunFolder
from tests.train.small import draw

ROOT = Path(__file__).parents[2]
CLOCKS = {"seconds", "data_wait"}


def run(points: str, data: Path, out: Path) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.small", points, str(data), str(out)],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def unbroken(data: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    run("", data, out)
    return RunFolder.existing(out)


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Where two states differ, to the last bit."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [where]
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        return [found for key in a for found in differences(a[key], b[key], f"{where}/{key}")]
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        return [found for i, (x, y) in enumerate(zip(a, b, strict=True)) for found in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {a} {b}"]


def check_equal(broken: RunFolder, unbroken: RunFolder) -> None:
    for name in ("model", "average", "optimizer", "scaler", "random", "classes"):
        assert differences(load_state(unbroken.last)[name], load_state(broken.last)[name], name) == []
    clean = [[{k: v for k, v in r.items() if k not in CLOCKS} for r in f.records()] for f in (unbroken, broken)]
    assert clean[0] == clean[1]
    assert unbroken.best_weights.read_bytes() == broken.best_weights.read_bytes()
    assert not list(broken.root.rglob("*.tmp"))


@pytest.mark.parametrize(
    "points",
    [
        pytest.param("1,2,4,commit:1,eval:1,3,save:2", id="each kind of moment"),
        pytest.param("save:1,save:1,eval:1,save:3,commit:2", id="while saving", marks=pytest.mark.slow),
    ],
)
def test_a_killed_and_resumed_run_ends_with_the_same_bits(
    points: str, data: Path, unbroken: RunFolder, tmp_path: Path
) -> None:
    lines = run(points, data, tmp_path / "run")
    assert sum("killed" in line for line in lines) >= 4
    check_equal(RunFolder.existing(tmp_path / "run"), unbroken)


@pytest.mark.slow
def test_a_run_killed_at_twenty_random_points_ends_with_the_same_bits(
    data: Path, unbroken: RunFolder, tmp_path: Path
) -> None:
    dice = random.Random(0)
    kinds = [
        lambda: str(dice.randint(1, 4)),
        lambda: f"save:{dice.randint(1, 2)}",
        lambda: f"eval:{dice.randint(1, 2)}",
    ]
    points = ",".join(dice.choice(kinds)() for _ in range(20))
    run(points, data, tmp_path / "run")
    check_equal(RunFolder.existing(tmp_path / "run"), unbroken)


def test_the_unbroken_run_wrote_everything_that_a_run_leaves(unbroken: RunFolder) -> None:
    found = {str(path.relative_to(unbroken.root)) for path in unbroken.root.rglob("*") if path.is_file()}
    assert found == {
        "config.json",
        "classes.json",
        "data_report.json",
        "metrics.jsonl",
        "status.json",
        "train.log",
        "evaluation.json",
        "report.html",
        "predictions_val.json",
        "checkpoints/last.pt",
        "checkpoints/best.pt",
        "weights/last.safetensors",
        "weights/best.safetensors",
        "samples/train_mosaic.jpg",
        "samples/train_standard.jpg",
        "samples/train_plain.jpg",
        "samples/predictions_val.jpg",
        "samples/worst_val.jpg",
    }
