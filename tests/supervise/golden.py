"""The golden set of the specification, section 3.3, as records."""

from __future__ import annotations

import torch

from finedetr.geometry import bin_values
from finedetr.records import Assignment, Edges, Match, Prediction, Supervision, Targets

LOGITS = torch.tensor([[0.2, -1, 0.5], [-2, 1.5, 0], [0, 0, 0], [-0.5, -0.5, 2]])
BOXES = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.3, 0.2, 0.2], [0.7, 0.6, 0.3, 0.3], [0.2, 0.8, 0.1, 0.1]])
TRUTH = torch.tensor([[0.32, 0.31, 0.22, 0.18], [0.52, 0.5, 0.2, 0.36]])
LABELS = torch.tensor([1, 2])
TARGETS = Targets.from_lists([LABELS], [TRUTH])


def prediction(stages: int = 1) -> Prediction:
    """The golden answers at every stage; of two stages the last has the teacher's corners."""
    corners = torch.zeros(stages, 1, 4, 132)
    corners[..., 16] = 1
    corners[..., 1, 40] = 2
    if stages > 1:
        corners[-1] = 0
        corners[-1, ..., 17] = 1.5
    edges = Edges(corners.view(stages, 1, 4, 4, 33), BOXES[None], bin_values(), 4.0)
    shape = (stages, 1, -1, -1)
    names = tuple(f"layer{i}" for i in range(stages))
    return Prediction(LOGITS.expand(shape).clone(), BOXES.expand(shape).clone(), names, edges)


def supervision(stages: int = 1) -> Supervision:
    """The golden pairs, q0 with g1 and q1 with g0, and N = 2."""
    zeros = torch.zeros(2, dtype=torch.long)
    pair = Assignment(zeros, zeros, torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([2.0]), (2,))
    pairs = pair.repeat(stages)
    return Supervision(prediction(stages), Match(pairs, pairs), TARGETS)
