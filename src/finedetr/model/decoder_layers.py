"""One layer of the decoder, whole or split into a branch for classes and a branch for boxes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from finedetr.model.attention import SelfAttention
from finedetr.model.conditional import ConditionalAttention, Shown
from finedetr.model.config import DecoderConfig
from finedetr.model.deformable import DeformableAttention
from finedetr.model.layers import RMSNorm, activation

__all__ = ["Both", "DecoderLayer", "Seeds", "SplitLayer", "of_both"]

_HALF_MAX = 65504.0  # the largest float16: the published layers clamp there


@dataclass(frozen=True, slots=True)
class Seeds:
    """What one branch starts with; see `finedetr.model.decoder.Decoder.forward`."""

    content: Float[Tensor, "B N D"]
    references: Float[Tensor, "B N R"]
    positions: Float[Tensor, "B N D"] | None = None


class Both(NamedTuple):
    """What the branches for classes and for boxes have. One tensor under both names where they have the same."""

    scores: Tensor
    boxes: Tensor

    @classmethod
    def same(cls, x: Tensor) -> Both:
        """One for both."""
        return cls(x, x)

    @property
    def mean(self) -> Tensor:
        """What stands for both."""
        return self.boxes if self.scores is self.boxes else (self.scores + self.boxes) / 2


def of_both(make: Callable[..., Tensor], *parts: Both) -> Both:
    """`make` of each branch's parts; called once where the branches have the same ones."""
    boxes = make(*(part.boxes for part in parts))
    if all(part.scores is part.boxes for part in parts):
        return Both.same(boxes)
    return Both(make(*(part.scores for part in parts)), boxes)


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
    """Self-attention, cross-attention, feed-forward (spec 1.4, steps 1-4; 1.6; 1.7; and 2.2, 2.3 of the classic hosts).

    What a query saw is joined with what it was by a gateway (D-FINE) or by a sum and a norm.

    Args:
        config: What it is made of.
        temperature: Of the cells' sine code in the encoder; conditional attention has the same.
        first: Contents of queries take in positions; for the first layer, where they have none yet.
        hears: Whether it has a self-attention of its own; a branch that has none is told what queries heard.
        reads: Whether its attention projects the pyramid itself; a branch that does not is shown another's.
    """

    def __init__(
        self, config: DecoderConfig, temperature: float, *, first: bool, hears: bool = True, reads: bool = True
    ) -> None:
        super().__init__()
        width, inner = config.width, config.feedforward // 2 if config.gated else config.feedforward
        self.self_attention = _self_attention(config, width) if hears else None
        self.norm1 = _norm(config)
        self.cross_attention = (
            ConditionalAttention(width, config.heads, temperature, first=first, dropout=config.dropout, reads=reads)
            if config.attention == "conditional"
            else DeformableAttention(
                width,
                config.heads,
                config.points,
                projected=config.projected,
                discrete=config.sampling == "discrete",
                reads=reads,
            )
        )
        self.gateway = Gateway(width, _norm(config)) if config.gateway else None
        self.norm2 = None if config.gateway else _norm(config)
        self.linear1 = nn.Linear(width, 2 * inner if config.gated else inner)
        self.linear2 = nn.Linear(inner, width)
        self.norm3 = _norm(config)
        self.act, self.gated, self.dropout = activation(config.activation), config.gated, config.dropout
        for layer in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(layer.weight)
            if config.gated:
                nn.init.zeros_(layer.bias)

    def forward(
        self,
        x: Both,
        positions: Both,
        where: Both,
        memory: tuple[Float[Tensor, "B D H W"], ...],
        blocked: Bool[Tensor, "*B E N"] | None,
    ) -> Both:
        """The next state of the queries, of which there is one here.

        Args:
            x: Their state [B, N, D].
            positions: Added to what they look with [B, N, D].
            where: References for deformable attention, spatial queries for conditional attention [B, N, E].
            memory: The pyramid.
            blocked: See `SelfAttention.forward`.
        """
        heard = self.hear(x.boxes, positions.boxes, blocked)
        return Both.same(self.look(x.boxes, heard, positions.boxes, where.boxes, memory))

    def hear(self, x: Tensor, positions: Tensor, blocked: Tensor | None) -> Float[Tensor, "B N D"]:
        """What queries hear of one another."""
        assert self.self_attention is not None
        heard: Tensor = self.self_attention(x, positions, blocked)
        return heard

    def look(
        self,
        x: Float[Tensor, "B N D"],
        heard: Float[Tensor, "B N D"],
        positions: Float[Tensor, "B N D"],
        where: Float[Tensor, "B N E"],
        memory: tuple[Float[Tensor, "B D H W"], ...],
        shown: tuple[Tensor, ...] | Shown | None = None,
    ) -> Float[Tensor, "B N D"]:
        """All that follows: queries look at the pyramid, or at what another branch was shown of it, and think."""
        x = self.norm1(x + self._drop(heard))
        if isinstance(self.cross_attention, ConditionalAttention):
            assert shown is None or isinstance(shown, Shown)
            seen = self._drop(self.cross_attention(x, positions, where, memory, shown=shown))
        else:
            seen = self._drop(self.cross_attention(x + positions, where, memory, shown=shown))
        if self.gateway is not None:
            x = self.gateway(x, seen)
        else:
            assert self.norm2 is not None
            x = self.norm2(x + seen)
        thought = self._drop(self.linear2(self._drop(self._inner(x))))
        x = x + thought  # wider than `thought` under autocast
        if thought.dtype == torch.float16 or not self.training:  # no other type gets there; training would pay for it
            x = x.clamp(-_HALF_MAX, _HALF_MAX)
        out: Tensor = self.norm3(x)
        return out

    def _inner(self, x: Tensor) -> Tensor:
        gate, value = self.linear1(x).chunk(2, dim=-1) if self.gated else (self.linear1(x), None)
        inner: Tensor = self.act(gate)
        return inner if value is None else inner * value

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def _norm(config: DecoderConfig) -> nn.Module:
    """The norm of a decoder's layers."""
    return nn.LayerNorm(config.width) if config.norm == "layer" else RMSNorm(config.width, eps=1e-6)


