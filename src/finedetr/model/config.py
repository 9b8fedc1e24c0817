"""What a detector is made of: frozen dataclasses. `zoo.py` holds the published rows."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal

from finedetr.errors import ConfigError

__all__ = [
    "BackboneConfig",
    "DecoderConfig",
    "EncoderConfig",
    "Fusion",
    "Joining",
    "ModelConfig",
    "SalientConfig",
    "Source",
    "SplitConfig",
]

Fusion = Literal["elan", "csp", "sum-elan4", "sum-elan5", "lite", "single", "deformable"]
"""How two levels are joined: D-FINE's blocks, RT-DETR's, DEIMv2's two on sums, or without attention (`LiteEncoder`).

In the classic DETRs there is a single level, or the levels look at one another by deformable attention.
"""

Source = Literal["tokens", "points", "anchors", "proposals", "mixed"]
"""Where queries come from.

tokens: the best tokens are content and boxes (RT-DETR family). points: learned content, position and point (Conditional
DETR, Deformable DETR). anchors: learned content and boxes (DAB-DETR). proposals: the boxes of the best tokens, from
which content and position are made (Deformable DETR in two stages). mixed: these boxes, learned content (DINO).
"""

Joining = Literal["none", "token", "channel", "fused", "apart"]
"""How the self-attention of a split decoder sees its two branches (SD-DETR, spec 3.2).

none: the decoder is not split. token: as twice as many tokens. channel: as tokens of twice the width. fused: as the
mean of both, learned from there on; no dearer than without. apart: each branch has its own, the whole decoder is split.
"""


@dataclass(frozen=True)
class BackboneConfig:
    """A backbone: its name in the table of `hgnet.py`, `resnet.py` or `vit.py`, and what of it is used."""

    name: str = "B0"
    affine: bool = True  # learnable affine blocks after each activation (HGNetv2)
    stages: tuple[int, ...] = (1, 2, 3)  # indices of the returned stages, strides 4·2^i
    freeze_stem: bool = False
    freeze_norm: bool = False
    freeze_stages: int = 0  # first stages that are not trained
    dilated: bool = False  # the last stage keeps its size and looks further apart instead (DC5)


@dataclass(frozen=True)
class EncoderConfig:
    """The hybrid encoder of the RT-DETR family, the lite one of DEIMv2's smallest sizes, or a classic transformer."""

    width: int = 256  # h
    feedforward: int = 1024
    expansion: float = 1.0
    depth: float = 1.0
    layers: int = 1  # of the transformer on the coarsest level
    heads: int = 8
    fusion: Fusion = "elan"
    extra_levels: int = 0  # deformable: levels made of the coarsest map by convolutions of stride 2
    temperature: float = 10000.0  # of the cells' sine code; this and what follows: of the classic encoders only
    centered: bool = False  # the code of the cells' centers instead of their far edges
    scaled: bool = False  # each layer stretches the code by what a token has seen (DAB-DETR)
    activation: Literal["relu", "prelu"] = "relu"
    dropout: float = 0.0


@dataclass(frozen=True)
class SplitConfig:
    """Branches of the decoder for classes and for boxes, with attention to the pyramid and feed-forward each."""

    joining: Joining = "none"
    queries: Literal["shared", "own"] = "shared"  # what the branches start from; own: where learned, twice, and where
    # a token or a box makes a query, moved by a linear layer that begins with zero
    shared_memory: bool = True  # one projection of the pyramid for both, where the attention has any
    shared_norm: bool = False  # of the norm before the heads
    modulation: Literal["boxes", "own"] = "boxes"  # which state stretches the spatial queries of conditional attention
    half: bool = False  # feed-forward networks of half the width: as many parameters as before, and a fresh start


@dataclass(frozen=True)
class SalientConfig:
    """Queries made of each picture's salient points, in the place of learned ones (SD-DETR, spec 3.3)."""

    queries: bool = False
    points: int = 8  # of each query and task
    roi: int = 7  # a box is read at so many places a side
    tower: Literal["conv", "mlp", "linear"] = "conv"  # of the small detector that finds the boxes
    weight: float = 1.0  # of the small detector's losses
    detached: bool = True  # losses of the decoder do not reach the boxes, which the small detector's own teach


