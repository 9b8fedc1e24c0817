"""Depthwise convolution of bfloat16 on a CPU, for training."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from finedetr.kernels.library import address, call, floats, library, pixels, room, takes

__all__ = ["depthwise"]

LANES = 16  # channels are so many, or a multiple
KERNELS = (2, 3, 5, 7)


def depthwise(x: Float[Tensor, "B D H W"], conv: nn.Conv2d) -> Float[Tensor, "B D H2 W2"] | None:
    """What `conv` answers, of each channel by itself; None where no kernel can answer.

    Products and sums are float32, of the float32 weights; the answer has the type and the layout of the map.

    Args:
        x: A map of bfloat16 whose channels are innermost in memory.
        conv: With as many groups as channels, and without a bias.
    """
    side, stride, padding = conv.kernel_size[0], conv.stride[0], conv.padding[0]
    known = (
        conv.groups == conv.in_channels == conv.out_channels == x.shape[1]
        and conv.bias is None
        and conv.kernel_size == (side, side)
        and side in KERNELS
        and conv.stride == (stride, stride)
        and conv.padding == (padding, padding)
        and conv.dilation == (1, 1)
        and conv.padding_mode == "zeros"
        and conv.weight.dtype == torch.float32
    )
    if not known or x.shape[1] % LANES or x.dtype != torch.bfloat16 or not takes(x, conv.weight):
        return None
    if not x.is_contiguous(memory_format=torch.channels_last) or isinstance(padding, str):
        return None
    kernel = library("depthwise", KERNEL=side)
    if kernel is None:
        return None
    out: Tensor = _Depthwise.apply(x, conv.weight, stride, padding, kernel)  # type: ignore[no-untyped-call]
    return out


class _Arguments(ctypes.Structure):
    """`Depthwise` of depthwise.c."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("weights", ctypes.c_void_p),
        ("batch", ctypes.c_int),
        ("channels", ctypes.c_int),
        ("height", ctypes.c_int),
        ("width", ctypes.c_int),
        ("out_height", ctypes.c_int),
        ("out_width", ctypes.c_int),
        ("stride", ctypes.c_int),
        ("padding", ctypes.c_int),
    )


class _Depthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, padding: int, kernel: ctypes.CDLL) -> Tensor:
        batch, channels, height, width = x.shape
        side = weight.shape[-1]
        out_sizes = [(size + 2 * padding - side) // stride + 1 for size in (height, width)]
        out = torch.empty(
            batch, channels, *out_sizes, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        table = weight.detach().permute(2, 3, 1, 0).contiguous()
        ctx.sizes, ctx.kernel = (batch, channels, height, width, *out_sizes, stride, padding), kernel
        arguments = _Arguments(address(pixels(x)), address(table), *ctx.sizes)
        call(kernel.depthwise_forward, arguments, pixels(out), room(kernel.depthwise_room, arguments))
        ctx.save_for_backward(x, table)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        x, table = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        to_x, to_weights = torch.empty_like(x), floats(x.shape[0], *table.shape)
        arguments = _Arguments(address(pixels(x)), address(table), *ctx.sizes)
        given = (pixels(grad), pixels(to_x), to_weights, room(ctx.kernel.depthwise_room, arguments))
        call(ctx.kernel.depthwise_backward, arguments, *given)
        return to_x, to_weights.sum(dim=0).permute(3, 2, 0, 1).contiguous(), None, None, None
