"""Conditional attention: queries look at one map by what they seek and by where, each with weights of its own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finedetr.model.attention import attend
from finedetr.model.layers import MLP
from finedetr.model.sines import SineMap, place_code

__all__ = ["ConditionalAttention", "Shown", "SpatialQuery"]


class SpatialQuery(nn.Module):
    """Where a query looks: the sine code of its point, stretched by what the query has seen (Conditional DETR, eq. 2).

    DAB-DETR (Liu et al., 2022, eq. 8) stretches it also by the size that it expects, over the size of its box.

    Args:
        width: D.
        sized: Queries are boxes.
    """

    def __init__(self, width: int, *, sized: bool) -> None:
        super().__init__()
        self.width = width
        self.scale = MLP(width, width, width, 2)
        self.size = MLP(width, width, 2, 2) if sized else None
        for part in self.modules():
            if isinstance(part, nn.Linear):
                nn.init.xavier_uniform_(part.weight)

    def forward(
        self, x: Float[Tensor, "B N D"], references: Float[Tensor, "B N R"], *, first: bool
    ) -> Float[Tensor, "B N D"]:
        """The spatial queries of a layer; the first one has seen nothing."""
        code: Tensor = place_code(references[..., :2], self.width // 2).to(x.dtype)
        if not first:
            code = code * self.scale(x)
        if self.size is not None:
            stretch = (self.size(x).sigmoid() / references[..., 2:]).flip(-1)  # rows come first in the code
            code = code * stretch.to(x.dtype).repeat_interleave(self.width // 2, dim=-1)
        return code


@dataclass(frozen=True, slots=True)
class Shown:
    """Keys and values of a map."""

    content: Float[Tensor, "B T D"]
    place: Float[Tensor, "B T D"]
    value: Float[Tensor, "B T D"]


class ConditionalAttention(nn.Module):
    """Multi-head attention whose scores add content to content and place to place (Meng et al., 2021; spec 2.2).

    Args:
        width: D.
        heads: Number of heads.
        temperature: Of the sine code of the map's cells, which is the encoder's.
        first: In the first layer, contents take in positions, for the queries have none yet.
        dropout: Of the attention, in training.
        reads: Whether it has keys and values of its own; otherwise it is shown another's.
    """

    def __init__(
        self, width: int, heads: int, temperature: float, *, first: bool, dropout: float = 0.0, reads: bool = True
    ) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.cells = SineMap(width, temperature)
        self.query, self.spatial, self.out = (nn.Linear(width, width) for _ in range(3))
        self.query_position = nn.Linear(width, width) if first else None
        if reads:
            self.key, self.value, self.key_position = (nn.Linear(width, width) for _ in range(3))
        for layer in self.children():
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        positions: Float[Tensor, "B N D"],
        spatial: Float[Tensor, "B N D"],
        memory: tuple[Float[Tensor, "B D H W"], ...],
        shown: Shown | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Queries look at the only level of the pyramid.

        Args:
            x: What they seek.
            positions: Of the queries.
            spatial: Where they seek.
            memory: The pyramid.
            shown: What another attention has read of it, for one that does not read.
        """
        keys = self.read(memory) if shown is None else shown
        query = self.query(x)
        if self.query_position is not None:
            query = query + self.query_position(positions)
        seen = attend(
            torch.cat((self._split(query), self._split(self.spatial(spatial))), dim=-1),
            torch.cat((self._split(keys.content), self._split(keys.place)), dim=-1),
            self._split(keys.value),
            dropout=self.dropout if self.training else 0.0,
        )
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2).to(x.dtype))
        return out

    def read(self, memory: tuple[Float[Tensor, "B D H W"], ...]) -> Shown:
        """Keys and values of the only level of the pyramid."""
        (level,) = memory
        height, width = (int(side) for side in level.shape[-2:])
        tokens = level.flatten(2).transpose(1, 2)
        key = self.key(tokens)
        place = self.key_position(self.cells(height, width, level.device).to(level.dtype)).expand_as(key)
        return Shown(key if self.query_position is None else key + place, place, self.value(tokens))

    def _split(self, x: Tensor) -> Tensor:
        parts: Tensor = x.unflatten(-1, (self.heads, -1))
        return parts.transpose(1, 2)