@dataclass(frozen=True)
class DecoderConfig:
    """The decoder. The defaults are D-FINE's; RT-DETRv2 has plain boxes, projected attention, no gateway.

    DEIMv2 has root-mean-square norms, gated feed-forward networks, and positions that are made once. The classic DETRs
    differ in where queries come from, how they look at the pyramid, and which boxes the next layer looks at.
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
    activation: Literal["relu", "silu", "prelu"] = "relu"  # DEIM: silu; DAB-DETR: prelu in the layers
    boxes: Literal["distributions", "plain"] = "distributions"  # refined as four distributions (FDR), or as numbers
    projected: bool = False  # linear layers before and behind the deformable attention
    sampling: Literal["bilinear", "discrete"] = "bilinear"  # of the pyramid; discrete: at one cell, RT-DETRv2's "dsp"
    gateway: bool = True  # of what a query was and what it saw; otherwise a sum and a norm
    position_layers: int = 2  # of the network that makes a position of a box: 2 of twice the width, or 3
    position_limit: float | None = 10.0  # where positions are cut off
    position_once: bool = False  # of the initial reference, for all layers; otherwise of each layer's reference
    norm: Literal["layer", "rms"] = "layer"
    gated: bool = False  # feed-forward networks as SwiGLU, whose inner width is half of `feedforward`
    shared_boxes: bool = False  # one head of boxes or edges for all layers
    shared_scores: bool = False  # one head of classes for all layers
    select_raw: bool = False  # tokens are scored, and become queries, as they are, without a projection
    project_memory: bool = False  # a projection of the pyramid even where the widths are equal
    answering: int | None = None  # layers that run outside training; None: all
    source: Source = "tokens"
    attention: Literal["deformable", "conditional"] = "deformable"  # of queries to the pyramid
    refine: bool = True  # a layer looks at the box that the one before answered; otherwise all look at the first
    look_twice: bool = True  # plain boxes: the loss of a box reaches the layer before, too (DINO)
    final_norm: bool = False  # a norm between the layers' states and the heads
    logit_margin: float = 1e-5  # how near to 0 and 1 a reference may come before its logit is taken
    dropout: float = 0.0
    split: SplitConfig = field(default_factory=SplitConfig)
    salient: SalientConfig = field(default_factory=SalientConfig)

    @property
    def head_activation(self) -> str:
        """Of all networks that are not the layers' feed-forward ones."""
        return "relu" if self.activation == "prelu" else self.activation

    @property
    def selects(self) -> bool:
        """Whether queries come from cells of the pyramid; otherwise they are learned, the same for all pictures."""
        return self.source in ("tokens", "mixed", "proposals")

    @property
    def queries_are_learned(self) -> bool:
        """Whether each query has tensors of its own, so that their number belongs to the weights."""
        return self.source not in ("tokens", "proposals") and not self.salient.queries

    @property
    def boxes_are_queries(self) -> bool:
        """Whether a box and a label make a query, as denoising has them; otherwise queries bring their positions."""
        return self.source in ("tokens", "anchors", "mixed")


