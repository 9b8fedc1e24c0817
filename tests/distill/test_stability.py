from __future__ import annotations

import torch

from finedetr.distill.stability import Matched, agreement, hits, instability, matched_by
from tests.distill.small import detector, lesson


def picture(targets: dict[int, int], *cells: int) -> Matched:
    return Matched(targets, frozenset({*targets, *cells}))


def test_what_stays_is_steady_and_a_swap_counts_twice() -> None:
    one, two = picture({3: 0, 7: 1}), picture({5: 0})
    assert instability([one, two], [one, two]) == 0
    assert instability([one, two], [picture({3: 1, 7: 0}), two]) == 2 / 2
    assert instability([one], [picture({3: 0, 8: 1})]) == 2
    assert instability([], []) == 0


def test_agreement_and_hits_go_by_cells() -> None:
    student, teacher = picture({3: 0, 7: 1}, 9), picture({3: 0, 9: 1}, 4)
    assert agreement([student], [teacher]) == 0.5
    assert hits([student], [teacher]) == 2 / 3
    assert agreement([student], [student]) == hits([student], [student]) == 1


def test_the_last_stage_of_a_lesson_is_read() -> None:
    taught = lesson(detector(seed=7), (3, 1))
    found = matched_by(taught, taught.trace)
    at = taught.match.stage == 3
    for image, query, target in zip(
        taught.match.image[at], taught.match.query[at], taught.match.target[at], strict=True
    ):
        assert found[int(image)].targets[int(taught.trace.tokens[image, query])] == int(target)
    assert [len(p.targets) for p in found] == [3, 1]
    assert [len(p.cells) for p in found] == [12, 12]
    assert torch.equal(taught.trace.tokens[0].sort().values, torch.tensor(sorted(found[0].cells)))
