"""Attention among queries, and of queries to the pyramid."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from finedetr.model.layers import kept

__all__ = ["DeformableAttention", "SelfAttention", "attend"]


class SelfAttention(nn.Module):
    """Multi-head attention with positions on queries and keys only; no attention map is ever materialized.

    `qk` and `v` are the two parts of the usual joint input projection: queries and keys read x + positions, values x.

    Args:
        width: D.
        heads: Number of heads.
        separate: Positions have a projection of their own (Conditional DETR).
        dropout: Of the attention, in training.
    """

    def __init__(self, width: int, heads: int, *, separate: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.qk = nn.Linear(width, 2 * width)
        self.v = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.position = nn.Linear(width, 2 * width) if separate else None
        bound = math.sqrt(6 / (4 * width))  # xavier_uniform of the joint [3·width, width] projection
        for layer in (self.qk, self.v, *((self.position,) if self.position is not None else ())):
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)
        nn.init.zeros_(self.out.bias)

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        positions: Float[Tensor, "*B N D"],
        blocked: Bool[Tensor, "*B E N"] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Tokens look at one another.

        Args:
            x: Content.
            positions: Added to what queries and keys are made of.
            blocked: For the first E tokens (extra query groups): True where the row must not see the column. The
                remaining tokens see one another and none of the first E, always; None: E is 0.
        """
        joint = self.qk(x + positions) if self.position is None else self.qk(x) + self.position(positions)
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (*joint.chunk(2, dim=-1), self.v(x))
        )
        seen = attend(q, k, v, blocked, self.dropout if self.training else 0.0)
        out: Tensor = self.out(seen.transpose(1, 2).flatten(2).to(x.dtype))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    """[B, heads, N, D/heads], with the first E tokens seeing what `blocked` leaves them."""
    if q.device.type == "cpu" and torch.is_grad_enabled():
        # in bfloat16 the backward pass of this one operation is three times slower there
        with torch.autocast("cpu", enabled=False):
            return _attend(q.float(), k.float(), v.float(), blocked, dropout)
    return _attend(q, k, v, blocked, dropout)


def _attend(q: Tensor, k: Tensor, v: Tensor, blocked: Tensor | None, dropout: float) -> Tensor:
    if blocked is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
    extra = blocked.shape[-2]
    if blocked.dim() == 3:
        blocked = blocked[:, None]  # of each picture, the same for all heads
    # two calls, so that no number of an extra group can touch the matching queries, not even by rounding
    return torch.cat(
        (
            F.scaled_dot_product_attention(q[:, :, :extra], k, v, attn_mask=~blocked, dropout_p=dropout),
            F.scaled_dot_product_attention(q[:, :, extra:], k[:, :, extra:], v[:, :, extra:], dropout_p=dropout),
        ),
        dim=2,
    )


@dataclass(frozen=True)
class _Grid:
    """Where the cells of all levels stand in one table, each level with a border of one zero cell."""

    sizes: tuple[tuple[int, int], ...]  # (height, width) of each level, without the border
    points: tuple[int, ...]  # places that a head looks at on each level

    def levels(self) -> Iterator[tuple[int, int, int]]:
        """First cell, one past the last, and cells in a line."""
        start = 0
        for height, width in self.sizes:
            stop = start + (height + 2) * (width + 2)
            yield start, stop, width + 2
            start = stop

    def of_points(self, values: Sequence[object]) -> Tensor:
        """What is given for each level, for each point."""
        return torch.tensor(values).repeat_interleave(torch.tensor(self.points), dim=0)


