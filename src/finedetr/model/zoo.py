"""The table of variants: a name and what it is made of. A literal, not a registry."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finedetr.errors import UsageError, did_you_mean
from finedetr.model.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig, Source
from finedetr.model.resnet import RESNETS
from finedetr.model.vit import VITS

__all__ = ["ZOO", "Input", "published_input", "variant"]

# D-FINE, spec 1.4 (Peterande/D-FINE, configs/dfine); queries 300 and bins 33 everywhere.
_DFINE = (
    ModelConfig(
        "dfine-n",
        BackboneConfig("B0", affine=True, stages=(2, 3)),
        EncoderConfig(width=128, feedforward=512, expansion=0.34, depth=0.5),
        DecoderConfig(width=128, feedforward=512, layers=3, points=(6, 6)),
    ),
    ModelConfig(
        "dfine-s",
        BackboneConfig("B0", affine=True),
        EncoderConfig(expansion=0.5, depth=0.34),
        DecoderConfig(layers=3),
    ),
    ModelConfig(
        "dfine-m",
        BackboneConfig("B2", affine=True),
        EncoderConfig(expansion=1.0, depth=0.67),
        DecoderConfig(layers=4),
    ),
    ModelConfig(
        "dfine-l",
        BackboneConfig("B4", affine=False, freeze_stem=True, freeze_norm=True),
        EncoderConfig(expansion=1.0, depth=1.0),
        DecoderConfig(layers=6),
    ),
    ModelConfig(
        "dfine-x",
        BackboneConfig("B5", affine=False, freeze_stem=True, freeze_norm=True),
        EncoderConfig(width=384, feedforward=2048, expansion=1.0, depth=1.0),
        DecoderConfig(layers=6, scale=8.0),
    ),
)

_PLAIN = DecoderConfig(
    layers=6,
    points=(4, 4, 4),
    boxes="plain",
    projected=True,
    gateway=False,
    position_limit=None,
    project_memory=True,
)


def _rtdetrv2(
    size: str, backbone: str, *, expansion: float = 1.0, wide: bool = False, layers: int = 6, frozen: bool = True
) -> ModelConfig:
    """RT-DETRv2, spec 1.6 (lyuwenyu/RT-DETR, rtdetrv2_pytorch); v1 is the same network."""
    return ModelConfig(
        f"rtdetrv2-{size}",
        BackboneConfig(backbone, affine=False, freeze_stem=frozen, freeze_norm=frozen),
        EncoderConfig(
            width=384 if wide else 256, feedforward=2048 if wide else 1024, expansion=expansion, fusion="csp"
        ),
        replace(_PLAIN, layers=layers),
    )


# DEIMv2, spec 1.7 (Intellindust-AI-Lab/DEIMv2): everything SiLU, no projection before the selection of queries
_V2 = DecoderConfig(
    norm="rms", gated=True, select_raw=True, position_once=True, position_layers=3, activation="silu", layers=4
)


def _deimv2_tiny(size: str, width: int, feedforward: int, queries: int) -> ModelConfig:
    """The three smallest: one map of the backbone, no attention in the encoder, one head of edges, no gateway."""
    return ModelConfig(
        f"deimv2-{size}",
        BackboneConfig(size.capitalize(), stages=(2,)),
        EncoderConfig(width=width, expansion=0.34, depth=0.5, fusion="lite"),
        replace(
            _V2,
            width=width,
            feedforward=feedforward,
            layers=3,
            points=(4, 2),
            queries=queries,
            gateway=False,
            shared_boxes=True,
        ),
    )


def _deimv2(
    size: str, backbone: str, width: int, feedforward: tuple[int, int], expansion: float, depth: float, layers: int = 4
) -> ModelConfig:
    """On vision transformers. `feedforward`: the encoder's and the decoder's."""
    return ModelConfig(
        f"deimv2-{size}",
        BackboneConfig(backbone),
        EncoderConfig(width, feedforward[0], expansion, depth, fusion="sum-elan5"),
        replace(_V2, width=width, feedforward=feedforward[1], layers=layers),
    )


def _deimv2_hgnet(host: ModelConfig) -> ModelConfig:
    """On the backbone and with the sizes of a D-FINE detector; the authors published no weights of these."""
    size = host.name.rpartition("-")[2]
    return ModelConfig(
        f"deimv2-hgnet-{size}",
        replace(host.backbone, freeze_stem=size == "x", freeze_norm=size == "x"),
        replace(host.encoder, fusion="sum-elan4" if size == "s" else "sum-elan5"),
        replace(_V2, feedforward=2048, layers=host.decoder.layers, scale=host.decoder.scale),
    )


_DEIMV2 = (
    _deimv2_tiny("atto", 64, 160, 100),
    _deimv2_tiny("femto", 96, 256, 150),
    _deimv2_tiny("pico", 112, 320, 200),
    ModelConfig(
        "deimv2-n",
        BackboneConfig("B0", stages=(2, 3)),
        EncoderConfig(128, 512, expansion=0.34, depth=0.5, fusion="sum-elan4"),
        replace(_V2, width=128, feedforward=512, layers=3, points=(6, 6)),
    ),
    _deimv2("s", "vit-tiny", 192, (512, 512), 0.34, 0.67),
    _deimv2("m", "vit-tiny-plus", 256, (512, 512), 0.67, 1.0),
    _deimv2("l", "dinov3-s", 224, (896, 1792), 1.0, 1.0),
    _deimv2("x", "dinov3-s-plus", 256, (1024, 2048), 1.25, 1.37, layers=6),
    *(_deimv2_hgnet(host) for host in _DFINE[1:]),
)

_RTDETRV2 = (
    _rtdetrv2("r18", "R18", expansion=0.5, layers=3, frozen=False),
    _rtdetrv2("r34", "R34", expansion=0.5, layers=4, frozen=False),
    _rtdetrv2("r50", "R50"),
    _rtdetrv2("r101", "R101", wide=True),
    _rtdetrv2("hgnet-l", "B4"),
    _rtdetrv2("hgnet-x", "B5", wide=True),
)
_H = replace(_rtdetrv2("hgnet-h", "B6"), encoder=EncoderConfig(width=512, feedforward=2048, layers=2, fusion="csp"))
# the middle size trains six layers and answers with the third
_R50M = replace(_rtdetrv2("r50-m", "R50", expansion=0.5), decoder=replace(_PLAIN, answering=3))
_DEIM_R50M = replace(_R50M, decoder=replace(_PLAIN, layers=3))  # DEIM's has three layers from the start


_DSP = tuple(  # discrete sampling (spec 1.6, `_dsp`), fine-tuned from the model's own weights
    replace(config, name=f"{config.name}-dsp", decoder=replace(config.decoder, sampling="discrete"))
    for config in (*_RTDETRV2[:3], _R50M)
)


def _deim(config: ModelConfig) -> ModelConfig:
    """DEIM's variant (spec 1.5): SiLU in the decoder and its heads, nothing of the backbone frozen.

    On RT-DETRv2 positions come from a network of three layers.
    """
    layers = 3 if config.decoder.boxes == "plain" else config.decoder.position_layers
    return replace(
        config,
        name=f"deim-{config.name}",
        backbone=replace(config.backbone, freeze_stem=False, freeze_norm=False),
        decoder=replace(config.decoder, activation="silu", position_layers=layers),
    )


_DEIM = tuple(
    _deim(config) for config in (*_DFINE, *(c for c in _RTDETRV2 if c.backbone.name.startswith("R")), _DEIM_R50M)
)

# The classic hosts, spec 2.2 - 2.4. Batches have no padding here, as all pictures are resized to one size.
_CLASSIC = DecoderConfig(feedforward=2048, boxes="plain", gateway=False, position_limit=None, dropout=0.1)


def _resnet(depth: int, *stages: int, dilated: bool = False) -> BackboneConfig:
    """As in torchvision, all norms and the first two parts at rest."""
    return BackboneConfig(
        f"resnet{depth}", False, stages, freeze_stem=True, freeze_norm=True, freeze_stages=1, dilated=dilated
    )


def _conditional(depth: int, *, dilated: bool = False) -> ModelConfig:
    """Conditional DETR (Meng et al., 2021)."""
    return ModelConfig(
        f"conditional-detr-r{depth}{'-dc5' if dilated else ''}",
        _resnet(depth, 3, dilated=dilated),
        EncoderConfig(feedforward=2048, layers=6, fusion="single", dropout=0.1),
        replace(
            _CLASSIC,
            points=(1,),
            source="points",
            attention="conditional",
            refine=False,
            final_norm=True,
            shared_scores=True,
            shared_boxes=True,
        ),
    )


def _deformable(
    suffix: str, source: Source, *, refine: bool, single: bool = False, dilated: bool = False
) -> ModelConfig:
    """Deformable DETR (Zhu et al., 2021)."""
    stages = (3,) if single else (1, 2, 3)
    return ModelConfig(
        f"deformable-detr-r50{suffix}",
        _resnet(50, *stages, dilated=dilated),
        EncoderConfig(layers=6, fusion="deformable", extra_levels=0 if single else 1, centered=True, dropout=0.1),
        replace(
            _CLASSIC,
            feedforward=1024,
            points=(4,) if single else (4, 4, 4, 4),
            projected=True,
            source=source,
            refine=refine,
            look_twice=False,
            shared_scores=not refine,
            shared_boxes=not refine,
        ),
    )


def _dab(depth: int, *, dilated: bool = False) -> ModelConfig:
    """DAB-DETR (Liu et al., 2022): Conditional DETR with boxes as queries, refined layer by layer."""
    host = _conditional(depth, dilated=dilated)
    return replace(
        host,
        name=host.name.replace("conditional", "dab"),
        encoder=replace(host.encoder, temperature=20.0, scaled=True, activation="prelu"),
        decoder=replace(host.decoder, source="anchors", refine=True, activation="prelu"),
    )


def _dino(suffix: str, *stages: int) -> ModelConfig:
    """DINO (Zhang et al., 2023), without dropout."""
    levels = len(stages) + 1
    return ModelConfig(
        f"dino-r50{suffix}",
        _resnet(50, *stages),
        EncoderConfig(feedforward=2048, layers=6, fusion="deformable", extra_levels=1, temperature=20.0),
        replace(
            _CLASSIC,
            queries=900,
            points=(4,) * levels,
            projected=True,
            source="mixed",
            final_norm=True,
            shared_scores=True,
            shared_boxes=True,
            logit_margin=1e-3,
            dropout=0.0,
        ),
    )


_HOSTS = (
    _conditional(50),
    _conditional(50, dilated=True),
    _conditional(101),
    _conditional(101, dilated=True),
    _dab(50),
    _dab(50, dilated=True),
    _deformable("", "points", refine=False),
    _deformable("-refine", "points", refine=True),
    _deformable("-two-stage", "proposals", refine=True),
    _deformable("-single", "points", refine=False, single=True),
    _deformable("-single-dc5", "points", refine=False, single=True, dilated=True),
    _dino("", 1, 2, 3),
    _dino("-5scale", 0, 1, 2, 3),
)

ZOO: dict[str, ModelConfig] = {
    config.name: config for config in (*_DFINE, *_RTDETRV2, _H, _R50M, *_DSP, *_DEIM, *_DEIMV2, *_HOSTS)
}


def variant(name: str) -> ModelConfig:
    """The configuration of a named variant.

    Raises:
        UsageError: It is no name, or not in the table; the message suggests the closest ones.
    """
    if not isinstance(name, str):
        raise UsageError(
            f"the name of a model is wanted, {type(name).__name__} came",
            code="type",
            hint="`finedetr models` lists them; a configuration goes into recipe=replace(build(...), model=...).",
        )
    if name not in ZOO:
        raise UsageError(f"no model is called {name!r}", code="unknown_model", hint=did_you_mean(name, ZOO))
    return ZOO[name]


@dataclass(frozen=True)
class Input:
    """What a published detector was trained on: (height, width), and mean and std of each channel on the 0..1 scale."""

    size: tuple[int, int] = (640, 640)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None


_SIDES = {"deimv2-atto": 320, "deimv2-femto": 416}


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def published_input(config: ModelConfig) -> Input:
    """Sizes and normalization of the published training (spec 1.0, 2.1): ImageNet's for ViTs and plain ResNets.

    The classic hosts were trained with the shorter side at 480 to 800. Here all pictures have one size; theirs is what
    the most frequent size of COCO, 480x640, becomes at 800, in multiples of 32.
    """
    resnet = RESNETS.get(config.backbone.name)
    if resnet is not None and resnet.plain:
        return Input((800, 1056), *_IMAGENET)
    side = _SIDES.get(config.name, 640)
    return Input((side, side), *(_IMAGENET if config.backbone.name in VITS else (None, None)))
