"""Draws what was planned: one decode and one anti-aliased resample a source picture, color in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Complex64, Float, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from finedetr.data.color import apply, color_steps, distort, store
from finedetr.data.images import decode, read_bytes
from finedetr.data.transforms import Color, Matrix, Plan, Tile
from finedetr.errors import DataError

__all__ = ["Loader", "Scratch", "draw", "load", "turn_canvas"]

ROWS = 96  # of the output at a time, when a canvas is turned: small enough for the cache

Loader = Callable[[int, int], tuple[NDArray[np.uint8], int]]  # (index, reduce) -> pixels, the factor of reduction


class Scratch:
    """Memory that is used again for every picture: getting fresh pages costs more than much of what is done in them."""

    def __init__(self) -> None:
        self.encoded = bytearray()  # what a JPEG is decoded into
        self.tensors: dict[torch.dtype, Tensor] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialized tensor, good until the next call with the same type."""
        count = math.prod(shape)
        if dtype not in self.tensors or self.tensors[dtype].numel() < count:
            self.tensors[dtype] = torch.empty(count, dtype=dtype)
        return self.tensors[dtype][:count].view(shape)


def load(
    path: str, reduce: int, size: tuple[int, int], buffer: bytearray | None = None
) -> tuple[NDArray[np.uint8], int]:
    """Pixels of a file that is to be (width, height) large; DataError where it has changed since it was listed."""
    pixels, factor = decode(read_bytes(path), path, reduce, buffer)
    wanted = (-(-size[1] // factor), -(-size[0] // factor))
    if pixels.shape[:2] != wanted:
        got = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise DataError(f"{path}: wanted {size[0]}x{size[1]} pixels (by {factor}); got {got}", code="size")
    return pixels, factor


def draw(plan: Plan, loader: Loader, out: UInt8[Tensor, "H W 3"], scratch: Scratch | None = None) -> None:
    """Draws a plan into `out` (channels last)."""
    if plan.turn is not None:
        scratch = scratch or Scratch()
        canvas = scratch.empty((*plan.canvas, 3), torch.uint8).zero_()
        for tile in plan.tiles:
            draw_tile(tile, loader, canvas, None)
        floats = scratch.empty((1, *plan.canvas, 3), torch.float32)
        floats.copy_(canvas[None])
        turn_canvas(floats, plan.turn, plan.color, out)
    else:
        if not plan.tiles or plan.tiles[0].target != (0, 0, plan.size[1], plan.size[0]):
            out.zero_()
        for tile in plan.tiles:
            draw_tile(tile, loader, out, plan.color, plan.flip)
    if plan.quarters:
        out.copy_(out.rot90(plan.quarters))  # rot90 makes a copy of its own


def draw_tile(
    tile: Tile, loader: Loader, canvas: UInt8[Tensor, "H W 3"], color: Color | None, flip: bool = False
) -> None:
    """Scales the source rectangle of a tile into its place on the canvas, which is mirrored if `flip`.

    Color and flip are done where there are fewer pixels: before an enlargement, after a reduction.
    """
    pixels, factor = loader(tile.index, tile.reduce)
    left, top, right, bottom = (edge // factor for edge in tile.source)
    source = torch.from_numpy(pixels)
    part = source[top:bottom, left:right]
    x0, y0, x1, y1 = tile.target
    if flip:
        x0, x1 = canvas.shape[1] - x1, canvas.shape[1] - x0
    enlarged = part.shape[0] * part.shape[1] < (y1 - y0) * (x1 - x0)
    if enlarged:
        part = scale(finish(part, color, flip), (y1 - y0, x1 - x0))
    else:
        part = finish(scale(part, (y1 - y0, x1 - x0)), color, flip)
    canvas[y0:y1, x0:x1] = part


def finish(pixels: UInt8[Tensor, "h w 3"], color: Color | None, flip: bool) -> UInt8[Tensor, "h w 3"]:
    """Color and mirror image."""
    if color is not None:
        pixels = distort(pixels, color)
    return pixels.flip(1) if flip else pixels


def turn_canvas(
    canvas: Float[Tensor, "1 h w 3"], turn: Matrix, color: Color | None, out: UInt8[Tensor, "H W 3"]
) -> None:
    """Bilinear rotation at scale one, black outside, and the color in the same floats.

    Only the rectangle of the output that the canvas touches is sampled. The black around it is part of the picture
    when its contrast is changed, so it may become grey.
    """
    height, width = out.shape[:2]
    extent = (canvas.shape[1], canvas.shape[2])
    corners = np.array([[x, y] for x in (0, extent[1]) for y in (0, extent[0])])
    corners = corners @ turn[:, :2].T + turn[:, 2]
    x0, y0 = np.clip(np.floor(corners.min(0)) - 1, 0, (width - 1, height - 1)).astype(int).tolist()
    x1, y1 = np.clip(np.ceil(corners.max(0)) + 1, (x0 + 1, y0 + 1), (width, height)).astype(int).tolist()
    source = canvas.permute(0, 3, 1, 2)  # channels last: as fast to sample, and cheaper to make
    columns, rows = sampling_grid(turn, (height, width), extent)

    def sampled(across: Complex64[Tensor, " w"], down: Complex64[Tensor, " h"]) -> Float[Tensor, "3 N"]:
        grid = torch.view_as_real(across[None, :] + down[:, None])[None]
        return F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0].view(3, -1)

    steps = () if color is None else color_steps(color, sampled(columns[::8], rows[::8]))
    if (x1 - x0, y1 - y0) != (width, height):
        fill = torch.empty(1, 1, 3, dtype=torch.uint8)
        store(apply(torch.zeros(3, 1), steps), fill)
        out.copy_(fill.expand(out.shape))
    for top in range(y0, y1, ROWS):
        bottom = min(top + ROWS, y1)
        store(apply(sampled(columns[x0:x1], rows[top:bottom]), steps), out[top:bottom, x0:x1])


def scale(pixels: UInt8[Tensor, "h w 3"], size: tuple[int, int]) -> UInt8[Tensor, "H W 3"]:
    """Anti-aliased bilinear scaling of bytes with channels last: the layout in which it is several times faster."""
    if pixels.shape[:2] == size:
        return pixels
    planes = pixels[None].permute(0, 3, 1, 2)
    return F.interpolate(planes, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def sampling_grid(
    turn: Matrix, size: tuple[int, int], canvas: tuple[int, int]
) -> tuple[Complex64[Tensor, " W"], Complex64[Tensor, " H"]]:
    """Where the centers of the output's pixels (H, W) lie on the canvas (h, w), in grid_sample's -1..1.

    A point is the sum of what its column and its row contribute. Both coordinates of a point are one complex number,
    which makes the outer sum one vectorized addition.
    """
    linear = np.linalg.inv(turn[:, :2])
    shift = -linear @ turn[:, 2]
    extent = np.array((canvas[1], canvas[0])) / 2
    linear, shift = linear / extent[:, None], shift / extent - 1
    across = (np.arange(size[1]) + 0.5) * complex(linear[0, 0], linear[1, 0])
    down = (np.arange(size[0]) + 0.5) * complex(linear[0, 1], linear[1, 1]) + complex(shift[0], shift[1])
    return torch.from_numpy(across.astype(np.complex64)), torch.from_numpy(down.astype(np.complex64))
