"""A detector small enough for a test, of real parts."""

from __future__ import annotations

from finedetr.model.config import BackboneConfig, DecoderConfig, EncoderConfig, ModelConfig

TINY = ModelConfig(
    "tiny",
    BackboneConfig("B0", stages=(2, 3)),
    EncoderConfig(width=16, feedforward=16, expansion=0.34, depth=0.34, heads=2),
    DecoderConfig(width=16, feedforward=16, layers=2, heads=2, points=(2, 2), queries=12),
)
