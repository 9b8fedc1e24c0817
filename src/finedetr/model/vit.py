"""Vision transformers with a spatial tuning adapter: the backbones of DEIMv2 S to X (spec 1.7)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from finedetr.errors import ConfigError, did_you_mean
from finedetr.model.attention import attend
from finedetr.model.config import BackboneConfig
from finedetr.model.layers import ConvNorm

__all__ = ["VITS", "AdaptedViT", "ViT", "ViTTable"]

PATCH = 16


@dataclass(frozen=True)
class ViTTable:
    """A vision transformer of twelve blocks on patches of 16 pixels, and the adapter around it."""

    width: int
    heads: int
    taps: tuple[int, int, int]  # blocks whose tokens make the maps at strides 8, 16 and 32
    detail: int  # channels of the adapter's first convolution
    outputs: int  # channels of the three maps
    gated: bool = False  # feed-forward networks as SwiGLU
    dinov3: bool = (
        False  # storage tokens, layer scales, a final norm, keys without a bias; positions scaled in training
    )


VITS: dict[str, ViTTable] = {
    "vit-tiny": ViTTable(192, 3, (3, 7, 11), detail=16, outputs=192),
    "vit-tiny-plus": ViTTable(256, 4, (3, 7, 11), detail=16, outputs=256),
    "dinov3-s": ViTTable(384, 6, (5, 8, 11), detail=32, outputs=224, dinov3=True),
    "dinov3-s-plus": ViTTable(384, 6, (5, 8, 11), detail=64, outputs=256, gated=True, dinov3=True),
}


class RotaryPositions(nn.Module):
    """Angles by which queries and keys are turned, from where their patch stands (spec 1.7).

    Rows and columns go from -1 to 1 whatever the size of the picture. `periods` travels with the weights.
    """

    periods: Tensor

    def __init__(self, head: int, prefix: int, *, scaled: bool) -> None:
        super().__init__()
        self.prefix, self.scaled = prefix, scaled
        self.register_buffer("periods", 100.0 ** (2 * torch.arange(head // 4).float() / (head // 2)))

    @torch.no_grad()
    def forward(self, rows: int, columns: int) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:
        """Cosines and sines for each token; the prefix tokens (1, 0) are not turned."""
        y, x = (
            2 * (torch.arange(count, device=self.periods.device).float() + 0.5) / count - 1 for count in (rows, columns)
        )
        if self.training and self.scaled:  # one factor between 1/2 and 2, for scales that were never seen
            factor = torch.exp2(2 * torch.rand((), device=self.periods.device) - 1)
            y, x = y * factor, x * factor
        places = torch.stack(torch.meshgrid(y, x, indexing="ij"), dim=-1).flatten(0, 1)
        angles = (2 * math.pi * places[:, :, None] / self.periods.float()).flatten(1).repeat(1, 2)
        above = (0, 0, self.prefix, 0)
        return F.pad(angles.cos(), above, value=1.0), F.pad(angles.sin(), above)


def turn(x: Float[Tensor, "B H T D"], cos: Float[Tensor, "T D"], sin: Float[Tensor, "T D"]) -> Float[Tensor, "B H T D"]:
    """Each pair (i, i + D/2) turned by its angle."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm and on top of what came in."""

    has_bias: Tensor

    def __init__(self, table: ViTTable) -> None:
        super().__init__()
        width, inner, eps = table.width, 4 * table.width, 1e-5 if table.dinov3 else 1e-6
        self.heads, self.gated = table.heads, table.gated
        self.norm1, self.norm2 = nn.LayerNorm(width, eps=eps), nn.LayerNorm(width, eps=eps)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        # DINOv3 has numbers for the keys' bias and multiplies them by zero
        keys = 0.0 if table.dinov3 else 1.0
        self.register_buffer("has_bias", torch.tensor([1.0, keys, 1.0]).repeat_interleave(width), persistent=False)
        self.linear1 = nn.Linear(width, 2 * inner if table.gated else inner)
        self.linear2 = nn.Linear(inner, width)
        self.scale1, self.scale2 = (
            nn.Parameter(torch.full((width,), 1e-5)) if table.dinov3 else None for _ in range(2)
        )

    def forward(
        self, x: Float[Tensor, "B T D"], positions: tuple[Float[Tensor, "T E"], Float[Tensor, "T E"]]
    ) -> Float[Tensor, "B T D"]:
        """Tokens that look at one another."""
        x = x + _scaled(self._attend(self.norm1(x), positions), self.scale1)
        return x + _scaled(self._feed(self.norm2(x)), self.scale2)

    def _attend(self, x: Tensor, positions: tuple[Tensor, Tensor]) -> Tensor:
        qkv = F.linear(x, self.qkv.weight, self.qkv.bias * self.has_bias)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        seen = attend(turn(q, *positions).to(v.dtype), turn(k, *positions).to(v.dtype), v)
        out: Tensor = self.proj(seen.transpose(1, 2).flatten(2).to(x.dtype))
        return out

    def _feed(self, x: Tensor) -> Tensor:
        x = self.linear1(x)
        if self.gated:
            gate, value = x.chunk(2, dim=-1)
            x = F.silu(gate) * value
        else:
            x = F.gelu(x)
        out: Tensor = self.linear2(x)
        return out


