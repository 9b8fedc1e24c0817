"""The table of variants: a name and what it is made of. A literal, not a registry."""

from __future__ import annotations

from dataclasses import replace

from finedetr.errors import UsageError, did_you_mean
from finedetr.model.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig

__all__ = ["ZOO", "variant"]

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


def _deim(config: ModelConfig) -> ModelConfig:
    """DEIM's variant (spec 1.5): SiLU in the decoder and its heads, nothing of the backbone frozen."""
    return replace(
        config,
        name=f"deim-{config.name}",
        backbone=replace(config.backbone, freeze_stem=False, freeze_norm=False),
        decoder=replace(config.decoder, activation="silu"),
    )


ZOO: dict[str, ModelConfig] = {config.name: config for config in (*_DFINE, *map(_deim, _DFINE))}


def variant(name: str) -> ModelConfig:
    """The configuration of a named variant.

    Raises:
        UsageError: The name is not in the table; the message suggests the closest ones.
    """
    if name not in ZOO:
        raise UsageError(f"no model is called {name!r}", code="unknown_model", hint=did_you_mean(name, ZOO))
    return ZOO[name]
