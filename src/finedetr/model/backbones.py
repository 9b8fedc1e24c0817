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
        ConfigError: No backbone is called so.
    """
    if config.name in HGNETS:
        return HGNet(config)
    if config.name in RESNETS:
        return ResNet(config)
    if config.name in VITS:
        return AdaptedViT(config)
    names = (*HGNETS, *RESNETS, *VITS)
    raise ConfigError(f"no backbone is called {config.name!r}", hint=did_you_mean(config.name, names))
