"""Queries of a picture's salient points (SD-DETR): a small detector finds boxes, and each task its points in them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from finedetr.model.config import DecoderConfig
from finedetr.model.decoder_layers import Seeds
from finedetr.model.layers import MLP, focal_bias
from finedetr.model.sines import place_code

__all__ = ["MiniDetector", "SalientPoints", "Tower", "level_maps", "region_features", "sample"]


def level_maps(
    tokens: Float[Tensor, "B T D"], shapes: tuple[tuple[int, int], ...]
) -> tuple[Float[Tensor, "B D H W"], ...]:
    """The levels of a flattened pyramid."""
    parts = tokens.transpose(1, 2).split([height * width for height, width in shapes], dim=2)
    return tuple(part.unflatten(2, shape) for part, shape in zip(parts, shapes, strict=True))


def sample(
    maps: tuple[Float[Tensor, "B D H W"], ...], level: Int[Tensor, "B Q"], places: Float[Tensor, "B Q P 2"]
) -> Float[Tensor, "B Q P D"]:
    """What stands at P places of each query, between the cells of the query's level; outside of the map is zero."""
    grid = 2 * places.float() - 1
    seen = grid.new_zeros(())
    for index, level_map in enumerate(maps):
        here = F.grid_sample(level_map.float(), grid, align_corners=False)  # [B, D, Q, P]
        seen = here if len(maps) == 1 else seen + here * (level == index)[:, None, :, None]
    return seen.permute(0, 2, 3, 1).to(maps[0].dtype)


def region_features(
    maps: tuple[Float[Tensor, "B D H W"], ...],
    level: Int[Tensor, "B Q"],
    boxes: Float[Tensor, "B Q 4"],
    side: int,
) -> Float[Tensor, "B Q P D"]:
    """The inside of each box as side x side places, row by row: RoIAlign with one place in the middle of each part."""
    steps = (torch.arange(side, device=boxes.device) + 0.5) / side - 0.5
    inside = torch.stack(torch.meshgrid(steps, steps, indexing="xy"), dim=-1).flatten(0, 1)
    return sample(maps, level, boxes[..., None, :2] + inside * boxes[..., None, 2:])


class Tower(nn.Module):
    """What the small detector makes of each level before a head: convolutions, a network for each cell, or nothing."""

    def __init__(self, width: int, kind: str, depth: int = 4) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for _ in range(0 if kind == "linear" else depth):
            convolution = nn.Conv2d(width, width, 3 if kind == "conv" else 1, padding="same", bias=False)
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
            layers += [convolution, nn.GroupNorm(32, width), nn.ReLU()]
        self.layers = nn.Sequential(*layers)

    def forward(self, maps: tuple[Float[Tensor, "B D H W"], ...]) -> Float[Tensor, "B T D"]:
        """All cells as tokens."""
        return torch.cat([self.layers(level).flatten(2).transpose(1, 2) for level in maps], dim=1)


class MiniDetector(nn.Module):
    """Classes and a box for every cell: where objects may be (SD-DETR; its heads after DESTR, spec 3.3)."""

    def __init__(self, config: DecoderConfig, classes: int) -> None:
        super().__init__()
        width, kind = config.width, config.salient.tower
        self.score_tower, self.box_tower = Tower(width, kind), Tower(width, kind)
        self.score_head = nn.Linear(width, classes)
        self.box_head = MLP(width, width, 4, 3)
        nn.init.constant_(self.score_head.bias, focal_bias())
        self.box_head.zero_last()

    def forward(
        self, maps: tuple[Float[Tensor, "B D H W"], ...], anchors: Float[Tensor, "T 4"]
    ) -> tuple[Float[Tensor, "B T C"], Float[Tensor, "B T 4"]]:
        """Logits and boxes of all cells.

        Args:
            maps: The pyramid.
            anchors: Logits of the boxes at which those of the cells begin.
        """
        boxes = (self.box_head(self.box_tower(maps)).float() + anchors).sigmoid()
        return self.score_head(self.score_tower(maps)), boxes


class SalientPoints(nn.Module):
    """For one task, M points within each box, and the query that is made of what stands there (SD-DETR, eq. 5).

    The layers are SAM-DETR's; all points begin at the middle of the box.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        width, salient = config.width, config.salient
        self.side, self.width = salient.roi, width
        narrow = width // 4
        self.squeeze = nn.Linear(width, narrow)
        sizes = (narrow * self.side**2, width, 2 * width, 2 * width, 2 * salient.points)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        last = self.layers[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.position = MLP(width, width, width, 2) if config.source == "points" else None
        for layer in self.position.layers if self.position is not None else ():
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(
        self,
        maps: tuple[Float[Tensor, "B D H W"], ...],
        level: Int[Tensor, "B Q"],
        boxes: Float[Tensor, "B Q 4"],
    ) -> Seeds:
        """The queries of boxes; they look at the box where the host's queries are boxes, else at the mean point."""
        points = self.points(maps, level, boxes)
        content = sample(maps, level, points).mean(dim=2)
        if self.position is None:
            return Seeds(content, boxes)
        code = place_code(points, self.width // 2).mean(dim=2).to(content.dtype)
        return Seeds(content, points.mean(dim=2), self.position(code))

    def points(
        self, maps: tuple[Float[Tensor, "B D H W"], ...], level: Int[Tensor, "B Q"], boxes: Float[Tensor, "B Q 4"]
    ) -> Float[Tensor, "B Q M 2"]:
        """Where to look, within each box."""
        # a linear layer may come before the sampling, which is then of fewer channels: both orders are the same
        narrow = tuple(F.conv2d(level_map, self.squeeze.weight[..., None, None]) for level_map in maps)
        x = F.relu(region_features(narrow, level, boxes, self.side) + self.squeeze.bias).flatten(2)
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        moved: Tensor = self.layers[-1](x).float().unflatten(-1, (-1, 2)).tanh()
        return boxes[..., None, :2] + 0.5 * boxes[..., None, 2:] * moved