class _WeightedCorners(torch.autograd.Function):
    """Deformable attention's sum on the CPU: every output row is a weighted sum of a few rows of the memory.

    Bilinear samples are never written down. For each of the four corners of the cell in which a place lies, row numbers
    and weights form a sparse matrix A: the answer is A·values, the gradient of the values Aᵀ·grad, that of A's entries
    the dot product of two rows each. The maps carry a border of zeros, so that no corner can be missing.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, weights: Tensor, grid: _Grid) -> Tensor:
        """The sum [B, N, heads, D].

        Args:
            ctx: What `backward` reads.
            values: Cells of all levels [B, L, heads, D].
            places: Where to look, in 0..1 [2 (x, y), B, N, heads, P].
            weights: How much of it [B, N, heads, P].
            grid: Which cell is where.
        """
        batch, cells, heads, width = values.shape
        sizes = grid.of_points([(float(w), float(h)) for h, w in grid.sizes]).T[:, None, None, None]
        line = grid.of_points([line for *_, line in grid.levels()]).int()
        starts = grid.of_points([start for start, *_ in grid.levels()]).int()
        wanted = places * sizes - 0.5
        pixel = torch.minimum(wanted.clamp(min=-1), sizes)
        low = torch.minimum(pixel.floor(), sizes - 1)
        share = pixel - low
        # A place that is no number still makes its answer none: the share carries it to the losses, which name it.
        x, y = low.nan_to_num(nan=0.0).to(torch.int32)
        origin = (torch.arange(batch, dtype=torch.int32) * cells)[:, None, None, None] + (starts + line + 1)
        row = (origin + y * line + x) * heads + torch.arange(heads, dtype=torch.int32)[:, None]
        ctx.grid = grid
        ctx.save_for_backward(values, share, pixel == wanted, weights, sizes, row, line)
        table = values.reshape(-1, width)
        out = table.new_zeros(())
        for (down, right), entries in zip(_CORNERS, _entries(share, weights), strict=True):
            rows = row + (line * down + right) * heads
            out = out + F.embedding_bag(_flat(rows), table, mode="sum", per_sample_weights=_flat(entries))
        return out.view(*weights.shape[:3], width)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        values, share, inside, weights, sizes, row, line = ctx.saved_tensors
        table = values.reshape(-1, values.shape[-1])
        grad = grad.reshape(-1, table.shape[-1])
        heads, points = weights.shape[-2:]
        # Aᵀ: places in the order of their cells; the other corners are the same list, moved
        order = row.flatten().sort().indices
        queries = order // points
        counts = torch.bincount(row.flatten(), minlength=table.shape[0])
        starts = counts.cumsum(0) - counts
        bounds = torch.arange(0, row.numel() + 1, points, dtype=torch.int32)
        to_values = torch.zeros_like(values)
        products: list[Tensor] = []
        for (down, over), entries in zip(_CORNERS, _entries(share, weights), strict=True):
            own = F.embedding_bag(queries, grad, starts, mode="sum", per_sample_weights=entries.flatten()[order])
            for first, stop, cells in ctx.grid.levels():
                moved = cells * down + over
                to_values[:, first + moved : stop] += own.view_as(values)[:, first : stop - moved]
            rows = row + (line * down + over) * heads
            products.append(_row_products(bounds, rows.flatten(), grad, table).view_as(weights))
        x, y = share.unbind()
        left, right, below_left, below_right = products
        above, below = torch.lerp(left, right, x), torch.lerp(below_left, below_right, x)
        to_places = torch.empty_like(share)
        torch.mul(torch.lerp(right - left, below_right - below_left, y), weights, out=to_places[0])
        torch.mul(below - above, weights, out=to_places[1])
        return to_values, to_places.mul_(sizes).masked_fill_(~inside, 0), torch.lerp(above, below, y), None


_CORNERS = ((0, 0), (0, 1), (1, 0), (1, 1))  # (down, right) of the upper left one


def _entries(share: Tensor, weights: Tensor) -> Iterator[Tensor]:
    """For each corner, its part of every place times the place's weight.

    Args:
        share: How far the place is from the upper left corner towards its neighbours [2 (x, y), B, N, heads, P].
        weights: Of the places [B, N, heads, P].
    """
    for of_line in (weights * (1 - share[1]), weights * share[1]):
        of_right = of_line * share[0]
        yield of_line - of_right
        yield of_right


def _flat(x: Tensor) -> Tensor:
    """[B, N, heads, P] as rows of P."""
    return x.reshape(-1, x.shape[-1])


def _row_products(bounds: Tensor, columns: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """left[i]·right[columns[k]] for all k in bounds[i] .. bounds[i + 1] - 1."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        out = torch.sparse_csr_tensor(
            bounds, columns, torch.zeros(columns.numel()), (left.shape[0], right.shape[0]), check_invariants=False
        )
    products: Tensor = torch.sparse.sampled_addmm(out, left, right.t(), beta=0.0, out=out).values()
    return products


