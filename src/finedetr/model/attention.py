"""Attention among queries."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from finedetr.kernels.attention import attention

__all__ = ["SelfAttention", "attend"]


class SelfAttention(nn.Module):
    """Multi-head attention with positions on queries and keys only; no attention map is ever materialized.

    `qk` and `v` are the two parts of the usual joint input projection: queries and keys read x + positions, values x.

    Args:
        width: D.
        heads: Number of heads.
        separate: Positions have a projection of their own (Conditional DETR).
        dropout: Of the attention, in training.
    """

    def __init__(self, width: int, heads: int, *, separate: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qk = nn.Linear(width, 2 * width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.position = nn.Linear(width, 2 * width) if separate else None
        bound = math.sqrt(6 / (4 * width))  # xavier_uniform of the joint [3·width, width] projection
        for layer in (self.qk, self.v, *((self.position,) if self.position is not None else ())):
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        positions: Float[Tensor, "*B N D"],
        blocked: Bool[Tensor, "*B E N"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens look at one another.

        Args:
            x: Content.
            positions: Added to what queries and keys are made of.
            blocked: For the first E tokens (extra query groups): True where the row must not see the column. The
                remaining tokens see one another and none of the first E, always; None: E is 0.
        """
        joint = self.qk(x + positions) if self.position is None else self.qk(x) + self.position(positions)
        values, dropout, seen = self.v(x), self.dropout if self.training else 0.0, None
        if torch.is_grad_enabled() and dropout == 0:
            seen = attention(joint, values, blocked, self.heads)
        if seen is None:
            parts = (*joint.chunk(2, dim=-1), values)
            q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
            seen = attend(q, k, v, blocked, dropout).transpose(1, 2).flatten(2)
        out: Tensor = self.out(seen.to(x.dtype))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """[B, heads, N, D/heads], with the first E tokens seeing what `blocked` leaves them."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # in bfloat16 the backward pass of this one operation is three times slower there
        with torch.autocast("cpu", enabled=False):
            return _attend(q.float(), k.float(), v.float(), blocked, dropout)
    return _attend(q, k, v, blocked, dropout)


def _attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None, dropout: float) -> Tensor:
    if blocked is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    extra = blocked.shape[-2]
    if blocked.dim() == 3:
        blocked = blocked[:, None]  # of each picture, the same for all heads
    # two calls, so that no number of an extra group can touch the matching queries, not even by rounding
    return torch.cat(
        (
            F.scaled_dot_product_attention(q[:, :, :extra], k, v, attn_mask=~blocked, dropout_p=dropout),
            F.scaled_dot_product_attention(q[:, :, extra:], k[:, :, extra:], v[:, :, extra:], dropout_p=dropout),
        ),
        dim=2,
    )
