"""Boxes as numbers: formats, IoU, GIoU, edge distances. Pure functions, no state.

`cxcywh` is (centre x, centre y, width, height); `xyxy` is (left, top, right, bottom). All functions are
element-wise over leading dimensions: pair up what is to be compared, there is no N×N form here on purpose.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["area", "giou", "inverse_sigmoid", "iou", "iou_giou", "to_cxcywh", "to_xyxy"]


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
    a, b = to_xyxy(a), to_xyxy(b)
    overlap = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(min=0)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    intersection = overlap[..., 0] * overlap[..., 1]
    enclosing = hull[..., 0] * hull[..., 1]
    union = area(a) + area(b) - intersection
    tiny = torch.finfo(union.dtype).tiny if eps == 0.0 else eps
    ratio = intersection / union.clamp(min=tiny)
    return ratio, ratio - (enclosing - union) / enclosing.clamp(min=tiny)


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
