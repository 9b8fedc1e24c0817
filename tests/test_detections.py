"""Detections: shapes are kept, an empty result converts cleanly, drawings can be read on any ground."""

from __future__ import annotations

import builtins
import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finedetr.detections import Detections, annotate, class_color
from finedetr.errors import DataError, UsageError

NAMES = ("cat", "dog", "[red]owl")


def three(**changes: Any) -> Detections:
    fields: dict[str, Any] = {
        "xyxy": [[10, 20, 40, 60], [12, 22, 41, 61], [50, 5, 90, 30]],
        "score": [0.9, 0.6, 0.3],
        "label": [0, 0, 2],
        "names": NAMES,
        "size": (100, 80),
    }
    return Detections(**{**fields, **changes})


def test_arrays_have_the_promised_types_whatever_came() -> None:
    d = three()
    assert (d.xyxy.dtype, d.score.dtype, d.label.dtype) == (np.float32, np.float32, np.int64)
    assert d.xyxy.shape == (3, 4)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"xyxy": np.zeros((3, 5))}, r"xyxy \[n, 4\]"),
        ({"score": [0.1]}, r"got \[3, 4\], \[1\]"),
        ({"label": [0.5, 1.0, 2.0]}, "integers"),
        ({"label": [0, 1, 3]}, "label 3 has no name"),
        ({"label": [0, -1, 2]}, "label -1 has no name"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        three(**changes)


def test_an_empty_result_is_zero_by_four_and_converts_cleanly() -> None:
    for d in (Detections.empty(NAMES, (100, 80)), Detections([], [], [], NAMES, (100, 80)), three().above(1.0)):
        assert d.xyxy.shape == (0, 4)
        assert len(d) == 0
        assert list(d) == d.to_records() == d.to_coco(1, [4, 5, 6]) == d.to_yolo() == []
        assert len(d.nms()) == 0
        assert d.draw(Image.new("RGB", (100, 80))).size == (100, 80)
        assert d.counts() == {}


def test_one_index_gives_a_detection_and_many_give_detections() -> None:
    d = three()
    assert d[2].name == "[red]owl"
    assert d[-1] == list(d)[2]
    assert d[1:].score.tolist() == pytest.approx([0.6, 0.3])
    assert d[np.array([True, False, True])].label.tolist() == [0, 2]
    assert len(d[[]]) == 0
    with pytest.raises(IndexError):
        d[3]


def test_above_keeps_scores_at_the_threshold() -> None:
    assert len(three(score=[0.5, 0.25, 0.75]).above(0.5)) == 2


def test_nms_suppresses_within_a_class_only() -> None:
    assert three().nms(0.5).score.tolist() == pytest.approx([0.9, 0.3])
    assert len(three(label=[0, 1, 2]).nms(0.5)) == 3
    assert len(three().nms(0.99)) == 3


def test_nms_agrees_with_the_definition_on_random_boxes() -> None:
    random = np.random.default_rng(0)
    low = random.random((60, 2)) * 40
    d = Detections(
        np.concatenate((low, low + 5 + random.random((60, 2)) * 30), 1),
        random.random(60),
        random.integers(0, 3, 60),
        NAMES,
        (100, 100),
    )

    def overlap(a: list[float], b: list[float]) -> float:
        width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(width, 0) * max(height, 0)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    kept: list[Any] = []
    for box in sorted(d, key=lambda box: -box.score):
        if all(other.label != box.label or overlap(list(other.xyxy), list(box.xyxy)) <= 0.4 for other in kept):
            kept.append(box)
    assert list(d.nms(0.4)) == kept
    assert 3 < len(kept) < 60


def test_coco_results_carry_original_ids_and_width_and_height() -> None:
    rows = three().to_coco(77, [1, 18, 90])
    assert rows[2] == {"image_id": 77, "category_id": 90, "bbox": [50, 5, 40, 25], "score": 0.3}
    json.dumps(rows)
    with pytest.raises(UsageError, match="one category id for each of the 3"):
        three().to_coco(77, [1])


def test_records_are_plain_json() -> None:
    record = json.loads(json.dumps(three().to_records()))[0]
    assert record == {"label": 0, "name": "cat", "score": 0.9, "xyxy": [10, 20, 40, 60]}


def test_yolo_lines_are_fractions_of_the_picture() -> None:
    assert three().to_yolo()[2] == "2 0.700000 0.218750 0.400000 0.312500 0.300000"


def test_supervision_gets_the_same_arrays_even_when_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    module: Any = types.ModuleType("supervision")
    module.Detections = lambda **fields: fields
    monkeypatch.setitem(sys.modules, "supervision", module)
    for d in (three(), Detections.empty(NAMES, (9, 9))):
        fields = d.to_supervision()
        assert fields["xyxy"].shape == (len(d), 4)
        assert fields["class_id"].dtype == int
        assert fields["data"]["class_name"].tolist() == [box.name for box in d]


def test_a_missing_extra_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **more: Any) -> Any:
        if name == "supervision":
            raise ImportError("No module named 'supervision'")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UsageError, match=r"pip install .finedetr\[viz\]"):
        three().to_supervision()


