"""Deformable attention's sum on a CPU, as a sparse product with a backward pass of its own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from finedetr.model.layers import kept

__all__ = ["sum_of_corners"]


def sum_of_corners(
    places: Float[Tensor, "B N 2 P"],
    weights: Float[Tensor, "B N P"],
    memory: tuple[Float[Tensor, "B D H W"], ...],
    points: tuple[int, ...],
    heads: int,
) -> Float[Tensor, "B N D"]:
    """The weighted sum of bilinear samples of a pyramid; outside of its maps there are zeros.

    Args:
        places: x and y of what is sampled, from 0 to 1, of each head and point (head by head, level by level).
        weights: Of the places.
        memory: The pyramid.
        points: How many of a head's places are on each level.
        heads: Among which the channels are shared.
    """
    grid = _Grid(tuple((level.shape[-2], level.shape[-1]) for level in memory), points, heads)
    cells = torch.cat([grid.padded(level) for level in memory], dim=1).float().unflatten(-1, (heads, -1))
    out: Tensor = _WeightedCorners.apply(cells, places, weights, grid)  # type: ignore[no-untyped-call]
    return out.flatten(2)


@dataclass(frozen=True)
class _Grid:
    """Where the cells of all levels stand in one table, each level with a border of zero cells."""

    BEFORE: ClassVar[int] = 1  # lines of border above and to the left
    AFTER: ClassVar[int] = 2  # and behind: the upper left corner of a place may itself lie on the border

    sizes: tuple[tuple[int, int], ...]  # (height, width) of each level, without the border
    points: tuple[int, ...]  # places that a head looks at on each level
    heads: int

    def levels(self) -> Iterator[tuple[int, int, int]]:
        """First cell, one past the last, and cells in a line."""
        start, border = 0, self.BEFORE + self.AFTER
        for height, width in self.sizes:
            stop = start + (height + border) * (width + border)
            yield start, stop, width + border
            start = stop

    def padded(self, level: Tensor) -> Tensor:
        """[B, D, H, W] with its border, as cells [B, L, D]."""
        border = (self.BEFORE, self.AFTER)
        return F.pad(level.permute(0, 2, 3, 1), (0, 0, *border, *border)).flatten(1, 2)


class _Constants(NamedTuple):
    """What is known of a place before it is known, by its head and point (the last axis, `heads · P`)."""

    sizes: Tensor  # (width, height) of its level [2, heads · P]
    line: Tensor  # rows of the table to the line below [heads · P], whole numbers
    origin: Tensor  # the row of its head in the cell (0, 0) of its level, in each picture [B, 1, heads · P]


@kept
def _constants(grid: _Grid, batch: int, device: torch.device) -> _Constants:
    """For the rows of a table [B · L · heads, D]."""

    def of_places(values: Sequence[object]) -> Tensor:
        of_points = torch.tensor(values, device=device).repeat_interleave(torch.tensor(grid.points, device=device), 0)
        return of_points.repeat(grid.heads, *[1] * (of_points.dim() - 1))

    levels = list(grid.levels())
    sizes = of_places([(float(width), float(height)) for height, width in grid.sizes]).T.contiguous()
    line = of_places([line for *_, line in levels]) * grid.heads
    start = of_places([start + grid.BEFORE * (line + 1) for start, _, line in levels]) * grid.heads
    head = torch.arange(grid.heads, device=device).repeat_interleave(sum(grid.points))
    picture = torch.arange(batch, device=device)[:, None, None] * (levels[-1][1] * grid.heads)
    return _Constants(sizes, line.int(), (picture + start + head).int())


class _WeightedCorners(torch.autograd.Function):
    """Deformable attention's sum on the CPU: every output row is a weighted sum of a few rows of the memory.

    Bilinear samples are never written down. For each of the four corners of the cell in which a place lies, row numbers
    and weights form a sparse matrix A: the answer is A·values, the gradient of the values Aᵀ·grad, that of A's entries
    the dot product of two rows each. The maps carry a border of zeros, so that no corner can be missing. Heads and
    points share one axis, the last: an operation on the CPU runs at full speed along a long last axis only.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, weights: Tensor, grid: _Grid) -> Tensor:
        """The sum [B, N, heads, D].

        Args:
            ctx: What `backward` reads.
            values: Cells of all levels [B, L, heads, D].
            places: Where to look, in 0..1 [B, N, 2 (x, y), heads · P].
            weights: How much of it [B, N, heads · P].
            grid: Which cell is where.
        """
        batch, _, heads, width = values.shape
        constants = _constants(grid, batch, values.device)
        wanted = (places * constants.sizes).sub_(0.5)
        pixel = torch.minimum(wanted.clamp(min=-1), constants.sizes)
        low = pixel.floor()
        share = pixel - low
        x, y = low.unbind(2)
        # exact in float32 below 2^24 rows a picture; a place that is no number still makes its answer none: the share
        # carries it to the losses, which name it
        row = torch.add(y * constants.line.float(), x, alpha=heads).nan_to_num_(nan=0.0).int().add_(constants.origin)
        ctx.grid = grid
        ctx.save_for_backward(values, share, pixel == wanted, weights, row)
        table, shape = values.reshape(-1, width), (-1, weights.shape[-1] // heads)
        above, below = row.view(shape), (row + constants.line).view(shape)
        parts = zip((above, above, below, below), _tables(table, heads), _entries(share, weights), strict=True)
        out = [
            F.embedding_bag(rows, moved, mode="sum", per_sample_weights=entries.view(shape))
            for rows, moved, entries in parts
        ]
        return ((out[0] + out[1]).add_(out[2]).add_(out[3])).view(*weights.shape[:2], heads, width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        values, share, inside, weights, row = ctx.saved_tensors
        table = values.reshape(-1, values.shape[-1])
        grad = grad.reshape(-1, table.shape[-1])
        heads = values.shape[2]
        points = weights.shape[-1] // heads
        constants = _constants(ctx.grid, values.shape[0], values.device)
        # Aᵀ: places in the order of their cells; the other corners are the same list, moved
        order = row.flatten().sort().indices
        queries = torch.arange(grad.shape[0])[:, None].expand(-1, points).flatten().index_select(0, order)
        counts = torch.bincount(row.flatten(), minlength=table.shape[0])
        starts = counts.cumsum(0) - counts
        bounds = torch.arange(0, row.numel() + 1, points, dtype=torch.int32)
        to_values = torch.zeros_like(values)
        products: list[Tensor] = []
        above, below = row.flatten(), (row + constants.line).flatten()
        parts = zip(
            _CORNERS, (above, above, below, below), _tables(table, heads), _entries(share, weights), strict=True
        )
        for (down, over), rows, moved, entries in parts:
            sorted_entries = entries.flatten().index_select(0, order)
            own = F.embedding_bag(queries, grad, starts, mode="sum", per_sample_weights=sorted_entries)
            for first, stop, cells in ctx.grid.levels():
                step = cells * down + over
                to_values[:, first + step : stop] += own.view_as(values)[:, first : stop - step]
            products.append(_row_products(bounds, rows, grad, moved).view_as(weights))
        to_right, to_bottom = share.unbind(2)
        left, right, below_left, below_right = products
        at_top, at_bottom = torch.lerp(left, right, to_right), torch.lerp(below_left, below_right, to_right)
        to_places = torch.empty_like(share)
        to_x, to_y = to_places.unbind(2)
        torch.mul(torch.lerp(right - left, below_right - below_left, to_bottom), weights, out=to_x)
        torch.mul(at_bottom - at_top, weights, out=to_y)
        return to_values, to_places.mul_(constants.sizes).mul_(inside), torch.lerp(at_top, at_bottom, to_bottom), None


_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (down, right) of the upper left one


def _tables(table: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each corner, what its rows are counted in: one cell to the right is `heads` rows on."""
    return table, table[heads:], table, table[heads:]


def _entries(share: Tensor, weights: Tensor) -> Iterator[Tensor]:
    """For each corner, its part of every place times the place's weight.

    Args:
        share: How far the place is from the upper left corner towards its neighbours [B, N, 2 (x, y), heads · P].
        weights: Of the places [B, N, heads · P].
    """
    x, y = share.unbind(2)
    below = weights * y
    for of_line in (weights - below, below):
        of_right = of_line * x
        yield of_line - of_right
        yield of_right


def _row_products(bounds: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left[i]·right[columns[k]] for all k in bounds[i] .. bounds[i + 1] - 1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        out = torch.sparse_csr_tensor(
            bounds, columns, torch.zeros(columns.numel()), (left.shape[0], right.shape[0]), check_invariants=False
        )
    products: Tensor = torch.sparse.sampled_addmm(out, left, right.t(), beta=0.0, out=out).values()
    return products
