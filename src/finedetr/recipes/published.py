"""The published numbers for COCO, one row a size (spec 4.2, read from the official configurations)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from finedetr.errors import ConfigError, did_you_mean
from finedetr.train.optimizer import Grouping

__all__ = [
    "CLASSIC",
    "DEIM",
    "DEIMV2",
    "DEIM_RTDETRV2",
    "DFINE",
    "HOSTS",
    "LONG_STEPS",
    "RTDETRV2",
    "Published",
    "PublishedV2",
    "row",
]


LONG_STEPS = 20_000
"""Ours, not measured as a limit: below it a run of DEIM's recipes counts as short (the published ones have at least
seven times as many), and learns more with a higher rate and less of the strong augmentation (LOG.md, "Short runs")."""

_SMALL = Grouping(decay_backbone_norms=True, decay_affine=True)
_LARGE = Grouping(decay_backbone_norms=True, decay_affine=True, decay_biases=True)
_RTDETR = Grouping(decay_biases=True)
_DEIM_RTDETR = Grouping(decay_biases=True, backbone_norms_at_main_rate=True)
_SPLIT = Grouping(decay_affine=True, decay_biases=True, backbone_norms_at_main_rate=True)


@dataclass(frozen=True)
class Published:
    """One configuration: rates, batch, and the epochs at which something changes."""

    lr: float
    backbone_lr: float
    batch: int
    weight_decay: float
    epochs: int
    plain_from: int  # D-FINE's stop_epoch, DEIM's third policy value
    mosaic_end: int = 0  # also where DEIM's rate stops being flat
    start: int = 0
    gamma: float = 0.5
    repeat: int | None = 3  # of the base size in the list of sizes; None: one size only
    restart_decay: float = 0.9999
    groups: Grouping = _SMALL  # the official split, on request


DFINE: dict[str, Published] = {
    "n": Published(8e-4, 4e-4, 128, 1e-4, 160, 148, repeat=None),
    "s": Published(2e-4, 1e-4, 32, 1e-4, 132, 120, repeat=20),
    "m": Published(2e-4, 2e-5, 32, 1e-4, 132, 120, repeat=6),
    "l": Published(2.5e-4, 1.25e-5, 32, 1.25e-4, 80, 72, repeat=4, groups=_LARGE),
    "x": Published(2.5e-4, 2.5e-6, 32, 1.25e-4, 80, 72, repeat=3, restart_decay=0.9998, groups=_LARGE),
}

DEIM: dict[str, Published] = {
    "n": Published(8e-4, 4e-4, 128, 1e-4, 160, 148, 78, 4, gamma=1.0, repeat=None),
    "s": Published(4e-4, 2e-4, 32, 1e-4, 132, 120, 64, 4, repeat=20, groups=_SPLIT),
    "m": Published(4e-4, 4e-5, 32, 1e-4, 102, 90, 49, 4, repeat=6, groups=_SPLIT),
    "l": Published(5e-4, 2.5e-5, 32, 1.25e-4, 58, 50, 29, 4, repeat=4, groups=_LARGE),
    "x": Published(5e-4, 5e-6, 32, 1.25e-4, 58, 50, 29, 4, repeat=3, restart_decay=0.9998, groups=_LARGE),
}

# spec 4.4; the step at which augmentation stops is the epoch in brackets there
RTDETRV2: dict[str, Published] = {
    "r18": Published(1e-4, 1e-4, 16, 1e-4, 120, 117, repeat=None, groups=_RTDETR),
    "r34": Published(1e-4, 5e-5, 16, 1e-4, 120, 117, groups=Grouping()),
    "r50-m": Published(1e-4, 1e-5, 16, 1e-4, 84, 81, groups=_RTDETR),
    "r50": Published(1e-4, 1e-5, 16, 1e-4, 72, 71, groups=_RTDETR),
    "r101": Published(1e-4, 1e-6, 16, 1e-4, 72, 71, groups=_RTDETR),
    "hgnet-l": Published(1e-4, 5e-6, 16, 1e-4, 72, 71, groups=_RTDETR),
    "hgnet-x": Published(1e-4, 1e-6, 16, 1e-4, 72, 71, groups=_RTDETR),
    "hgnet-h": Published(1e-4, 5e-6, 16, 1e-4, 72, 71, groups=_RTDETR),
    # from the weights of the model with bilinear sampling
    "r18-dsp": Published(1e-4, 1e-4, 16, 1e-4, 36, 33, repeat=None, groups=_RTDETR),
    "r34-dsp": Published(1e-4, 5e-5, 16, 1e-4, 12, 10, groups=Grouping()),
    "r50-m-dsp": Published(1e-4, 1e-5, 16, 1e-4, 36, 33, groups=_RTDETR),
    "r50-dsp": Published(1e-4, 1e-5, 16, 1e-4, 12, 10, groups=_RTDETR),
}

DEIM_RTDETRV2: dict[str, Published] = {  # spec 4.3
    "r18": Published(2e-4, 2e-4, 16, 1e-4, 120, 117, 64, 4, groups=_DEIM_RTDETR),
    "r34": Published(2e-4, 1e-4, 16, 1e-4, 120, 117, 64, 4, groups=_DEIM_RTDETR),
    "r50-m": Published(2e-4, 2e-5, 16, 1e-4, 60, 58, 34, 4, groups=_DEIM_RTDETR),
    "r50": Published(2e-4, 2e-5, 16, 1e-4, 60, 58, 34, 4, groups=_DEIM_RTDETR),
    "r101": Published(2e-4, 2e-6, 16, 1e-4, 60, 58, 34, 4, groups=_DEIM_RTDETR),
}


@dataclass(frozen=True)
class PublishedV2(Published):
    """What DEIMv2 adds (spec 4.5): the epoch of the late matching, chances, and which terms."""

    late: int = 0
    mosaic: float = 0.5
    mixup: float = 0.5
    copy_blend: float = 0.5
    min_size: float = 1.0
    distributions: bool = True  # FGL, DDF and the union of stages; the three smallest do without
    warmup_steps: int = 2000


_PICO = PublishedV2(
    *(1.6e-3, 8e-4, 128, 1e-4, 500, 400, 250, 4),
    repeat=None,
    late=450,
    mixup=0.0,
    copy_blend=0.0,
    min_size=8,
    distributions=False,
    warmup_steps=4000,
)

DEIMV2: dict[str, PublishedV2] = {
    "atto": replace(_PICO, lr=2e-3, backbone_lr=1e-3, mosaic=0.3, min_size=12),
    "femto": replace(_PICO, min_size=10),
    "pico": _PICO,
    "n": PublishedV2(8e-4, 4e-4, 32, 1e-4, 160, 148, 78, 4, gamma=1.0, repeat=None, late=136, copy_blend=0.4),
    "s": PublishedV2(5e-4, 2.5e-5, 32, 1e-4, 132, 120, 64, 4, repeat=20, late=100),
    "m": PublishedV2(5e-4, 2.5e-5, 32, 1e-4, 102, 90, 49, 4, repeat=6, late=80),
    "l": PublishedV2(5e-4, 1.25e-5, 32, 1.25e-4, 68, 60, 34, 4, repeat=3, late=50),
    "x": PublishedV2(5e-4, 1e-5, 32, 1.25e-4, 58, 50, 29, 4, repeat=3, late=45),
    "hgnet-s": PublishedV2(4e-4, 2e-4, 32, 1e-4, 132, 120, 64, 4, repeat=20, late=100),
    "hgnet-m": PublishedV2(4e-4, 4e-5, 32, 1e-4, 102, 90, 49, 4, repeat=6, late=80),
    "hgnet-l": PublishedV2(5e-4, 2.5e-5, 32, 1.25e-4, 58, 50, 29, 4, repeat=4, late=45),
    "hgnet-x": PublishedV2(5e-4, 5e-6, 32, 1.25e-4, 58, 50, 29, 4, repeat=3, late=45),
}


# distillation spec 2.2 - 2.4; only flips and sizes vary, to the end
CLASSIC: dict[str, Published] = {
    "conditional-detr": Published(1e-4, 1e-5, 16, 1e-4, 50, 50, 50, 50),
    "dab-detr": Published(1e-4, 1e-5, 16, 1e-4, 50, 50, 50, 50),
    "deformable-detr": Published(2e-4, 2e-5, 32, 1e-4, 50, 50, 50, 50),
    "dino": Published(1e-4, 1e-5, 16, 1e-4, 12, 12, 12, 12),
}


HOSTS = {"distributions": (DFINE, DEIM), "plain": (RTDETRV2, DEIM_RTDETRV2)}
"""By the kind of boxes: the host's own rows, and those of DEIM on it."""


Row = TypeVar("Row", bound=Published)


def row(table: Mapping[str, Row], model: str) -> Row:
    """The row of a model by what follows its family's name ("deim-dfine-s" -> "s").

    What has no row of its own takes that of S or R50 (DEIM published none for RT-DETRv2's HGNets).

    Raises:
        ConfigError: The name looks like one of D-FINE's sizes but is none.
    """
    family, _, size = model.removeprefix("deim-").partition("-")
    fitting = [key for key in table if f"{size}-".startswith(f"{key}-")]  # "s-sd" is a variation of "s"
    if not fitting and family == "dfine" and "s" in table:
        raise ConfigError(f"no published recipe for {model!r}", hint=did_you_mean(size, table))
    return table[max(fitting, key=len)] if fitting else table["s" if "s" in table else "r50"]
