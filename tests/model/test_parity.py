"""D-FINE of all five sizes answers what `transformers` answers at the same random weights."""

from __future__ import annotations

import pytest

from finedetr.model.zoo import variant
from tests.model.oracle import assert_same_answers, pair

pytest.importorskip("transformers")


@pytest.mark.parametrize("name", ["dfine-n", "dfine-s", "dfine-m", "dfine-l", "dfine-x"])
def test_logits_and_boxes_equal_transformers_at_640(name: str) -> None:
    assert_same_answers(*pair(variant(name), 80), (640, 640))


@pytest.mark.parametrize("name", ["dfine-n", "dfine-s"])
def test_logits_and_boxes_equal_transformers_at_a_rectangle(name: str) -> None:
    assert_same_answers(*pair(variant(name), 7), (320, 448))
