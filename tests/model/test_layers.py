"""Small parts: what is written for speed answers as the plain form does."""

from __future__ import annotations

import pytest
import torch

from finedetr.model.config import DecoderConfig
from finedetr.model.decoder_layers import DecoderLayer
from finedetr.model.layers import ConvNorm, join


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_maps_that_are_joined_have_the_gradients_of_cat_as_tensors_of_their_own(layout: torch.memory_format) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, c, 5, 4, generator=generator).to(memory_format=layout) for c in (3, 1, 6)]
    scale = torch.randn(2, 10, 5, 4, generator=generator).to(memory_format=layout)
    results, strides = [], []
    for make in (join, lambda parts: torch.cat(tuple(parts), dim=1)):
        leaves = [part.clone().requires_grad_() for part in maps]
        between = [leaf * 2 for leaf in leaves]
        for part in between:
            part.register_hook(lambda grad: strides.append(grad.is_contiguous(memory_format=layout)))
        out = make(between)
        (out.tanh() * scale).sum().backward()
        results.append([out, *(leaf.grad for leaf in leaves)])
    for ours, plain in zip(*results, strict=True):
        assert torch.equal(ours, plain)
    assert strides[:3] == [True] * 3


def test_second_derivatives_pass_through_joined_maps() -> None:
    maps = [torch.rand(1, c, 2, 2, dtype=torch.double, requires_grad=True) for c in (1, 2)]
    assert torch.autograd.gradcheck(lambda *parts: join(parts).square(), maps)
    assert torch.autograd.gradgradcheck(lambda *parts: join(parts).square(), maps)


@pytest.mark.parametrize("groups", [1, 8])
def test_convolutions_answer_in_the_type_of_autocast(groups: int) -> None:
    torch.manual_seed(0)
    layer = ConvNorm(8, 8, 3, groups=groups).train()
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    exact = layer.conv(x)
    with torch.autocast("cpu", torch.bfloat16):
        half = layer._convolve(x)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), exact, atol=0.02, rtol=0.02)
    half.float().sum().backward()
    assert x.grad is not None
    assert layer.conv.weight.grad is not None
    assert layer.conv.weight.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("training", "autocast", "greatest"), [(True, None, 1e5), (True, torch.float16, 65504.0), (False, None, 65504.0)]
)
def test_the_published_clamp_holds_wherever_a_half_may_overflow(
    training: bool, autocast: torch.dtype | None, greatest: float
) -> None:
    layer = DecoderLayer(DecoderConfig(width=32, feedforward=64, points=(3, 3)), 1e4, first=True).train(training)
    seen: list[torch.Tensor] = []
    layer.norm3.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    layer.linear2.register_forward_hook(lambda module, inputs, out: out + 1e5)  # infinity, for a half
    maps = tuple(torch.rand(1, 32, side, side) for side in (4, 2))
    x, heard, positions = torch.rand(3, 1, 5, 32).unbind()
    with torch.autocast("cpu", autocast, enabled=autocast is not None), torch.no_grad():
        layer.look(x, heard, positions, torch.rand(1, 5, 4), maps)
    torch.testing.assert_close(seen[0].max().item(), greatest, atol=20, rtol=0)
