"""Draws what was planned: one decode and one anti-aliased resample a source picture, color in one pass."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from finedetr.data.images import decode, read_bytes
from finedetr.data.transforms import Color, Matrix, Plan, Tile
from finedetr.errors import DataError

__all__ = ["Loader", "color_matrix", "distort", "draw", "load"]

LUMA = np.array((0.2989, 0.587, 0.114))
Loader = Callable[[int, int], tuple[NDArray[np.uint8], int]]  # (index, reduce) -> pixels, the factor of reduction


def load(path: str, reduce: int, size: tuple[int, int]) -> tuple[NDArray[np.uint8], int]:
    """Pixels of a file that is to be (width, height) large; DataError where it has changed since it was listed."""
    pixels, factor = decode(read_bytes(path), path, reduce)
    wanted = (-(-size[1] // factor), -(-size[0] // factor))
    if pixels.shape[:2] != wanted:
        got = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise DataError(f"{path}: wanted {size[0]}x{size[1]} pixels (by {factor}); got {got}", code="size")
    return pixels, factor


def draw(plan: Plan, loader: Loader, out: UInt8[Tensor, "H W 3"]) -> None:
    """Draws a plan into `out` (channels last)."""
    if plan.turn is not None:
        canvas = torch.zeros((*plan.canvas, 3), dtype=torch.uint8)
        for tile in plan.tiles:
            draw_tile(tile, loader, canvas, None)
        turn_canvas(canvas, plan.turn, plan.color, out)
        return
    if not plan.tiles or plan.tiles[0].target != (0, 0, plan.size[1], plan.size[0]):
        out.zero_()
    for tile in plan.tiles:
        draw_tile(tile, loader, out, plan.color, plan.flip)


def draw_tile(
    tile: Tile, loader: Loader, canvas: UInt8[Tensor, "H W 3"], color: Color | None, flip: bool = False
) -> None:
    """Scales the source rectangle of a tile into its place on the canvas, which is mirrored if `flip`."""
    pixels, factor = loader(tile.index, tile.reduce)
    left, top, right, bottom = (edge // factor for edge in tile.source)
    source = torch.from_numpy(pixels)
    part = source[top:bottom, left:right]
    x0, y0, x1, y1 = tile.target
    if flip:
        x0, x1 = canvas.shape[1] - x1, canvas.shape[1] - x0
    place = canvas[y0:y1, x0:x1]
    linear = None
    if color is not None:
        linear = color_matrix(color, channel_means(source))
    enlarged = part.shape[0] * part.shape[1] < place.shape[0] * place.shape[1]
    if linear is not None and enlarged:
        part = distort(part, *linear)
    if flip and enlarged:
        part = part.flip(1)
    if part.shape != place.shape:
        moved = part.permute(2, 0, 1)[None]
        part = F.interpolate(moved, size=place.shape[:2], mode="bilinear", antialias=True)[0].permute(1, 2, 0)
    if linear is not None and not enlarged:
        part = distort(part, *linear)
    if flip and not enlarged:
        part = part.flip(1)
    place.copy_(part)


def turn_canvas(canvas: UInt8[Tensor, "h w 3"], turn: Matrix, color: Color | None, out: UInt8[Tensor, "H W 3"]) -> None:
    """Bilinear rotation at scale one, black outside, and the color in the same floats."""
    height, width = out.shape[:2]
    source = canvas.permute(2, 0, 1)[None].float().contiguous()
    grid = sampling_grid(turn, (height, width), (canvas.shape[0], canvas.shape[1]))
    turned = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0].view(3, -1)
    if color is not None:
        means = turned[:, ::13].mean(1).double().numpy()
        matrix, bias = color_matrix(color, means)
        turned = torch.addmm(torch.from_numpy(bias).float()[:, None], torch.from_numpy(matrix).float(), turned).clamp_(
            0, 255
        )
    out.copy_(turned.add_(0.5).to(torch.uint8).view(3, height, width).permute(1, 2, 0))


def sampling_grid(turn: Matrix, size: tuple[int, int], canvas: tuple[int, int]) -> Float[Tensor, "1 H W 2"]:
    """Where each output pixel's center lies on the canvas, in grid_sample's -1..1."""
    linear = np.linalg.inv(turn[:, :2])
    shift = -linear @ turn[:, 2]
    height, width = size
    x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    grid = torch.empty(1, height, width, 2)
    for axis, extent in enumerate((canvas[1], canvas[0])):
        across = x * (2 * linear[axis, 0] / extent)
        down = y * (2 * linear[axis, 1] / extent) + (2 * shift[axis] / extent - 1)
        torch.add(across[None, :], down[:, None], out=grid[0, :, :, axis])
    return grid


# ---------------------------------------------------------------------------------------------------------------- color


def channel_means(pixels: UInt8[Tensor, "H W 3"]) -> NDArray[np.float64]:
    """Mean of each channel, from every fourth pixel of every fourth row."""
    means: NDArray[np.float64] = pixels[::4, ::4].reshape(-1, 3).double().mean(0).numpy()
    return means


def color_matrix(color: Color, means: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """A photometric distortion as one affine map of RGB: matrix [3, 3] and bias [3], in grey levels.

    Brightness, contrast (towards the mean grey) and saturation (towards each pixel's grey) are affine as they stand.
    Hue is turned about the grey axis by the drawn angle, where the published code goes through HSV: the same for
    grey, nearly so elsewhere. Values are clipped once at the end, not after each step.
    """
    matrix, bias = np.eye(3), np.zeros(3)
    if color.brightness is not None:
        matrix = matrix * color.brightness
    if color.contrast_first:
        matrix, bias = contrasted(matrix, bias, color.contrast, means)
    if color.saturation is not None:
        blend = color.saturation * np.eye(3) + (1 - color.saturation) * np.ones((3, 1)) * LUMA
        matrix, bias = blend @ matrix, blend @ bias
    if color.hue is not None:
        turned = hue_rotation(2 * math.pi * color.hue)
        matrix, bias = turned @ matrix, turned @ bias
    if not color.contrast_first:
        matrix, bias = contrasted(matrix, bias, color.contrast, means)
    if color.channels is not None:
        order = list(color.channels)
        matrix, bias = matrix[order], bias[order]
    return matrix, bias


def contrasted(
    matrix: NDArray[np.float64], bias: NDArray[np.float64], factor: float | None, means: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Blends with the mean grey of the picture as it is by then."""
    if factor is None:
        return matrix, bias
    grey = LUMA @ (matrix @ means + bias)
    return factor * matrix, factor * bias + (1 - factor) * grey


def hue_rotation(angle: float) -> NDArray[np.float64]:
    """A rotation of RGB about the grey axis (Rodrigues); red goes towards green for positive angles."""
    cosine, sine = math.cos(angle), math.sin(angle)
    same, ahead = cosine + (1 - cosine) / 3, (1 - cosine) / 3
    up, down = ahead + sine / math.sqrt(3), ahead - sine / math.sqrt(3)
    return np.array([[same, down, up], [up, same, down], [down, up, same]])


def distort(
    pixels: UInt8[Tensor, "H W 3"], matrix: NDArray[np.float64], bias: NDArray[np.float64]
) -> UInt8[Tensor, "H W 3"]:
    """Applies an affine map of RGB to bytes, rounded and clipped. Four pixels at a time: a product with 12 columns."""
    count = pixels.shape[0] * pixels.shape[1]
    flat = pixels.reshape(count, 3)
    if count % 4:
        flat = torch.cat((flat, flat[:1].expand(4 - count % 4, 3)))
    block = torch.block_diag(*[torch.from_numpy(matrix.T).float()] * 4)
    offset = torch.from_numpy(np.tile(bias + 0.5, 4)).float()
    mapped = torch.addmm(offset, flat.reshape(-1, 12).float(), block).clamp_(0, 255.5).to(torch.uint8)
    return mapped.view(-1, 3)[:count].view(pixels.shape)
