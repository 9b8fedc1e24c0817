"""The loop over decoder layers: queries look at one another and at the pyramid, and refine boxes as distributions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from finedetr.geometry import decode_edges, inverse_sigmoid
from finedetr.model.attention import DeformableAttention, SelfAttention
from finedetr.model.config import DecoderConfig
from finedetr.model.heads import BinTable, LocationQuality, expected_distances
from finedetr.model.layers import ACTIVATIONS, MLP, focal_bias

__all__ = ["Decoder", "DecoderLayer", "DistributionDecoder", "PlainDecoder", "Refinement", "build_decoder"]

_HALF_MAX = 65504.0  # the largest float16: the published layers clamp there


@dataclass(frozen=True, slots=True)
class Refinement:
    """All that the decoder answers for its N queries. The initial stage comes first where it was asked for."""

    logits: Float[Tensor, "S B N C"]
    boxes: Float[Tensor, "S B N 4"]
    stages: tuple[str, ...]
    corners: Float[Tensor, "L B N 4 K"] | None = None  # accumulated edge logits of the layers
    anchors: Float[Tensor, "B N 4"] | None = None
    states: Float[Tensor, "L B N D"] | None = None  # behind each layer; outside training only


class Gateway(nn.Module):
    """Chooses, channel by channel, between what a query was and what it saw (D-FINE's target gating)."""

    def __init__(self, width: int, norm: nn.Module) -> None:
        super().__init__()
        self.gate = nn.Linear(2 * width, 2 * width)
        self.norm = norm
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Float[Tensor, "B N D"], seen: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """norm(g1 · x + g2 · seen)."""
        old, new = self.gate(torch.cat((x, seen), dim=-1)).sigmoid().chunk(2, dim=-1)
        out: Tensor = self.norm(old * x + new * seen)
        return out


class DecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention, feed-forward (spec 1.4, steps 1-4; 1.6; 1.7).

    What a query saw is joined with what it was by a gateway (D-FINE) or by a sum and a norm.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, inner = config.width, config.feedforward // 2 if config.gated else config.feedforward
        self.self_attention = SelfAttention(width, config.heads)
        self.norm1 = _norm(config)
        self.cross_attention = DeformableAttention(
            width, config.heads, config.points, projected=config.projected, discrete=config.sampling == "discrete"
        )
        self.gateway = Gateway(width, _norm(config)) if config.gateway else None
        self.norm2 = None if config.gateway else _norm(config)
        self.linear1 = nn.Linear(width, 2 * inner if config.gated else inner)
        self.linear2 = nn.Linear(inner, width)
        self.norm3 = _norm(config)
        self.act, self.gated = ACTIVATIONS[config.activation], config.gated
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)
            if config.gated:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        positions: Float[Tensor, "B N D"],
        boxes: Float[Tensor, "B N 4"],
        memory: tuple[Float[Tensor, "B D H W"], ...],
        blocked: Bool[Tensor, "*B E N"] | None,
    ) -> Float[Tensor, "B N D"]:
        """The next state of the queries."""
        x = self.norm1(x + self.self_attention(x, positions, blocked))
        seen = self.cross_attention(x + positions, boxes, memory)
        if self.gateway is not None:
            x = self.gateway(x, seen)
        else:
            assert self.norm2 is not None
            x = self.norm2(x + seen)
        x = x + self.linear2(self._inner(x))
        out: Tensor = self.norm3(x.clamp(-_HALF_MAX, _HALF_MAX))
        return out

    def _inner(self, x: Tensor) -> Tensor:
        x = self.linear1(x)
        if not self.gated:
            return self.act(x)
        gate, value = x.chunk(2, dim=-1)
        return self.act(gate) * value


def _norm(config: DecoderConfig) -> nn.Module:
    """The norm of a decoder's layers."""
    return nn.LayerNorm(config.width) if config.norm == "layer" else nn.RMSNorm(config.width, eps=1e-6)


class Answers:
    """What the layers have answered so far, and what the next one has to know of it."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.boxes: list[Tensor] = []
        self.stages: list[str] = []
        self.corners: list[Tensor] = []
        self.states: list[Tensor] = []
        self.anchors: Tensor | None = None
        self.moved: Tensor | None = None  # accumulated edge logits, wanted or not
        self.content: Tensor | None = None  # of the layer before
        self.box: Tensor | None = None  # of the layer before, with its gradient

    def add(self, stage: str, logits: Tensor, boxes: Tensor, corners: Tensor | None = None) -> None:
        """One stage's answer."""
        self.stages.append(stage)
        self.logits.append(logits)
        self.boxes.append(boxes)
        if corners is not None:
            self.corners.append(corners)

    def stacked(self) -> Refinement:
        """All stages as one axis."""
        corners = torch.stack(self.corners) if self.corners else None
        states = torch.stack(self.states) if self.states else None
        return Refinement(
            torch.stack(self.logits), torch.stack(self.boxes), tuple(self.stages), corners, self.anchors, states
        )


