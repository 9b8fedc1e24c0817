"""The README's commands are commands: each line of `finedetr train` can be planned, each verb exists, each file too."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from finedetr.cli import ALIASES, VERBS, main
from finedetr.model.detector import Detector
from finedetr.model.weights import Card, save_weights
from finedetr.model.zoo import variant
from finedetr.recipes import build
from finedetr.train.config import to_dict
from tests.train.small import draw
from tests.train.tiny import TINY

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line.split("#")[0])[1:] for line in README.splitlines() if line.startswith("finedetr ")]
PLANS = [words for words in COMMANDS if words[0] == "train" and "--resume" not in words]


def test_the_readme_shows_commands() -> None:
    assert len(PLANS) >= 2
    assert {words[0] for words in COMMANDS} >= {"train", "eval", "predict", "data"}
    assert all(words[0] in {**VERBS, **ALIASES} for words in COMMANDS)


@pytest.mark.parametrize("words", PLANS, ids=" ".join)
def test_every_training_command_can_be_planned(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = draw(tmp_path / "pictures", train=4, val=2)
    earlier = {"data": {"path": str(data)}, "recipe": to_dict(build(variant("dfine-n"), random_start=True))}
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "config.json").write_text(json.dumps(earlier))
    words = [{"pictures/": str(data), "more/": str(data / "val")}.get(word, word) for word in words]
    words = [str(tmp_path / word) if word.startswith("runs/") else word for word in words]
    if "--teacher" in words:
        place = words.index("--teacher") + 1
        words[place] = str(
            save_weights(tmp_path / "teacher.safetensors", Detector(TINY, 1), Card(TINY, ("disc",), (0,)))
        )
    assert main([*(word for word in words if word != "--dry-run"), "--dry-run"]) == 0
    assert "MatchabilityAware" in capsys.readouterr().out


def test_every_linked_file_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not link.startswith("http") and not (ROOT / link).exists()] == []
