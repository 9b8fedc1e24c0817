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
Linear = tuple[NDArray[np.float64], NDArray[np.float64]]  # matrix [3, 3] and bias [3] of RGB, in grey levels
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
    linear = None if color is None else color_matrix(color, channel_means(source))
    enlarged = part.shape[0] * part.shape[1] < (y1 - y0) * (x1 - x0)
    if enlarged:
        part = scale(finish(part, linear, flip), (y1 - y0, x1 - x0))
    else:
        part = finish(scale(part, (y1 - y0, x1 - x0)), linear, flip)
    canvas[y0:y1, x0:x1] = part


def finish(pixels: UInt8[Tensor, "h w 3"], linear: Linear | None, flip: bool) -> UInt8[Tensor, "h w 3"]:
    """Color and mirror image."""
    if linear is not None:
        pixels = distort(pixels, *linear)
    return pixels.flip(1) if flip else pixels


def turn_canvas(canvas: UInt8[Tensor, "h w 3"], turn: Matrix, color: Color | None, out: UInt8[Tensor, "H W 3"]) -> None:
    """Bilinear rotation at scale one, black outside, and the color in the same floats.

    Only the rectangle of the output that the canvas touches is sampled. The black around it is part of the picture
    when its contrast is changed, so it may become grey.
    """
    height, width = out.shape[:2]
    corners = np.array([[x, y] for x in (0, canvas.shape[1]) for y in (0, canvas.shape[0])])
    corners = corners @ turn[:, :2].T + turn[:, 2]
    x0, y0 = np.clip(np.floor(corners.min(0)) - 1, 0, (width - 1, height - 1)).astype(int).tolist()
    x1, y1 = np.clip(np.ceil(corners.max(0)) + 1, (x0 + 1, y0 + 1), (width, height)).astype(int).tolist()
    grid = sampling_grid(turn, (x0, y0, x1, y1), (canvas.shape[0], canvas.shape[1]))
    source = canvas[None].permute(0, 3, 1, 2).float()  # channels last: as fast to sample, and cheaper to make
    turned = F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)[0].view(3, -1)
    fill = torch.zeros(3, dtype=torch.uint8)
    if color is not None:
        share = (x1 - x0) * (y1 - y0) / (width * height)
        matrix, bias = color_matrix(color, turned[:, ::13].mean(1).double().numpy() * share)
        turned = torch.addmm(
            torch.from_numpy(bias + 0.5).float()[:, None], torch.from_numpy(matrix).float(), turned
        ).clamp_(0, 255.5)
        fill = torch.from_numpy(np.clip(bias + 0.5, 0, 255.5)).to(torch.uint8)
    else:
        turned.add_(0.5)
    if (x1 - x0, y1 - y0) != (width, height):
        out[:] = fill
    planes = turned.to(torch.uint8).view(3, y1 - y0, x1 - x0)
    for channel in range(3):  # three strided copies take half the time of one permuted copy
        out[y0:y1, x0:x1, channel] = planes[channel]


def scale(pixels: UInt8[Tensor, "h w 3"], size: tuple[int, int]) -> UInt8[Tensor, "H W 3"]:
    """Anti-aliased bilinear scaling of bytes with channels last: the layout in which it is several times faster."""
    if pixels.shape[:2] == size:
        return pixels
    planes = pixels[None].permute(0, 3, 1, 2)
    return F.interpolate(planes, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0)


def sampling_grid(turn: Matrix, part: tuple[int, int, int, int], canvas: tuple[int, int]) -> Float[Tensor, "1 h w 2"]:
    """Where the centers of output pixels lie on the canvas (h, w), in grid_sample's -1..1.

    `part` is the rectangle (left, top, right, bottom) of the output that is sampled. Both coordinates of a point are
    one complex number, which makes the outer sum one vectorized addition.
    """
    linear = np.linalg.inv(turn[:, :2])
    shift = -linear @ turn[:, 2]
    extent = np.array((canvas[1], canvas[0])) / 2
    linear, shift = linear / extent[:, None], shift / extent - 1
    x, y = np.arange(part[0], part[2]) + 0.5, np.arange(part[1], part[3]) + 0.5
    across = x * complex(linear[0, 0], linear[1, 0])
    down = y * complex(linear[0, 1], linear[1, 1]) + complex(shift[0], shift[1])
    rows, columns = torch.from_numpy(down).to(torch.complex64), torch.from_numpy(across).to(torch.complex64)
    return torch.view_as_real(columns[None, :] + rows[:, None])[None]


# ---------------------------------------------------------------------------------------------------------------- color


def channel_means(pixels: UInt8[Tensor, "H W 3"]) -> NDArray[np.float64]:
    """Mean of each channel, from every fourth pixel of every fourth row."""
    means: NDArray[np.float64] = pixels[::4, ::4].reshape(-1, 3).double().mean(0).numpy()
    return means


def color_matrix(color: Color, means: NDArray[np.float64]) -> Linear:
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
) -> Linear:
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
