from __future__ import annotations

from pathlib import Path

import pytest
import torch

import finedetr
from finedetr.errors import Interrupted
from finedetr.train.callbacks import Callbacks, State
from finedetr.train.folder import RunFolder
from finedetr.train.interrupt import signal
from tests.train.small import draw, small_recipe

MOMENTS = ("on_start", "on_step", "on_eval", "on_save", "on_end")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"), train=8, val=1)


class Witness:
    """Five functions that write down what they were told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, State]] = []
        self.functions = {name: self._remember(name) for name in MOMENTS}

    def _remember(self, name: str) -> object:
        return lambda state: self.told.append((name, state))

    def names(self) -> list[str]:
        return [name for name, _ in self.told]

    def of(self, name: str) -> list[State]:
        return [state for told, state in self.told if told == name]


def test_each_moment_has_its_function_and_none_changes_the_run(data: Path, tmp_path: Path) -> None:
    witness = Witness()
    common = {"recipe": small_recipe(epochs=2), "device": "cpu", "quiet": True}
    seen = finedetr.train(data, out=tmp_path / "seen", callbacks=witness.functions, **common)
    alone = finedetr.train(data, out=tmp_path / "alone", **common)
    assert RunFolder(seen.folder).best_weights.read_bytes() == RunFolder(alone.folder).best_weights.read_bytes()

    names = witness.names()
    assert (names[0], names[-1]) == ("on_start", "on_end")
    assert [names.count(name) for name in MOMENTS] == [1, 4, 2, names.count("on_save"), 1]
    assert [state.step for state in witness.of("on_step")] == [1, 2, 3, 4]
    first = witness.of("on_step")[0]
    record = next(r for r in RunFolder(seen.folder).records() if r["kind"] == "step")
    assert first.loss == pytest.approx(record["loss"], abs=1e-5)
    assert (first.rate, first.steps, first.epochs) == (record["lr"], 4, 2)
    assert any("matching/" in name for name in first.losses)
    assert [state.evaluation.ap for state in witness.of("on_eval") if state.evaluation] == [
        r["AP"] for r in RunFolder(seen.folder).records() if r["kind"] == "evaluation"
    ]
    for state in witness.of("on_save"):
        assert state.path in (RunFolder(seen.folder).last, RunFolder(seen.folder).best)
    end = witness.of("on_end")[0]
    assert (end.outcome, end.evaluation, end.folder) == ("finished", seen.best, seen.folder)
    assert all(isinstance(part, torch.nn.Module) for part in (end.detector, end.average))


def test_a_run_that_goes_on_starts_and_ends_again(data: Path, tmp_path: Path) -> None:
    def stop(state: State) -> None:
        if state.step == 1:
            signal.raise_signal(signal.SIGINT)

    witness = Witness()
    functions = {**witness.functions, "on_step": stop}
    with pytest.raises(Interrupted):
        finedetr.train(
            data, recipe=small_recipe(epochs=1), out=tmp_path / "a", device="cpu", quiet=True, callbacks=functions
        )
    assert [state.outcome for state in witness.of("on_end")] == ["interrupted"]
    assert witness.names()[-2:] == ["on_save", "on_end"]
    again = Witness()
    finedetr.resume(tmp_path / "a", device="cpu", quiet=True, callbacks=Callbacks.of(again.functions))
    assert [state.step for state in again.of("on_start")] == [1]
    assert [state.step for state in again.of("on_step")] == [2]


def test_an_error_in_a_callback_ends_the_run_and_the_end_is_told(data: Path, tmp_path: Path) -> None:
    witness = Witness()

    def fail(state: State) -> None:
        raise ZeroDivisionError("mine")

    functions = {**witness.functions, "on_eval": fail}
    with pytest.raises(ZeroDivisionError, match="mine"):
        finedetr.train(data, recipe=small_recipe(), out=tmp_path / "a", device="cpu", quiet=True, callbacks=functions)
    assert [state.outcome for state in witness.of("on_end")] == ["failed"]
    assert RunFolder(tmp_path / "a").read_json(tmp_path / "a" / "status.json")["state"] == "failed"


def test_an_unknown_moment_is_a_type_error_with_a_suggestion(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"no callback is called 'on_evaluate'. Did you mean on_eval"):
        finedetr.train("nowhere", out=tmp_path / "a", callbacks={"on_evaluate": print})
    with pytest.raises(TypeError, match="on_eval: a function of the run's state is wanted, 3 came"):
        finedetr.train("nowhere", out=tmp_path / "a", callbacks={"on_eval": 3})  # type: ignore[dict-item]
