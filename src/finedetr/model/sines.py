"""Sine codes of the classic DETRs: of numbers in 0..1, and of every cell of a map."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from finedetr.model.layers import kept

__all__ = ["SineMap", "place_code", "sine_code"]


def sine_code(values: Float[Tensor, "*N R"], channels: int, temperature: float = 10000.0) -> Float[Tensor, "*N E"]:
    """R numbers as R·channels: sines and cosines in turn, of ever longer waves (DETR; spec 2.1).

    Channel k of a number a holds the sine (k even) or cosine (k odd) of 2π·a / temperature^(2⌊k/2⌋ / channels).
    """
    waves = torch.arange(channels // 2, dtype=torch.float32, device=values.device) * (2 / channels)
    angles = values[..., None] * (2 * math.pi / temperature**waves)
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-3)


def place_code(places: Float[Tensor, "*N R"], channels: int) -> Float[Tensor, "*N E"]:
    """The code of points (x, y) or boxes (cx, cy, w, h) as DETRs have it: y before x, then the size."""
    return sine_code(torch.cat((places[..., :2].flip(-1), places[..., 2:]), dim=-1), channels)


@kept
def _table(
    height: int, width: int, channels: int, temperature: float, shift: float, device: torch.device
) -> Float[Tensor, "T D"]:
    rows = (torch.arange(1, height + 1, device=device) - shift) / (height + 1e-6)
    columns = (torch.arange(1, width + 1, device=device) - shift) / (width + 1e-6)
    places = torch.stack(torch.meshgrid(rows, columns, indexing="ij"), dim=-1).flatten(0, 1)
    return sine_code(places, channels // 2, temperature)


class SineMap:
    """The sine code of every cell's row and column, as shares of the map.

    Args:
        width: Channels of a cell, half of them for its row.
        temperature: Of the code.
        centered: Cells are at their centers; otherwise at their far edges, so that the last one is at 1.
    """

    def __init__(self, width: int, temperature: float = 10000.0, *, centered: bool = False) -> None:
        self.width, self.temperature, self.shift = width, temperature, 0.5 if centered else 0.0

    def __call__(self, height: int, width: int, device: torch.device) -> Float[Tensor, "T D"]:
        """One row a cell, line after line."""
        return _table(height, width, self.width, self.temperature, self.shift, device)
