from __future__ import annotations

import io
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from finedetr.errors import ConfigError, DataError, DivergedError, Interrupted, ModelError, UsageError
from finedetr.evaluate.evaluation import Evaluation
from finedetr.train import loop
from finedetr.train.budget import MARGIN
from finedetr.train.checkpoint import load_state
from finedetr.train.folder import RunFolder
from finedetr.train.log import Reporter, Stopwatch, clock
from finedetr.train.session import Request, begin, open_data, resume, saved_recipe
from tests.train.small import draw, small_recipe, stop_after


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"), train=4, val=2)


def request(data: Path, out: Path, **changes: Any) -> Request:
    return Request(data, small_recipe(**changes), out, device="cpu", quiet=True)


def scripted(monkeypatch: pytest.MonkeyPatch, *aps: float) -> None:
    """Evaluations say these numbers one after the other; everything else is real."""
    real, left = loop.evaluate_detector, list(aps)

    def evaluate(*args: Any, **kwargs: Any) -> tuple[Evaluation, Any]:
        evaluation, evaluator = real(*args, **kwargs)
        return replace(evaluation, ap=left.pop(0)), evaluator

    monkeypatch.setattr(loop, "evaluate_detector", evaluate)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_finishes_the_step_saves_and_says_how_to_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals, status: int
) -> None:
    stop_after(monkeypatch, 1, number)
    with pytest.raises(Interrupted, match="--resume") as raised:
        begin(request(data, tmp_path / "a"))
    assert raised.value.exit == status
    folder = RunFolder(tmp_path / "a")
    assert load_state(folder.last)["progress"]["total"] == 1
    assert folder.read_json(folder.status)["state"] == "interrupted"
    monkeypatch.undo()
    assert resume(tmp_path / "a", device="cpu", quiet=True).steps == 3


