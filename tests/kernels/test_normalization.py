"""The kernel of batch normalization, activation and affine block: plain torch's numbers, statistics and gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from finedetr.kernels.normalization import normalization
from finedetr.model.layers import ACTIVATIONS
from tests.kernels.reference import agree

HALF, WHOLE = torch.bfloat16, torch.float32


def problem(channels: int, dtype: torch.dtype, affine: float | None) -> tuple[nn.BatchNorm2d, list[Tensor]]:
    """A norm, and the map, the norm's two parameters and those of the affine block behind it."""
    torch.manual_seed(channels)
    norm = nn.BatchNorm2d(channels).train()
    x = (5 + 3 * torch.randn(3, channels, 8, 6)).to(dtype, memory_format=torch.channels_last)
    own = [] if affine is None else [torch.tensor([affine]), torch.tensor([0.3])]
    return norm, [x, 1 + torch.rand(channels), torch.randn(channels), *own]


def plain(norm: nn.BatchNorm2d, act: str | None, x: Tensor, weight: Tensor, bias: Tensor, *affine: Tensor) -> Tensor:
    """One after the other."""
    x = functional_call(norm, {"weight": weight, "bias": bias}, (x,))
    x = x if act is None else ACTIVATIONS[act](x)
    return affine[0] * x + affine[1] if affine else x


@pytest.mark.parametrize("dtype", [WHOLE, HALF])
@pytest.mark.parametrize("channels", [2, 8, 16, 48, 512])
@pytest.mark.parametrize(
    ("act", "affine"), [(None, None), ("relu", None), ("silu", None), ("relu", 0.7), ("relu", -0.7), ("silu", 1.3)]
)
def test_all_of_it_is_that_of_plain_torch(
    dtype: torch.dtype, channels: int, act: str | None, affine: float | None
) -> None:
    norm, inputs = problem(channels, dtype, affine)
    theirs = copy.deepcopy(norm).double()

    def kernel(x: Tensor, weight: Tensor, bias: Tensor, *own: Tensor) -> Tensor | None:
        changed = copy.copy(norm)  # with the same statistics
        changed._parameters = {"weight": weight, "bias": bias}  # type: ignore[assignment]
        return normalization(x, changed, act, *own)

    agree(kernel, lambda *x: plain(theirs, act, *x), inputs, torch.randn_like(inputs[0].float()))
    for name, buffer in norm.named_buffers():
        wanted = dict(theirs.named_buffers())[name].to(buffer.dtype)
        torch.testing.assert_close(buffer, wanted, atol=1e-5, rtol=1e-5, msg=name)


def test_statistics_of_a_small_spread_far_from_zero_keep_their_digits() -> None:
    norm, (x, *_) = problem(16, WHOLE, None)
    x = (1000 + 0.01 * torch.randn(4, 16, 64, 64)).to(memory_format=torch.channels_last)
    out = normalization(x, norm, None)
    assert out is not None
    variance, mean = torch.var_mean(x.double(), dim=(0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(out.double(), (x.double() - mean) / (variance + norm.eps).sqrt(), atol=2e-2, rtol=0)
    torch.testing.assert_close(norm.running_mean, 0.1 * mean.flatten().float())


def test_no_number_stays_none() -> None:
    norm, (x, *_) = problem(16, WHOLE, None)
    x[1, 4, 0, 0] = torch.nan
    out = normalization(x, norm, "relu")
    assert out is not None
    assert out[:, 4].isnan().all()
    assert torch.isfinite(out[:, 5]).all()


def test_it_leaves_to_torch_what_it_was_not_made_for() -> None:
    norm, (x, *_) = problem(16, WHOLE, None)
    assert normalization(x.contiguous(), norm, None) is None, "channels are not innermost"
    assert normalization(x, norm, "gelu") is None
    assert normalization(x.double(), norm, None) is None
    assert normalization(x[:1, :, :1, :1].contiguous(memory_format=torch.channels_last), norm, None) is None
    assert normalization(x, copy.deepcopy(norm).eval(), None) is None
    assert normalization(x, nn.SyncBatchNorm(16), None) is None  # type: ignore[arg-type]
    assert normalization(x, nn.BatchNorm2d(16, momentum=None), None) is None
    odd, (y, *_) = problem(21, WHOLE, None)
    assert normalization(y, odd, None) is None
    assert norm.num_batches_tracked == 0
    assert not norm.running_mean.any()  # type: ignore[union-attr]