def _self_attention(config: DecoderConfig, width: int) -> SelfAttention:
    """Among the queries of a decoder."""
    return SelfAttention(width, config.heads, separate=config.attention == "conditional", dropout=config.dropout)


class SplitLayer(nn.Module):
    """One self-attention for two branches, of which each looks and thinks for itself (SD-DETR, eq. 3; spec 3.2).

    Classes depend on what is inside of an object, boxes on its edges, so one attention for both is a compromise. Query
    i of one branch and query i of the other make answer i.

    Args:
        config: What it is made of.
        temperature: See `DecoderLayer`.
        first: See `DecoderLayer`.
    """

    def __init__(self, config: DecoderConfig, temperature: float, *, first: bool) -> None:
        super().__init__()
        split, width = config.split, config.width
        self.joining, self.shared_memory = split.joining, split.shared_memory
        wide = 2 * width if self.joining == "channel" else width
        self.self_attention = None if self.joining == "apart" else _self_attention(config, wide)
        fused = self.joining == "fused"
        self.join = nn.Linear(2 * width, width, bias=False) if fused else None
        self.part = nn.Linear(width, 2 * width, bias=False) if fused else None
        branch = replace(config, feedforward=config.feedforward // 2) if split.half else config
        self.scores, self.boxes = (
            DecoderLayer(branch, temperature, first=first, hears=self.joining == "apart", reads=reads)
            for reads in (True, not self.shared_memory)
        )
        if self.join is not None and self.part is not None:  # begins as the mean of both, told to both
            with torch.no_grad():
                one = torch.eye(width)
                self.join.weight.copy_(torch.cat((one / 2, one / 2), dim=1))
                self.part.weight.copy_(torch.cat((one, one), dim=0))

    def forward(
        self,
        x: Both,
        positions: Both,
        where: Both,
        memory: tuple[Float[Tensor, "B D H W"], ...],
        blocked: Bool[Tensor, "*B E N"] | None,
    ) -> Both:
        """The next states of the queries; see `DecoderLayer.forward`."""
        heard = self._hear(x, positions, blocked)
        shown = self.scores.cross_attention.read(memory) if self.shared_memory else None
        return Both(
            *(
                branch.look(x[i], heard[i], positions[i], where[i], memory, shown)
                for i, branch in enumerate((self.scores, self.boxes))
            )
        )

    def _hear(self, x: Both, positions: Both, blocked: Tensor | None) -> Both:
        if self.self_attention is None:
            return Both(
                *(branch.hear(x[i], positions[i], blocked) for i, branch in enumerate((self.scores, self.boxes)))
            )
        if self.join is not None and self.part is not None:
            heard = self.part(self.self_attention(self.join(torch.cat(x, dim=-1)), positions.mean, blocked))
            return Both(*heard.chunk(2, dim=-1))
        if self.joining == "channel":
            heard = self.self_attention(torch.cat(x, dim=-1), torch.cat(positions, dim=-1), blocked)
            return Both(*heard.chunk(2, dim=-1))
        extra = 0 if blocked is None else int(blocked.shape[-2])
        both = None if blocked is None else _twice(blocked)
        return _separate(self.self_attention(_tokens(x, extra), _tokens(positions, extra), both), extra)


def _tokens(x: Both, extra: int) -> Float[Tensor, "B M D"]:
    """Both branches as one list of tokens, those of extra groups first, as `SelfAttention` wants them."""
    return torch.cat((x.scores[:, :extra], x.boxes[:, :extra], x.scores[:, extra:], x.boxes[:, extra:]), dim=1)


def _separate(x: Float[Tensor, "B M D"], extra: int) -> Both:
    """The branches of `_tokens` again."""
    own = x.shape[1] // 2 - extra
    scores, boxes, own_scores, own_boxes = x.split((extra, extra, own, own), dim=1)
    return Both(torch.cat((scores, own_scores), dim=1), torch.cat((boxes, own_boxes), dim=1))


def _twice(blocked: Bool[Tensor, "*B E N"]) -> Bool[Tensor, "*B 2*E 2*N"]:
    """Whoever sees a query, or does not, sees both of its tokens, or none."""
    extra = blocked.shape[-2]
    among, own = blocked[..., :extra], blocked[..., extra:]
    row = torch.cat((among, among, own, own), dim=-1)
    return torch.cat((row, row), dim=-2)
