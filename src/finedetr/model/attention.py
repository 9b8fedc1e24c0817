"""Attention among queries, and of queries to the pyramid."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

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
        queries = _queries(row.numel(), points, row.device).index_select(0, order)
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


@kept
def _queries(places: int, points: int, device: torch.device) -> Tensor:
    """Which output row each place belongs to."""
    return torch.arange(places, device=device) // points


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


@kept
def _cell_sizes(
    shapes: tuple[tuple[int, int], ...], points: tuple[int, ...], heads: int, device: torch.device
) -> Float[Tensor, "2 P"]:
    """Width and height of a cell of each point's level, for each head."""
    sizes = [(1 / width, 1 / height) for height, width in shapes]
    of_points = [size for size, count in zip(sizes, points, strict=True) for _ in range(count)]
    return torch.tensor(of_points * heads, device=device).T.contiguous()


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
        reach = torch.cat([torch.full((n,), 0.5 / n) for n in points])
        self.register_buffer("reach", reach.repeat(heads), persistent=False)
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
        memory = self.read(memory) if shown is None else shown
        offsets = self._offsets(x).float()
        weights = self._weights(x)
        references = references[..., None]
        if references.shape[-2] == 4:
            moved = offsets * self.reach * references[..., 2:, :]
        else:
            shapes = tuple((int(level.shape[-2]), int(level.shape[-1])) for level in memory)
            moved = offsets * _cell_sizes(shapes, self.points, self.heads, offsets.device)
        places = references[..., :2, :] + moved  # [B, N, 2 (x, y), heads · P]
        if self.discrete:
            seen = self._sum_of_cells(places, weights, memory)
        elif x.device.type == "cpu" and not torch.compiler.is_compiling():
            seen = self._sum_of_corners(places, weights, memory)
        else:
            seen = self._sum_of_samples(places, weights, memory)
        seen = seen.to(x.dtype)
        return seen if self.out is None else self.out(seen)

    def _offsets(self, x: Tensor) -> Tensor:
        """How far each place is from the reference [B, N, 2 (x, y), heads · P].

        The published weights answer x and y by turns. Their rows are sorted here and not the many answers later.
        """
        layer = self.sampling_offsets
        weight = layer.weight.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        bias = layer.bias.view(-1, 2).T.flatten()
        offsets: Tensor = F.linear(x, weight, bias).unflatten(-1, (2, -1))
        return offsets

    def _weights(self, x: Tensor) -> Tensor:
        """How much each place counts [B, N, heads · P]; those of a head add up to one."""
        weights: Tensor = self.attention_weights(x)
        if x.device.type != "cpu" or torch.compiler.is_compiling():
            weights = weights.unflatten(-1, (self.heads, -1)).float().softmax(dim=-1).flatten(-2)
        else:  # along a short last axis softmax takes seven times as long on a CPU
            weights = weights.transpose(1, 2).unflatten(1, (self.heads, -1))
            weights = weights.to(torch.float32, memory_format=torch.contiguous_format).softmax(dim=2)
            weights = weights.flatten(1, 2).transpose(1, 2).contiguous()
        return weights

    def read(self, memory: tuple[Float[Tensor, "B D H W"], ...]) -> tuple[Float[Tensor, "B D H W"], ...]:
        """What queries find in the pyramid: its projection, where there is one."""
        if self.value is None:
            return memory
        project = self.value
        return tuple(project(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for level in memory)

    def _sum_of_corners(self, places: Tensor, weights: Tensor, memory: tuple[Tensor, ...]) -> Tensor:
        """For the CPU: a sparse product."""
        grid = _Grid(tuple((level.shape[-2], level.shape[-1]) for level in memory), self.points, self.heads)
        cells = torch.cat([grid.padded(level) for level in memory], dim=1).float()
        out: Tensor = _WeightedCorners.apply(  # type: ignore[no-untyped-call]
            cells.unflatten(-1, (self.heads, -1)), places, weights, grid
        )
        return out.flatten(2)

    def _sum_of_cells(self, places: Tensor, weights: Tensor, memory: tuple[Tensor, ...]) -> Tensor:
        """Discrete sampling: the cell at trunc(place · size + 1/2), or the nearest one of the border.

        The official code clips both coordinates to the height, which is wrong on rectangles (spec 1.6); here x is
        clipped to the width.
        """
        seen = weights.new_zeros(())
        for level, where, weight in self._by_level(places, weights, memory):
            height, width = level.shape[-2:]
            x = (where[:, 0] * width + 0.5).long().clamp(0, width - 1)
            y = (where[:, 1] * height + 0.5).long().clamp(0, height - 1)
            cell = y * width + x  # [B, heads, P, N]
            table = level.flatten(2).unflatten(1, (self.heads, -1)).float()  # [B, heads, D/heads, H·W]
            index = cell.flatten(2)[:, :, None].expand(-1, -1, table.shape[2], -1)
            samples = table.gather(3, index).unflatten(3, cell.shape[2:])
            seen = seen + (samples * weight[:, :, None]).sum(dim=-2)
        return seen.flatten(1, 2).transpose(1, 2)

    def _sum_of_samples(self, places: Tensor, weights: Tensor, memory: tuple[Tensor, ...]) -> Tensor:
        """For accelerators and graphs: `grid_sample`, whose places go from -1 to 1."""
        seen = weights.new_zeros(())
        for level, where, weight in self._by_level(2 * places - 1, weights, memory):
            grid = where.permute(0, 2, 3, 4, 1).flatten(0, 1)  # [B·heads, P, N, 2]
            split = level.reshape(grid.shape[0], -1, *level.shape[-2:]).float()
            samples = F.grid_sample(split, grid, align_corners=False)  # [B·heads, D/heads, P, N]
            seen = seen + (samples * weight.flatten(0, 1)[:, None]).sum(dim=2)
        return seen.view(memory[0].shape[0], -1, seen.shape[-1]).transpose(1, 2)

    def _by_level(
        self, places: Tensor, weights: Tensor, memory: tuple[Tensor, ...]
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each level, the places on it [B, 2, heads, P, N] and their weights [B, heads, P, N], queries innermost."""
        places = places.permute(0, 2, 3, 1).unflatten(2, (self.heads, -1))
        weights = weights.transpose(1, 2).unflatten(1, (self.heads, -1))
        return zip(memory, places.split(self.points, dim=3), weights.split(self.points, dim=2), strict=True)
