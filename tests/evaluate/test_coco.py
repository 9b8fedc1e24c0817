"""The evaluator agrees with pycocotools to the last bit, and keeps its head where pycocotools loses its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from finedetr.data.dataset import Dataset
from finedetr.errors import DataError, RunError, UsageError
from finedetr.evaluate.coco import Evaluator
from finedetr.evaluate.evaluation import Evaluation
from tests.evaluate.cases import make_dataset, pycocotools_stats, random_case


def filled(dataset: Dataset, answers: list, **options: int) -> Evaluator:
    evaluator = Evaluator(dataset, **options)
    for index, answer in enumerate(answers):
        evaluator.add(index, *answer)
    return evaluator


def one_cat(**fields: object) -> Dataset:
    return make_dataset([(100, 100)], [[[10, 10, 50, 50]]], [[0]], **fields)  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", range(24))
def test_the_twelve_numbers_and_every_class_equal_pycocotools_to_the_last_bit(seed: int) -> None:
    dataset, answers = random_case(seed)
    evaluator = filled(dataset, answers)
    stats, oracle = pycocotools_stats(dataset, evaluator.coco_results(decimals=None))
    result = evaluator.result()
    assert list(result.metrics().values()) == stats.tolist()
    order = np.argsort(np.argsort(dataset.categories.ids))
    for index, score in enumerate(result.per_class):
        precision = oracle["precision"][:, :, order[index], 0, 2]
        expected = precision[precision > -1].mean() if (precision > -1).any() else -1
        assert score.ap == pytest.approx(expected, abs=1e-12)
        assert score.id == dataset.categories.ids[index]
        assert score.boxes == np.count_nonzero((dataset.labels == index) & ~dataset.crowd)
    assert sum(size.boxes for size in result.by_size.values()) == result.boxes == np.count_nonzero(~dataset.crowd)


def test_the_reference_case_of_coco_to_the_printed_digits(real_data: Path) -> None:
    document = json.loads((real_data / "cocoeval" / "instances_val2014_100.json").read_text())
    results = json.loads((real_data / "cocoeval" / "instances_val2014_fakebbox100_results.json").read_text())
    row = {image["id"]: i for i, image in enumerate(document["images"])}
    of: list[list[dict]] = [[] for _ in row]
    for annotation in document["annotations"]:
        of[row[annotation["image_id"]]].append(annotation)
    categories = [c["id"] for c in document["categories"]]
    dataset = make_dataset(
        [(image["width"], image["height"]) for image in document["images"]],
        [[[x, y, x + w, y + h] for x, y, w, h in (a["bbox"] for a in rows)] for rows in of],
        [[categories.index(a["category_id"]) for a in rows] for rows in of],
        names=[c["name"] for c in document["categories"]],
        category_ids=categories,
        ids=list(row),
        crowd=[[bool(a["iscrowd"]) for a in rows] for rows in of],
        area=[[a["area"] for a in rows] for rows in of],
    )
    evaluator = Evaluator(dataset)
    for identity, index in row.items():
        mine = [result for result in results if result["image_id"] == identity]
        boxes = np.array([result["bbox"] for result in mine]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        labels = [categories.index(result["category_id"]) for result in mine]
        evaluator.add(index, boxes, [result["score"] for result in mine], np.array(labels, dtype=int))
    printed = " ".join(f"{value:.3f}"[1:] for value in evaluator.result().metrics().values())
    assert printed == ".505 .697 .573 .586 .519 .501 .387 .594 .595 .640 .566 .564"


def test_shards_merge_to_the_same_numbers_and_a_picture_sent_twice_counts_once() -> None:
    dataset, answers = random_case(3, pictures=11)
    whole = filled(dataset, answers)
    shards = [Evaluator(dataset) for _ in range(3)]
    for index in [*range(11), 0]:  # as a sampler that pads gives them out
        shards[index % 3 if index else 2].add(index, *answers[index])
    shards[1].add(0, *answers[0])
    merged = Evaluator(dataset)
    for shard in shards:
        merged.merge(shard.to_bytes())
    assert merged.result() == whole.result()
    assert merged.coco_results() == whole.coco_results()


def test_an_untouched_shard_merges_as_nothing() -> None:
    dataset, answers = random_case(5)
    whole = filled(dataset, answers)
    expected = whole.result()
    whole.merge(Evaluator(dataset).to_bytes())
    assert whole.result() == expected


def test_the_later_answer_for_a_picture_replaces_the_earlier() -> None:
    evaluator = Evaluator(one_cat())
    evaluator.add(0, [[60, 60, 90, 90], [1, 1, 2, 2]], [0.9, 0.8], [0, 0])
    assert evaluator.result().ap == 0
    evaluator.add(0, [[10, 10, 50, 50]], [0.5], [0])
    assert evaluator.result().ap == pytest.approx(1)
    evaluator.add(0, np.zeros((0, 4)), [], [])
    assert evaluator.result().detections == 0
    assert evaluator.result().ap == 0


def test_batches_are_the_same_as_single_pictures() -> None:
    generator = np.random.default_rng(0)
    dataset, _ = random_case(2, pictures=6)
    low = generator.random((6, 10, 2)) * 300
    xyxy = np.concatenate((low, low + 50), 2).astype(np.float32)
    score, label = generator.random((6, 10)).astype(np.float32), generator.integers(0, 4, (6, 10))
    one, many = Evaluator(dataset), Evaluator(dataset)
    for i in range(6):
        one.add(i, xyxy[i], score[i], label[i])
    order = [4, 1, 0, 5, 3, 2]
    for part in (order[:4], order[4:]):
        many.add_batch(part, xyxy[part], score[part], label[part])
    assert one.result() == many.result()
    assert one.coco_results() == many.coco_results()


def test_finding_nothing_is_an_ap_of_zero_and_no_truth_an_ap_of_minus_one() -> None:
    nothing = Evaluator(one_cat())
    nothing.add(0, np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    assert nothing.result().ap == 0.0
    assert nothing.result().per_class[1].ap == -1.0  # a dog was never there
    assert nothing.coco_results() == []
    no_truth = Evaluator(make_dataset([(50, 50)], [[]], [[]]))
    no_truth.add(0, [[1, 1, 9, 9]], [0.5], [1])
    assert set(no_truth.result().metrics().values()) == {-1.0}


def test_pictures_without_an_answer_count_as_missed_and_are_told() -> None:
    dataset = make_dataset([(100, 100)] * 2, [[[10, 10, 50, 50]]] * 2, [[0]] * 2)
    evaluator = Evaluator(dataset)
    evaluator.add(1, [[10, 10, 50, 50]], [0.9], [0])
    result = evaluator.result()
    assert result.unanswered == 1
    assert result.ar100 == pytest.approx(0.5)


def test_detections_on_a_crowd_are_neither_right_nor_wrong() -> None:
    boxes = [[[10, 10, 50, 50], [60, 60, 99, 99]]]
    dataset = make_dataset([(100, 100)], boxes, [[0, 0]], crowd=[[False, True]])
    evaluator = Evaluator(dataset)
    evaluator.add(0, [[62, 62, 80, 80], [70, 70, 95, 95], [10, 10, 50, 50]], [0.9, 0.8, 0.7], [0, 0, 0])
    assert evaluator.result().ap == pytest.approx(1)
    assert evaluator.result().boxes == 1


def test_max_detections_limits_recall() -> None:
    boxes = [[[x, 10, x + 8, 30] for x in range(0, 100, 10)]]
    dataset = make_dataset([(110, 50)], boxes, [[0] * 10])
    answers = [(boxes[0], np.linspace(0.9, 0.5, 10), np.zeros(10, int))]
    assert filled(dataset, answers, max_detections=4).result().ar100 == pytest.approx(0.4)
    assert filled(dataset, answers, max_detections=500).result().ap == pytest.approx(1)
    assert filled(dataset, answers, max_detections=500).result().max_detections == 500


def test_results_are_written_in_original_ids() -> None:
    dataset, answers = random_case(8)
    evaluator = filled(dataset, answers)
    rows = json.loads(json.dumps(evaluator.coco_results(decimals=None)))
    assert {row["image_id"] for row in rows} <= set(dataset.ids.tolist())
    assert {row["category_id"] for row in rows} <= set(dataset.categories.ids)
    assert len(rows) == evaluator.result().detections


def test_answers_that_cannot_be_are_refused() -> None:
    evaluator = Evaluator(one_cat())
    with pytest.raises(RunError, match=r"0\.jpg.*NaN"):
        evaluator.add(0, [[1, 1, np.nan, 2]], [0.5], [0])
    with pytest.raises(RunError, match="NaN"):
        evaluator.add(0, [[1, 1, 2, 2]], [np.nan], [0])
    with pytest.raises(UsageError, match="label 2 is outside"):
        evaluator.add(0, [[1, 1, 2, 2]], [0.5], [2])
    with pytest.raises(UsageError, match="picture index 1"):
        evaluator.add(1, [[1, 1, 2, 2]], [0.5], [0])
    with pytest.raises(UsageError, match="as many boxes"):
        evaluator.add(0, [[1, 1, 2, 2]], [0.5, 0.4], [0, 0])
    with pytest.raises(UsageError, match="batch of 2"):
        evaluator.add_batch([0, 0], np.zeros((1, 1, 4)), np.zeros((1, 1)), np.zeros((1, 1), int))
    with pytest.raises(UsageError, match="at least 1"):
        Evaluator(one_cat(), max_detections=0)
    assert evaluator.result().unanswered == 1


def test_bytes_of_another_data_set_or_no_bytes_at_all_are_refused() -> None:
    evaluator = Evaluator(one_cat())
    with pytest.raises(RunError, match="another data set"):
        evaluator.merge(Evaluator(one_cat(ids=[5])).to_bytes())
    for broken in (b"", b"nonsense", evaluator.to_bytes()[:-40]):
        with pytest.raises(RunError, match="cannot be read"):
            evaluator.merge(broken)


def test_the_caller_may_use_its_arrays_again() -> None:
    evaluator = Evaluator(one_cat())
    xyxy = np.array([[10, 10, 50, 50]], dtype=np.float32)
    evaluator.add(0, xyxy, [0.9], [0])
    xyxy[:] = 0
    assert evaluator.result().ap == pytest.approx(1)
    assert evaluator.detections(0)[0].tolist() == [[10, 10, 50, 50]]


def test_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    dataset, answers = random_case(1)
    for limit in (100, 300, 5):
        filled(dataset, answers, max_detections=limit).result()
    Evaluator(dataset).result()
    assert capfd.readouterr() == ("", "")


def test_an_evaluation_survives_json() -> None:
    dataset, answers = random_case(4)
    result = filled(dataset, answers).result()
    assert Evaluation.from_json(result.to_json()) == result
    values = json.loads(result.to_json())
    assert values["AP"] == result.ap
    older = {name: value for name, value in values.items() if name != "unreadable"}
    assert Evaluation.from_dict(older) == result
    assert values["per_class"][0]["name"] == "class 0"
    assert Evaluation.from_dict({**values, "train_seconds": 12.5}) == result
    for broken in ("", "[]", "{}", '{"AP": 1}'):
        with pytest.raises(DataError, match="no evaluation"):
            Evaluation.from_json(broken)
