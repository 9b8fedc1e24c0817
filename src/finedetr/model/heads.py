"""What reads a query: the quality estimate, and boxes as refined distributions (D-FINE)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finedetr.geometry import bin_values
from finedetr.model.layers import MLP

__all__ = ["LocationQuality", "expected_distances"]


def expected_distances(probabilities: Float[Tensor, "*N 4 K"], bins: Float[Tensor, " K"]) -> Float[Tensor, "*N 4"]:
    """The mean edge distance of each distribution: Σ_n P(n)·W(n) (D-FINE, eq. 2)."""
    return probabilities @ bins.to(probabilities)


class LocationQuality(nn.Module):
    """How sure a query is of its edges, added to all of its class scores (D-FINE's LQE; after GFLv2).

    Reads the four largest probabilities of each edge and their mean.
    """

    TOP, HIDDEN = 4, 64  # as published

    def __init__(self, act: str) -> None:
        super().__init__()
        self.mlp = MLP(4 * (self.TOP + 1), self.HIDDEN, 1, 2, act)
        self.mlp.zero_last()

    def forward(self, probabilities: Float[Tensor, "B N 4 K"]) -> Float[Tensor, "B N 1"]:
        """One addend for the logits of each query."""
        best = probabilities.topk(self.TOP, dim=-1).values
        out: Tensor = self.mlp(torch.cat((best, best.mean(dim=-1, keepdim=True)), dim=-1).flatten(2))
        return out


class BinTable(nn.Module):
    """W(n), the meaning of each bin. `up` and `reg_scale` are numbers of the weights, never trained (spec 1.4)."""

    values: Tensor

    def __init__(self, bins: int, up: float, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.up = nn.Parameter(torch.tensor([up]), requires_grad=False)
        self.reg_scale = nn.Parameter(torch.tensor([scale]), requires_grad=False)
        self.register_buffer("values", bin_values(bins, up, scale), persistent=False)