@kept
def _cell_sizes(
    shapes: tuple[tuple[int, int], ...], points: tuple[int, ...], device: torch.device
) -> Float[Tensor, "P 2"]:
    """Width and height of a cell of each point's level."""
    sizes = [(1 / width, 1 / height) for height, width in shapes]
    return torch.tensor([size for size, count in zip(sizes, points, strict=True) for _ in range(count)], device=device)


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al., 2021; D-FINE, spec 1.4 step 2: without projections).

    Each head samples `points[l]` places of level l around the reference and adds them with softmax weights over all
    points of all levels. Offsets are in units of the reference box, or of a level's cells where it is a point. A place
    is read between its four cells, or (`discrete`, RT-DETRv2's "dsp", for runtimes without GridSample) at one cell; its
    offsets then have no gradient and stay what they are. One that does not read (`reads`) is shown what another has
    read.
    """

    reach: Tensor

    def __init__(
        self,
        width: int,
        heads: int,
        points: tuple[int, ...],
        *,
        projected: bool = False,
        discrete: bool = False,
        reads: bool = True,
    ) -> None:
        super().__init__()
        self.heads, self.points, self.discrete = heads, points, discrete
        self.value = nn.Linear(width, width) if projected and reads else None
        self.out = nn.Linear(width, width) if projected else None
        total = sum(points)
        self.sampling_offsets = nn.Linear(width, heads * total * 2)
        self.attention_weights = nn.Linear(width, heads * total)
        # half of the reference's size, shared among the points of a level
        self.register_buffer("reach", torch.cat([torch.full((n, 1), 0.5 / n) for n in points]), persistent=False)
        self._initialize()
        self.sampling_offsets.requires_grad_(not discrete)

    def _initialize(self) -> None:
        """Points start on rays, one direction a head, at distances 1, 2, … (Deformable DETR)."""
        angles = torch.arange(self.heads, dtype=torch.float32) * (2 * math.pi / self.heads)
        rays = torch.stack((angles.cos(), angles.sin()), dim=-1)
        rays = rays / rays.abs().amax(dim=-1, keepdim=True)
        steps = torch.cat([torch.arange(1, n + 1, dtype=torch.float32) for n in self.points])
        nn.init.zeros_(self.sampling_offsets.weight)
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for layer in (self.value, self.out):
            if layer is not None:
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_((rays[:, None] * steps[:, None]).flatten())

    def forward(
        self,
        x: Float[Tensor, "B N D"],
        references: Float[Tensor, "*B N R"],
        memory: tuple[Float[Tensor, "B D H W"], ...],
        shown: tuple[Float[Tensor, "B D H W"], ...] | None = None,
    ) -> Float[Tensor, "B N D"]:
        """Queries look at the pyramid around their reference boxes (cx, cy, w, h in [0, 1]) or points (x, y).

        Args:
            x: Queries.
            references: Where they look.
            memory: The pyramid.
            shown: What another attention has read of it, for one that does not read.
        """
        batch, queries, _ = x.shape
        memory = self.read(memory) if shown is None else shown
        offsets = self.sampling_offsets(x).view(batch, queries, self.heads, -1, 2).float()
        weights = self.attention_weights(x).view(batch, queries, self.heads, -1).float().softmax(dim=-1)
        references = references[..., None, None, :]
        if references.shape[-1] == 4:
            moved = offsets * self.reach * references[..., 2:]
        else:
            shapes = tuple((int(level.shape[-2]), int(level.shape[-1])) for level in memory)
            moved = offsets * _cell_sizes(shapes, self.points, offsets.device)
        places = references[..., :2] + moved  # [B, N, heads, P, 2]
        if self.discrete:
            seen = self._sum_of_cells(places, weights, memory)
        elif x.device.type == "cpu" and not torch.compiler.is_compiling():
            seen = self._sum_of_corners(places, weights, memory)
        else:
            seen = self._sum_of_samples(places, weights, memory)
        seen = seen.to(x.dtype)
        return seen if self.out is None else self.out(seen)

    def read(self, memory: tuple[Float[Tensor, "B D H W"], ...]) -> tuple[Float[Tensor, "B D H W"], ...]:
        """What queries find in the pyramid: its projection, where there is one."""
        if self.value is None:
            return memory
        project = self.value
        return tuple(project(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for level in memory)

    def _sum_of_corners(self, places: Tensor, weights: Tensor, memory: tuple[Tensor, ...]) -> Tensor:
        """For the CPU: a sparse product."""
        padded = [F.pad(level.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1)).flatten(1, 2) for level in memory]
        out: Tensor = _WeightedCorners.apply(  # type: ignore[no-untyped-call]
            torch.cat(padded, dim=1).float().unflatten(-1, (self.heads, -1)),
            places.movedim(-1, 0).contiguous(),
            weights,
            _Grid(tuple((level.shape[-2], level.shape[-1]) for level in memory), self.points),
        )
        return out.flatten(2)

    def _sum_of_cells(self, places: Tensor, weights: Tensor, memory: tuple[Tensor, ...]) -> Tensor:
        """Discrete sampling: the cell at trunc(place · size + 1/2), or the nearest one of the border.

        The official code clips both coordinates to the height, which is wrong on rectangles (spec 1.6); here x is
        clipped to the width.
        """
        seen = weights.new_zeros(())
        parts = zip(memory, places.split(self.points, dim=3), weights.split(self.points, dim=3), strict=True)
        for level, where, weight in parts:
            height, width = level.shape[-2:]
            x = (where[..., 0] * width + 0.5).long().clamp(0, width - 1)
            y = (where[..., 1] * height + 0.5).long().clamp(0, height - 1)
            cell = (y * width + x).transpose(1, 2)  # [B, heads, N, P]
            table = level.flatten(2).unflatten(1, (self.heads, -1)).float()  # [B, heads, D/heads, H·W]
            index = cell.flatten(2)[:, :, None].expand(-1, -1, table.shape[2], -1)
            samples = table.gather(3, index).unflatten(3, cell.shape[2:])
            seen = seen + (samples * weight.transpose(1, 2)[:, :, None]).sum(dim=-1)
        return seen.flatten(1, 2).transpose(1, 2)

    def _sum_of_samples(self, places: Tensor, weights: Tensor, memory: tuple[Tensor, ...]) -> Tensor:
        """For accelerators and graphs: `grid_sample`, whose places go from -1 to 1, with the queries innermost."""
        places = (2 * places - 1).permute(0, 2, 3, 1, 4).flatten(0, 1)  # [B·heads, P, N, 2]
        weights = weights.permute(0, 2, 3, 1).flatten(0, 1)
        seen = weights.new_zeros(())
        parts = zip(memory, places.split(self.points, dim=1), weights.split(self.points, dim=1), strict=True)
        for level, grid, weight in parts:
            split = level.reshape(grid.shape[0], -1, *level.shape[-2:]).float()
            samples = F.grid_sample(split, grid, align_corners=False)  # [B·heads, D/heads, P, N]
            seen = seen + (samples * weight[:, None]).sum(dim=2)
        return seen.view(memory[0].shape[0], -1, seen.shape[-1]).transpose(1, 2)