_AT_LEAST_ONE = ("width", "feedforward", "layers", "heads", "queries")


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
        strides = self._backbone_strides
        extra = 1 if self.encoder.fusion == "lite" else self.encoder.extra_levels
        return (*strides, *(strides[-1] * 2**level for level in range(1, extra + 1)))

    @property
    def largest_stride(self) -> int:
        """What height and width of the input must be multiples of; levels of a deformable encoder round up."""
        return self.strides[-1] if self.encoder.fusion == "lite" else self._backbone_strides[-1]

    @property
    def classic(self) -> bool:
        """Whether it is one of the hosts before the real-time family: Conditional, Deformable and DAB-DETR, DINO."""
        return self.encoder.fusion in ("single", "deformable")

    @property
    def whole(self) -> ModelConfig:
        """The same host without the parts of SD-DETR."""
        return replace(self, decoder=replace(self.decoder, split=SplitConfig(), salient=SalientConfig()))

    @property
    def _backbone_strides(self) -> tuple[int, ...]:
        dilated = self.backbone.dilated
        return tuple(16 if dilated and stage == 3 else 4 * 2**stage for stage in self.backbone.stages)

    def __post_init__(self) -> None:
        for part, names in (("encoder", ("width", "feedforward", "heads")), ("decoder", _AT_LEAST_ONE)):
            for name in names:
                value = getattr(getattr(self, part), name)
                if value < 1:
                    raise ConfigError(f"{part}.{name}: at least 1 is wanted, {value} came", code="range")
        if not self.backbone.stages or min(self.decoder.points, default=0) < 1:
            raise ConfigError(
                "at least one of backbone.stages, and one point of each of decoder.points, are wanted; "
                f"got {self.backbone.stages} and {self.decoder.points}",
                code="range",
            )
        if self.encoder.fusion == "lite" and len(self.backbone.stages) != 1:
            raise ConfigError(f"the lite encoder reads one stage of the backbone; got {self.backbone.stages}")
        single = self.decoder.attention == "conditional" or self.encoder.fusion == "single"
        if single and len(self.strides) != 1:
            raise ConfigError(f"conditional attention and a single encoder see one level; got strides {self.strides}")
        if self.decoder.attention == "conditional" and self.decoder.source not in ("points", "anchors"):
            raise ConfigError(f"conditional attention has learned queries; got decoder.source={self.decoder.source!r}")
        if self.decoder.source == "anchors" and self.decoder.attention != "conditional":
            raise ConfigError("learned boxes go with conditional attention, as in DAB-DETR; got deformable attention")
        if self.encoder.extra_levels and self.encoder.fusion != "deformable":
            raise ConfigError(f"a deformable encoder has extra_levels; got them with fusion={self.encoder.fusion!r}")
        if len(self.decoder.points) != len(self.strides):
            raise ConfigError(
                f"decoder.points names {len(self.decoder.points)} levels, the pyramid has {len(self.strides)}; "
                "give one number of points for each level"
            )
        answering = self.decoder.answering
        if answering is not None and not 1 <= answering <= self.decoder.layers:
            raise ConfigError(f"decoder.answering must lie in 1..{self.decoder.layers} (its layers); got {answering}")
        if self.decoder.position_layers not in (2, 3):
            raise ConfigError(f"decoder.position_layers must be 2 or 3; got {self.decoder.position_layers}")
        split = self.decoder.split
        if split.joining == "none" and split != SplitConfig():
            raise ConfigError(
                f"decoder.split describes two branches, and split.joining is 'none'; got {split}",
                hint="Such as --model.decoder.split.joining token, or --with sd-split before it.",
            )
        if self.decoder.salient.queries:
            self._check_salient(self.decoder.salient)
        if self.decoder.bins % 2 == 0:
            raise ConfigError(f"decoder.bins must be odd, so that one bin means 'do not move'; got {self.decoder.bins}")
        for part, width, heads in (
            ("encoder", self.encoder.width, self.encoder.heads),
            ("decoder", self.decoder.width, self.decoder.heads),
        ):
            if width % heads or width % 4:
                raise ConfigError(f"{part}.width must be a multiple of its {heads} heads and of 4; got {width}")

    def _check_salient(self, salient: SalientConfig) -> None:
        if self.decoder.source not in ("points", "anchors"):
            raise ConfigError(
                f"salient points take the place of learned queries; got decoder.source={self.decoder.source!r}",
                hint="Where tokens are queries, branches have their own with --model.decoder.split.queries own.",
            )
        if self.decoder.width % 32 or salient.points < 1 or salient.roi < 1:
            raise ConfigError(
                "decoder.salient wants a decoder.width that is a multiple of 32, and points and roi from 1; got "
                f"{self.decoder.width}, {salient.points} and {salient.roi}"
            )