class Decoder(nn.Module, ABC):
    """The loop. What a layer answers, and how it moves the boxes, is left to the two kinds below."""

    def __init__(self, config: DecoderConfig, classes: int) -> None:
        super().__init__()
        width, act = config.width, config.activation
        hidden = 2 * width if config.position_layers == 2 else width
        self.answering = config.answering or config.layers
        self.position_limit, self.position_once = config.position_limit, config.position_once
        self.query_position_head = MLP(4, hidden, width, config.position_layers, act)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.score_heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(config.layers))
        for layer in self.query_position_head.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
        for head in self.score_heads:
            assert isinstance(head, nn.Linear)
            nn.init.constant_(head.bias, focal_bias())

    def forward(
        self,
        content: Float[Tensor, "B N D"],
        boxes: Float[Tensor, "B N 4"],
        memory: tuple[Float[Tensor, "B D H W"], ...],
        blocked: Bool[Tensor, "*B E N"] | None = None,
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
        x, reference, answers = content, boxes, Answers()
        count = len(self.layers) if self.training else self.answering
        positions = None
        for index, layer in enumerate(self.layers[:count]):
            if positions is None or not self.position_once:
                positions = self._positions(reference.to(x.dtype))
            x = layer(x, positions, reference, memory, blocked)
            if all_stages and not self.training:
                answers.states.append(x)
            reference = self._answer(index, x, reference, answers, all_stages, index == count - 1)
        return answers.stacked()

    def _positions(self, boxes: Tensor) -> Tensor:
        positions: Tensor = self.query_position_head(boxes)
        limit = self.position_limit
        return positions if limit is None else positions.clamp(-limit, limit)

    @abstractmethod
    def _answer(
        self, index: int, x: Tensor, reference: Tensor, answers: Answers, all_stages: bool, last: bool
    ) -> Tensor:
        """Adds what layer `index` answers where that is wanted; the next reference boxes, without gradient."""


class DistributionDecoder(Decoder):
    """D-FINE: a first plain box, then every layer refines the distributions of its four edges (FDR, LQE)."""

    def __init__(self, config: DecoderConfig, classes: int) -> None:
        super().__init__(config, classes)
        width, act = config.width, config.activation
        self.bin_table = BinTable(config.bins, config.up, config.scale)
        self.initial_box_head = MLP(width, width, 4, 3, act)
        heads = 1 if config.shared_boxes else config.layers
        self.edge_heads = nn.ModuleList(MLP(width, width, 4 * config.bins, 3, act) for _ in range(heads))
        self.quality_heads = nn.ModuleList(LocationQuality(act) for _ in range(config.layers))
        self.initial_box_head.zero_last()
        for head in self.edge_heads:
            assert isinstance(head, MLP)
            head.zero_last()

    def _answer(
        self, index: int, x: Tensor, reference: Tensor, answers: Answers, all_stages: bool, last: bool
    ) -> Tensor:
        if index == 0:
            initial = (self.initial_box_head(x).float() + inverse_sigmoid(reference)).sigmoid()
            answers.anchors = initial.detach()
            if all_stages:
                answers.add("initial", self.score_heads[0](x), initial)
        assert answers.anchors is not None
        head = self.edge_heads[index % len(self.edge_heads)]
        moved = head(x if answers.content is None else x + answers.content.detach()).float()
        moved = moved.unflatten(-1, (4, -1))
        corners = moved if answers.moved is None else moved + answers.moved
        probabilities = corners.softmax(dim=-1)
        distances = expected_distances(probabilities, self.bin_table.values)
        box: Tensor = decode_edges(answers.anchors, distances, self.bin_table.scale)
        if all_stages or last:
            logits = self.score_heads[index](x) + self.quality_heads[index](probabilities.to(x.dtype))
            answers.add(f"layer{index}", logits, box, corners)
        answers.moved, answers.content = corners, x
        return box.detach()


class PlainDecoder(Decoder):
    """RT-DETR: every layer moves the box by four numbers; each box's loss reaches the layer before, too.

    That is "look forward twice" (DINO, eq. 5): the answer stands on the box before with its gradient, the reference
    of the next layer has none.
    """

    def __init__(self, config: DecoderConfig, classes: int) -> None:
        super().__init__(config, classes)
        self.box_heads = nn.ModuleList(
            MLP(config.width, config.width, 4, 3, config.activation) for _ in range(config.layers)
        )
        for head in self.box_heads:
            assert isinstance(head, MLP)
            head.zero_last()

    def _answer(
        self, index: int, x: Tensor, reference: Tensor, answers: Answers, all_stages: bool, last: bool
    ) -> Tensor:
        moved = self.box_heads[index](x).float()
        box: Tensor = (moved + inverse_sigmoid(reference)).sigmoid()
        if all_stages or last:
            # the same numbers; the gradient goes one layer further, and no more than one
            answer = box if answers.box is None else (moved + inverse_sigmoid(answers.box)).sigmoid()
            answers.add(f"layer{index}", self.score_heads[index](x), answer)
        answers.box = box
        return box.detach()


def build_decoder(config: DecoderConfig, classes: int) -> DistributionDecoder | PlainDecoder:
    """The decoder that a configuration names."""
    return DistributionDecoder(config, classes) if config.boxes == "distributions" else PlainDecoder(config, classes)


def join_blocked(
    sizes: list[int], own: list[Tensor | None], sees: list[bool], queries: int, device: torch.device
) -> Tensor:
    """The attention block of all extra groups.

    A group sees itself, as its own mask allows, and on request the matching queries; never another group.

    Args:
        sizes: Queries of each extra group.
        own: Each group's own [Q, Q] or [B, Q, Q] block, or None where all of it is visible.
        sees: Whether each group sees the matching queries.
        queries: Number of matching queries, which stand last.
        device: Where the mask is built.
    """
    extra, batch = sum(sizes), max((mask.shape[:-2] for mask in own if mask is not None), key=len, default=())
    blocked = torch.ones(*batch, extra, extra + queries, dtype=torch.bool, device=device)
    stop = 0
    for size, mask, open_ in zip(sizes, own, sees, strict=True):
        start, stop = stop, stop + size
        blocked[..., start:stop, start:stop] = False if mask is None else mask
        if open_:
            blocked[..., start:stop, extra:] = False
    return blocked
