"""The loop over decoder layers: queries look at one another and at the pyramid, and refine boxes as distributions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from finedetr.geometry import decode_edges, inverse_sigmoid
from finedetr.model.attention import DeformableAttention, SelfAttention
from finedetr.model.config import DecoderConfig
from finedetr.model.heads import BinTable, LocationQuality, expected_distances
from finedetr.model.layers import ACTIVATIONS, MLP, focal_bias

__all__ = ["Decoder", "DecoderLayer", "Refinement"]

_HALF_MAX = 65504.0  # the largest float16: the published layers clamp there


@dataclass(frozen=True, slots=True)
class Refinement:
    """All that the decoder answers for its N queries. The initial stage comes first where it was asked for."""

    logits: Float[Tensor, "S B N C"]
    boxes: Float[Tensor, "S B N 4"]
    corners: Float[Tensor, "L B N 4 K"]  # accumulated edge logits of the layers
    anchors: Float[Tensor, "B N 4"]


class Gateway(nn.Module):
    """Chooses, channel by channel, between what a query was and what it saw (D-FINE's target gating)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, 2 * width)
        self.norm = nn.LayerNorm(width)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Float[Tensor, "B N D"], seen: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """norm(g1 · x + g2 · seen)."""
        old, new = self.gate(torch.cat((x, seen), dim=-1)).sigmoid().chunk(2, dim=-1)
        out: Tensor = self.norm(old * x + new * seen)
        return out


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention through a gateway, feed-forward (spec 1.4, steps 1-4)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width = config.width
        self.self_attention = SelfAttention(width, config.heads)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attention = DeformableAttention(width, config.heads, config.points)
        self.gateway = Gateway(width)
        self.linear1 = nn.Linear(width, config.feedforward)
        self.linear2 = nn.Linear(config.feedforward, width)
        self.norm3 = nn.LayerNorm(width)
        self.act = ACTIVATIONS[config.activation]
        nn.init.xavier_uniform_(self.linear1.weight)
        nn.init.xavier_uniform_(self.linear2.weight)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        positions: Float[Tensor, "B N D"],
        boxes: Float[Tensor, "B N 4"],
        memory: tuple[Float[Tensor, "B D H W"], ...],
        blocked: Bool[Tensor, "E N"] | None,
    ) -> Float[Tensor, "B N D"]:
        """The next state of the queries."""
        x = self.norm1(x + self.self_attention(x, positions, blocked))
        x = self.gateway(x, self.cross_attention(x + positions, boxes, memory))
        x = x + self.linear2(self.act(self.linear1(x)))
        out: Tensor = self.norm3(x.clamp(-_HALF_MAX, _HALF_MAX))
        return out


class Decoder(nn.Module):
    """D-FINE's decoder: a first plain box, then every layer refines the distributions of its four edges (FDR)."""

    def __init__(self, config: DecoderConfig, classes: int) -> None:
        super().__init__()
        width, act = config.width, config.activation
        self.bin_table = BinTable(config.bins, config.up, config.scale)
        self.query_position_head = MLP(4, 2 * width, width, 2, act)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.initial_box_head = MLP(width, width, 4, 3, act)
        self.score_heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(config.layers))
        self.edge_heads = nn.ModuleList(MLP(width, width, 4 * config.bins, 3, act) for _ in range(config.layers))
        self.quality_heads = nn.ModuleList(LocationQuality(act) for _ in range(config.layers))
        for layer in self.query_position_head.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
        self.initial_box_head.zero_last()
        for head in self.edge_heads:
            assert isinstance(head, MLP)
            head.zero_last()
        for head in self.score_heads:
            assert isinstance(head, nn.Linear)
            nn.init.constant_(head.bias, focal_bias())

    def forward(
        self,
        content: Float[Tensor, "B N D"],
        boxes: Float[Tensor, "B N 4"],
        memory: tuple[Float[Tensor, "B D H W"], ...],
        blocked: Bool[Tensor, "E N"] | None = None,
        all_stages: bool = True,
    ) -> Refinement:
        """Refines the boxes of all queries, layer after layer.

        Args:
            content: What each query starts with.
            boxes: Where each query starts to look.
            memory: The pyramid, finest level first.
            blocked: See `SelfAttention.forward`.
            all_stages: Answer at every stage (training, teachers) or only at the last.
        """
        x, reference = content, boxes
        previous: Tensor | None = None
        corners: Tensor | None = None
        logits, answers, distributions = [], [], []
        anchors = reference
        last = len(self.layers) - 1
        for index, layer in enumerate(self.layers):
            positions = self.query_position_head(reference.to(x.dtype)).clamp(-10, 10)
            x = layer(x, positions, reference, memory, blocked)
            if index == 0:
                initial = (self.initial_box_head(x).float() + inverse_sigmoid(reference)).sigmoid()
                anchors = initial.detach()
                if all_stages:
                    logits.append(self.score_heads[0](x))
                    answers.append(initial)
            moved = self.edge_heads[index](x if previous is None else x + previous.detach()).float()
            moved = moved.unflatten(-1, (4, -1))
            corners = moved if corners is None else moved + corners
            probabilities = corners.softmax(dim=-1)
            distances = expected_distances(probabilities, self.bin_table.values)
            box = decode_edges(anchors, distances, self.bin_table.scale)
            if all_stages or index == last:
                logits.append(self.score_heads[index](x) + self.quality_heads[index](probabilities.to(x.dtype)))
                answers.append(box)
                distributions.append(corners)
            reference, previous = box.detach(), x
        return Refinement(torch.stack(logits), torch.stack(answers), torch.stack(distributions), anchors)


def join_blocked(
    sizes: list[int], own: list[Tensor | None], sees: list[bool], queries: int, device: torch.device
) -> Tensor:
    """The attention block of all extra groups.

    A group sees itself, as its own mask allows, and on request the matching queries; never another group.

    Args:
        sizes: Queries of each extra group.
        own: Each group's own [Q, Q] block, or None where all of it is visible.
        sees: Whether each group sees the matching queries.
        queries: Number of matching queries, which stand last.
        device: Where the mask is built.
    """
    blocks = [
        torch.zeros(size, size, dtype=torch.bool, device=device) if mask is None else mask.to(device)
        for size, mask in zip(sizes, own, strict=True)
    ]
    inner = ~torch.block_diag(*[(~b).float() for b in blocks]).bool()
    matching = torch.cat(
        [torch.full((size, queries), not open_, device=device) for size, open_ in zip(sizes, sees, strict=True)]
    )
    return F.pad(inner, (0, queries)) | F.pad(matching, (inner.shape[1], 0))
