"""From logits to ranked detections: flat top-k over queries and classes, no suppression (spec 1.0)."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["top_detections"]

PUBLISHED_TOP = 300


def top_detections(
    logits: Float[Tensor, "B Q C"], boxes: Float[Tensor, "B Q 4"], k: int | None = None
) -> tuple[Float[Tensor, "B K"], Int[Tensor, "B K"], Float[Tensor, "B K 4"]]:
    """The min(k, Q·C) best pairs of query and class: scores, labels and boxes (cx, cy, w, h), best first.

    A query can come back with several labels.

    Args:
        logits: Of each query and class.
        boxes: Of each query.
        k: None: 300, as published, or one for each query where there are more queries.
    """
    queries, classes = logits.shape[1:]
    k = max(PUBLISHED_TOP, queries) if k is None else k
    scores, index = logits.float().sigmoid().flatten(1).topk(min(k, queries * classes), dim=1)
    query = index // classes
    return scores, index - query * classes, boxes.gather(1, query[..., None].expand(-1, -1, 4))
