"""What every kernel is held to: the same sums by plain torch, in double precision."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2}  # of the largest number of a tensor


def gradients(answer: Callable[..., Tensor], inputs: list[Tensor], slope: Tensor) -> list[Tensor]:
    """The answer and the gradients of all inputs, given that of the answer."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    out = answer(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, slope.to(out.dtype))]


def agree(
    kernel: Callable[..., Tensor | None], plain: Callable[..., Tensor], inputs: list[Tensor], slope: Tensor
) -> None:
    """A kernel gives what plain torch gives for the same numbers in double precision, and gradients likewise."""

    def answer(*tensors: Tensor) -> Tensor:
        out = kernel(*tensors)
        assert out is not None, "the kernel did not answer"
        return out

    got, wanted = (
        gradients(f, given, slope.to(given[0].dtype))
        for f, given in ((answer, inputs), (plain, [tensor.double() for tensor in inputs]))
    )
    for index, (mine, theirs, like) in enumerate(zip(got, wanted, [None, *inputs], strict=True)):
        assert like is None or mine.dtype == like.dtype
        size = float(theirs.abs().max())
        kind = torch.bfloat16 if torch.bfloat16 in {tensor.dtype for tensor in (mine, *inputs)} else torch.float32
        torch.testing.assert_close(
            mine.double(), theirs, atol=TOLERANCE[kind] * max(size, 0.05), rtol=0, msg=lambda m, i=index: f"{i}: {m}"
        )
