"""ResNet backbones: ResNet-vd of the RT-DETR family (spec 1.2), and the plain ones of the classic DETRs.

"vd": a stem of three convolutions, pooled shortcuts. Plain: as torchvision has them, whose weights fit.
"""

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
    plain: bool = False  # not "vd"

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the map of each stage."""
        return tuple((4 if self.bottleneck else 1) * width for width in _WIDTHS)


RESNETS: dict[str, ResNetTable] = {
    "R18": ResNetTable((2, 2, 2, 2), bottleneck=False),
    "R34": ResNetTable((3, 4, 6, 3), bottleneck=False),
    "R50": ResNetTable((3, 4, 6, 3), bottleneck=True),
    "R101": ResNetTable((3, 4, 23, 3), bottleneck=True),
    "resnet50": ResNetTable((3, 4, 6, 3), bottleneck=True, plain=True),
    "resnet101": ResNetTable((3, 4, 23, 3), bottleneck=True, plain=True),
}


class Residual(nn.Module):
    """Two 3×3 convolutions, or 1×1, 3×3 and 1×1, and what came in.

    Where the map halves, the shortcut of a ResNet-vd is averaged before its 1×1 convolution (He et al., 2019); that of
    a plain one has a stride.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        stride: int,
        table: ResNetTable,
        *,
        shortcut: bool,
        frozen: bool,
        dilation: int = 1,
    ) -> None:
        super().__init__()
        outputs = 4 * width if table.bottleneck else width
        if table.bottleneck:
            self.convs = nn.Sequential(
                ConvNorm(inputs, width, act="relu", frozen=frozen),
                ConvNorm(width, width, 3, stride, dilation=dilation, act="relu", frozen=frozen),
                ConvNorm(width, outputs, frozen=frozen),
            )
        else:
            self.convs = nn.Sequential(
                ConvNorm(inputs, width, 3, stride, dilation=dilation, act="relu", frozen=frozen),
                ConvNorm(width, width, 3, dilation=dilation, frozen=frozen),
            )
        self.pools = stride == 2 and not table.plain
        self.shortcut = ConvNorm(inputs, outputs, 1, 1 if self.pools else stride, frozen=frozen) if shortcut else None

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E H2 W2"]:
        """One feature map to the next."""
        added = x
        if self.shortcut is not None:
            added = self.shortcut(F.avg_pool2d(x, 2, 2, ceil_mode=True) if self.pools else x)
        return F.relu(self.convs(x) + added)


class ResNet(Backbone):
    """ResNet-vd, or a plain ResNet."""

    def __init__(self, config: BackboneConfig) -> None:
        if config.name not in RESNETS:
            raise ConfigError(f"no ResNet is called {config.name!r}", hint=did_you_mean(config.name, RESNETS))
        table, frozen = RESNETS[config.name], config.freeze_norm
        super().__init__(config.stages, table.channels)
        stem = (
            (ConvNorm(3, 64, 7, 2, act="relu", frozen=frozen),)
            if table.plain
            else (
                ConvNorm(3, 32, 3, 2, act="relu", frozen=frozen),
                ConvNorm(32, 32, 3, act="relu", frozen=frozen),
                ConvNorm(32, 64, 3, act="relu", frozen=frozen),
            )
        )
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        self.stages = nn.ModuleList()
        inputs = 64
        for stage in range(max(config.stages) + 1):
            outputs, dilated = table.channels[stage], config.dilated and stage == 3
            blocks = []
            for block in range(table.blocks[stage]):
                stride = 2 if block == 0 and stage > 0 and not dilated else 1
                # vd: the published code has a convolution in the shortcut of every stage's first block, needed or not
                needed = stride == 2 or inputs != outputs
                blocks.append(
                    Residual(
                        inputs,
                        _WIDTHS[stage],
                        stride,
                        table,
                        shortcut=needed if table.plain else block == 0,
                        frozen=frozen,
                        dilation=2 if dilated and block > 0 else 1,  # as torchvision: the first looks as far as before
                    )
                )
                inputs = outputs
            self.stages.append(nn.Sequential(*blocks))
        self.initialize(config.freeze_stem, config.freeze_stages)
