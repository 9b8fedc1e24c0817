"""Class names: complete, unique, and matched by what they mean."""

from __future__ import annotations

import pytest

from finedetr.model.classes import COCO_IDS, COCO_NAMES, OBJECTS365_NAMES, SAME, match_names


def test_the_lists_are_complete_and_say_nothing_twice() -> None:
    assert (len(COCO_NAMES), len(COCO_IDS), len(OBJECTS365_NAMES)) == (80, 80, 365)
    for names in (COCO_NAMES, OBJECTS365_NAMES):
        assert len({name.casefold() for name in names}) == len(names)
    assert all(name == name.strip() for name in OBJECTS365_NAMES)
    assert [OBJECTS365_NAMES[i] for i in (0, 46, 120, 328, 364)] == [
        "Person",
        "Bicycle",
        "Luggage",
        "Hair Dryer",
        "Table Tennis",
    ]


def test_the_table_of_spellings_names_real_classes() -> None:
    assert all(group[0] in COCO_NAMES for group in SAME)
    spellings = [name.casefold() for group in SAME for name in group]
    assert len(set(spellings)) == len(spellings)


def test_every_class_of_coco_is_in_objects365_and_no_two_are_the_same_one() -> None:
    rows = match_names(COCO_NAMES, OBJECTS365_NAMES)
    assert None not in rows
    assert len(set(rows)) == 80


@pytest.mark.parametrize(
    ("wanted", "known", "found"),
    [
        (["dog", "cat"], ["cat", "dog"], [1, 0]),
        (["Dog", "traffic_light", "hot-dog"], ["hot dog", "dog", "Traffic Light"], [1, 2, 0]),
        (["dog", "Dog"], ["Dog", "dog"], [1, 0]),  # the same letters come first
        (["aeroplane", "sofa"], ["couch", "airplane"], [1, 0]),
        (["Monitor/TV", "tvmonitor", "tv"], ["Moniter/TV"], [0, 0, 0]),
        (["unicorn"], ["dog"], [None]),
        ([], ["dog"], []),
    ],
)
def test_names_are_matched_by_letters_then_by_spelling_then_by_the_table(
    wanted: list[str], known: list[str], found: list[int | None]
) -> None:
    assert match_names(wanted, known) == found
