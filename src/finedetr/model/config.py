"""What a detector is made of: frozen dataclasses. `zoo.py` holds the published rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from finedetr.errors import ConfigError

__all__ = ["BackboneConfig", "DecoderConfig", "EncoderConfig", "Fusion", "ModelConfig"]

Fusion = Literal["elan", "csp", "sum-elan4", "sum-elan5", "lite"]
"""How two levels are joined: D-FINE's blocks, RT-DETR's, DEIMv2's two on sums, or without attention (`LiteEncoder`)."""


@dataclass(frozen=True)
class BackboneConfig:
    """A backbone: its name in the table of `hgnet.py`, `resnet.py` or `vit.py`, and what of it is used."""

    name: str = "B0"
    affine: bool = True  # learnable affine blocks after each activation (HGNetv2)
    stages: tuple[int, ...] = (1, 2, 3)  # indices of the returned stages, strides 4·2^i
    freeze_stem: bool = False
    freeze_norm: bool = False


@dataclass(frozen=True)
class EncoderConfig:
    """The hybrid encoder of the RT-DETR family, or the lite one of DEIMv2's smallest sizes."""

    width: int = 256  # h
    feedforward: int = 1024
    expansion: float = 1.0
    depth: float = 1.0
    layers: int = 1  # of the transformer on the coarsest level
    heads: int = 8
    fusion: Fusion = "elan"


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder. The defaults are D-FINE's; RT-DETRv2 has plain boxes, projected attention, no gateway.

    DEIMv2 has root-mean-square norms, gated feed-forward networks, and positions that are made once.
    """

    width: int = 256  # d
    feedforward: int = 1024
    layers: int = 6
    heads: int = 8
    points: tuple[int, ...] = (3, 6, 3)  # sampling points of each level
    queries: int = 300
    bins: int = 33
    scale: float = 4.0  # reg_scale
    up: float = 0.5
    activation: Literal["relu", "silu"] = "relu"  # DEIM: silu
    boxes: Literal["distributions", "plain"] = "distributions"  # refined as four distributions (FDR), or as numbers
    projected: bool = False  # linear layers before and behind the deformable attention
    sampling: Literal["bilinear", "discrete"] = "bilinear"  # of the pyramid; discrete: at one cell, RT-DETRv2's "dsp"
    gateway: bool = True  # of what a query was and what it saw; otherwise a sum and a norm
    position_layers: int = 2  # of the network that makes a position of a box: 2 of twice the width, or 3
    position_limit: float | None = 10.0  # where positions are cut off
    position_once: bool = False  # of the initial reference, for all layers; otherwise of each layer's reference
    norm: Literal["layer", "rms"] = "layer"
    gated: bool = False  # feed-forward networks as SwiGLU, whose inner width is half of `feedforward`
    shared_boxes: bool = False  # one head of edges for all layers
    select_raw: bool = False  # tokens are scored, and become queries, as they are, without a projection
    project_memory: bool = False  # a projection of the pyramid even where the widths are equal
    answering: int | None = None  # layers that run outside training; None: all


@dataclass(frozen=True)
class ModelConfig:
    """A whole detector. The number of classes and the input size are not part of it."""

    name: str
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels of the input for each cell of each level."""
        strides = tuple(4 * 2**stage for stage in self.backbone.stages)
        return (*strides, 2 * strides[-1]) if self.encoder.fusion == "lite" else strides

    @property
    def largest_stride(self) -> int:
        """What height and width of the input must be multiples of."""
        return self.strides[-1]

    def __post_init__(self) -> None:
        if self.encoder.fusion == "lite" and len(self.backbone.stages) != 1:
            raise ConfigError(f"the lite encoder reads one stage of the backbone; got {self.backbone.stages}")
        if len(self.decoder.points) != len(self.strides):
            raise ConfigError(
                f"decoder.points names {len(self.decoder.points)} levels, the pyramid has {len(self.strides)}; "
                "give one number of points for each level"
            )
        if self.decoder.queries < 1:
            raise ConfigError(f"decoder.queries: at least 1 is wanted, {self.decoder.queries} came", code="range")
        answering = self.decoder.answering
        if answering is not None and not 1 <= answering <= self.decoder.layers:
            raise ConfigError(f"decoder.answering must lie in 1..{self.decoder.layers} (its layers); got {answering}")
        if self.decoder.position_layers not in (2, 3):
            raise ConfigError(f"decoder.position_layers must be 2 or 3; got {self.decoder.position_layers}")
        if self.decoder.bins % 2 == 0:
            raise ConfigError(f"decoder.bins must be odd, so that one bin means 'do not move'; got {self.decoder.bins}")
        for part, width, heads in (
            ("encoder", self.encoder.width, self.encoder.heads),
            ("decoder", self.decoder.width, self.decoder.heads),
        ):
            if width % heads or width % 4:
                raise ConfigError(f"{part}.width must be a multiple of its {heads} heads and of 4; got {width}")
