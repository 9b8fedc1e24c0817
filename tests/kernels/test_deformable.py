"""Deformable attention's kernel: the sums of plain torch, forward and backward, wherever a place lies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from finedetr.kernels.deformable import deformable_sum
from tests.kernels.reference import agree, gradients

HALF, WHOLE = torch.bfloat16, torch.float32


def plain(
    offsets: Tensor,
    logits: Tensor,
    references: Tensor,
    *memory: Tensor,
    stretch: Tensor,
    points: tuple[int, ...],
    heads: int,
) -> Tensor:
    """By `grid_sample`, level by level."""
    moved = offsets * stretch.to(offsets)
    references = references[..., None]
    if references.shape[-2] == 4:
        moved = moved * references[..., 2:, :]
    places = (2 * (references[..., :2, :] + moved) - 1).unflatten(-1, (heads, -1))  # [B, N, 2, heads, P]
    weights = logits.unflatten(-1, (heads, -1)).softmax(-1)
    total = torch.zeros(())
    for level, where, weight in zip(memory, places.split(points, -1), weights.split(points, -1), strict=True):
        split = level.unflatten(1, (heads, -1)).flatten(0, 1)
        grid = where.permute(0, 3, 1, 4, 2).flatten(0, 1)  # [B · heads, N, P, 2]
        samples = F.grid_sample(split, grid, align_corners=False).unflatten(0, (-1, heads))
        total = total + (samples * weight.permute(0, 2, 1, 3)[:, :, None]).sum(-1)  # [B, heads, D, N]
    return total.flatten(1, 2).mT


def problem(
    size: int, points: tuple[int, ...], width: int, dtype: torch.dtype, spread: float = 1.0
) -> tuple[list[Tensor], Tensor]:
    """Offsets, logits, references of `size` numbers, and maps of 2 heads; how far an offset goes."""
    generator = torch.Generator().manual_seed(size + width)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    total = 2 * sum(points)
    shapes = [(9, 14), (5, 7), (3, 4), (1, 2)][: len(points)]
    maps = [normal(2, 2 * width, *shape).to(dtype, memory_format=torch.channels_last) for shape in shapes]
    references = torch.rand(2, 11, size, generator=generator)
    offsets = spread * normal(2, 11, 2, total)
    return [offsets.to(dtype), normal(2, 11, total).to(dtype), references, *maps], 0.1 + normal(2, total).abs() / 4


@pytest.mark.parametrize("dtype", [WHOLE, HALF])
@pytest.mark.parametrize(("points", "width"), [((6, 6), 16), ((4, 4, 4), 32), ((3, 6, 3, 5), 32), ((1,), 64)])
@pytest.mark.parametrize("size", [2, 4])
def test_the_sum_is_that_of_plain_torch(dtype: torch.dtype, points: tuple[int, ...], width: int, size: int) -> None:
    inputs, stretch = problem(size, points, width, dtype)

    def kernel(offsets: Tensor, logits: Tensor, references: Tensor, *memory: Tensor) -> Tensor | None:
        return deformable_sum(offsets, logits, references, stretch, memory, points, 2)

    agree(
        kernel,
        lambda *x: plain(*x, stretch=stretch, points=points, heads=2),
        inputs,
        torch.randn(2, 11, 2 * width, generator=torch.Generator().manual_seed(0)),
    )


def test_places_far_outside_see_zeros_and_pull_at_nothing() -> None:
    inputs, stretch = problem(4, (6, 6), 16, WHOLE)
    inputs[2] = torch.tensor([40.0, -40.0, 0.5, 0.5]).expand(2, 11, 4)
    out, *grads = gradients(
        lambda o, a, r, *m: deformable_sum(o, a, r, stretch, m, (6, 6), 2), inputs, torch.ones(2, 11, 32)
    )
    assert not out.any()
    assert not any(grad.any() for grad in grads)


def test_maps_may_lie_in_memory_as_they_like() -> None:
    inputs, stretch = problem(4, (6, 6), 16, WHOLE)
    answers = [
        deformable_sum(*inputs[:3], stretch, tuple(change(m) for m in inputs[3:]), (6, 6), 2)
        for change in (lambda m: m, lambda m: m.contiguous(), lambda m: m.flip(-1).flip(-1))
    ]
    assert answers[0] is not None
    assert all(torch.equal(answers[0], other) for other in answers[1:])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_place_that_is_no_number_makes_its_answer_none(which: int) -> None:
    inputs, stretch = problem(4, (6, 6), 16, WHOLE)
    inputs[which][0, 3] = torch.nan
    out = deformable_sum(*inputs[:3], stretch, tuple(inputs[3:]), (6, 6), 2)
    assert out is not None
    assert out[0, 3].isnan().all()
    assert torch.isfinite(out[1]).all()


def test_all_pictures_may_have_the_same_references() -> None:
    inputs, stretch = problem(4, (6, 6), 16, WHOLE)
    inputs[2] = inputs[2][0]
    agree(
        lambda o, a, r, *m: deformable_sum(o, a, r, stretch, m, (6, 6), 2),
        lambda *x: plain(*x, stretch=stretch, points=(6, 6), heads=2),
        inputs,
        torch.ones(2, 11, 32),
    )


def test_what_does_not_fit_is_refused_before_any_memory_is_read() -> None:
    inputs, stretch = problem(4, (6, 6), 16, WHOLE)
    for wrong in (
        [inputs[0], inputs[1][:, :5], inputs[2], *inputs[3:]],
        [inputs[0], inputs[1], inputs[2][..., :3], *inputs[3:]],
        [*inputs[:3], inputs[3][:1], inputs[4]],
        [*inputs[:3], inputs[3]],
    ):
        with pytest.raises(ValueError, match="do not fit"):
            deformable_sum(*wrong[:3], stretch, tuple(wrong[3:]), (6, 6), 2)


def test_it_leaves_to_torch_what_it_was_not_made_for() -> None:
    inputs, stretch = problem(4, (6, 6), 16, WHOLE)
    assert deformable_sum(*inputs[:3], stretch, tuple(m.double() for m in inputs[3:]), (6, 6), 2) is None
    assert deformable_sum(*inputs[:3], stretch, (inputs[3], inputs[4].bfloat16()), (6, 6), 2) is None
    assert deformable_sum(*inputs[:3], stretch, tuple(m[:, :24] for m in inputs[3:]), (6, 6), 2) is None
