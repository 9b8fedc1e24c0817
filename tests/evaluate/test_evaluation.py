"""Tables: nothing cut in a pipe, nothing taken for markup on a terminal."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from finedetr.evaluate.coco import Evaluator
from finedetr.evaluate.evaluation import Evaluation
from tests.evaluate.cases import make_dataset

LONG = "a class name that is much longer than eighty columns because somebody wrote a sentence into it, [bold]loudly[/]"


@pytest.fixture
def evaluation() -> Evaluation:
    dataset = make_dataset([(100, 100)], [[[10, 10, 50, 50]]], [[0]], names=[LONG, "tab\there"], category_ids=[3, 7])
    evaluator = Evaluator(dataset)
    evaluator.add(0, [[10, 10, 50, 50]], [0.9], [0])
    return evaluator.result()


def test_a_pipe_gets_tab_separated_values_that_are_complete(evaluation: Evaluation) -> None:
    blocks = [[line.split("\t") for line in block.splitlines()] for block in evaluation.table().split("\n\n")]
    assert dict(blocks[0])["AP"] == "1.000000"
    assert len(blocks[0]) == 13
    assert blocks[1][2] == ["medium", "1.000000", "1.000000", "1"]
    assert blocks[2][1] == [LONG, "3", "1.000000", "1.000000", "1.000000", "1"]
    assert blocks[2][2] == ["tab here", "7", "-1.000000", "-1.000000", "-1.000000", "0"]


@pytest.mark.parametrize("width", [60, 200])
def test_a_terminal_shows_names_whole_and_as_they_are(evaluation: Evaluation, width: int) -> None:
    text = evaluation.table(terminal=True, width=width)
    assert "…" not in text
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    assert max(len(line) for line in text.splitlines()) <= width
    letters = "".join(c for c in text if c.isalnum() or c in "[]/.,")
    assert "".join(LONG.split())[-30:] in letters
    assert "–" in text  # the class without boxes


def test_what_is_not_as_usual_is_said(evaluation: Evaluation) -> None:
    text = replace(evaluation, max_detections=300, unanswered=4, unreadable=7).table(terminal=True, width=120)
    assert "300 detections" in text
    assert "4 pictures were not answered" in text
    assert "7 pictures could not be read" in text
    assert "detections a picture" not in evaluation.table(terminal=True, width=120)


def test_printing_an_evaluation_prints_its_numbers(evaluation: Evaluation) -> None:
    assert "AP50\t1.000000" in str(evaluation)
    assert "class\t" not in str(evaluation)
