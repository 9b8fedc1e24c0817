"""Matching: the golden costs, scipy's assignments, odd numbers of targets, unions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment

from finedetr.records import Assignment, Prediction, Targets
from finedetr.supervise.matching import Fixed, FocalCost, PerStage, QualityCost, UnionOfStages, costs, unite
from tests.supervise import golden

GOLDEN_COST = [[4.0698, -1.7004], [-2.8331, 3.6156], [5.4126, 2.2279], [5.5750, 3.7674]]


def random_case(counts: tuple[int, ...], queries: int = 6, stages: int = 3) -> tuple[Prediction, Targets]:
    generator = torch.Generator().manual_seed(sum(counts))
    shape = (stages, len(counts), queries)
    logits = torch.randn(*shape, 4, generator=generator)
    boxes = torch.rand(*shape, 4, generator=generator) * 0.5 + 0.1
    targets = Targets.from_lists(
        [torch.randint(4, (n,), generator=generator) for n in counts],
        [torch.rand(n, 4, generator=generator) * 0.5 + 0.1 for n in counts],
    )
    return Prediction(logits, boxes, tuple(f"layer{i}" for i in range(stages))), targets


def rows(pairs: Assignment) -> list[tuple[int, int, int, int]]:
    return list(zip(*(v.tolist() for v in (pairs.stage, pairs.image, pairs.query, pairs.target)), strict=True))


def test_costs_are_the_golden_ones() -> None:
    table = costs(FocalCost(), golden.prediction(), golden.TARGETS)
    torch.testing.assert_close(table[0, 0].T, torch.tensor(GOLDEN_COST), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cost", [FocalCost(), QualityCost()])
def test_the_golden_pairs_are_found_early_and_late(cost: FocalCost | QualityCost) -> None:
    match = PerStage(cost)(golden.prediction(), golden.TARGETS)
    assert rows(match.labels) == [(0, 0, 0, 1), (0, 0, 1, 0)]
    assert match.labels is match.boxes
    assert match.labels.count.tolist() == [2]


@pytest.mark.parametrize("counts", [(3, 0, 5), (0, 0), (1, 9, 6), (12,)])
def test_assignments_are_those_of_scipy(counts: tuple[int, ...]) -> None:
    prediction, targets = random_case(counts)
    table = costs(FocalCost(), prediction, targets).numpy()
    wanted = []
    for stage in range(3):
        for image, (start, count) in enumerate(zip(targets.starts, counts, strict=True)):
            query, target = linear_sum_assignment(table[stage, image, :count].T)
            wanted += [(stage, image, int(q), int(t) + start) for q, t in zip(query, target, strict=True)]
    pairs = PerStage()(prediction, targets).labels
    assert rows(pairs) == wanted
    assert pairs.sizes == (sum(min(6, n) for n in counts),) * 3
    assert pairs.count.tolist() == [float(sum(counts))] * 3


def test_late_cost_is_minus_score_times_iou_to_the_fourth() -> None:
    table = costs(QualityCost(), golden.prediction(), golden.TARGETS)[0, 0]
    assert table[1, 0].item() == pytest.approx(-torch.tensor(0.5).sigmoid().item() * 0.743119**4, abs=1e-5)
    assert table[0, 1].item() == pytest.approx(-torch.tensor(1.5).sigmoid().item() * 0.753304**4, abs=1e-5)


def test_half_precision_is_matched_in_single() -> None:
    prediction, targets = random_case((3, 5))
    extreme = prediction.logits.clone()
    extreme[0, 0, 0], extreme[0, 0, 1] = 12.0, -20.0  # fp16 sigmoid saturates at 8.3, and 1e-8 is 0 there
    half = Prediction(extreme.half(), prediction.boxes.half(), prediction.stages)
    single = Prediction(extreme.half().float(), prediction.boxes.half().float(), prediction.stages)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        table = costs(FocalCost(), half, targets)
    assert table.dtype == torch.float32
    torch.testing.assert_close(table, costs(FocalCost(), single, targets), atol=0, rtol=0)


def test_answers_that_are_not_finite_still_match() -> None:
    prediction, targets = random_case((3, 2))
    prediction.logits[0, 0, 0] = torch.nan
    prediction.logits[1, 0] = torch.inf
    prediction.boxes[2, 1, 3] = torch.nan
    prediction.boxes[2, 1, 4, 2] = torch.inf
    table = costs(FocalCost(), prediction, targets)
    assert bool(table.isfinite().all())
    assert table[0, 0, 0, 0] == 1
    assert len(UnionOfStages()(prediction, targets).labels) == 15


def test_the_union_is_the_golden_one() -> None:
    stages = [[(0, 0), (1, 1)], [(0, 0), (2, 1)], [(3, 0), (2, 1)], [(1, 0), (2, 1)]]
    pairs = np.array([(s, 0, q, t) for s, block in enumerate(stages) for q, t in block], dtype=np.int64).T
    assert unite(pairs, queries=4, targets=2)[2:].T.tolist() == [[0, 0], [1, 0], [2, 1], [3, 0]]


def test_the_union_follows_the_rule_pair_by_pair() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        pairs = generator.integers(0, [[3], [2], [5], [4]], (4, 30))
        pairs = np.unique(pairs, axis=1)
        wanted: set[tuple[int, int, int]] = set()
        votes: dict[tuple[int, int, int], int] = {}
        for _, image, query, target in pairs.T.tolist():
            votes[image, query, target] = votes.get((image, query, target), 0) + 1
        for pair in sorted(sorted(votes), key=lambda p: -votes[p]):
            if pair[:2] not in {p[:2] for p in wanted}:
                wanted.add(pair)
        assert [tuple(row) for row in unite(pairs, queries=5, targets=4)[1:].T.tolist()] == sorted(wanted)


def test_boxes_have_the_union_at_every_stage_and_labels_their_own() -> None:
    prediction, targets = random_case((3, 0, 5), queries=9, stages=4)
    match = UnionOfStages()(prediction, targets)
    own = PerStage()(prediction, targets).labels
    assert rows(match.labels) == rows(own)
    once = match.boxes.sizes[0]
    assert match.boxes.sizes == (once,) * 4
    assert match.boxes.count.tolist() == [once] * 4
    blocks = [[r[1:] for r in rows(match.boxes) if r[0] == stage] for stage in range(4)]
    assert all(block == blocks[0] for block in blocks)
    assert {r[1:] for r in rows(match.boxes)} <= {r[1:] for r in rows(own)}
    assert len({r[:2] for r in blocks[0]}) == once


def test_a_batch_without_targets_has_no_pairs() -> None:
    prediction, targets = random_case((0, 0))
    match = UnionOfStages()(prediction, targets)
    assert (len(match.labels), len(match.boxes)) == (0, 0)
    assert match.boxes.sizes == match.labels.sizes == (0, 0, 0)


def test_a_known_assignment_holds_at_every_stage() -> None:
    prediction, targets = random_case((2,))
    known = PerStage()(Prediction(prediction.logits[:1], prediction.boxes[:1], ("x",)), targets).labels
    match = Fixed(known)(prediction, targets)
    assert rows(match.boxes) == [(s, *r[1:]) for s in range(3) for r in rows(known)]
    tail = match.boxes.last(2)
    assert rows(tail) == [(s, *r[1:]) for s in range(2) for r in rows(known)]
    assert tail.sizes == (2, 2)


def test_uneven_stages_are_summed_apart() -> None:
    stage = torch.tensor([0, 0, 2])
    pairs = Assignment(stage, stage, stage, stage, torch.tensor([2.0, 1.0, 4.0]), (2, 0, 1))
    assert pairs.sum_by_stage(torch.tensor([3.0, 5.0, 8.0])).tolist() == [4.0, 0.0, 2.0]
