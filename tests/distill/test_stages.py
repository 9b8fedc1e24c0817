from __future__ import annotations

import pytest

from finedetr.distill.stages import layer_stages, links, source_stages
from finedetr.errors import ConfigError

FULL = ("encoder", "initial", "layer0", "layer1", "layer2")


def test_a_teacher_of_twice_the_depth_is_taken_in_groups_of_two() -> None:
    assert links(3, 6) == ((0, 0), (0, 1), (1, 2), (1, 3), (2, 4), (2, 5))
    assert links(3, 6, "last_of_group") == ((0, 1), (1, 3), (2, 5))
    assert links(3, 6, "last") == ((0, 5), (1, 5), (2, 5))


def test_equal_depths_are_the_identity() -> None:
    for how in ("group", "last_of_group"):
        assert links(4, 4, how) == ((0, 0), (1, 1), (2, 2), (3, 3))


@pytest.mark.parametrize("student", range(1, 8))
@pytest.mark.parametrize("teacher", range(1, 8))
def test_every_layer_has_a_teacher_and_no_layer_of_a_deeper_one_is_lost(student: int, teacher: int) -> None:
    found = links(student, teacher)
    assert {k for k, _ in found} == set(range(student))
    assert list(found) == sorted(found)
    assert found[-1] == (student - 1, teacher - 1)
    if teacher >= student:
        assert sorted(layer for _, layer in found) == list(range(teacher))


def test_nobody_learns_from_no_layers() -> None:
    with pytest.raises(ConfigError, match="have layers"):
        links(3, 0)


def test_stages_are_found_by_name_and_layers_by_group() -> None:
    assert list(layer_stages(FULL)) == [2, 3, 4]
    assert source_stages(FULL, FULL) == (0, 1, 2, 3, 4)
    assert source_stages(("initial", "layer0"), FULL) == (1, 4)
    assert source_stages(("initial", "layer0", "layer1"), ("encoder", "layer0", "layer1")) == (1, 1, 2)
