"""Errors are told by kind, confusion by class, thresholds give the best F1 or the least cost, the worst come first."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finedetr.cli import main
from finedetr.errors import UsageError
from finedetr.evaluate.coco import Evaluator, Judged
from finedetr.evaluate.diagnosis import Goal, diagnose
from finedetr.evaluate.evaluation import Evaluation
from finedetr.evaluate.findings import ClassThreshold, Confusion, Diagnosis
from finedetr.evaluate.html import report_page
from finedetr.evaluate.pictures import worst_sheet
from finedetr.model.detector import Detector
from finedetr.model.weights import Card, load_weights, read_card, save_weights
from tests.evaluate.cases import make_dataset, random_case, solid_pictures
from tests.train.small import draw
from tests.train.tiny import TINY


@pytest.fixture
def evaluator() -> Evaluator:
    """Of cats (id 9) and dogs (id 4): two found, one taken for the other, one askew, one told twice, one missed."""
    boxes = [[[0, 0, 20, 20], [50, 50, 90, 90]], [[10, 10, 40, 40]], [[0, 0, 30, 30], [60, 60, 99, 99]]]
    crowd = [[False, False], [False], [False, True]]
    data = make_dataset(
        [(100, 100)] * 3, boxes, [[0, 1], [1], [0, 0]], category_ids=(9, 4), ids=[30, 20, 10], crowd=crowd
    )
    found = Evaluator(data)
    found.add(0, [[0, 0, 20, 20], [0, 0, 20, 21], [50, 50, 90, 90]], [0.9, 0.3, 0.8], [0, 0, 0])  # hit, double, class
    found.add(1, [[10, 10, 40, 40], [70, 70, 90, 90]], [0.7, 0.6], [1, 1])  # hit, nothing there
    found.add(2, [[0, 0, 30, 80], [61, 61, 90, 90]], [0.5, 0.95], [0, 0])  # place; in the crowd, which does not count
    return found


def test_each_kind_of_error_is_counted(evaluator: Evaluator) -> None:
    counts = {error.kind: error.count for error in diagnose(evaluator).errors}
    assert counts == {"class": 1, "place": 1, "class and place": 0, "double": 1, "nothing": 1, "missed": 0}
    assert all(0 <= error.cost <= 1 for error in diagnose(evaluator).errors)


def test_the_matrix_is_at_the_thresholds_and_in_the_order_of_the_classes(evaluator: Evaluator) -> None:
    diagnosis = diagnose(evaluator)
    cat, dog = diagnosis.thresholds
    assert (cat.threshold, dog.threshold) == (pytest.approx(0.85), pytest.approx(0.65)), "half-way to the next score"
    assert (cat.f1, cat.precision, cat.recall) == (pytest.approx(2 / 3), 1, 0.5)
    assert diagnosis.matrix().tolist() == [[1, 0, 1], [0, 1, 1], [0, 0, 0]]
    everything = evaluator.confused(evaluator.judged().verdict >= 0)
    assert everything.tolist() == [[1, 0, 1], [1, 1, 0], [2, 1, 0]], "a dog was taken for a cat"
    loose = replace(diagnosis, confusion=tuple(Confusion(t, a, everything[t, a]) for t in range(3) for a in range(3)))
    assert [(c.truth, c.answer, c.count) for c in loose.confused()[:2]] == [(2, 0, 2), (0, 2, 1)]


def test_answers_are_matched_once_for_all_questions_until_more_come(
    evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = evaluator.to_bytes()
    tables = []
    prepared = Evaluator._prepared
    monkeypatch.setattr(
        Evaluator, "_prepared", lambda self, table, **more: tables.append(table) or prepared(self, table, **more)
    )
    other = Evaluator(evaluator.dataset)
    other.merge(fresh)
    diagnosis, numbers = diagnose(other), other.result()
    assert len(tables) == 2, "all answers, and those that are told"
    assert (diagnose(evaluator), evaluator.result()) == (diagnosis, numbers)
    other.add(2, [[0, 0, 30, 30]], [0.99], [0])
    assert other.result().ap > numbers.ap
    assert diagnose(other).worst != diagnosis.worst


def test_the_worst_pictures_come_first(evaluator: Evaluator) -> None:
    worst = diagnose(evaluator).worst
    assert [(w.id, w.found, w.missed, w.wrong) for w in worst] == [(30, 1, 1, 0), (10, 0, 1, 0)]


def value(judged: Judged, label: int, objects: int, limit: float, goal: Goal, costs: tuple[float, float]) -> float:
    """What a threshold is worth."""
    told = (judged.label == label) & (judged.verdict >= 0) & (judged.score >= limit)
    hits = int((judged.verdict[told] == 1).sum())
    wrong = int(told.sum()) - hits
    return 2 * hits / (wrong + hits + objects) if goal == "f1" else -costs[0] * wrong - costs[1] * (objects - hits)


GOALS: list[tuple[Goal, tuple[float, float]]] = [("f1", (1.0, 1.0)), ("cost", (1.0, 4.0))]


@pytest.mark.parametrize("seed", [1, 2])
def test_thresholds_are_the_best_of_all(seed: int) -> None:
    data, answers = random_case(seed)
    evaluator = Evaluator(data)
    for index, one in enumerate(answers):
        evaluator.add(index, *one)
    judged = evaluator.judged()
    for goal, costs in GOALS:
        diagnosis = diagnose(evaluator, goal, costs)
        for label, entry in enumerate(diagnosis.thresholds):
            objects = int((data.labels[~data.crowd] == label).sum())
            best = max(value(judged, label, objects, limit, goal, costs) for limit in np.linspace(0, 1, 2001))
            assert value(judged, label, objects, entry.threshold, goal, costs) == best
            if goal == "f1":
                assert entry.f1 == pytest.approx(best)
        told = sum(row.found + row.missed for row in diagnosis.worst)
        assert told <= (~data.crowd).sum()
        rows = diagnosis.matrix()[:-1].sum(axis=1)
        assert rows.tolist() == np.bincount(data.labels[~data.crowd], minlength=4).tolist()


def test_nothing_found_and_a_class_without_boxes() -> None:
    data = make_dataset([(50, 50)], [[[1, 1, 20, 20]]], [[0]])
    diagnosis = diagnose(Evaluator(data))
    assert [entry.threshold for entry in diagnosis.thresholds] == [0.4, 0.4]
    assert diagnosis.thresholds[1].f1 == -1
    assert diagnosis.matrix().tolist() == [[0, 0, 1], [0, 0, 0], [0, 0, 0]]
    assert {error.kind: error.count for error in diagnosis.errors}["missed"] == 1
    for costs in ((-1.0, 1.0), (0.0, 0.0), (float("nan"), 1.0), (1.0, float("inf"))):
        with pytest.raises(UsageError, match="costs are positive"):
            diagnose(Evaluator(data), "cost", costs)


def test_a_class_that_is_never_hit_keeps_the_usual_threshold_but_costs_least_where_it_is_silent() -> None:
    evaluator = Evaluator(make_dataset([(50, 50)], [[[1, 1, 20, 20]]], [[0]]))
    evaluator.add(0, [[30, 30, 45, 45], [31, 30, 45, 45]], [0.6, 0.02], [0, 0])
    assert diagnose(evaluator).thresholds[0] == ClassThreshold("cat", 0.4, 0, 0, 0)
    assert diagnose(evaluator, "cost").thresholds[0].threshold == pytest.approx(0.8)


def test_a_diagnosis_travels_with_its_evaluation(evaluator: Evaluator) -> None:
    evaluation = replace(evaluator.result(), diagnosis=diagnose(evaluator))
    back = Evaluation.from_json(evaluation.to_json())
    assert back == evaluation
    assert isinstance(back.diagnosis, Diagnosis)
    table = evaluation.table()
    assert "error\tcount\tAP50 lost\nclass\t1\t" in table
    assert "cat\t0.850000" in table
    assert "threshold" in evaluation.table(terminal=True, width=100)
    page = report_page("run", evaluation=evaluation)
    assert all(f"<h2>{title}</h2>" in page for title in ("Errors", "Thresholds", "Confusion", "Worst pictures"))


def test_the_worst_pictures_are_shown(tmp_path: Path) -> None:
    data = solid_pictures(tmp_path)
    evaluator = Evaluator(data)
    evaluation = replace(evaluator.result(), diagnosis=diagnose(evaluator))
    sheet = worst_sheet(evaluation, evaluator)
    assert sheet is not None
    assert sheet.height > 400
    for index in range(len(data)):
        rows = data.rows(index)
        evaluator.add(index, data.boxes[rows], np.ones(rows.stop - rows.start), data.labels[rows])
    assert worst_sheet(replace(evaluation, diagnosis=diagnose(evaluator)), evaluator) is None
    assert worst_sheet(evaluator.result(), evaluator) is None


def test_the_command_keeps_thresholds_in_the_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = draw(tmp_path / "data", train=1, val=2)
    names = ("disc", "square", "dragon")
    file = save_weights(tmp_path / "a.safetensors", Detector(TINY, 3), Card(TINY, names, (1, 2, 3), size=(64, 64)))
    before = load_weights(file)[0].state_dict()
    words = ["eval", str(file), "--data", str(data), "--device", "cpu", "--workers", "0", "--out", str(tmp_path / "o")]
    assert main([*words, "--errors"]) == 0
    assert "error\tcount\tAP50 lost" in capsys.readouterr().out
    assert (tmp_path / "o" / "worst_val.jpg").is_file()
    assert read_card(file).thresholds == ()
    assert main([*words, "--thresholds", "cost", "--costs", "1", "5", "--json"]) == 0
    found = {t["name"]: t for t in json.loads(capsys.readouterr().out)["result"]["diagnosis"]["thresholds"]}
    kept = dict(zip(names, read_card(file).thresholds, strict=True))
    assert kept["dragon"] == 0.4, "the data set does not know it"
    for name in ("disc", "square"):
        assert kept[name] == (found[name]["threshold"] if found[name]["f1"] >= 0 else 0.4)
    after = load_weights(file)[0].state_dict()
    assert all((after[name] == before[name]).all() for name in before)
    assert main(["info", str(file)]) == 0
    assert "scores   from disc" in capsys.readouterr().out
    assert main([*words, "--thresholds", "best"]) == 2
    assert main([*words, "--thresholds", "cost", "--costs", "-1", "5"]) == 2
    assert "Traceback" not in capsys.readouterr().err
