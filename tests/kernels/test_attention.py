"""Attention's kernel: the sums of plain torch, forward and backward, and nothing seen that is blocked."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from finedetr.kernels.attention import attention
from tests.kernels.reference import agree, gradients

HALF, WHOLE = torch.bfloat16, torch.float32


def plain(joint: Tensor, values: Tensor, blocked: Tensor | None, heads: int) -> Tensor:
    """The whole map of attention."""
    queries, keys, shown = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (*joint.chunk(2, -1), values))
    count, extra = values.shape[1], 0 if blocked is None else blocked.shape[-2]
    hidden = torch.zeros(values.shape[0], 1, count, count, dtype=torch.bool)
    hidden[:, :, extra:, :extra] = True
    if blocked is not None:
        hidden[:, :, :extra] = blocked[:, None] if blocked.dim() == 3 else blocked
    scores = (queries @ keys.mT / queries.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
    return (scores.softmax(-1).nan_to_num(0.0) @ shown).transpose(1, 2).flatten(2)


def groups(extra: int, count: int, size: int) -> Tensor:
    """Extra queries see their own group and those that are none."""
    group = torch.arange(extra) // size
    return torch.cat((group[:, None] != group, torch.zeros(extra, count - extra, dtype=torch.bool)), dim=1)


@pytest.mark.parametrize("dtype", [WHOLE, HALF])
@pytest.mark.parametrize("width", [16, 32, 64])
@pytest.mark.parametrize(("count", "extra"), [(1, 0), (37, 0), (64, 64), (75, 33), (130, 3)])
def test_attention_is_that_of_plain_torch(dtype: torch.dtype, width: int, count: int, extra: int) -> None:
    torch.manual_seed(count)
    heads = 3
    joint, values, slope = (torch.randn(2, count, n * heads * width).to(dtype) for n in (2, 1, 1))
    blocked = groups(extra, count, 5) if extra else None
    agree(lambda *x: attention(*x, blocked, heads), lambda *x: plain(*x, blocked, heads), [joint, values], slope)


def test_each_picture_may_have_a_block_of_its_own() -> None:
    torch.manual_seed(0)
    joint, values, slope = (torch.randn(3, 61, n * 32) for n in (2, 1, 1))
    blocked = torch.rand(3, 40, 61) < 0.6
    agree(lambda *x: attention(*x, blocked, 2), lambda *x: plain(*x, blocked, 2), [joint, values], slope)


def test_one_that_sees_nothing_answers_nothing() -> None:
    joint, values = torch.randn(1, 20, 32), torch.randn(1, 20, 16)
    blocked = torch.zeros(4, 20, dtype=torch.bool)
    blocked[2] = True
    out, to_joint, to_values = gradients(lambda *x: attention(*x, blocked, 1), [joint, values], torch.ones(1, 20, 16))
    assert not out[0, 2].any()
    assert out[0, [0, 1, 3]].all()
    assert not to_joint[0, 2, :16].any()
    assert torch.isfinite(to_joint).all()
    assert torch.isfinite(to_values).all()


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
def test_no_number_of_an_extra_group_touches_the_others_not_even_by_rounding(poison: float) -> None:
    torch.manual_seed(0)
    blocked = groups(21, 80, 7)
    joint, values, slope = (torch.randn(2, 80, n * 32) for n in (2, 1, 1))
    slope[:, :21] = 0  # nor does any loss of theirs
    clean = gradients(lambda *x: attention(*x, blocked, 2), [joint, values], slope)
    joint[:, :21] = poison
    values[:, :21] = poison
    spoilt = gradients(lambda *x: attention(*x, blocked, 2), [joint, values], slope)
    assert torch.equal(clean[0][:, 21:], spoilt[0][:, 21:])
    assert torch.equal(clean[1][:, 21:, :32], spoilt[1][:, 21:, :32])  # gradients of their queries


def test_no_number_stays_none() -> None:
    joint, values = torch.randn(1, 20, 32), torch.randn(1, 20, 16)
    values[0, 7, 3] = torch.nan
    out = attention(joint, values, None, 1)
    assert out is not None
    assert out[0, :, 3].isnan().all()
    assert torch.isfinite(out[0, :, 4]).all()
    joint[0, 5, 0] = torch.nan  # a query
    out = attention(joint, values.nan_to_num(), None, 1)
    assert out is not None
    assert out[0, 5].isnan().all()
    assert torch.isfinite(out[0, 6]).all()


def test_large_scores_do_not_overflow() -> None:
    joint, values = 1e3 * torch.randn(1, 40, 32), torch.randn(1, 40, 16)
    out, *slopes = gradients(lambda *x: attention(*x, None, 1), [joint, values], torch.ones(1, 40, 16))
    torch.testing.assert_close(out, plain(joint, values, None, 1), atol=1e-3, rtol=0)
    assert all(torch.isfinite(slope).all() for slope in slopes)


def test_the_number_of_threads_changes_no_bit() -> None:
    joint, values, slope = (torch.randn(2, 70, n * 64) for n in (2, 1, 1))
    threads = torch.get_num_threads()
    results = []
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            results.append(gradients(lambda *x: attention(*x, None, 4), [joint, values], slope))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_does_not_fit_is_refused_before_any_memory_is_read() -> None:
    joint, values = torch.randn(2, 20, 32), torch.randn(2, 20, 16)
    for wrong in (joint[:, :19], joint[:1], joint[..., :16]):
        with pytest.raises(ValueError, match="do not fit"):
            attention(wrong, values, None, 1)
    for blocked in ((4, 19), (3, 4, 20), (21, 20)):
        with pytest.raises(ValueError, match="do not fit"):
            attention(joint, values, torch.zeros(blocked, dtype=torch.bool), 1)


def test_it_leaves_to_torch_what_it_was_not_made_for() -> None:
    joint, values = torch.randn(1, 20, 2 * 24), torch.randn(1, 20, 24)
    assert attention(joint, values, None, 1) is None, "heads of 24 channels"
    joint, values = torch.randn(1, 20, 32), torch.randn(1, 20, 16)
    assert attention(joint.double(), values.double(), None, 1) is None
    assert attention(joint.half(), values.half(), None, 1) is None
    assert attention(joint.to("meta"), values.to("meta"), None, 1) is None
