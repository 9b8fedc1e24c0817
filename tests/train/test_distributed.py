from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from finedetr.errors import UsageError
from finedetr.train.build import Start, build_student
from finedetr.train.distributed import World, choose_device, open_world
from finedetr.train.dump import Dump
from finedetr.train.folder import RunFolder
from finedetr.train.plan import Plan
from tests.train.small import draw, small_recipe

ROOT = Path(__file__).parents[2]


def pair(processes: int, data: Path, out: Path, batch: int, case: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    done = subprocess.run(
        [*command, "-m", "tests.train.pair", str(data), str(out), str(batch), case],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(out / f"{case}-{processes}-{rank}.pt", weights_only=True) for rank in range(processes)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"), train=12)


@pytest.fixture(scope="module")
def alone(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return pair(1, data, tmp_path_factory.mktemp("alone"), 4, "plain")[0]


def check_same(one: dict[str, Any], many: list[dict[str, Any]]) -> None:
    steps = len(one["losses"])
    assert steps == 3
    for step in range(steps):
        for name, value in one["losses"][step].items():
            mean = sum(state["losses"][step][name] for state in many) / len(many)
            assert mean == pytest.approx(value, rel=2e-4, abs=1e-5), (step, name)
    for name, value in one["model"].items():
        for state in many:
            torch.testing.assert_close(state["model"][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_train_as_one_with_the_whole_batch(data: Path, alone: dict[str, Any], tmp_path: Path) -> None:
    both = pair(2, data, tmp_path, 4, "plain")
    check_same(alone, both)
    for name, value in both[0]["model"].items():
        assert torch.equal(value, both[1]["model"][name]), f"{name} differs between the processes"


def test_two_processes_hear_their_teachers_as_one(data: Path, tmp_path: Path) -> None:
    one, both = (pair(count, data, tmp_path, 4, "teachers") for count in (1, 2))
    assert any("LogitsDistillation" in name for name in one[0]["losses"][0])
    for name, value in one[0]["losses"][0].items():
        mean = sum(state["losses"][0][name] for state in both) / 2
        assert mean == pytest.approx(value, rel=2e-4, abs=1e-5), name
    # later steps drift: Adam takes a rounding error of a small gradient for a gradient
    totals = [[sum(step.values()) for step in state["losses"]] for state in (*one, *both)]
    assert [(a + b) / 2 for a, b in zip(*totals[1:], strict=True)] == pytest.approx(totals[0], rel=5e-3)
    for name, value in both[0]["model"].items():
        assert torch.equal(value, both[1]["model"][name]), f"{name} differs between the processes"


def test_a_process_without_any_target_does_not_hang(tmp_path: Path) -> None:
    data = draw(tmp_path / "data", train=2)
    path = data / "annotations" / "instances_train.json"
    document = json.loads(path.read_text())
    empty = document["images"][0]["id"]
    document["annotations"] = [a for a in document["annotations"] if a["image_id"] != empty]
    assert document["annotations"]
    path.write_text(json.dumps(document))
    states = pair(2, data, tmp_path / "out", 2, "denoising")  # each process has one picture, one of them no box
    for name, value in states[0]["model"].items():
        assert torch.equal(value, states[1]["model"][name]), name
    boxes = [sum(v for n, v in state["losses"][0].items() if "BoxL1" in n) for state in states]
    assert min(boxes) == 0 < max(boxes)


def test_a_bad_batch_of_one_process_is_passed_over_by_all(data: Path, tmp_path: Path) -> None:
    states = pair(2, data, tmp_path, 4, "poisoned")
    assert [len(state["losses"]) for state in states] == [2, 2]  # of three steps
    for name, value in states[0]["model"].items():
        assert value.isfinite().all(), name
        assert torch.equal(value, states[1]["model"][name]), f"{name} differs between the processes"
    messages = [Dump.load(RunFolder(tmp_path / f"rank{rank}of2").bad_batch(rank)).message for rank in (0, 1)]
    assert messages[0] == "a loss of another process is not finite; this one's are"
    assert "is nan" in messages[1]


def test_a_signal_to_one_process_stops_all_and_they_go_on_together(data: Path, tmp_path: Path) -> None:
    states = pair(2, data, tmp_path, 4, "stopped")
    assert all("--resume" in state["said"] for state in states)
    assert [state["epochs"] for state in pair(2, data, tmp_path, 4, "resumed")] == [2, 2]
    folder = RunFolder.existing(tmp_path / "run")
    assert folder.read_json(folder.status)["state"] == "finished"
    assert [record["epoch"] for record in folder.records() if record["kind"] == "evaluation"] == [0, 1]


def test_one_process_needs_no_variables() -> None:
    with open_world("cpu") as world:
        assert (world.size, world.main, world.total([1.0, 2.0]), world.largest([3.0])) == (1, True, [1.0, 2.0], [3.0])
    assert World().wrap(torch.nn.Linear(1, 1), unused=False).training


def test_frozen_norms_are_those_that_see_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    def join(self: World, detector: nn.Module) -> None:
        nn.SyncBatchNorm.convert_sync_batchnorm(detector)  # as on several GPUs

    monkeypatch.setattr(World, "join_norms", join)
    recipe = small_recipe(freeze=("norms",))
    student = build_student(recipe, Plan(recipe, 1, 1), ("ant",), World(), Start())
    student.train()
    norms = [m for m in student.detector.backbone.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert norms
    assert not any(norm.training or norm.weight.requires_grad for norm in norms)


@pytest.mark.parametrize(
    ("variables", "message"),
    [({"WORLD_SIZE": "2"}, "MASTER_ADDR is not set"), ({"WORLD_SIZE": "two"}, "WORLD_SIZE must be an integer")],
)
def test_incomplete_variables_are_a_clear_error(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=message), open_world("cpu"):
        pass


def test_an_absent_device_is_a_clear_error() -> None:
    assert choose_device("cpu").type == "cpu"
    with pytest.raises(UsageError, match="no device is called 'gpu'"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="this machine offers 0 CUDA devices"):
            choose_device("cuda:3")
