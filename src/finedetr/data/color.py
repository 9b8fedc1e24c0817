"""Photometric distortion: at most two affine maps of RGB, with a turn of the hue between them."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int16, UInt8
from numpy.typing import NDArray
from torch import Tensor

from finedetr.data.transforms import Color

__all__ = ["Step", "apply", "color_steps", "distort", "turn_hue"]

LUMA = np.array((0.2989, 0.587, 0.114))
Linear = tuple[NDArray[np.float64], NDArray[np.float64]]  # matrix [3, 3] and bias [3] of RGB, in grey levels
Step = Linear | float  # a float turns the hue by so many turns
STRIP = 1 << 15  # pixels at a time: what a step reads is still in the cache when the next one wants it


def color_steps(color: Color, sample: Float[Tensor, "3 N"]) -> tuple[Step, ...]:
    """The steps of a distortion, fused where they are affine.

    Brightness, contrast (towards the picture's mean grey), saturation (towards each pixel's grey) and the exchange of
    channels are affine; a turn of the hue (in HSV, as published) is not. Values are clipped between the steps, not
    after each published one. `sample` is some of the picture's pixels, from which its mean grey is taken.
    """
    steps: list[Step] = []
    matrix, bias = np.eye(3), np.zeros(3)
    if color.brightness is not None:
        matrix = matrix * color.brightness
    if color.contrast is not None and color.contrast_first:
        matrix, bias = contrasted(matrix, bias, color.contrast, sample)
    if color.saturation is not None:
        blend = color.saturation * np.eye(3) + (1 - color.saturation) * np.ones((3, 1)) * LUMA
        matrix, bias = blend @ matrix, blend @ bias
    if color.hue is not None:
        if not is_identity(matrix, bias):
            steps.append((matrix, bias))
        steps.append(color.hue)
        if color.contrast is not None and not color.contrast_first:
            sample = apply(sample, tuple(steps)).float()
        matrix, bias = np.eye(3), np.zeros(3)
    if color.contrast is not None and not color.contrast_first:
        matrix, bias = contrasted(matrix, bias, color.contrast, sample)
    if color.channels is not None:
        order = list(color.channels)
        matrix, bias = matrix[order], bias[order]
    if not is_identity(matrix, bias):
        steps.append((matrix, bias))
    return tuple(steps)


def is_identity(matrix: NDArray[np.float64], bias: NDArray[np.float64]) -> bool:
    """Whether an affine map changes nothing."""
    return bool((matrix == np.eye(3)).all() and not bias.any())


def contrasted(
    matrix: NDArray[np.float64], bias: NDArray[np.float64], factor: float, sample: Float[Tensor, "3 N"]
) -> Linear:
    """Blends with the mean grey of the picture as it is by then."""
    means = sample.mean(1).double().numpy()
    grey = LUMA @ (matrix @ means + bias)
    return factor * matrix, factor * bias + (1 - factor) * grey


def apply(planes: Float[Tensor, "3 N"], steps: tuple[Step, ...]) -> Float[Tensor, "3 N"] | Int16[Tensor, "3 N"]:
    """Runs the steps on planes of grey levels; within 0..255 where any did, in whole levels where the last is a hue."""
    values: Tensor = planes
    for step in steps:
        if isinstance(step, tuple):
            matrix, bias = (torch.from_numpy(number).float() for number in step)
            values = torch.addmm(bias[:, None], matrix, values.float()).clamp_(0, 255)
        else:
            values = turn_hue(rounded(values), step)
    return values


def rounded(values: Float[Tensor, "*S"] | Int16[Tensor, "*S"]) -> Int16[Tensor, "*S"]:
    """Whole levels of values that are not negative."""
    return values if values.dtype == torch.int16 else (values + 0.5).to(torch.int16)


def turn_hue(planes: Int16[Tensor, "3 N"], turns: float) -> Int16[Tensor, "3 N"]:
    """Adds to the hue of HSV for less than a twelfth of a turn, exactly but for the rounding to whole levels.

    Along the circle of hues each channel is a trapezoid: it falls, rests at the least value, rises, rests at the
    greatest. A small turn moves a channel down its falling edge where the next channel is above the one after, and up
    its rising edge where it is below; both edges are continued beyond the rests and clipped to them, so there is no
    sector to look up. (A masked selection costs 35 times an addition here; there is none.)
    """
    assert abs(turns) < 1 / 12, "the two edges of a trapezoid would overlap"
    order = (0, 1, 2) if turns >= 0 else (0, 2, 1)  # backwards is forwards with green and blue exchanged
    first, second, third = (planes[channel] for channel in order)
    top, low = torch.maximum(first, second), torch.minimum(first, second)
    torch.maximum(top, third, out=top)
    torch.minimum(low, third, out=low)
    shift = rounded((top - low).float().mul_(6 * abs(turns)))
    rising = torch.empty_like(planes)  # each channel minus the next, for now
    torch.sub(first, second, out=rising[0])
    torch.sub(second, third, out=rising[1])
    torch.sub(third, first, out=rising[2])
    above = rising.clamp(0, 1)  # 1 where a channel is above the next
    falling = rising + (top - shift)
    rising += low + shift
    for edge in (falling, rising):
        torch.maximum(edge, low, out=edge)
        torch.minimum(edge, top, out=edge)
    falling -= rising
    falling[:2] *= above[1:]
    falling[2] *= above[0]
    rising += falling
    return rising if turns >= 0 else rising[[0, 2, 1]]


def distort(pixels: UInt8[Tensor, "H W 3"], color: Color) -> UInt8[Tensor, "H W 3"]:
    """Applies a distortion to bytes, rounded and clipped."""
    sample = pixels[::8, ::8].reshape(-1, 3).t().float().contiguous()
    steps = color_steps(color, sample)
    if not steps:
        return pixels
    if len(steps) == 1 and isinstance(steps[0], tuple):
        return distort_affinely(pixels, *steps[0])
    flat = pixels.reshape(-1, 3)
    out = torch.empty_like(flat)
    for start in range(0, len(flat), STRIP):
        part = flat[start : start + STRIP]
        planes = torch.empty(3, len(part))
        for channel in range(3):
            planes[channel] = part[:, channel]
        store(apply(planes, steps), out[start : start + STRIP])
    return out.view(pixels.shape)


def store(planes: Float[Tensor, "3 N"] | Int16[Tensor, "3 N"], out: UInt8[Tensor, "*S 3"]) -> None:
    """Rounds planes into interleaved bytes; three strided copies take half the time of one permuted copy."""
    levels = rounded(planes).to(torch.uint8)  # by way of 16 bits: the direct conversion costs four times as much
    for channel in range(3):
        out[..., channel] = levels[channel].view(out.shape[:-1])


def distort_affinely(
    pixels: UInt8[Tensor, "H W 3"], matrix: NDArray[np.float64], bias: NDArray[np.float64]
) -> UInt8[Tensor, "H W 3"]:
    """One affine map of interleaved bytes. Four pixels at a time: a product with 12 columns is what BLAS is good at."""
    count = pixels.shape[0] * pixels.shape[1]
    flat = pixels.reshape(count, 3)
    if count % 4:
        flat = torch.cat((flat, flat[:1].expand(4 - count % 4, 3)))
    block = torch.block_diag(*[torch.from_numpy(matrix.T).float()] * 4)
    offset = torch.from_numpy(np.tile(bias + 0.5, 4)).float()
    mapped = torch.addmm(offset, flat.reshape(-1, 12).float(), block).clamp_(0, 255.5).to(torch.int16).to(torch.uint8)
    return mapped.view(-1, 3)[:count].view(pixels.shape)
