"""Which tensors of a plain detector a larger one begins with: one that is split, or whose boxes are distributions."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from finedetr.model.config import ModelConfig

__all__ = ["grouped", "origin_of", "part_of", "plain_form", "why_fresh"]

_ORIGINS = (
    (r"^(decoder\.layers\.\d+)\.(?:scores|boxes)\.", r"\1."),  # both branches begin as the whole layer
    (r"^decoder\.score_norm\.", "decoder.norm."),
    (r"^selection\.scoring\.", "selection.embedding."),
    (r"^decoder\.initial_box_head\.", "decoder.box_heads.0."),
)
_WITHOUT_EFFECT = ("join", "part", "task_moves", "edge_heads", "quality_heads", "bin_table")


def plain_form(wanted: ModelConfig, given: ModelConfig) -> ModelConfig:
    """What `wanted` is without that which weights of `given` need not have for it: a second branch, edges of boxes."""
    decoder = wanted.whole.decoder if given == given.whole else wanted.decoder
    if given.decoder.boxes == "plain":
        decoder = replace(decoder, boxes="plain", shared_boxes=given.decoder.shared_boxes)
    return replace(wanted, decoder=decoder)


def origin_of(key: str) -> str | None:
    """The tensor of the plain detector from which another one of the larger detector begins, if there is one."""
    for pattern, name in _ORIGINS:
        if re.search(pattern, key):
            return re.sub(pattern, name, key)
    return None


def why_fresh(key: str) -> str:
    """How a tensor begins that the plain detector has not."""
    return "without effect" if set(_WITHOUT_EFFECT) & set(key.split(".")) else "at random"


def grouped(rows: Iterable[tuple[str, str]]) -> list[tuple[str, str, int]]:
    """Pairs of a tensor and what is said of it, by part of the model, each with how many there are."""
    return [(part, said, count) for (part, said), count in Counter((part_of(key), said) for key, said in rows).items()]


def part_of(key: str, depth: int = 4) -> str:
    """The part of a model in which a tensor is, such as decoder.layers.*.scores; of layers, so many words."""
    words = ["*" if word.isdigit() else word for word in key.split(".")[:-1]]
    return ".".join(words[: depth if words[1:2] == ["layers"] else 2])