def test_drawing_leaves_the_original_alone_and_shows_the_class_color() -> None:
    image = Image.new("RGB", (400, 300), (128, 128, 128))
    d = three(size=(400, 300), xyxy=[[50, 100, 200, 250]] * 3)
    drawn = np.asarray(d.draw(image))
    assert np.asarray(image).min() == np.asarray(image).max() == 128
    assert (drawn.reshape(-1, 3) == class_color(0)).all(axis=1).sum() > 300  # the surest box lies on top


@pytest.mark.parametrize("ground", [0, 128, 255])
@pytest.mark.parametrize("dashed", [False, True])
def test_lines_contrast_with_any_ground(ground: int, dashed: bool) -> None:
    image = Image.new("RGB", (200, 200), (ground,) * 3)
    color = (ground,) * 3  # the worst case: the color of the class is the color of the ground
    drawn = np.asarray(annotate(image, [[40, 40, 160, 160]], [""], [color], dashed=dashed)).astype(int)
    assert np.abs(drawn - ground).max() >= 100


def test_boxes_outside_or_not_finite_are_drawn_without_complaint() -> None:
    odd = [[-50, -50, 500, 500], [30, 30, 20, 20], [np.nan, 0, np.inf, 10], [99.9, 79.9, 100, 80]]
    d = Detections(odd, [0.1, 0.2, 0.3, 0.4], [0, 1, 2, 0], ("line\nbreak", "名前", ""), (100, 80))
    assert d.draw(Image.new("L", (100, 80))).mode == "RGB"


def test_classes_have_colors_that_differ() -> None:
    colors = [class_color(i) for i in range(20)]
    apart = [
        sum(abs(a - b) for a, b in zip(one, other, strict=True)) for one in colors for other in colors if one != other
    ]
    assert len(set(colors)) == 20
    assert min(apart) > 20


def test_a_file_is_drawn_as_it_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (40, 20), (9, 90, 200)).save(path, exif=exif)
    d = Detections.empty(NAMES, (20, 40), str(path))
    assert d.draw().size == (20, 40)
    path16 = tmp_path / "deep.png"
    Image.fromarray(np.full((40, 20), 32768, np.uint16)).save(path16)
    assert np.asarray(Detections.empty(NAMES, (20, 40), str(path16)).draw()).max() == 128


def test_drawing_on_nothing_or_on_the_wrong_picture_says_so(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"detections\.draw\(image\)"):
        three().draw()
    with pytest.raises(UsageError, match="100×80 picture"):
        three().draw(Image.new("RGB", (80, 100)))
    with pytest.raises(UsageError, match="uint8"):
        three().draw(np.zeros((80, 100), np.uint8))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png"):
        three(path=str(tmp_path / "broken.png")).draw()


def test_the_representation_tells_what_was_found() -> None:
    assert repr(three(path="a.jpg")) == "<Detections: 2 cat, 1 [red]owl in a.jpg, 100×80>"
    assert "nothing" in repr(Detections.empty(NAMES, (5, 5)))
