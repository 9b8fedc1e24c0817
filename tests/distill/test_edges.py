from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from finedetr.distill.edges import edge_divergence, transport
from finedetr.geometry import bin_values, decode_edges, to_xyxy
from finedetr.records import Edges

W4, W8 = bin_values(scale=4.0), bin_values(scale=8.0)


def some(seed: int = 0, sharp: float = 3.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    anchors = torch.cat((0.5 + 0.05 * torch.randn(7, 2, generator=generator), 0.3 + 0.1 * torch.rand(7, 2)), dim=-1)
    # around the middle, so that nothing is cut off at the outermost bins
    logits = sharp * torch.randn(7, 4, 33, generator=generator) - 0.3 * (torch.arange(33) - 16).abs()
    return anchors, logits.softmax(-1)


def test_equal_frames_change_nothing() -> None:
    anchors, p = some()
    torch.testing.assert_close(transport(p, anchors, W4, 4.0, anchors, W4, 4.0), p, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("bins", "scale"), [(W4, 4.0), (W8, 8.0)])
def test_the_mean_edge_stays_where_it_is(bins: Tensor, scale: float) -> None:
    anchors, p = some()
    p = torch.where((W8.abs() <= 1.0) if scale == 8.0 else (W4.abs() <= 1.0), p, torch.zeros(()))
    p = p / p.sum(-1, keepdim=True)
    onto = anchors + torch.tensor([0.01, -0.01, 0.02, 0.01])
    carried = transport(p, anchors, bins, scale, onto, W4, 4.0)
    before = to_xyxy(decode_edges(anchors, p @ bins, scale))
    after = to_xyxy(decode_edges(onto, carried @ W4, 4.0))
    torch.testing.assert_close(after, before, atol=1e-5, rtol=0)


def test_nothing_is_lost_and_what_lies_outside_goes_to_the_outermost_bins() -> None:
    anchors, p = some()
    onto = anchors.clone()
    onto[:, 0] += 5  # far to the right: all left edges lie far to its left, all right edges, too
    carried = transport(p, anchors, W4, 4.0, onto, W4, 4.0)
    torch.testing.assert_close(carried.sum(-1), torch.ones(7, 4))
    torch.testing.assert_close(carried[:, 0, -1], torch.ones(7))
    torch.testing.assert_close(carried[:, 2, 0], torch.ones(7))


def test_shared_anchors_give_the_divergence_of_the_bins() -> None:
    anchors, p = some()
    q = some(1)[1]
    teacher, student = p.log(), q.log().requires_grad_()
    edges = Edges(torch.zeros(1, 1, 7, 4, 33), anchors[None], W4, 4.0)
    found = edge_divergence(teacher, edges, anchors, student, edges, anchors, 5.0)
    wanted = 25 * F.kl_div((student / 5).log_softmax(-1), (teacher / 5).softmax(-1), reduction="none").sum(-1).mean(-1)
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    found.sum().backward()
    assert student.grad is not None
    assert student.grad.abs().max() > 0
    same = edge_divergence(teacher, edges, anchors, teacher, edges, anchors, 5.0)
    torch.testing.assert_close(same, torch.zeros(7), atol=1e-4, rtol=0)
