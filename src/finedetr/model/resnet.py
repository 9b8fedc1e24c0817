"""ResNet-vd backbones (PResNet of the RT-DETR family, spec 1.2): a stem of three convolutions, pooled shortcuts."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from finedetr.errors import ConfigError, did_you_mean
from finedetr.model.config import BackboneConfig
from finedetr.model.layers import Backbone, ConvNorm

__all__ = ["RESNETS", "ResNet", "ResNetTable"]

_WIDTHS = (64, 128, 256, 512)


@dataclass(frozen=True)
class ResNetTable:
    """Blocks of each stage, and whether they are bottlenecks (four times as wide outside as inside)."""

    blocks: tuple[int, int, int, int]
    bottleneck: bool

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the map of each stage."""
        return tuple((4 if self.bottleneck else 1) * width for width in _WIDTHS)


RESNETS: dict[str, ResNetTable] = {
    "R18": ResNetTable((2, 2, 2, 2), bottleneck=False),
    "R34": ResNetTable((3, 4, 6, 3), bottleneck=False),
    "R50": ResNetTable((3, 4, 6, 3), bottleneck=True),
    "R101": ResNetTable((3, 4, 23, 3), bottleneck=True),
}


class Residual(nn.Module):
    """Two 3×3 convolutions, or 1×1, 3×3 and 1×1, and what came in.

    Where the map halves, the shortcut is averaged before its 1×1 convolution ("variant d", He et al., 2019).
    """

    def __init__(self, inputs: int, width: int, stride: int, *, bottleneck: bool, shortcut: bool, frozen: bool) -> None:
        super().__init__()
        outputs = 4 * width if bottleneck else width
        if bottleneck:
            self.convs = nn.Sequential(
                ConvNorm(inputs, width, act="relu", frozen=frozen),
                ConvNorm(width, width, 3, stride, act="relu", frozen=frozen),
                ConvNorm(width, outputs, frozen=frozen),
            )
        else:
            self.convs = nn.Sequential(
                ConvNorm(inputs, width, 3, stride, act="relu", frozen=frozen),
                ConvNorm(width, width, 3, frozen=frozen),
            )
        self.pools = stride == 2
        self.shortcut = ConvNorm(inputs, outputs, frozen=frozen) if shortcut else None

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E H2 W2"]:
        """One feature map to the next."""
        added = x
        if self.shortcut is not None:
            added = self.shortcut(F.avg_pool2d(x, 2, 2, ceil_mode=True) if self.pools else x)
        return F.relu(self.convs(x) + added)


class ResNet(Backbone):
    """ResNet-vd."""

    def __init__(self, config: BackboneConfig) -> None:
        if config.name not in RESNETS:
            raise ConfigError(f"no ResNet-vd is called {config.name!r}", hint=did_you_mean(config.name, RESNETS))
        table, frozen = RESNETS[config.name], config.freeze_norm
        super().__init__(config.stages, table.channels)
        self.stem = nn.Sequential(
            ConvNorm(3, 32, 3, 2, act="relu", frozen=frozen),
            ConvNorm(32, 32, 3, act="relu", frozen=frozen),
            ConvNorm(32, 64, 3, act="relu", frozen=frozen),
            nn.MaxPool2d(3, 2, 1),
        )
        self.stages = nn.ModuleList()
        inputs = 64
        for stage in range(max(config.stages) + 1):
            blocks = []
            for block in range(table.blocks[stage]):
                stride = 2 if block == 0 and stage > 0 else 1
                # the published code has a convolution in the shortcut of every stage's first block, needed or not
                blocks.append(
                    Residual(
                        inputs, _WIDTHS[stage], stride, bottleneck=table.bottleneck, shortcut=block == 0, frozen=frozen
                    )
                )
                inputs = table.channels[stage]
            self.stages.append(nn.Sequential(*blocks))
        self.initialize(config.freeze_stem)