def test_a_balanced_run_stopped_within_an_epoch_goes_on_exactly(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    balanced = {"epochs": 1, "batch": 1, "balance": 1.0}
    begin(request(data, tmp_path / "whole", **balanced))
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        begin(request(data, tmp_path / "broken", **balanced))
    monkeypatch.undo()
    again = resume(tmp_path / "broken", device="cpu", quiet=True)
    whole, broken = (load_state(RunFolder(tmp_path / name).last) for name in ("whole", "broken"))
    assert again.steps == whole["progress"]["total"] > len(open_data(data).train)
    assert all(torch.equal(tensor, broken["model"][name]) for name, tensor in whole["model"].items())
    assert "pictures come more often" in RunFolder(tmp_path / "whole").log.read_text()


def test_dropout_without_denoising_goes_on_exactly(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_recipe().model
    model = replace(model, encoder=replace(model.encoder, dropout=0.2))
    plain: dict[str, Any] = {"epochs": 1, "batch": 1, "denoise": False, "model": model}
    begin(request(data, tmp_path / "whole", **plain))
    stop_after(monkeypatch, 2)
    with pytest.raises(Interrupted):
        begin(request(data, tmp_path / "broken", **plain))
    monkeypatch.undo()
    torch.rand(7)  # another process has another state
    resume(tmp_path / "broken", device="cpu", quiet=True)
    whole, broken = (load_state(RunFolder(tmp_path / name).last)["model"] for name in ("whole", "broken"))
    assert all(torch.equal(tensor, broken[name]) for name, tensor in whole.items())


def test_a_signal_in_the_last_evaluation_lets_the_run_end(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = loop.evaluate_detector

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "evaluate_detector", evaluate)
    begin(request(data, tmp_path / "a", epochs=1))
    assert RunFolder(tmp_path / "a").read_json(RunFolder(tmp_path / "a").status)["state"] == "finished"
    assert (tmp_path / "a" / "report.html").is_file()


def test_patience_ends_a_run_without_progress(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(monkeypatch, 0.5, 0.4, 0.3, 0.2)
    result = begin(request(data, tmp_path / "a", epochs=9, patience=2))
    assert result.epochs == 3
    assert result.evaluation is not None
    assert result.evaluation.ap == 0.5


def test_restarts_go_back_to_the_best_weights_and_shorten_the_memory(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(epochs=6)
    recipe = replace(recipe, schedule=replace(recipe.schedule, plain=0.34, restart=True))
    # two epochs of stage one, the first is the best; then: worse (restart 2), anything, better, worse (restart 3)
    scripted(monkeypatch, 0.5, 0.4, 0.3, 0.2, 0.6, 0.1)
    begin(Request(data, recipe, tmp_path / "a", device="cpu", quiet=True))
    folder = RunFolder(tmp_path / "a")
    said = folder.log.read_text()
    assert said.count("back to the best weights") == 2
    assert "epoch 3: back to the best weights (restart 1)" in said
    state = load_state(folder.last)
    assert state["progress"]["restarts"] == 2
    assert state["average"]["decay"] == pytest.approx(recipe.average.decay_after(2, 6))
    assert state["progress"]["best"] == 0.6


def test_a_missing_best_state_does_not_stop_the_plain_epochs(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = small_recipe(epochs=3)
    recipe = replace(recipe, schedule=replace(recipe.schedule, flat=0.3, plain=0.34, restart=True))
    monkeypatch.setattr(RunFolder, "best", property(lambda self: self.root / "checkpoints" / f"lost{id(object())}.pt"))
    monkeypatch.setattr(loop, "link_file", lambda source, target: loop.save_state(target, load_state(source)))
    scripted(monkeypatch, 0.5, 0.6, 0.7)
    assert begin(Request(data, recipe, tmp_path / "a", device="cpu", quiet=True)).epochs == 3


def test_a_time_budget_shortens_the_run_and_its_schedule(data: Path, tmp_path: Path) -> None:
    result = begin(request(data, tmp_path / "a", epochs=100_000, max_time=4.0))
    assert 1 <= result.epochs < 1000
    assert result.seconds < 20
    folder = RunFolder(tmp_path / "a")
    progress = load_state(folder.last)["progress"]
    assert progress["limit"] == 100_000
    assert progress["epochs"] < 1000
    assert "the schedule follows" in folder.log.read_text()
    with pytest.raises(UsageError, match="has done all of its"):
        resume(tmp_path / "a", device="cpu", quiet=True)
    longer = replace(saved_recipe(folder)[0], max_time=result.seconds + 1.5)
    assert resume(tmp_path / "a", longer, device="cpu", quiet=True).epochs > result.epochs


def test_a_time_budget_cuts_a_last_epoch_whose_greater_part_fits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = draw(tmp_path / "data", train=12, val=1)
    seconds = {"step": 1.0, "evaluation": 0.25}  # by a clock of the test: three steps and an evaluation an epoch
    monkeypatch.setattr(Stopwatch, "lap", lambda self, name: seconds.get(name, 0.0))
    folder = RunFolder(tmp_path / "a")
    begin(request(data, folder.root, epochs=100, max_time=18.4 / MARGIN))  # 5.7 epochs
    progress = load_state(folder.last)["progress"]
    assert (progress["epochs"], progress["epoch"], progress["total"]) == (6, 6, 17)
    assert progress["seconds"] == 17 + 6 * 0.25 < 18.4 / MARGIN
    assert "the time budget is spent" in folder.log.read_text()


def test_a_run_that_its_time_budget_ends_is_evaluated_all_the_same(data: Path, tmp_path: Path) -> None:
    recipe = small_recipe(epochs=50, max_time=0.001)
    recipe = replace(recipe, evaluating=replace(recipe.evaluating, every=40))
    result = begin(Request(data, recipe, tmp_path / "a", device="cpu", quiet=True))
    assert (result.epochs, result.steps) == (1, 1)
    assert result.evaluation is not None
    assert RunFolder(tmp_path / "a").best_weights.is_file()


def test_without_a_split_for_evaluation_the_last_weights_are_kept(data: Path, tmp_path: Path) -> None:
    only = tmp_path / "data"
    draw(only, train=4, val=1)
    (only / "annotations" / "instances_val.json").unlink()
    recipe = small_recipe(epochs=6)
    recipe = replace(recipe, schedule=replace(recipe.schedule, plain=0.34, restart=True))  # from what best?
    result = begin(Request(only, recipe, tmp_path / "a", device="cpu", quiet=True))
    assert result.evaluation is None
    assert load_state(RunFolder(tmp_path / "a").last)["progress"]["restarts"] == 0
    folder = RunFolder(tmp_path / "a")
    assert folder.best_weights.is_file()
    assert not folder.evaluation.exists()
    assert "no split for evaluation" in folder.log.read_text()


def test_a_run_that_diverges_says_so_in_its_status(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = loop.OnDevice.__call__

    def poison(self: Any, batch: Any, **place: int) -> Any:
        images, targets = real(self, batch, **place)
        images[0] = float("nan")
        return images, targets

    monkeypatch.setattr(loop.OnDevice, "__call__", poison)
    with pytest.raises(DivergedError, match=r"\.jpg"):
        begin(request(data, tmp_path / "a"))
    folder = RunFolder(tmp_path / "a")
    assert folder.read_json(folder.status)["state"] == "failed"


def test_the_card_of_the_weights_says_all_that_a_user_must_know(data: Path, tmp_path: Path) -> None:
    from finedetr.model.weights import load_weights

    begin(request(data, tmp_path / "a", epochs=1))
    detector, card = load_weights(RunFolder(tmp_path / "a").best_weights)
    assert (card.size, card.names[:2], card.category_ids[:4]) == ((64, 64), ("disc", "square"), (1, 2, 3, 5))
    assert card.recipe["name"] == "deim"
    assert not detector.training


def test_what_cannot_be_trained_on_is_refused_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be worked off in 2 equal parts"):
        request(data, tmp_path / "a", batch=3, accumulate=2)
    with pytest.raises(DataError, match="does not exist"):
        begin(request(tmp_path / "nothing", tmp_path / "a"))
    with pytest.raises(UsageError, match="no device is called"):
        begin(replace(request(data, tmp_path / "a"), device="gpu"))
    assert not (tmp_path / "a").exists()


def test_a_run_of_other_classes_or_without_a_state_is_not_resumed(data: Path, tmp_path: Path) -> None:
    begin(request(data, tmp_path / "a", epochs=1))
    other = draw(tmp_path / "other", train=4, val=2)
    for split in ("train", "val"):
        path = other / "annotations" / f"instances_{split}.json"
        document = json.loads(path.read_text())
        document["categories"][0]["name"] = "plate"
        path.write_text(json.dumps(document))
    with pytest.raises(DataError, match="no longer those"):
        resume(tmp_path / "a", data=other, device="cpu", quiet=True)
    RunFolder(tmp_path / "a").last.unlink()
    with pytest.raises(ModelError, match="no resume state"):
        resume(tmp_path / "a", device="cpu", quiet=True)


def test_plain_lines_where_there_is_no_terminal(tmp_path: Path) -> None:
    stream = io.StringIO()
    with Reporter(tmp_path / "log", stream=stream) as reporter:
        assert not reporter.live("moving", 1, 2)
        reporter.line("stays [bold]as it is[/bold]")
        reporter.warn("careful")
    assert stream.getvalue() == (tmp_path / "log").read_text() == "stays [bold]as it is[/bold]\nwarning: careful\n"
    assert reporter.warnings == ["careful"]
    assert [clock(s) for s in (5, 187, 7509)] == ["5s", "3:07", "2:05:09"]


def test_a_terminal_has_a_moving_line_and_lines_that_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with Reporter(stream=stream) as reporter:
        assert reporter.live("epoch 1/3  loss [x] 2.5", 1, 2)
        reporter.line("stays [bold]")
    said = stream.getvalue()
    assert "loss [x] 2.5" in said
    assert "stays [bold]" in said
