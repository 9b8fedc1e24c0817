"""The page of a run: complete in itself, safe whatever the classes are called, honest about what is absent."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from finedetr.errors import DataError
from finedetr.evaluate.charts import Curve, line_chart, smoothed
from finedetr.evaluate.coco import Evaluator
from finedetr.evaluate.evaluation import Evaluation
from finedetr.evaluate.html import report_page, write_report
from finedetr.evaluate.pictures import save_picture
from tests.evaluate.cases import make_dataset

WICKED = '<script>alert("x")</script>&'


@pytest.fixture
def evaluation() -> Evaluation:
    dataset = make_dataset([(100, 100)], [[[10, 10, 50, 50]]], [[0]], names=[WICKED, "dog"])
    evaluator = Evaluator(dataset)
    evaluator.add(0, [[10, 10, 50, 50]], [0.9], [0])
    return evaluator.result()


RECORDS = [
    {
        "kind": "step",
        "step": 10 * i,
        "loss": 30.0 / (i + 1),
        "lr": 1e-4,
        "losses": {"matching/layer0/MAL": 2.0 / (i + 1)},
    }
    for i in range(1, 30)
] + [{"kind": "evaluation", "step": 100 * i, "AP": 0.1 * i, "AP50": 0.2 * i, "AP75": -1} for i in range(1, 4)]


class Outside(HTMLParser):
    """Collects what a page asks for from elsewhere, and the tags that it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]


def test_the_page_needs_nothing_outside_itself_and_escapes_names(evaluation: Evaluation) -> None:
    page = report_page(WICKED, RECORDS, evaluation, [(WICKED, b"12", "image/png")], {"recipe": WICKED})
    reader = Outside()
    reader.feed(page)
    assert reader.addresses == ["data:image/png;base64,MTI="]
    assert "script" not in reader.tags
    assert page.count("&lt;script&gt;") >= 5
    assert reader.tags.count("svg") == 4
    assert "@import" not in page
    assert "url(" not in page


def test_curves_show_every_evaluation_and_leave_out_what_was_not_measured(evaluation: Evaluation) -> None:
    page = report_page("run", RECORDS, evaluation)
    marks = re.findall(r"<title>(AP\d* [\d.]+ at \d+)</title>", page)
    assert marks == [f"AP {0.1 * i:.4f} at {100 * i}" for i in (1, 2, 3)] + [
        f"AP50 {0.2 * i:.4f} at {100 * i}" for i in (1, 2, 3)
    ]
    assert ">MAL<" in page
    assert "–" in page  # the class without boxes


def test_a_run_folder_becomes_a_page(tmp_path: Path, evaluation: Evaluation) -> None:
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, RECORDS)) + '\n{"kind": "st')
    (tmp_path / "evaluation.json").write_text(json.dumps({**evaluation.to_dict(), "epoch": 3, "train_seconds": 41.5}))
    save_picture(Image.new("RGB", (8, 8)), tmp_path / "samples" / "val_predictions.jpg")
    page = write_report(tmp_path).read_text()
    assert "<h2>val predictions</h2>" in page
    assert "41.5" in page
    assert sorted(p.name for p in tmp_path.iterdir()) == ["evaluation.json", "metrics.jsonl", "report.html", "samples"]
    (tmp_path / "evaluation.json").unlink()
    assert "Classes" not in write_report(tmp_path).read_text()
    with pytest.raises(DataError, match="is it a run"):
        write_report(tmp_path / "samples")


def test_charts_of_nothing_one_point_and_a_constant() -> None:
    assert line_chart("empty", [Curve("a", [], []), Curve("b", [1.0], [float("nan")])]) == ""
    assert "<polyline" in line_chart("one", [Curve("a", [3], [7])])
    constant = line_chart("constant", [Curve("a", [1, 2, 3], [0, 0, 0])], floor=0)
    assert "nan" not in constant
    small = line_chart("a constant rate", [Curve("lr", [1, 2], [1e-4, 1e-4])], floor=0)
    heights = [float(point.split(",")[1]) for point in re.findall(r'points="([^"]+)"', small)[0].split()]
    assert 14 < heights[0] < 150  # in the upper half, not on the floor
    points = re.search(r'points="([^"]+)"', line_chart("long", [Curve("a", range(5000), range(5000))]))
    assert points
    assert len(points[1].split()) == 400


def test_smoothing_keeps_length_mean_and_a_constant() -> None:
    assert smoothed([2.0] * 500, 0.1) == pytest.approx([2.0] * 500)
    noisy = [float(i % 2) for i in range(1000)]
    assert min(smoothed(noisy, 0.1)[100:900]) > 0.4
    assert smoothed([1.0, 2.0], 0.1) == [1.0, 2.0]
    assert smoothed([], 0.1) == []
