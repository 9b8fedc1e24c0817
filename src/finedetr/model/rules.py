"""Renamings of tensors, applied in order, and those that several tables of names share."""

from __future__ import annotations

import re

__all__ = [
    "ATTENTION",
    "CONV_NORM",
    "FEEDFORWARD",
    "OLD_BACKBONE",
    "OLD_LINEAR",
    "RESNET_BLOCK",
    "SQUEEZE",
    "Rules",
    "rename",
]

Rules = tuple[tuple[str, str], ...]
"""Patterns and what takes their place."""

# transformers, in memory
CONV_NORM: Rules = (
    (r"^(model\.backbone.*)\.conv\.weight$", r"\1.convolution.weight"),
    (r"^(model\.backbone.*)\.norm\.", r"\1.normalization."),
)
RESNET_BLOCK: Rules = (
    (r"^backbone\.stages\.(\d+)\.(\d+)\.convs\.", r"model.backbone.model.encoder.stages.\1.layers.\2.layer."),
)
ATTENTION: Rules = ((r"\.cross_attention\.", ".encoder_attn."), (r"\.self_attention\.", ".self_attn."))
FEEDFORWARD: Rules = ((r"layers\.(\d+)\.linear([12])\.", r"layers.\1.mlp.fc\2."),)

# transformers, as its older versions have it and files still do
OLD_LINEAR: Rules = ((r"\.mlp\.fc", ".fc"), (r"\.o_proj\.", ".out_proj."))
OLD_BACKBONE: Rules = ((r"^model\.backbone\.model\.", "model.backbone.conv_encoder.model."),)

# HGNetv2, everywhere
SQUEEZE: Rules = ((r"\.squeeze\.", ".aggregation.0."), (r"\.expand\.", ".aggregation.1."))


def rename(key: str, rules: Rules) -> str:
    """A name under all rules, one after the other."""
    for pattern, new in rules:
        key = re.sub(pattern, new, key)
    return key
