"""The sum of deformable attention on a CPU, for training."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from finedetr.kernels.library import address, call, floats, library, pixels, room, takes

__all__ = ["deformable_sum"]

LANES = 16  # a head is so many channels wide, or a multiple of it
LEVELS = 8  # the most; deformable.c has the same number


def deformable_sum(
    offsets: Float[Tensor, "B N 2 P"],
    logits: Float[Tensor, "B N P"],
    references: Float[Tensor, "B N R"],
    stretch: Float[Tensor, "2 P"],
    memory: tuple[Float[Tensor, "B D H W"], ...],
    points: tuple[int, ...],
    heads: int,
) -> Float[Tensor, "B N D"] | None:
    """Σ softmax(logits) · bilinear samples of the pyramid, with zeros outside of its maps; None: no kernel can answer.

    The answer has the type of the offsets. Softmax, places and sums are float32 whatever the type.

    Args:
        offsets: x and y of each head's points (head by head, level by level), as a linear layer answers them.
        logits: Of the points' weights, likewise.
        references: Boxes (cx, cy, w, h) or points (x, y), from 0 to 1.
        stretch: What an offset of one means, as a part of the box's size or, beside a point, of the map's.
        memory: The pyramid.
        points: How many of a head's points are on each level.
        heads: Among which the channels are shared.
    """
    width = memory[0].shape[1] // heads
    one_type = offsets.dtype == logits.dtype and len({level.dtype for level in memory}) == 1
    if width % LANES or len(memory) > LEVELS or not one_type or not takes(offsets, logits, references, *memory):
        return None
    kernel = library("deformable", HEAD=width, POINTS=sum(points))
    if kernel is None:
        return None
    batch, count, _, total = offsets.shape
    references = references.float().expand(batch, count, -1)  # some have the same ones for all pictures
    _check_sizes(batch, count, total, logits, references, stretch, memory, (points, heads))
    given = (offsets, logits, references, stretch.float(), *(pixels(level) for level in memory))
    out: Tensor = _Sum.apply(points, heads, kernel, *(tensor.contiguous() for tensor in given))  # type: ignore[no-untyped-call]
    return out


def _check_sizes(
    batch: int,
    count: int,
    total: int,
    logits: Tensor,
    references: Tensor,
    stretch: Tensor,
    memory: tuple[Tensor, ...],
    shared: tuple[tuple[int, ...], int],
) -> None:
    """A kernel reads what it is told is there."""
    points, heads = shared
    fits = (
        total == heads * sum(points)
        and len(points) == len(memory)
        and logits.shape == (batch, count, total)
        and stretch.shape == (2, total)
        and references.shape[-1] in (2, 4)
        and all(level.shape[:2] == (batch, memory[0].shape[1]) for level in memory)
    )
    if not fits:
        raise ValueError(
            f"{batch} pictures of {count} queries with {points} points of {heads} heads do not fit logits "
            f"{tuple(logits.shape)}, references {tuple(references.shape)}, stretch {tuple(stretch.shape)} and maps "
            f"{[tuple(level.shape) for level in memory]}"
        )


class _Arguments(ctypes.Structure):
    """`Sampling` of deformable.c."""

    _fields_ = (
        ("offsets", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("references", ctypes.c_void_p),
        ("stretch", ctypes.c_void_p),
        ("levels", ctypes.c_void_p * LEVELS),
        ("half", ctypes.c_int),
        ("half_levels", ctypes.c_int),
        ("heights", ctypes.c_int * LEVELS),
        ("widths", ctypes.c_int * LEVELS),
        ("points", ctypes.c_int * LEVELS),
        ("level_count", ctypes.c_int),
        ("batch", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("count", ctypes.c_int),
        ("reference_width", ctypes.c_int),
    )


class _Gradients(ctypes.Structure):
    """`Gradients` of deformable.c."""

    _fields_ = (
        ("out", ctypes.c_void_p),
        ("half_out", ctypes.c_int),
        ("offsets", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
        ("levels", ctypes.c_void_p * LEVELS),
        ("references", ctypes.c_void_p),
    )


def _table(tensors: tuple[Tensor, ...]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * LEVELS)(*(tensor.data_ptr() for tensor in tensors))


def _arguments(given: tuple[Tensor, ...], points: tuple[int, ...], heads: int) -> _Arguments:
    offsets, logits, references, stretch, *levels = given
    sizes = [level.shape[1:3] for level in levels]

    def numbers(values: Any) -> ctypes.Array[ctypes.c_int]:
        return (ctypes.c_int * LEVELS)(*values)

    return _Arguments(
        address(offsets),
        address(logits),
        address(references),
        address(stretch),
        _table(tuple(levels)),
        offsets.dtype == torch.bfloat16,
        levels[0].dtype == torch.bfloat16,
        numbers(height for height, _ in sizes),
        numbers(width for _, width in sizes),
        numbers(points),
        len(levels),
        offsets.shape[0],
        heads,
        offsets.shape[1],
        references.shape[-1],
    )


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, points: tuple[int, ...], heads: int, kernel: ctypes.CDLL, *given: Tensor) -> Tensor:
        offsets, levels = given[0], given[4:]
        out = offsets.new_empty(*offsets.shape[:2], levels[0].shape[-1])
        arguments = _arguments(given, points, heads)
        half = int(out.dtype == torch.bfloat16)
        call(kernel.deformable_forward, arguments, out, half)
        ctx.save_for_backward(*given)
        ctx.points, ctx.heads, ctx.kernel = points, heads, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        given, heads, kernel = ctx.saved_tensors, ctx.heads, ctx.kernel
        offsets, logits, references, _, *levels = given
        arguments = _arguments(given, ctx.points, heads)
        to_offsets, to_logits = torch.empty_like(offsets), torch.empty_like(logits)
        to_levels = tuple(torch.empty_like(level) for level in levels)
        batch, count, size = references.shape
        to_references = floats(batch, count, heads, size) if ctx.needs_input_grad[5] else None
        grad = grad.contiguous()
        gradients = _Gradients(
            address(grad),
            grad.dtype == torch.bfloat16,
            address(to_offsets),
            address(to_logits),
            _table(to_levels),
            None if to_references is None else address(to_references),
        )
        call(kernel.deformable_backward, arguments, gradients, room(kernel.deformable_room, arguments))
        summed = None if to_references is None else to_references.sum(dim=2)
        return None, None, None, to_offsets, to_logits, summed, None, *to_levels
