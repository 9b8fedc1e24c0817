"""Encoders of tokens: a transformer's layer, and the encoders of the classic DETRs that are nothing else (spec 2)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from finedetr.model.attention import SelfAttention
from finedetr.model.config import EncoderConfig
from finedetr.model.deformable import DeformableAttention
from finedetr.model.layers import MLP, activation, kept
from finedetr.model.sines import SineMap

__all__ = ["DeformableEncoder", "EncoderLayer", "SingleEncoder"]


class EncoderLayer(nn.Module):
    """A post-norm transformer layer: tokens look at one another, then each thinks for itself.

    Args:
        attention: All tokens at all, or each at a few places of all levels.
        width: D.
        feedforward: Width between the two linear layers.
        act: Their activation.
        dropout: Of what is added, and between the linear layers.
    """

    def __init__(
        self,
        attention: SelfAttention | DeformableAttention,
        width: int,
        feedforward: int,
        act: str = "gelu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.self_attention = attention
        self.norm1 = nn.LayerNorm(width)
        self.linear1 = nn.Linear(width, feedforward)
        self.linear2 = nn.Linear(feedforward, width)
        self.norm2 = nn.LayerNorm(width)
        self.act, self.dropout = activation(act), dropout

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        positions: Float[Tensor, "*B T D"],
        centers: Float[Tensor, "T 2"] | None = None,
        shapes: tuple[tuple[int, int], ...] = (),
    ) -> Float[Tensor, "B T D"]:
        """The next state of the tokens.

        Args:
            x: Tokens.
            positions: Added to what they look with.
            centers: For deformable attention: where each token is, in 0..1.
            shapes: For deformable attention: height and width of each level.
        """
        positions = positions.to(x.dtype)
        if centers is None:
            seen = self.self_attention(x, positions)
        else:
            seen = self.self_attention(x + positions, centers, as_maps(x, shapes))
        x = self.norm1(x + self._drop(seen))
        out: Tensor = self.norm2(x + self._drop(self.linear2(self._drop(self.act(self.linear1(x))))))
        return out

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def as_maps(x: Float[Tensor, "B T D"], shapes: tuple[tuple[int, int], ...]) -> tuple[Float[Tensor, "B D H W"], ...]:
    """Tokens as the maps that they came from."""
    parts = x.split([height * width for height, width in shapes], dim=1)
    return tuple(part.unflatten(1, shape).permute(0, 3, 1, 2) for part, shape in zip(parts, shapes, strict=True))


def as_tokens(level: Float[Tensor, "B D H W"]) -> Float[Tensor, "B T D"]:
    """A map as tokens, line after line."""
    return level.flatten(2).transpose(1, 2)


def _xavier(*parts: nn.Module) -> None:
    """The classic DETRs' weights of what has none of its own kind."""
    for part in parts:
        if isinstance(part, nn.Linear | nn.Conv2d):
            nn.init.xavier_uniform_(part.weight)
        if isinstance(part, nn.Conv2d) and part.bias is not None:
            nn.init.zeros_(part.bias)


class SingleEncoder(nn.Module):
    """One map, whose cells all look at all (DETR; spec 2.2)."""

    def __init__(self, config: EncoderConfig, channels: tuple[int, ...]) -> None:
        super().__init__()
        width = config.width
        self.input_proj = nn.ModuleList([nn.Conv2d(channels[0], width, 1)])
        self.cells = SineMap(width, config.temperature, centered=config.centered)
        self.scale = MLP(width, width, width, 2) if config.scaled else None
        self.layers = nn.ModuleList(
            EncoderLayer(
                SelfAttention(width, config.heads, dropout=config.dropout),
                width,
                config.feedforward,
                config.activation,
                config.dropout,
            )
            for _ in range(config.layers)
        )
        for layer in self.layers:
            assert isinstance(layer, EncoderLayer)
            _xavier(layer.linear1, layer.linear2)
            assert isinstance(layer.self_attention, SelfAttention)
            _xavier(layer.self_attention.out)
        _xavier(*(self.scale.layers if self.scale is not None else ()))

    def enter(self, maps: tuple[Float[Tensor, "B _ H W"], ...]) -> tuple[Float[Tensor, "B E H W"], ...]:
        """The backbone's map in the encoder's width."""
        return (self.input_proj[0](maps[0]),)

    def forward(self, maps: tuple[Float[Tensor, "B E H W"], ...]) -> tuple[Float[Tensor, "B E H W"], ...]:
        """The map, as seen by the transformer."""
        (level,) = maps
        shape = (int(level.shape[-2]), int(level.shape[-1]))
        tokens, code = as_tokens(level), self.cells(*shape, level.device)
        for layer in self.layers:
            tokens = layer(tokens, code if self.scale is None else code * self.scale(tokens))
        return as_maps(tokens, (shape,))


class DeformableEncoder(nn.Module):
    """Several maps, whose cells each look at a few places of all of them (Deformable DETR; spec 2.3).

    Batches have no padding, as all pictures are resized to one size: every cell is valid.
    """

    POINTS = 4  # of each level, as published

    def __init__(self, config: EncoderConfig, channels: tuple[int, ...]) -> None:
        super().__init__()
        width, levels = config.width, len(channels) + config.extra_levels
        inputs = (*channels, *(channels[-1] if level == 0 else width for level in range(config.extra_levels)))
        self.input_proj = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, width, 1) if level < len(channels) else nn.Conv2d(c, width, 3, 2, 1),
                nn.GroupNorm(math.gcd(32, width), width),
            )
            for level, c in enumerate(inputs)
        )
        self.cells = SineMap(width, config.temperature, centered=config.centered)
        self.level_embedding = nn.Parameter(torch.randn(levels, width))
        self.layers = nn.ModuleList(
            EncoderLayer(
                DeformableAttention(width, config.heads, (self.POINTS,) * levels, projected=True),
                width,
                config.feedforward,
                config.activation,
                config.dropout,
            )
            for _ in range(config.layers)
        )
        for module in (*self.input_proj.modules(), *(p for layer in self.layers for p in layer.children())):
            _xavier(module)

    def enter(self, maps: tuple[Float[Tensor, "B _ H W"], ...]) -> tuple[Float[Tensor, "B E H W"], ...]:
        """One map for each level, finest first: those of the backbone, then the extra ones."""
        levels = [project(x) for project, x in zip(self.input_proj, maps, strict=False)]
        for index in range(len(maps), len(self.input_proj)):
            levels.append(self.input_proj[index](maps[-1] if index == len(maps) else levels[-1]))
        return tuple(levels)

    def forward(self, maps: tuple[Float[Tensor, "B E H W"], ...]) -> tuple[Float[Tensor, "B E H W"], ...]:
        """The levels that `enter` made, as seen by the transformer."""
        shapes = tuple((int(level.shape[-2]), int(level.shape[-1])) for level in maps)
        device = maps[0].device
        positions = torch.cat(
            [self.cells(*shape, device) + own for shape, own in zip(shapes, self.level_embedding, strict=True)]
        )
        centers = torch.cat([_centers(*shape, device) for shape in shapes])
        tokens = torch.cat([as_tokens(level) for level in maps], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, positions, centers, shapes)
        return as_maps(tokens, shapes)


@kept
def _centers(height: int, width: int, device: torch.device) -> Float[Tensor, "T 2"]:
    """(x, y) of every cell's center, line after line."""
    rows = (torch.arange(height, device=device) + 0.5) / height
    columns = (torch.arange(width, device=device) + 0.5) / width
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack((x, y), dim=-1).flatten(0, 1)