def _scaled(x: Tensor, scale: Tensor | None) -> Tensor:
    return x if scale is None else x * scale


class ViT(nn.Module):
    """A vision transformer that shows the patch tokens of some of its blocks as maps."""

    def __init__(self, table: ViTTable) -> None:
        super().__init__()
        width = table.width
        self.taps = table.taps
        self.patches = nn.Conv2d(3, width, PATCH, PATCH)
        self.class_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.storage_tokens = nn.Parameter(0.02 * torch.randn(1, 4, width)) if table.dinov3 else None
        # pretraining hides patches behind it; nothing does so here, but it belongs to the weights
        self.mask_token = nn.Parameter(torch.zeros(1, width)) if table.dinov3 else None
        self.blocks = nn.ModuleList(Block(table) for _ in range(max(table.taps) + 1))
        self.norm = nn.LayerNorm(width, eps=1e-5) if table.dinov3 else None
        self.positions = RotaryPositions(width // table.heads, 5 if table.dinov3 else 1, scaled=table.dinov3)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B D H16 W16"], ...]:
        """One map at stride 16 for each tap."""
        patches = self.patches(images)
        rows, columns = int(patches.shape[-2]), int(patches.shape[-1])
        x = torch.cat((*self._prefix(images.shape[0], patches.dtype), patches.flatten(2).transpose(1, 2)), dim=1)
        positions = self.positions(rows, columns)
        maps = []
        for index, block in enumerate(self.blocks):
            x = block(x, positions)
            if index in self.taps:
                tokens = x[:, self.positions.prefix :]
                tokens = tokens if self.norm is None else self.norm(tokens)
                maps.append(tokens.transpose(1, 2).unflatten(2, (rows, columns)))
        return tuple(maps)

    def _prefix(self, batch: int, dtype: torch.dtype) -> list[Tensor]:
        # with a gradient of zero, so that no process of a distributed run waits for one
        first = self.class_token if self.mask_token is None else self.class_token + 0 * self.mask_token
        tokens = [first] if self.storage_tokens is None else [first, self.storage_tokens]
        return [token.to(dtype).expand(batch, -1, -1) for token in tokens]


class Detail(nn.Module):
    """Convolutions on the picture itself, for what patches of 16 pixels lose: maps at strides 8, 16 and 32."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.stem = ConvNorm(3, channels, 3, 2, act="gelu")
        self.convs = nn.ModuleList(
            ConvNorm(inputs * channels, outputs * channels, 3, 2) for inputs, outputs in ((1, 2), (2, 4), (4, 4))
        )

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B D H2 W2"], ...]:
        """Three maps, finest first."""
        maps: list[Tensor] = []
        x = F.max_pool2d(self.stem(images), 3, 2, 1)
        for conv in self.convs:
            maps.append(conv(F.gelu(maps[-1]) if maps else x))
        return tuple(maps)


class AdaptedViT(nn.Module):
    """DEIMv2's spatial tuning adapter: what a vision transformer means, joined with what convolutions see."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        if config.name not in VITS:
            raise ConfigError(f"no vision transformer is called {config.name!r}", hint=did_you_mean(config.name, VITS))
        if config.stages != (1, 2, 3):
            raise ConfigError(f"{config.name} has the stages (1, 2, 3), strides 8, 16 and 32; got {config.stages}")
        table = VITS[config.name]
        self.channels = (table.outputs,) * 3
        self.vit, self.detail = ViT(table), Detail(table.detail)
        self.joins = nn.ModuleList(ConvNorm(table.width + share * table.detail, table.outputs) for share in (2, 4, 4))

    @property
    def pretrained(self) -> ViT:
        """The part that has weights before a detector is trained; the adapter starts from nothing."""
        return self.vit

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B D H2 W2"], ...]:
        """Three maps, at strides 8, 16 and 32."""
        outputs = []
        for join, meaning, detail in zip(self.joins, self.vit(images), self.detail(images), strict=True):
            meaning = F.interpolate(meaning, size=detail.shape[-2:], mode="bilinear", align_corners=False)
            outputs.append(join(torch.cat((meaning.to(detail.dtype), detail), dim=1)))
        return tuple(outputs)
