"""Attention: the fast form of deformable sampling has the gradients of the plain one."""

from __future__ import annotations

import pytest
import torch

from finedetr.model.corners import sum_of_corners
from finedetr.model.deformable import DeformableAttention


def test_the_sum_of_corners_equals_grid_sample_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    attention = DeformableAttention(8, 2, (3, 2, 1))
    maps = [torch.randn(2, 8, h, w, generator=generator) for h, w in ((9, 6), (4, 3), (1, 2))]
    maps[0] = maps[0].to(memory_format=torch.channels_last)
    places = 1.6 * torch.rand(2, 7, 2, 6, 2, generator=generator) - 0.3  # some outside, some half outside
    places[0, 0, 0, :, 0] = torch.tensor([-5.0, 6.0, 0.0, 1.0, 0.5, 0.25])
    places = places.movedim(-1, 2).flatten(3)
    weights = torch.rand(2, 7, 12, generator=generator)
    upstream = torch.randn(2, 7, 8, generator=generator)
    results = []
    for fast in (True, False):
        inputs = [t.clone().requires_grad_() for t in (places, weights, *maps)]
        given = (inputs[0], inputs[1], tuple(inputs[2:]))
        out = sum_of_corners(*given, attention.points, attention.heads) if fast else attention._sum_of_samples(*given)
        out.backward(upstream)
        results.append([out, *(t.grad for t in inputs)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, atol=2e-6, rtol=1e-4)


def test_a_place_that_is_no_number_reaches_the_answer() -> None:
    maps = [torch.rand(1, 8, h, w) for h, w in ((4, 4), (2, 2))]
    places = torch.rand(1, 3, 2, 3, 2)
    places[0, 1, 0, 2, 0] = torch.nan
    out = sum_of_corners(places.movedim(-1, 2).flatten(3), torch.rand(1, 3, 6), tuple(maps), (2, 1), 2)
    assert out[0, 1, :4].isnan().all()  # the first head's half
    assert out[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("size", [(6, 6), (3, 8)])
def test_discrete_sampling_reads_one_cell_and_stays_on_the_map(size: tuple[int, int]) -> None:
    attention = DeformableAttention(4, 2, (1,), discrete=True)
    height, width = size
    level = torch.arange(4.0 * height * width).view(1, 4, height, width)
    for (x, y), (column, row) in {
        (0.0, 0.0): (0, 0),
        (-2.0, 0.5): (0, int(0.5 * height + 0.5)),
        (1.0, 1.0): (width - 1, height - 1),  # the official code would read column height - 1
        (7.0, 0.0): (width - 1, 0),
        (2.4 / width, 1.6 / height): (2, 2),
    }.items():
        places = torch.tensor([[x], [y]]).expand(1, 1, 2, 2)  # two heads, one point
        out = attention._sum_of_cells(places, torch.ones(1, 1, 2), (level,))
        assert torch.equal(out[0, 0], level[0, :, row, column])


def test_discrete_sampling_trains_all_but_its_offsets() -> None:
    torch.manual_seed(0)
    attention = DeformableAttention(8, 2, (2, 1), projected=True, discrete=True)
    memory = tuple(torch.randn(1, 8, h, w, requires_grad=True) for h, w in ((4, 6), (2, 3)))
    attention(torch.randn(1, 3, 8), torch.rand(1, 3, 4), memory).square().sum().backward()
    untrained = {name for name, p in attention.named_parameters() if p.grad is None}
    assert untrained == {"sampling_offsets.weight", "sampling_offsets.bias"}
    assert not any(p.requires_grad for p in attention.sampling_offsets.parameters())
    assert all(level.grad is not None and level.grad.any() for level in memory)


def test_points_start_on_rays_one_direction_a_head() -> None:
    bias = DeformableAttention(32, 8, (2, 1)).sampling_offsets.bias.view(8, 3, 2)
    torch.testing.assert_close(bias[0], torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(bias[2, 1], torch.tensor([0.0, 2.0]), atol=1e-6, rtol=0)
