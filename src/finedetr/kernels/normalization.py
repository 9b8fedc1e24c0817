"""Batch normalization and what follows it on a CPU, for training."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finedetr.kernels.library import address, call, floats, library, pixels, room, takes

__all__ = ["normalization"]

ACTS = {None: 0, "relu": 1, "silu": 2}  # as normalization.c numbers them
LANES = 16  # numbers of a row of the kernel, or a multiple of them


def normalization(
    x: Float[Tensor, "B D H W"],
    norm: nn.BatchNorm2d,
    act: str | None,
    scale: Float[Tensor, 1] | None = None,
    shift: Float[Tensor, 1] | None = None,
) -> Float[Tensor, "B D H W"] | None:
    """Scale · act(norm(x)) + shift, with the batch's statistics; None where no kernel can answer.

    Updates the norm's own statistics as torch does. The answer has the type and the layout of the map.

    Args:
        x: A map whose channels are innermost in memory.
        norm: In training.
        act: "relu", "silu", or None.
        scale: Of the affine block, together with `shift`; None: there is none.
        shift: Its other number.
    """
    channels, numbers = x.shape[1], x.numel()
    even = channels % LANES == 0 or (LANES % channels == 0 and numbers % LANES == 0)
    known = (
        type(norm) is nn.BatchNorm2d and norm.training and norm.affine and norm.track_running_stats and norm.momentum
    )
    own = [tensor for tensor in (norm.weight, norm.running_mean, scale) if tensor is not None]
    known = known and all(tensor.dtype == torch.float32 for tensor in own)
    if not (known and even and act in ACTS and numbers > channels and takes(x)):
        return None
    if not x.is_contiguous(memory_format=torch.channels_last):
        return None
    kernel = library("normalization")
    if kernel is None:
        return None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    out: Tensor = _Normalization.apply(x, norm.weight, norm.bias, scale, shift, norm, ACTS[act], kernel)  # type: ignore[no-untyped-call]
    return out


class _Arguments(ctypes.Structure):
    """`Normalization` of normalization.c."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("half", ctypes.c_int),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("scale", ctypes.c_float),
        ("shift", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("act", ctypes.c_int),
        ("affine", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("pixels", ctypes.c_long),
    )


def _arguments(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> _Arguments:
    scale, shift = ctx.affine or (1.0, 0.0)
    return _Arguments(
        x=address(pixels(x)),
        half=x.dtype == torch.bfloat16,
        weight=address(weight),
        bias=address(bias),
        scale=scale,
        shift=shift,
        epsilon=ctx.epsilon,
        act=ctx.act,
        affine=ctx.affine is not None,
        channels=x.shape[1],
        pixels=x.numel() // x.shape[1],
    )


class _Normalization(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor | None,
        shift: Tensor | None,
        norm: nn.BatchNorm2d,
        act: int,
        kernel: ctypes.CDLL,
    ) -> Tensor:
        ctx.affine = None if scale is None or shift is None else (float(scale), float(shift))
        ctx.kernel, ctx.act, ctx.epsilon = kernel, act, norm.eps
        out, mean, inverse = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(weight)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.momentum is not None
        arguments = _arguments(ctx, x, weight, bias)
        statistics = (mean, inverse, norm.running_mean, norm.running_var, ctypes.c_float(norm.momentum))
        memory = room(kernel.normalization_room, arguments, torch.float64)
        call(kernel.normalization_forward, arguments, pixels(out), *statistics, memory)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        to_x, to_weight, to_bias = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        to_affine = floats(2)
        arguments = _arguments(ctx, x, weight, bias)
        slopes = (pixels(to_x), to_weight, to_bias, to_affine)
        memory = room(ctx.kernel.normalization_room, arguments, torch.float64)
        call(ctx.kernel.normalization_backward, arguments, pixels(grad), mean, inverse, *slopes, memory)
        to_scale, to_shift = (None, None) if ctx.affine is None else (to_affine[:1], to_affine[1:])
        return to_x, to_weight, to_bias, to_scale, to_shift, None, None, None
