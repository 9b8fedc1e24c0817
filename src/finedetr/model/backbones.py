"""Which backbone a name means."""

from __future__ import annotations

from finedetr.errors import ConfigError, did_you_mean
from finedetr.model.config import BackboneConfig
from finedetr.model.hgnet import HGNETS, HGNet
from finedetr.model.layers import Backbone
from finedetr.model.resnet import RESNETS, ResNet
from finedetr.model.vit import VITS, AdaptedViT

__all__ = ["build_backbone"]


def build_backbone(config: BackboneConfig) -> Backbone | AdaptedViT:
    """Pictures to feature maps; `channels` says how wide they are.

    Raises:
        ConfigError: No backbone is called so, or it cannot be as the configuration wants it.
    """
    if config.dilated and config.name not in RESNETS:
        raise ConfigError(
            f"backbone.dilated: {config.name} cannot be; ResNets can, such as 'resnet50'", code="conflict"
        )
    if config.name in VITS and (config.freeze_stem or config.freeze_norm or config.freeze_stages):
        raise ConfigError(
            f"{config.name} has no stem, norms or stages that are frozen one by one; backbone.freeze_* came",
            code="conflict",
            hint="Freeze all of it with --freeze backbone.",
        )
    if config.name in HGNETS:
        return HGNet(config)
    if config.name in RESNETS:
        return ResNet(config)
    if config.name in VITS:
        return AdaptedViT(config)
    names = (*HGNETS, *RESNETS, *VITS)
    raise ConfigError(f"no backbone is called {config.name!r}", hint=did_you_mean(config.name, names))
