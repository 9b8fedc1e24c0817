"""From logits to ranked detections: flat top-k over queries and classes, no suppression (spec 1.0)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["top_detections"]


def top_detections(
    logits: Float[Tensor, "B Q C"], boxes: Float[Tensor, "B Q 4"], k: int = 300
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"], Float[Tensor, "B K 4"]]:
    """The min(k, Q·C) best pairs of query and class: scores, labels and boxes (cx, cy, w, h), best first.

    A query can come back with several labels.
    """
    classes = logits.shape[-1]
    scores, index = logits.float().sigmoid().flatten(1).topk(min(k, logits.shape[1] * classes), dim=1)
    query = index // classes
    return scores, index - query * classes, boxes.gather(1, query[..., None].expand(-1, -1, 4))
