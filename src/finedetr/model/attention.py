"""Attention among queries, and of queries to the pyramid."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

__all__ = ["DeformableAttention", "SelfAttention"]


class SelfAttention(nn.Module):
    """Multi-head attention with positions on queries and keys only; no attention map is ever materialized.

    `qk` and `v` are the two parts of the usual joint input projection: queries and keys read x + positions, values x.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qk = nn.Linear(width, 2 * width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        bound = math.sqrt(6 / (4 * width))  # xavier_uniform of the joint [3·width, width] projection
        for layer in (self.qk, self.v):
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        positions: Float[Tensor, "*B N D"],
        blocked: Bool[Tensor, "E N"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens look at one another.

        Args:
            x: Content.
            positions: Added to what queries and keys are made of.
            blocked: For the first E tokens (extra query groups): True where the row must not see the column. The
                remaining tokens see one another and none of the first E, always; None: E is 0.
        """
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (*self.qk(x + positions).chunk(2, dim=-1), self.v(x))
        )
        if q.device.type == "cpu" and torch.is_grad_enabled():
            # in bfloat16 the backward pass of this one operation is three times slower there
            with torch.autocast("cpu", enabled=False):
                seen = _attend(q.float(), k.float(), v.float(), blocked)
        else:
            seen = _attend(q, k, v, blocked)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2).to(x.dtype))
        return out


def _attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None) -> Tensor:
    """[B, heads, N, D/heads], with the first E tokens seeing what `blocked` leaves them."""
    if blocked is None:
        return F.scaled_dot_product_attention(q, k, v)
    extra = blocked.shape[0]
    # two calls, so that no number of an extra group can touch the matching queries, not even by rounding
    return torch.cat(
        (
            F.scaled_dot_product_attention(q[:, :, :extra], k, v, attn_mask=~blocked),
            F.scaled_dot_product_attention(q[:, :, extra:], k[:, :, extra:], v[:, :, extra:]),
        ),
        dim=2,
    )


class _WeightedSamples(torch.autograd.Function):
    """Σ_p weight_p · grid_sample(level, place_p), for one level of the pyramid, on the CPU.

    The plain form multiplies the samples [M, D, P, N] by their weights into a second tensor of that size, and its
    backward pass into three more. Point by point the products stay in the cache: the same numbers, half the traffic.
    """

    @staticmethod
    def forward(ctx: Any, level: Tensor, places: Tensor, weights: Tensor) -> Tensor:
        samples = torch.ops.aten.grid_sampler_2d(level, places, 0, 0, False)
        ctx.save_for_backward(level, places, weights, samples)
        total: Tensor = samples[:, :, 0] * weights[:, None, 0]
        for point in range(1, samples.shape[2]):
            total.addcmul_(samples[:, :, point], weights[:, None, point])
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        level, places, weights, samples = ctx.saved_tensors
        grad = grad.contiguous()
        to_samples, to_weights = torch.empty_like(samples), torch.empty_like(weights)
        for point in range(samples.shape[2]):
            torch.mul(grad, weights[:, None, point], out=to_samples[:, :, point])
            torch.sum(grad * samples[:, :, point], dim=1, out=to_weights[:, point])
        to_level, to_places = torch.ops.aten.grid_sampler_2d_backward(
            to_samples, level, places, 0, 0, False, (True, True)
        )
        return to_level, to_places, to_weights


def _sample(level: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted samples of one level: [M, D, H, W] at [M, P, N, 2] with weights [M, P, N] to [M, D, N]."""
    if level.device.type == "cpu" and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        out: Tensor = _WeightedSamples.apply(level, places, weights)  # type: ignore[no-untyped-call]
        return out
    samples: Tensor = F.grid_sample(level, places, align_corners=False)
    return (samples * weights[:, None]).sum(dim=2)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention without value and output projection (D-FINE, spec 1.4 step 2).

    Each head samples `points[l]` places of level l around the reference box and adds them with softmax weights over
    all points of all levels.
    """

    reach: Tensor

    def __init__(self, width: int, heads: int, points: tuple[int, ...]) -> None:
        super().__init__()
        self.heads, self.points = heads, points
        total = sum(points)
        self.sampling_offsets = nn.Linear(width, heads * total * 2)
        self.attention_weights = nn.Linear(width, heads * total)
        # half of the reference's size, shared among the points of a level
        self.register_buffer("reach", torch.cat([torch.full((n, 1), 0.5 / n) for n in points]), persistent=False)
        self._initialize()

    def _initialize(self) -> None:
        """Points start on rays, one direction a head, at distances 1, 2, … (Deformable DETR)."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        rays = torch.stack((angles.cos(), angles.sin()), dim=-1)
        rays = rays / rays.abs().amax(dim=-1, keepdim=True)
        steps = torch.cat([torch.arange(1, n + 1, dtype=torch.float32) for n in self.points])
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((rays[:, None] * steps[:, None]).flatten())

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        boxes: Float[Tensor, "B N 4"],
        memory: tuple[Float[Tensor, "B D H W"], ...],
    ) -> Float[Tensor, "B N D"]:
        """Queries look at the pyramid around their reference boxes (cx, cy, w, h in [0, 1])."""
        batch, queries, width = x.shape
        offsets = self.sampling_offsets(x).view(batch, queries, self.heads, -1, 2).float()
        weights = self.attention_weights(x).view(batch, queries, self.heads, -1)
        boxes = boxes[:, :, None, None]
        # in grid_sample's -1..1; then [B, N, heads, P, 2] -> [B·heads, P, N, 2]: with the queries innermost, the
        # weighted sum below runs over long contiguous rows
        places = (2 * boxes[..., :2] - 1) + offsets * (2 * self.reach) * boxes[..., 2:]
        places = places.permute(0, 2, 3, 1, 4).flatten(0, 1)
        weights = weights.permute(0, 2, 3, 1).flatten(0, 1).float().softmax(dim=1)
        seen = x.new_zeros((), dtype=torch.float32)
        parts = zip(memory, places.split(self.points, dim=1), weights.split(self.points, dim=1), strict=True)
        for level, grid, weight in parts:
            heads = level.reshape(batch * self.heads, width // self.heads, *level.shape[-2:]).float()
            seen = seen + _sample(heads, grid, weight)  # [B·heads, D/heads, N]
        out: Tensor = seen.view(batch, width, queries).transpose(1, 2).to(x.dtype)
        return out
