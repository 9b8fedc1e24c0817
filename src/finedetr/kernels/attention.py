"""Attention of queries to one another on a CPU, for training."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from finedetr.kernels.library import address, call, floats, library, room, takes

__all__ = ["attention"]

LANES = 16  # a head is so many channels wide, or a multiple of it


def attention(
    joint: Float[Tensor, "B N 2*D"],
    values: Float[Tensor, "B N D"],
    blocked: Bool[Tensor, "*B E N"] | None,
    heads: int,
) -> Float[Tensor, "B N D"] | None:
    """Softmax(Q·Kᵀ / √width)·V of each head, in the type of the values; None where no kernel can answer.

    Sums and weights are float32 whatever the type. A quarter of torch's time, forward and backward (LOG.md).

    Args:
        joint: Queries and keys side by side.
        values: Of the keys.
        blocked: For the first E tokens, True where the row must not see the column. The others see one another, and
            none of the first E; None: E is 0.
        heads: Among which the channels are shared.
    """
    width = values.shape[-1] // heads
    if width % LANES or joint.dtype != values.dtype or not takes(joint, values):
        return None
    kernel = library("attention", HEAD=width)
    if kernel is None:
        return None
    if blocked is None:
        blocked = values.new_zeros(0, values.shape[1], dtype=torch.bool)
    batch, count, channels = values.shape
    mine = blocked.shape in ((blocked.shape[-2], count), (batch, blocked.shape[-2], count))
    mine = mine and blocked.dtype == torch.bool and blocked.shape[-2] <= count
    if joint.shape != (batch, count, 2 * channels) or not mine:
        raise ValueError(  # a kernel reads what it is told is there
            f"values {tuple(values.shape)} do not fit queries and keys {tuple(joint.shape)} and a block of what cannot "
            f"be seen {tuple(blocked.shape)} of {blocked.dtype}"
        )
    out: Tensor = _Attention.apply(joint.contiguous(), values.contiguous(), blocked.contiguous(), heads, kernel)  # type: ignore[no-untyped-call]
    return out


class _Arguments(ctypes.Structure):
    """`Attention` of attention.c."""

    _fields_ = (
        ("joint", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("half", ctypes.c_int),
        ("blocked", ctypes.c_void_p),
        ("blocked_stride", ctypes.c_long),
        ("survey", ctypes.c_void_p),
        ("extra", ctypes.c_int),
        ("batch", ctypes.c_int),
        ("heads", ctypes.c_int),
        ("count", ctypes.c_int),
    )


def _run(kernel: ctypes.CDLL, name: str, given: tuple[Tensor, Tensor, Tensor], heads: int, *others: Tensor) -> None:
    """One of the kernel's functions, for joint, values and blocked."""
    joint, values, blocked = given
    batch, count, _ = values.shape
    arguments = _Arguments(
        joint=address(joint),
        values=address(values),
        half=values.dtype == torch.bfloat16,
        blocked=address(blocked),
        blocked_stride=blocked.stride(0) if blocked.dim() == 3 else 0,
        extra=blocked.shape[-2],
        batch=batch,
        heads=heads,
        count=count,
    )
    kernel.attention_survey.restype = ctypes.c_long
    survey = torch.empty(kernel.attention_survey(ctypes.byref(arguments)), dtype=torch.uint8, device="cpu")
    arguments.survey = address(survey)
    call(getattr(kernel, name), arguments, *others, room(kernel.attention_room, arguments))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joint: Tensor, values: Tensor, blocked: Tensor, heads: int, kernel: ctypes.CDLL) -> Tensor:
        out, levels = torch.empty_like(values), floats(values.shape[0], heads, values.shape[1])
        _run(kernel, "attention_forward", (joint, values, blocked), heads, out, levels)
        ctx.save_for_backward(joint, values, blocked, out, levels)
        ctx.heads, ctx.kernel = heads, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        joint, values, blocked, out, levels = ctx.saved_tensors
        to_joint, to_values = torch.empty_like(joint), torch.empty_like(values)
        slopes = (out, grad.contiguous(), levels, to_joint, to_values)
        _run(ctx.kernel, "attention_backward", (joint, values, blocked), ctx.heads, *slopes)
        return to_joint, to_values, None, None, None
