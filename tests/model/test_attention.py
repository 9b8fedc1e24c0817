"""Attention: the fast form of deformable sampling has the gradients of the plain one."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from finedetr.model.attention import DeformableAttention, _WeightedSamples


def test_weighted_samples_equal_the_plain_form_and_its_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    level = torch.randn(3, 4, 5, 6, generator=generator, dtype=torch.double)
    places = 2.4 * torch.rand(3, 2, 7, 2, generator=generator, dtype=torch.double) - 1.2  # some outside
    weights = torch.rand(3, 2, 7, generator=generator, dtype=torch.double)
    upstream = torch.randn(3, 4, 7, generator=generator, dtype=torch.double)
    results = []
    for fast in (True, False):
        inputs = [t.clone().requires_grad_() for t in (level, places, weights)]
        if fast:
            out = _WeightedSamples.apply(*inputs)
        else:
            out = (F.grid_sample(inputs[0], inputs[1], align_corners=False) * inputs[2][:, None]).sum(dim=2)
        out.backward(upstream)
        results.append([out, *(t.grad for t in inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_points_start_on_rays_one_direction_a_head() -> None:
    bias = DeformableAttention(32, 8, (2, 1)).sampling_offsets.bias.view(8, 3, 2)
    torch.testing.assert_close(bias[0], torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.0, 0.0]]))
    torch.testing.assert_close(bias[2, 1], torch.tensor([0.0, 2.0]), atol=1e-6, rtol=0)
