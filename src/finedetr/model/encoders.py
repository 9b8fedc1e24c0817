"""Backbone maps to a pyramid: the hybrid encoder of the RT-DETR family, and DEIMv2's lite one (spec 1.3, 1.7)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from finedetr.errors import ConfigError
from finedetr.model.attention import SelfAttention
from finedetr.model.config import EncoderConfig
from finedetr.model.layers import ConvNorm, join, kept
from finedetr.model.token_encoders import DeformableEncoder, EncoderLayer, SingleEncoder

__all__ = ["Halve", "HybridEncoder", "LiteEncoder", "RepConv", "build_encoder", "sine_positions"]


@kept
def sine_positions(height: int, width: int, channels: int, device: torch.device) -> Float[Tensor, "T D"]:
    """Two-dimensional sine code of every cell, row after row: [sin row, cos row, sin column, cos column].

    The official code orders its grid column after row while features run row after column; on squares this table
    equals it, on rectangles the official positions are scrambled and this one is not (spec 1.3).
    """
    quarter = channels // 4
    omega = 1.0 / 10000.0 ** (torch.arange(quarter, dtype=torch.float64) / quarter)
    rows = torch.arange(height, dtype=torch.float64)[:, None] * omega
    columns = torch.arange(width, dtype=torch.float64)[:, None] * omega
    rows = torch.cat((rows.sin(), rows.cos()), dim=1)[:, None].expand(height, width, 2 * quarter)
    columns = torch.cat((columns.sin(), columns.cos()), dim=1)[None].expand(height, width, 2 * quarter)
    return torch.cat((rows, columns), dim=-1).reshape(height * width, channels).float().to(device)


class RepConv(nn.Module):
    """A 3×3 and a 1×1 convolution, each with its norm, added and activated; one 3×3 convolution once fused."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(channels, channels, 3)
        self.conv2: ConvNorm | None = ConvNorm(channels, channels, 1)  # None once merged into the first

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        """One feature map to the next."""
        return F.silu(self.conv1(x) if self.conv2 is None else self.conv1(x) + self.conv2(x))


class CSPLayer(nn.Module):
    """A branch of `RepConv` blocks beside a plain one, `expansion` times as wide inside as its outputs."""

    def __init__(self, inputs: int, outputs: int, blocks: int, expansion: float = 1.0) -> None:
        super().__init__()
        hidden = int(outputs * expansion)
        self.conv1 = ConvNorm(inputs, hidden, act="silu")
        self.conv2 = ConvNorm(inputs, hidden, act="silu")
        self.bottlenecks = nn.Sequential(*(RepConv(hidden) for _ in range(blocks)))
        self.conv3 = ConvNorm(hidden, outputs, act="silu") if hidden != outputs else None

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E H W"]:
        """One feature map to the next."""
        out: Tensor = self.bottlenecks(self.conv1(x)) + self.conv2(x)
        return out if self.conv3 is None else self.conv3(out)


class JointCSPLayer(nn.Module):
    """A `CSPLayer` without expansion whose two entrances are one convolution (DEIMv2)."""

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, 2 * outputs, act="silu")
        self.bottlenecks = nn.Sequential(*(RepConv(outputs) for _ in range(blocks)))

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E H W"]:
        """One feature map to the next."""
        plain, branch = self.conv1(x).chunk(2, dim=1)
        out: Tensor = plain + self.bottlenecks(branch)
        return out


class RepNCSPELAN(nn.Module):
    """D-FINE's fusion block: two halves, two CSP branches one after the other, everything joined.

    Args:
        inputs: Channels in.
        width: Channels out.
        branch: Channels of a branch.
        blocks: `RepConv` blocks of a branch.
        joint: Branches are `JointCSPLayer`s.
        tail: A 3x3 convolution ends each branch (RepNCSPELAN4), or none does (RepNCSPELAN5).
    """

    def __init__(
        self, inputs: int, width: int, branch: int, blocks: int, *, joint: bool = False, tail: bool = True
    ) -> None:
        super().__init__()
        csp = JointCSPLayer if joint else CSPLayer

        def path(inputs: int) -> nn.Sequential:
            ends = [ConvNorm(branch, branch, 3, act="silu")] if tail else []
            return nn.Sequential(csp(inputs, branch, blocks), *ends)

        self.cv1 = ConvNorm(inputs, 2 * width, act="silu")
        self.cv2, self.cv3 = path(width), path(branch)
        self.cv4 = ConvNorm(2 * width + 2 * branch, width, act="silu")

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E H W"]:
        """One feature map to the next."""
        halves = self.cv1(x)
        first = self.cv2(halves.chunk(2, dim=1)[1])
        out: Tensor = self.cv4(join((halves, first, self.cv3(first))))
        return out


