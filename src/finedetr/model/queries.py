"""Where the detector's own queries come from: the best tokens of the pyramid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from finedetr.model.layers import MLP, focal_bias

__all__ = ["Queries", "QuerySelection", "anchor_table"]


@dataclass(frozen=True, slots=True)
class Queries:
    """What the decoder starts from, and what the encoder itself answers for these tokens."""

    content: Float[Tensor, "B Q D"]  # no gradient
    boxes: Float[Tensor, "B Q 4"]  # no gradient
    logits: Float[Tensor, "B Q C"]  # of the stage "encoder"
    answers: Float[Tensor, "B Q 4"]  # boxes of the stage "encoder"
    tokens: Int[Tensor, "B Q"]  # which cell of the flattened pyramid
    embedded: Float[Tensor, "B T D"] | None = None  # all cells in the space of queries, outside training


def anchor_table(
    shapes: tuple[tuple[int, int], ...], side: float = 0.05, margin: float = 0.01
) -> tuple[Float[Tensor, "T 4"], Bool[Tensor, "T 1"]]:
    """Logits of one anchor a cell, row after row, level after level, and which of them are usable.

    The anchor of a cell stands at its centre with sides of 0.05·2^level. Anchors that are not strictly inside
    (0.01, 0.99) are unusable: their logits are +inf (spec 1.4).
    """
    anchors = []
    for level, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        center = torch.stack(((x + 0.5) / width, (y + 0.5) / height), dim=-1).float()
        anchors.append(torch.cat((center, torch.full_like(center, side * 2.0**level)), dim=-1).flatten(0, 1))
    table = torch.cat(anchors)
    usable = ((table > margin) & (table < 1 - margin)).all(dim=-1, keepdim=True)
    return torch.log(table / (1 - table)).masked_fill(~usable, torch.inf), usable


class QuerySelection(nn.Module):
    """The tokens with the best class score become queries; their boxes start at the cell's anchor."""

    def __init__(self, width: int, classes: int, queries: int, act: str, *, raw: bool = False) -> None:
        super().__init__()
        self.queries = queries
        self.proj = nn.Identity() if raw else nn.Linear(width, width)
        self.norm = nn.Identity() if raw else nn.LayerNorm(width)
        self.score_head = nn.Linear(width, classes)
        self.box_head = MLP(width, width, 4, 3, act)
        if isinstance(self.proj, nn.Linear):
            nn.init.xavier_uniform_(self.proj.weight)
        nn.init.constant_(self.score_head.bias, focal_bias())
        self.box_head.zero_last()
        self._tables: dict[tuple[tuple[tuple[int, int], ...], torch.device], tuple[Tensor, Tensor]] = {}

    def forward(self, memory: Float[Tensor, "B T D"], shapes: tuple[tuple[int, int], ...]) -> Queries:
        """The queries of a batch; at most as many as the pyramid has cells."""
        anchors, usable = self._table(shapes, memory.device)
        memory = memory.masked_fill(~usable, 0.0)
        # Ranking needs no gradient. Only the chosen tokens go through the heads a second time, with one: the same
        # gradient as through all tokens, for a fraction of the backward pass.
        with torch.no_grad():
            embedded = self.norm(self.proj(memory))
            best = self.score_head(embedded).amax(dim=-1)
            tokens = best.topk(min(self.queries, memory.shape[1]), dim=1).indices
        chosen = memory.gather(1, tokens[..., None].expand(-1, -1, memory.shape[-1]))
        content = self.norm(self.proj(chosen))
        boxes = (self.box_head(content).float() + anchors[tokens]).sigmoid()
        kept = None if self.training else embedded
        return Queries(content.detach(), boxes.detach(), self.score_head(content), boxes, tokens, kept)

    @torch.no_grad()
    def content(
        self, memory: Float[Tensor, "B T D"], shapes: tuple[tuple[int, int], ...], tokens: Int[Tensor, "B Q"]
    ) -> Float[Tensor, "B Q D"]:
        """What queries of given cells start with; like the own ones, without gradient."""
        usable = self._table(shapes, memory.device)[1]
        chosen = memory.masked_fill(~usable, 0.0).gather(1, tokens[..., None].expand(-1, -1, memory.shape[-1]))
        content: Tensor = self.norm(self.proj(chosen))
        return content

    def _table(self, shapes: tuple[tuple[int, int], ...], device: torch.device) -> tuple[Tensor, Tensor]:
        key = (shapes, device)
        table = self._tables.get(key)
        if table is None:
            anchors, usable = anchor_table(shapes)
            table = anchors.to(device), usable.to(device)
            if not torch.compiler.is_compiling():  # a traced graph holds it as a constant
                self._tables[key] = table
        return table
