"""Boxes as numbers: formats, IoU, GIoU, edge distances. Pure functions, no state.

`cxcywh` is (centre x, centre y, width, height); `xyxy` is (left, top, right, bottom). All functions are
element-wise over leading dimensions: pair up what is to be compared, there is no N×N form here on purpose.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from finedetr.errors import ConfigError

__all__ = [
    "area",
    "bin_values",
    "box_cost",
    "bracket",
    "decode_edges",
    "encode_edges",
    "giou",
    "inverse_sigmoid",
    "iou",
    "iou_giou",
    "to_cxcywh",
    "to_xyxy",
]


def to_xyxy(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
    """Corners of boxes given as (cx, cy, w, h). Negative sizes count as zero, as in the official code."""
    center, size = boxes[..., :2], boxes[..., 2:].clamp(min=0)
    return torch.cat((center - 0.5 * size, center + 0.5 * size), dim=-1)


def to_cxcywh(boxes: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 4"]:
    """Centre and size of boxes given as corners."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((low + high) * 0.5, high - low), dim=-1)


def area(xyxy: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N"]:
    """Area of boxes given as corners."""
    return (xyxy[..., 2] - xyxy[..., 0]) * (xyxy[..., 3] - xyxy[..., 1])


def iou_giou(
    a: Float[Tensor, "*#N 4"], b: Float[Tensor, "*#N 4"], eps: float = 0.0
) -> tuple[Float[Tensor, "*N"], Float[Tensor, "*N"]]:
    """IoU and generalized IoU (Rezatofighi et al., 2019) of boxes given as cxcywh, pair by pair (broadcasting).

    Two boxes without any area have IoU 0 (not NaN), so that a degenerate prediction cannot poison a step.
    """
    # coordinate by coordinate: broadcast pairs become dense planes, several times faster than boxes of four
    left_a, top_a, right_a, bottom_a = _corner_planes(a)
    left_b, top_b, right_b, bottom_b = _corner_planes(b)
    width = (torch.minimum(right_a, right_b) - torch.maximum(left_a, left_b)).clamp(min=0)
    height = (torch.minimum(bottom_a, bottom_b) - torch.maximum(top_a, top_b)).clamp(min=0)
    hull_width = torch.maximum(right_a, right_b) - torch.minimum(left_a, left_b)
    hull_height = torch.maximum(bottom_a, bottom_b) - torch.minimum(top_a, top_b)
    intersection = width * height
    enclosing = hull_width * hull_height
    union = (right_a - left_a) * (bottom_a - top_a) + (right_b - left_b) * (bottom_b - top_b) - intersection
    tiny = torch.finfo(union.dtype).tiny if eps == 0.0 else eps
    ratio = intersection / union.clamp(min=tiny)
    return ratio, ratio - (enclosing - union) / enclosing.clamp(min=tiny)


def box_cost(a: Float[Tensor, "*#N 4"], b: Float[Tensor, "*#N 4"], l1: float, giou: float) -> Float[Tensor, "*N"]:
    """What it costs to pair boxes (cxcywh, broadcasting): l1 · L1 distance - giou · generalized IoU."""
    distance = sum((x - y).abs() for x, y in zip(a.unbind(-1), b.unbind(-1), strict=True))
    cost: Tensor = l1 * distance - giou * iou_giou(a, b)[1]
    return cost


def _corner_planes(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`to_xyxy` as four dense tensors."""
    x, y, width, height = boxes.unbind(-1)
    width, height = 0.5 * width.clamp(min=0), 0.5 * height.clamp(min=0)
    return x - width, y - height, x + width, y + height


def iou(a: Float[Tensor, "*#N 4"], b: Float[Tensor, "*#N 4"]) -> Float[Tensor, "*N"]:
    """Intersection over union of boxes given as cxcywh, pair by pair (broadcasting)."""
    return iou_giou(a, b)[0]


def giou(a: Float[Tensor, "*#N 4"], b: Float[Tensor, "*#N 4"]) -> Float[Tensor, "*N"]:
    """Generalized IoU of boxes given as cxcywh, pair by pair (broadcasting)."""
    return iou_giou(a, b)[1]


def inverse_sigmoid(x: Float[Tensor, "*N"], eps: float = 1e-5) -> Float[Tensor, "*N"]:
    """Logit with both tails clipped: log(max(x, eps) / max(1 - x, eps)) for x in [0, 1]."""
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def bin_values(bins: int = 33, up: float = 0.5, scale: float = 4.0) -> Float[Tensor, " K"]:
    """What each bin of an edge distribution means: W(n) of D-FINE (Peng et al., 2024, eq. 3), ascending, fp32.

    One unit is the anchor's width (or height) divided by `scale`. The bins are fine around zero and coarse far off:
    the second and the last but one move an edge by `up` of the size, the outermost two by twice that.

    Args:
        bins: K, odd and at least 5 (33 in all published models).
        up: The reach of the inner bins, as a part of the size.
        scale: reg_scale; 4 in all published models but D-FINE-X (8).
    """
    if bins < 5 or bins % 2 == 0:
        raise ConfigError(f"bins: an odd number of at least 5 is wanted, {bins} came", code="bins")
    reach = abs(up * scale)
    powers = torch.arange(1, (bins - 1) // 2, dtype=torch.float64) * (2 / (bins - 3))
    positive = torch.cat(((reach + 1.0) ** powers - 1, torch.tensor([2 * reach], dtype=torch.float64)))
    return torch.cat((-positive.flip(0), positive.new_zeros(1), positive)).float()


def decode_edges(
    anchors: Float[Tensor, "*#N 4"], distances: Float[Tensor, "*#N 4"], scale: float
) -> Float[Tensor, "*N 4"]:
    """Boxes (cxcywh) whose edges stand at `distances` (left, top, right, bottom) from those of `anchors` (cxcywh).

    Distances are in units of the anchor's size / scale, positive outwards; zero gives the anchor itself.
    """
    center, size = anchors[..., :2], anchors[..., 2:]
    unit = size / scale
    low = center - (0.5 * scale + distances[..., :2]) * unit
    high = center + (0.5 * scale + distances[..., 2:]) * unit
    return torch.cat(((low + high) * 0.5, high - low), dim=-1)


def encode_edges(anchors: Float[Tensor, "*#N 4"], xyxy: Float[Tensor, "*#N 4"], scale: float) -> Float[Tensor, "*N 4"]:
    """The inverse of `decode_edges`, for boxes given as corners: how far each edge stands from the anchor's."""
    center, unit = anchors[..., :2], anchors[..., 2:] / scale + 1e-16
    low = (center - xyxy[..., :2]) / unit - 0.5 * scale
    high = (xyxy[..., 2:] - center) / unit - 0.5 * scale
    return torch.cat((low, high), dim=-1)


def bracket(distances: Float[Tensor, "*N"], bins: Float[Tensor, " K"]) -> tuple[Int[Tensor, "*N"], Float[Tensor, "*N"]]:
    """The two neighboring bins between which each distance lies: the lower's index, and the weight of the upper.

    The index is at most K - 2. Distances outside the bins are taken for the outermost one: weight 0 of the upper
    neighbor below the range, 1 above it.
    """
    inside = distances.clamp(bins[0], bins[-1])
    lower = (torch.searchsorted(bins, inside.contiguous(), right=True) - 1).clamp(0, bins.shape[0] - 2)
    low, high = bins[lower], bins[lower + 1]
    return lower, (inside - low) / (high - low)
