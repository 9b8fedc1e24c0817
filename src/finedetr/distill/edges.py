"""Distributions of edges, carried from the frame of one anchor box into that of another (spec 6.5)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from finedetr.geometry import bracket
from finedetr.records import Edges

__all__ = ["edge_divergence", "transport"]


def transport(
    probabilities: Float[Tensor, "*N 4 K"],
    anchors: Float[Tensor, "*#N 4"],
    bins: Float[Tensor, " K"],
    scale: float,
    onto: Float[Tensor, "*#N 4"],
    onto_bins: Float[Tensor, " J"],
    onto_scale: float,
) -> Float[Tensor, "*N 4 J"]:
    """What is said about the edges of one anchor box, said about those of another.

    The place that a bin means lies between two bins of the other frame, which share its probability so that the mean
    edge stays where it is; what lies outside goes to the outermost bins.

    Args:
        probabilities: Of the bins of each edge (left, top, right, bottom).
        anchors: (cx, cy, w, h) from which the bins measure.
        bins: What each bin means, in units of size / scale.
        scale: reg_scale.
        onto: The other anchors.
        onto_bins: The other bins.
        onto_scale: The other scale.
    """
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0], device=anchors.device)[:, None]
    center, size = _of_each_edge(anchors)
    onto_center, onto_size = _of_each_edge(onto)
    place = center + sign * (0.5 * scale + bins) * size / scale
    distance = sign * (place - onto_center) * onto_scale / (onto_size + 1e-16) - 0.5 * onto_scale
    lower, upper = bracket(distance, onto_bins)
    shape = torch.broadcast_shapes(lower.shape[:-2], probabilities.shape[:-2])
    lower = lower.expand(*shape, *lower.shape[-2:])
    carried = probabilities.new_zeros(*shape, 4, len(onto_bins))
    carried.scatter_add_(-1, lower, probabilities * (1 - upper))
    return carried.scatter_add_(-1, lower + 1, probabilities * upper)


def _of_each_edge(boxes: Float[Tensor, "*N 4"]) -> tuple[Float[Tensor, "*N 4 1"], Float[Tensor, "*N 4 1"]]:
    """Centre and size along the axis of each edge: x, y, x, y."""
    return boxes[..., [0, 1, 0, 1], None], boxes[..., [2, 3, 2, 3], None]


def edge_divergence(
    teacher: Float[Tensor, "*N 4 K"],
    teacher_edges: Edges,
    teacher_anchors: Float[Tensor, "*#N 4"],
    student: Float[Tensor, "*N 4 J"],
    student_edges: Edges,
    student_anchors: Float[Tensor, "*#N 4"],
    temperature: float,
) -> Float[Tensor, "*N"]:
    """T² KL(teacher ‖ student) of the bins, in the student's frame, as the mean of the four edges.

    Args:
        teacher: Logits of the bins; softened by the temperature before they are carried over.
        teacher_edges: Their bins and scale.
        teacher_anchors: Their anchors, one for each box.
        student: Logits of the same boxes.
        student_edges: Their bins and scale.
        student_anchors: Their anchors.
        temperature: T.
    """
    with torch.no_grad():
        target = transport(
            (teacher.float() / temperature).softmax(-1),
            teacher_anchors.float(),
            teacher_edges.bins.float(),
            teacher_edges.scale,
            student_anchors.float(),
            student_edges.bins.float(),
            student_edges.scale,
        )
        entropy = torch.xlogy(target, target).sum(-1)
    cross = (target * (student.float() / temperature).log_softmax(-1)).sum(-1)
    return temperature**2 * (entropy - cross).mean(-1)
