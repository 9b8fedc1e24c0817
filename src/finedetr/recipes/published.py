"""The published numbers for COCO, one row a size (spec 4.2, read from the official configurations)."""

from __future__ import annotations

from dataclasses import dataclass

from finedetr.errors import ConfigError, did_you_mean
from finedetr.train.optimizer import Grouping

__all__ = ["DEIM", "DFINE", "Published", "row"]


_SMALL = Grouping(decay_backbone_norms=True, decay_affine=True)
_LARGE = Grouping(decay_backbone_norms=True, decay_affine=True, decay_biases=True)
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


def row(table: dict[str, Published], model: str) -> Published:
    """The row of a model by the last part of its name ("deim-dfine-s" -> "s"); models of other names take S.

    Raises:
        ConfigError: The name ends in something that looks like a size but has no row.
    """
    size = model.rsplit("-", 1)[-1]
    if model.startswith(("dfine-", "deim-")) and size not in table:
        raise ConfigError(f"no published recipe for {model!r}", hint=did_you_mean(size, table))
    return table.get(size, table["s"])
