"""`finedetr info` says what is wrong with a run's file instead of breaking on it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from finedetr.cli import main
from finedetr.model.weights import load_weights, save_weights
from tests.data.test_formats import write


@pytest.mark.parametrize(("epoch", "said"), [(2, "epoch 3,"), ("x", "epoch unknown,"), (None, "epoch unknown,")])
def test_a_card_with_a_strange_epoch(
    epoch: object, said: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    detector, card = load_weights(weights)
    path = save_weights(tmp_path / "a.safetensors", detector, replace(card, recipe={"name": "deim", "epoch": epoch}))
    assert main(["info", str(path)]) == 0
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"state": "done"}', "3"])
def test_a_damaged_status_is_one_clear_message(
    text: str, weights: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "weights").mkdir()
    shutil.copy(weights, tmp_path / "weights" / "best.safetensors")
    assert main(["info", str(tmp_path)]) == 0
    write(tmp_path / "status.json", text)
    capsys.readouterr()
    assert main(["info", str(tmp_path)]) == 4
    assert f"model.schema: {tmp_path / 'status.json'}" in capsys.readouterr().err