class SCDown(nn.Module):
    """Halves a map: a pointwise convolution, then a depthwise one of stride 2, no activation."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.cv1 = ConvNorm(channels, channels)
        self.cv2 = ConvNorm(channels, channels, 3, 2, groups=channels)

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H2 W2"]:
        """One feature map to the next."""
        out: Tensor = self.cv2(self.cv1(x))
        return out


def _fusion(config: EncoderConfig) -> CSPLayer | RepNCSPELAN:
    """What joins two levels."""
    width, blocks = config.width, round(3 * config.depth)
    branch = round(config.expansion * width // 2)  # banker's rounding of an integral value: as published
    match config.fusion:
        case "csp":
            return CSPLayer(2 * width, width, blocks, config.expansion)
        case "elan":
            return RepNCSPELAN(2 * width, width, branch, blocks)
        case "sum-elan4" | "lite":
            return RepNCSPELAN(width, width, branch, blocks, joint=True)
        case "sum-elan5":
            return RepNCSPELAN(width, width, branch, blocks, joint=True, tail=False)
        case "single" | "deformable":
            raise ConfigError(f"the hybrid encoder has no fusion {config.fusion!r}")


class HybridEncoder(nn.Module):
    """Backbone maps to a pyramid of equal width. Any height and width whose strides divide them works."""

    def __init__(self, config: EncoderConfig, channels: tuple[int, ...]) -> None:
        super().__init__()
        width = config.width
        levels = len(channels)
        self.width = width
        self.sums = config.fusion.startswith("sum-")
        self.input_proj = nn.ModuleList(
            nn.Identity() if self.sums and inputs == width else ConvNorm(inputs, width) for inputs in channels
        )
        self.layers = nn.ModuleList(
            EncoderLayer(SelfAttention(width, config.heads), width, config.feedforward) for _ in range(config.layers)
        )
        act = "silu" if config.fusion == "csp" else None
        steps = range(levels - 1)
        self.lateral_convs = nn.ModuleList(ConvNorm(width, width, act=act) for _ in steps)
        self.fpn_blocks = nn.ModuleList(_fusion(config) for _ in steps)
        self.downsample_convs = nn.ModuleList(
            ConvNorm(width, width, 3, 2, act=act) if config.fusion == "csp" else SCDown(width) for _ in steps
        )
        self.pan_blocks = nn.ModuleList(_fusion(config) for _ in steps)

    def enter(self, maps: tuple[Float[Tensor, "B _ H W"], ...]) -> tuple[Float[Tensor, "B E H W"], ...]:
        """The backbone's maps in the encoder's width."""
        return tuple(project(x) for project, x in zip(self.input_proj, maps, strict=True))

    def forward(self, maps: tuple[Float[Tensor, "B E H W"], ...]) -> tuple[Float[Tensor, "B E H W"], ...]:
        """One map for each level, finest first, at the sizes of the inputs, which `enter` made."""
        levels = list(maps)
        levels[-1] = self._attend(levels[-1])
        current, entries = levels[-1], []
        for index, low in enumerate(reversed(levels[:-1])):  # top-down
            current = self.lateral_convs[index](current)
            entries.append(current)
            up = F.interpolate(current, scale_factor=2.0, mode="nearest")
            current = self.fpn_blocks[index](self._join(up, low))
        outputs = [current]
        for index, entry in enumerate(reversed(entries)):  # bottom-up
            down = self.downsample_convs[index](outputs[-1])
            outputs.append(self.pan_blocks[index](self._join(down, entry)))
        return tuple(outputs)

    def _join(self, moved: Tensor, here: Tensor) -> Tensor:
        return moved + here if self.sums else join((moved, here))

    def _attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        positions = sine_positions(int(height), int(width), self.width, x.device)
        for layer in self.layers:
            tokens = layer(tokens, positions)
        out: Tensor = tokens.unflatten(1, (height, width)).permute(0, 3, 1, 2)
        return out


class Halve(nn.Module):
    """Halves a map by averages of 3x3 pixels, the border counted as zeros."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.project = ConvNorm(channels, channels, act="silu")

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H2 W2"]:
        """One feature map to the next."""
        out: Tensor = self.project(F.avg_pool2d(x, 3, 2, 1))
        return out


class LiteEncoder(nn.Module):
    """DEIMv2's encoder for its smallest sizes: one map in, two out, and no attention but a global mean."""

    def __init__(self, config: EncoderConfig, channels: tuple[int, ...]) -> None:
        super().__init__()
        width = config.width
        self.input_proj = nn.ModuleList([ConvNorm(channels[0], width)])
        self.down1, self.down2 = Halve(width), Halve(width)
        self.mix = ConvNorm(width, width, act="silu")
        self.fpn_block, self.pan_block = _fusion(config), _fusion(config)

    def enter(self, maps: tuple[Float[Tensor, "B _ H W"], ...]) -> tuple[Float[Tensor, "B E H W"], ...]:
        """The backbone's map in the encoder's width."""
        return (self.input_proj[0](maps[0]),)

    def forward(self, maps: tuple[Float[Tensor, "B E H W"], ...]) -> tuple[Float[Tensor, "B E H W"], ...]:
        """A map of the size of the input, and one of half of it."""
        (fine,) = maps
        coarse = self.down1(fine)
        coarse = self.mix(coarse + coarse.mean(dim=(2, 3), keepdim=True))
        fine = self.fpn_block(fine + F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        return fine, self.pan_block(coarse + self.down2(fine))


def build_encoder(
    config: EncoderConfig, channels: tuple[int, ...]
) -> HybridEncoder | LiteEncoder | SingleEncoder | DeformableEncoder:
    """The encoder that a configuration names, for backbone maps of so many channels."""
    match config.fusion:
        case "lite":
            return LiteEncoder(config, channels)
        case "single":
            return SingleEncoder(config, channels)
        case "deformable":
            return DeformableEncoder(config, channels)
        case _:
            return HybridEncoder(config, channels)
