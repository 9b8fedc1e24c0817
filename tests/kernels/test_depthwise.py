"""The kernel of depthwise convolution: plain torch's numbers, forward and backward, up to the edges of the map."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from finedetr.kernels.depthwise import depthwise
from finedetr.model.layers import ConvNorm
from tests.kernels.reference import agree


def convolution(channels: int, side: int, stride: int, padding: int, **others: int) -> nn.Conv2d:
    """One that knows nothing of other channels."""
    torch.manual_seed(side)
    return nn.Conv2d(channels, channels, side, stride, padding, groups=channels, bias=False, **others)


@pytest.mark.parametrize("channels", [16, 48])
@pytest.mark.parametrize(
    ("side", "stride", "padding"), [(3, 1, 1), (3, 2, 1), (5, 1, 2), (5, 2, 1), (2, 1, 0), (7, 3, 3)]
)
def test_it_is_that_of_plain_torch(channels: int, side: int, stride: int, padding: int) -> None:
    conv = convolution(channels, side, stride, padding)
    x = torch.randn(3, channels, 9, 12).to(torch.bfloat16, memory_format=torch.channels_last)
    slope = torch.randn(conv(x.float()).shape)
    agree(
        lambda x: depthwise(x, conv),
        lambda x: F.conv2d(x, conv.weight.double(), None, stride, padding, 1, channels),
        [x],
        slope,
    )
    weight = conv.weight.detach().clone().requires_grad_()
    out = depthwise(x, conv)
    assert out is not None
    out.backward(slope.bfloat16())
    (wanted,) = torch.autograd.grad(
        F.conv2d(x.float(), weight, None, stride, padding, 1, channels), weight, slope.bfloat16().float()
    )
    assert conv.weight.grad is not None
    torch.testing.assert_close(conv.weight.grad, wanted, atol=1e-4, rtol=1e-4)


def test_a_map_smaller_than_the_kernel() -> None:
    conv = convolution(16, 5, 1, 2)
    x = torch.randn(1, 16, 1, 2).to(torch.bfloat16, memory_format=torch.channels_last)
    out = depthwise(x, conv)
    assert out is not None
    torch.testing.assert_close(out.float(), conv(x.float()), atol=2e-2, rtol=2e-2)


def test_a_layer_uses_it_under_autocast_and_learns_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    results = []
    for name in ("depthwise", None):
        if name is None:
            monkeypatch.setattr("finedetr.model.layers.depthwise", lambda *_: None)
        torch.manual_seed(0)
        layer = nn.Sequential(nn.Conv2d(16, 16, 1), ConvNorm(16, 16, 3, groups=16)).to(
            memory_format=torch.channels_last
        )
        with torch.autocast("cpu", torch.bfloat16):
            out = layer(x)
        out.float().square().mul(torch.linspace(0, 1, out.numel()).view_as(out)).sum().backward()
        results.append([out.detach().float(), *(parameter.grad for parameter in layer.parameters())])
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, atol=2e-2 * float(theirs.abs().max()), rtol=0)


def test_it_leaves_to_torch_what_it_was_not_made_for() -> None:
    x = torch.randn(2, 32, 8, 8).to(torch.bfloat16, memory_format=torch.channels_last)
    assert depthwise(x, convolution(32, 3, 1, 1)) is not None
    assert depthwise(x.float(), convolution(32, 3, 1, 1)) is None
    assert depthwise(x.contiguous(), convolution(32, 3, 1, 1)) is None
    assert depthwise(x, convolution(32, 4, 1, 1)) is None
    assert depthwise(x, convolution(32, 3, 1, 2, dilation=2)) is None
    assert depthwise(x, nn.Conv2d(32, 32, 3, 1, 1, groups=32)) is None, "a bias"
    assert depthwise(x, nn.Conv2d(32, 32, 3, 1, 1, groups=16, bias=False)) is None
    assert depthwise(x, nn.Conv2d(32, 32, 3, 1, "same", groups=32, bias=False)) is None
