"""The whole criterion against the specification: sections 3.1 to 3.3 once more, in plain loops over plain numbers."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from finedetr.geometry import bin_values
from finedetr.records import Edges, Output, Prediction, Targets
from finedetr.supervise.denoising import Denoising
from finedetr.supervise.matching import MatchingPolicy, PerStage, UnionOfStages
from finedetr.supervise.objective import Objective
from finedetr.supervise.terms import (
    BoxGIoU,
    BoxL1,
    FineGrainedLocalization,
    LocalizationDistillation,
    MatchabilityAware,
    Term,
    Varifocal,
)

LAYERS, CLASSES, QUERIES, SCALE = 3, 4, 12, 4.0
WEIGHTS = {"vfl": 1.0, "mal": 1.0, "bbox": 5.0, "giou": 2.0, "fgl": 0.15, "ddf": 1.5}
OFFICIAL = {
    "Varifocal": "vfl",
    "MatchabilityAware": "mal",
    "BoxL1": "bbox",
    "BoxGIoU": "giou",
    "FineGrainedLocalization": "fgl",
    "LocalizationDistillation": "ddf",
}
Pairs = list[list[tuple[int, int]]]  # (query, target) of each picture
Row = list[float]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def softmax(values: Row, temperature: float = 1.0) -> Row:
    powers = [math.exp(v / temperature) for v in values]
    return [p / sum(powers) for p in powers]


def corners(box: Row) -> Row:
    x, y, w, h = box
    return [x - w / 2, y - h / 2, x + w / 2, y + h / 2]


def overlaps(a: Row, b: Row) -> tuple[float, float]:
    """IoU and GIoU."""
    p, q = corners(a), corners(b)
    width, height = min(p[2], q[2]) - max(p[0], q[0]), min(p[3], q[3]) - max(p[1], q[1])
    inter = max(width, 0) * max(height, 0)
    union = a[2] * a[3] + b[2] * b[3] - inter
    hull = (max(p[2], q[2]) - min(p[0], q[0])) * (max(p[3], q[3]) - min(p[1], q[1]))
    return inter / union, inter / union - (hull - union) / hull


def cost(logits: Row, box: Row, label: int, truth: Row) -> float:
    p = sigmoid(logits[label])
    negative = 0.75 * p**2 * -math.log(1 - p + 1e-8)
    positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
    distance = sum(abs(u - v) for u, v in zip(box, truth, strict=True))
    return 2 * (positive - negative) + 5 * distance - 2 * overlaps(box, truth)[1]


class Criterion:
    """Official names to weighted values, one output after the other."""

    def __init__(self, truth: list[tuple[list[int], list[Row]]], label_loss: str, union: bool) -> None:
        self.truth, self.label_loss, self.use_union = truth, label_loss, union
        self.boxes = max(1, sum(len(labels) for labels, _ in truth))
        self.losses: dict[str, float] = {}

    def match(self, logits: list, boxes: list) -> Pairs:
        result = []
        for image, (labels, truth) in enumerate(self.truth):
            table = [
                [cost(x, b, label, t) for label, t in zip(labels, truth, strict=True)]
                for x, b in zip(logits[image], boxes[image], strict=True)
            ]
            rows, columns = linear_sum_assignment(table) if truth else ([], [])
            result.append([(int(q), int(t)) for q, t in zip(rows, columns, strict=True)])
        return result

    def unite(self, matches: list[Pairs]) -> Pairs:
        result = []
        for image in range(len(self.truth)):
            votes = Counter(pair for pairs in matches for pair in pairs[image])
            chosen: dict[int, int] = {}
            for query, target in sorted(sorted(votes), key=lambda pair: -votes[pair]):
                chosen.setdefault(query, target)
            result.append(sorted(chosen.items()))
        return result

    def put(self, name: str, suffix: str, value: float) -> None:
        self.losses[name + suffix] = WEIGHTS[name] * value

    def labels(self, suffix: str, logits: list, boxes: list, pairs: Pairs, number: float) -> None:
        total = 0.0
        for image, (labels, truth) in enumerate(self.truth):
            owner = dict(pairs[image])
            for query, row in enumerate(logits[image]):
                for c, x in enumerate(row):
                    p, mine = sigmoid(x), query in owner and labels[owner[query]] == c
                    q = overlaps(boxes[image][query], truth[owner[query]])[0] if mine else 0.0
                    if self.label_loss == "vfl":
                        target, weight = q, q if mine else 0.75 * p**2
                    else:
                        target, weight = q**1.5, 1.0 if mine else p**1.5
                    total += weight * -(target * math.log(p) + (1 - target) * math.log(1 - p))
        self.put(self.label_loss, suffix, total / number)

    def box(self, suffix: str, boxes: list, pairs: Pairs, number: float) -> None:
        both = [(boxes[i][q], self.truth[i][1][t]) for i, block in enumerate(pairs) for q, t in block]
        self.put("bbox", suffix, sum(abs(u - v) for a, b in both for u, v in zip(a, b, strict=True)) / number)
        self.put("giou", suffix, sum(1 - overlaps(a, b)[1] for a, b in both) / number)

    def fgl(self, suffix: str, edges: list, anchors: list, boxes: list, pairs: Pairs, number: float) -> None:
        w, total = bin_values(33, 0.5, SCALE).tolist(), 0.0
        for image, block in enumerate(pairs):
            for query, target in block:
                x, y, width, height = anchors[image][query]
                left, top, right, bottom = corners(self.truth[image][1][target])
                unit, tall = width / SCALE + 1e-16, height / SCALE + 1e-16
                distances = [(x - left) / unit, (y - top) / tall, (right - x) / unit, (bottom - y) / tall]
                iou = overlaps(boxes[image][query], self.truth[image][1][target])[0]
                for edge, distance in enumerate(distances):
                    delta = distance - SCALE / 2
                    k = sum(value <= delta for value in w) - 1
                    if k < 0:
                        k, upper = 0, 0.0
                    elif k >= 32:
                        k, upper = 31, 1.0
                    else:
                        upper = abs(delta - w[k]) / (abs(delta - w[k]) + abs(w[k + 1] - delta))
                    p = softmax(edges[image][query][edge])
                    total -= iou * (math.log(p[k]) * (1 - upper) + math.log(p[k + 1]) * upper)
        self.put("fgl", suffix, total / number)

    def ddf(
        self, suffix: str, layer: tuple, teacher: tuple, pairs: Pairs, balance: tuple[float, float] | None
    ) -> tuple[float, float]:
        """Takes (logits, boxes, edges) of layer and teacher; returns the balance that it used."""
        on, off = [], []
        for image, block in enumerate(pairs):
            owner = dict(block)
            for query in range(len(layer[0][image])):
                if query in owner:
                    u = overlaps(layer[1][image][query], self.truth[image][1][owner[query]])[0]
                else:
                    u = max(sigmoid(x) for x in teacher[0][image][query])
                for edge in range(4):
                    t, s = softmax(teacher[2][image][query][edge], 5), softmax(layer[2][image][query][edge], 5)
                    divergence = sum(a * (math.log(a) - math.log(b)) for a, b in zip(t, s, strict=True))
                    (on if query in owner else off).append(25 * u * divergence)
        pictures = len(self.truth)
        a, b = balance or (math.sqrt(len(on) * 8 / pictures), math.sqrt(len(off) * 8 / pictures))
        mean_on, mean_off = sum(on) / max(len(on), 1), sum(off) / max(len(off), 1)
        self.put("ddf", suffix, (mean_on * a + mean_off * b) / (a + b))
        return a, b

    def run(self, main: Prediction, noisy: Prediction, positives: Pairs, groups: int) -> dict[str, float]:
        logits, boxes = main.logits.tolist(), main.boxes.tolist()
        matches = [self.match(x, b) for x, b in zip(logits, boxes, strict=True)]
        union = self.unite(matches)
        number = max(1, sum(len(block) for block in union))
        balance: tuple[float, float] | None = None
        names = ["_enc_0", "_pre", *(f"_aux_{i}" for i in range(LAYERS - 1)), ""]
        for stage, suffix in enumerate(names):
            shared, count = (union, number) if self.use_union else (matches[stage], self.boxes)
            self.labels(suffix, logits[stage], boxes[stage], matches[stage], self.boxes)
            self.box(suffix, boxes[stage], shared, count)
            if stage >= 2:
                balance = self.local(suffix, main, stage, stage - 2, shared, count, None) or balance
        logits, boxes = noisy.logits.tolist(), noisy.boxes.tolist()
        for stage, suffix in enumerate(["_dn_pre", *(f"_dn_{i}" for i in range(LAYERS))]):
            self.labels(suffix, logits[stage], boxes[stage], positives, self.boxes * groups)
            self.box(suffix, boxes[stage], positives, self.boxes * groups)
            if stage >= 1:
                self.local(suffix, noisy, stage, stage - 1, positives, self.boxes * groups, balance)
        if self.label_loss == "vfl":
            self.losses[f"ddf_dn_{LAYERS - 1}"] = 0.0  # D-FINE: the last denoising layer is its own teacher
        return self.losses

    def local(self, suffix, answers, stage, layer, pairs, number, balance):
        edges, anchors = answers.edges.logits.tolist(), answers.edges.anchors.tolist()
        logits, boxes = answers.logits.tolist(), answers.boxes.tolist()
        self.fgl(suffix, edges[layer], anchors, boxes[stage], pairs, number)
        if layer == LAYERS - 1:
            return None
        mine = (logits[stage], boxes[stage], edges[layer])
        return self.ddf(suffix, mine, (logits[-1], boxes[-1], edges[-1]), pairs, balance)


def answers(pictures: int, queries: int, encoder: bool) -> Prediction:
    """Boxes near one another from stage to stage, so that stages agree on some pairs and not on others."""
    names = ("encoder",) * encoder + ("initial", *(f"layer{i}" for i in range(LAYERS)))
    base = torch.rand(pictures, queries, 4) * 0.5 + 0.2
    anchors = base + torch.rand(pictures, queries, 4) * 0.05
    return Prediction(
        torch.randn(len(names), pictures, queries, CLASSES) * 2,
        base + torch.rand(len(names), pictures, queries, 4) * 0.1,
        names,
        Edges(torch.randn(LAYERS, pictures, queries, 4, 33) * 2, anchors, bin_values(33, 0.5, SCALE), SCALE),
    )


def official(name: str) -> str:
    """The official name of one of ours."""
    group, stage, term = name.split("/")
    layer = stage.removeprefix("layer")
    if group == "denoising":
        return OFFICIAL[term] + ("_dn_pre" if stage == "initial" else f"_dn_{layer}")
    suffix = {"encoder": "_enc_0", "initial": "_pre", f"layer{LAYERS - 1}": ""}.get(stage, f"_aux_{layer}")
    return OFFICIAL[term] + suffix


@pytest.mark.parametrize(
    ("label_term", "policy", "count"),
    [
        (Varifocal(), UnionOfStages(), 38),
        (MatchabilityAware(), UnionOfStages(), 37),
        (MatchabilityAware(), PerStage(), 37),
    ],
    ids=["D-FINE", "DEIM", "DEIM without union"],
)
def test_every_loss_equals_the_specification(label_term: Term, policy: MatchingPolicy, count: int) -> None:
    torch.manual_seed(5)
    counts = (3, 0, 5)
    targets = Targets.from_lists(
        [torch.randint(CLASSES, (n,)) for n in counts], [torch.rand(n, 4) * 0.5 + 0.2 for n in counts]
    )
    group = Denoising(queries=10)(targets, CLASSES)
    main, noisy = answers(3, QUERIES, encoder=True), answers(3, group.boxes.shape[1], encoder=False)
    most, groups = 5, 2
    assert group.boxes.shape[1] == 2 * most * groups
    positives = [[(2 * most * g + j, j) for g in range(groups) for j in range(n)] for n in counts]
    truth = [
        (targets.labels[start : start + n].tolist(), targets.boxes[start : start + n].tolist())
        for start, n in zip(targets.starts, counts, strict=True)
    ]
    label_loss = OFFICIAL[type(label_term).__name__]
    wanted = Criterion(truth, label_loss, isinstance(policy, UnionOfStages)).run(main, noisy, positives, groups)
    assert len(wanted) == count

    terms = (label_term, BoxL1(), BoxGIoU(), FineGrainedLocalization(), LocalizationDistillation())
    losses = Objective(terms, policy)(Output(main, ((group, noisy),)), targets)
    found = {official(name): value for name, value in losses.by_name().items()}
    assert len(found) == len(losses)
    # the official D-FINE lists the distillation of the last denoising layer into itself, which is zero
    constants = {name for name, value in wanted.items() if value == 0}
    assert constants == ({"ddf_dn_2"} if label_loss == "vfl" else set())
    assert set(found) == set(wanted) - constants
    for name, value in found.items():
        assert value == pytest.approx(wanted[name], rel=1e-4), name
    assert losses.total.item() == pytest.approx(sum(wanted.values()), rel=1e-5)


def test_a_group_may_balance_distillation_by_its_own_numbers() -> None:
    torch.manual_seed(5)
    targets = Targets.from_lists([torch.tensor([1, 2])], [torch.rand(2, 4) * 0.4 + 0.3])
    group = Denoising(queries=4)(targets, CLASSES)
    main, noisy = answers(1, QUERIES, encoder=True), answers(1, group.boxes.shape[1], encoder=False)
    truth = [(targets.labels.tolist(), targets.boxes.tolist())]
    reference = Criterion(truth, "mal", union=True)
    logits, boxes, edges = noisy.logits.tolist(), noisy.boxes.tolist(), noisy.edges.logits.tolist()
    pairs = [[(4 * g + j, j) for g in range(2) for j in range(2)]]
    reference.ddf("_dn_1", (logits[2], boxes[2], edges[1]), (logits[3], boxes[3], edges[2]), pairs, None)
    output = Output(main, ((group, noisy),))
    name = "denoising/layer1/LocalizationDistillation"
    own = Objective((LocalizationDistillation(balance_of_matching=False),))(output, targets)[name].item()
    assert own == pytest.approx(reference.losses["ddf_dn_1"], rel=1e-4)
    assert own != pytest.approx(Objective((LocalizationDistillation(),))(output, targets)[name].item(), rel=1e-3)
