"""Attention of queries to the pyramid, at a few places each."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from finedetr.kernels.deformable import deformable_sum
from finedetr.model.corners import sum_of_corners
from finedetr.model.layers import kept

__all__ = ["DeformableAttention"]


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
        offsets, logits = self._offsets(x), self.attention_weights(x)
        stretch = self.reach.expand(2, -1)
        if references.shape[-1] == 2:
            shapes = tuple((int(level.shape[-2]), int(level.shape[-1])) for level in memory)
            stretch = _cell_sizes(shapes, self.points, self.heads, offsets.device)
        seen = None
        if torch.is_grad_enabled() and not self.discrete:
            seen = deformable_sum(offsets, logits, references, stretch, memory, self.points, self.heads)
        if seen is None:
            seen = self._sum(offsets.float(), self._weights(logits), references, stretch, memory)
        seen = seen.to(x.dtype)
        return seen if self.out is None else self.out(seen)

    def _sum(
        self, offsets: Tensor, weights: Tensor, references: Tensor, stretch: Tensor, memory: tuple[Tensor, ...]
    ) -> Float[Tensor, "B N D"]:
        """What `deformable_sum` does, by operations of torch."""
        references = references[..., None]
        moved = offsets * stretch
        if references.shape[-2] == 4:
            moved = moved * references[..., 2:, :]
        places = references[..., :2, :] + moved  # [B, N, 2 (x, y), heads · P]
        if self.discrete:
            return self._sum_of_cells(places, weights, memory)
        if places.device.type == "cpu" and not torch.compiler.is_compiling():
            return sum_of_corners(places, weights, memory, self.points, self.heads)
        return self._sum_of_samples(places, weights, memory)

    def _offsets(self, x: Tensor) -> Tensor:
        """How far each place is from the reference [B, N, 2 (x, y), heads · P].

        The published weights answer x and y by turns. Their rows are sorted here and not the many answers later.
        """
        layer = self.sampling_offsets
        weight = layer.weight.unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
        bias = layer.bias.view(-1, 2).T.flatten()
        offsets: Tensor = F.linear(x, weight, bias).unflatten(-1, (2, -1))
        return offsets

    def _weights(self, logits: Tensor) -> Tensor:
        """How much each place counts [B, N, heads · P]; those of a head add up to one."""
        if logits.device.type != "cpu" or torch.compiler.is_compiling():
            alone: Tensor = logits.unflatten(-1, (self.heads, -1)).float().softmax(dim=-1).flatten(-2)
            return alone
        # along a short last axis softmax takes seven times as long on a CPU
        turned: Tensor = logits.transpose(1, 2).unflatten(1, (self.heads, -1))
        turned = turned.to(torch.float32, memory_format=torch.contiguous_format).softmax(dim=2)
        return turned.flatten(1, 2).transpose(1, 2).contiguous()

    def read(self, memory: tuple[Float[Tensor, "B D H W"], ...]) -> tuple[Float[Tensor, "B D H W"], ...]:
        """What queries find in the pyramid: its projection, where there is one."""
        if self.value is None:
            return memory
        project = self.value
        return tuple(project(level.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for level in memory)

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
