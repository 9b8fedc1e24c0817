"""HGNetv2 backbones (PP-HGNetV2; D-FINE spec 1.1): a table of stages and the few blocks that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from finedetr.errors import ConfigError, did_you_mean
from finedetr.model.config import BackboneConfig
from finedetr.model.layers import Backbone, ConvNorm, join

__all__ = ["HGNETS", "HGNet", "HGNetTable"]


@dataclass(frozen=True)
class StageRow:
    """One stage: channels in, inside and out, blocks, whether it halves the map, light layers, kernel, layers."""

    inputs: int
    middle: int
    outputs: int
    blocks: int
    downsample: bool
    light: bool
    kernel: int
    layers: int


@dataclass(frozen=True)
class HGNetTable:
    """The widths of the stem and the rows of the stages."""

    stem: tuple[int, int]
    stages: tuple[StageRow, ...]

    @property
    def channels(self) -> tuple[int, ...]:
        """Of the map of each stage."""
        return tuple(row.outputs for row in self.stages)


def _table(
    stem: tuple[int, int], layers: int, rows: tuple[tuple[int, int, int, int], ...], kernel: int = 5
) -> HGNetTable:
    """Rows of (in, mid, out, blocks); what is the same in all published sizes is filled in here."""
    return HGNetTable(
        stem,
        tuple(
            StageRow(*row, downsample=index > 0, light=index > 1, kernel=kernel if index > 1 else 3, layers=layers)
            for index, row in enumerate(rows)
        ),
    )


HGNETS: dict[str, HGNetTable] = {
    "B0": _table((16, 16), 3, ((16, 16, 64, 1), (64, 32, 256, 1), (256, 64, 512, 2), (512, 128, 1024, 1))),
    "B1": _table((24, 32), 3, ((32, 32, 64, 1), (64, 48, 256, 1), (256, 96, 512, 2), (512, 192, 1024, 1))),
    "B2": _table((24, 32), 4, ((32, 32, 96, 1), (96, 64, 384, 1), (384, 128, 768, 3), (768, 256, 1536, 1))),
    "B3": _table((24, 32), 5, ((32, 32, 128, 1), (128, 64, 512, 1), (512, 128, 1024, 3), (1024, 256, 2048, 1))),
    "B4": _table((32, 48), 6, ((48, 48, 128, 1), (128, 96, 512, 1), (512, 192, 1024, 3), (1024, 384, 2048, 1))),
    "B5": _table((32, 64), 6, ((64, 64, 128, 1), (128, 128, 512, 2), (512, 256, 1024, 5), (1024, 512, 2048, 2))),
    "B6": _table((48, 96), 6, ((96, 96, 192, 2), (192, 192, 512, 3), (512, 384, 1024, 6), (1024, 768, 2048, 3))),
    # DEIMv2's smallest end at stride 16
    "Atto": _table((16, 16), 3, ((16, 16, 64, 1), (64, 32, 256, 1), (256, 64, 256, 1)), kernel=3),
    "Femto": _table((16, 16), 3, ((16, 16, 64, 1), (64, 32, 256, 1), (256, 64, 512, 1))),
    "Pico": _table((16, 16), 3, ((16, 16, 64, 1), (64, 32, 256, 1), (256, 64, 512, 2))),
}


class Stem(nn.Module):
    """Stride 4: a 3×3 convolution, a pooled and a convolved branch side by side, and two more convolutions."""

    def __init__(self, middle: int, outputs: int, *, affine: bool, frozen: bool) -> None:
        super().__init__()
        self.stem1 = ConvNorm(3, middle, 3, 2, act="relu", affine=affine, frozen=frozen)
        self.stem2a = ConvNorm(middle, middle // 2, 2, padding=0, act="relu", affine=affine, frozen=frozen)
        self.stem2b = ConvNorm(middle // 2, middle, 2, padding=0, act="relu", affine=affine, frozen=frozen)
        self.stem3 = ConvNorm(2 * middle, middle, 3, 2, act="relu", affine=affine, frozen=frozen)
        self.stem4 = ConvNorm(middle, outputs, 1, act="relu", affine=affine, frozen=frozen)

    def forward(self, x: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D H4 W4"]:
        """Pictures to the first feature map."""
        x = F.pad(self.stem1(x), (0, 1, 0, 1))
        convolved = self.stem2b(F.pad(self.stem2a(x), (0, 1, 0, 1)))
        pooled = F.max_pool2d(x, 2, 1)  # the official ceil_mode changes nothing at stride 1
        out: Tensor = self.stem4(self.stem3(join((pooled, convolved))))
        return out


class LightLayer(nn.Module):
    """A pointwise convolution without activation, then a depthwise one with it."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, affine: bool, frozen: bool) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, 1, frozen=frozen)
        self.conv2 = ConvNorm(outputs, outputs, kernel, groups=outputs, act="relu", affine=affine, frozen=frozen)

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E H W"]:
        """One feature map to the next."""
        out: Tensor = self.conv2(self.conv1(x))
        return out


class Block(nn.Module):
    """Layers one after another, all of their outputs joined, squeezed and expanded again."""

    def __init__(self, row: StageRow, inputs: int, *, residual: bool, affine: bool, frozen: bool) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for index in range(row.layers):
            channels = inputs if index == 0 else row.middle
            if row.light:
                layers.append(LightLayer(channels, row.middle, row.kernel, affine=affine, frozen=frozen))
            else:
                layers.append(ConvNorm(channels, row.middle, row.kernel, act="relu", affine=affine, frozen=frozen))
        self.layers = nn.ModuleList(layers)
        total = inputs + row.layers * row.middle
        self.squeeze = ConvNorm(total, row.outputs // 2, act="relu", affine=affine, frozen=frozen)
        self.expand = ConvNorm(row.outputs // 2, row.outputs, act="relu", affine=affine, frozen=frozen)
        self.residual = residual

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E H W"]:
        """One feature map to the next."""
        maps = [x]
        for layer in self.layers:
            maps.append(layer(maps[-1]))
        out: Tensor = self.expand(self.squeeze(join(maps)))
        return out + x if self.residual else out


class Stage(nn.Module):
    """An optional depthwise downsampling, then blocks; all but the first add their input."""

    def __init__(self, row: StageRow, *, affine: bool, frozen: bool) -> None:
        super().__init__()
        self.downsample = (
            ConvNorm(row.inputs, row.inputs, 3, 2, groups=row.inputs, frozen=frozen) if row.downsample else None
        )
        self.blocks = nn.ModuleList(
            Block(row, row.inputs if i == 0 else row.outputs, residual=i > 0, affine=affine, frozen=frozen)
            for i in range(row.blocks)
        )

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E H2 W2"]:
        """One feature map to the next."""
        if self.downsample is not None:
            x = self.downsample(x)
        for block in self.blocks:
            x = block(x)
        return x


class HGNet(Backbone):
    """HGNetv2."""

    def __init__(self, config: BackboneConfig) -> None:
        if config.name not in HGNETS:
            raise ConfigError(f"no HGNetv2 is called {config.name!r}", hint=did_you_mean(config.name, HGNETS))
        table = HGNETS[config.name]
        frozen = config.freeze_norm
        super().__init__(config.stages, table.channels)
        self.stem = Stem(*table.stem, affine=config.affine, frozen=frozen)
        self.stages = nn.ModuleList(
            Stage(row, affine=config.affine, frozen=frozen) for row in table.stages[: max(config.stages) + 1]
        )
        self.initialize(config.freeze_stem, config.freeze_stages)
