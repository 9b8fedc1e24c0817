"""Where the detector's own queries come from: the best tokens of the pyramid, or what was learned of all pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from finedetr.model.config import DecoderConfig
from finedetr.model.decoder_layers import Seeds
from finedetr.model.layers import MLP, focal_bias, kept, without_gradient
from finedetr.model.salient import MiniDetector, SalientPoints, level_maps
from finedetr.model.sines import sine_code

__all__ = [
    "Answer",
    "LearnedAnchors",
    "LearnedPoints",
    "Queries",
    "QuerySelection",
    "SalientQueries",
    "anchor_table",
    "build_queries",
]


@dataclass(frozen=True, slots=True)
class Answer:
    """Logits and boxes of one stage, with gradient."""

    logits: Float[Tensor, "B Q C"]
    boxes: Float[Tensor, "B Q 4"]


@dataclass(frozen=True, slots=True)
class Queries:
    """What the decoder starts from, and what the encoder itself answers where it does."""

    content: Float[Tensor, "B Q D"]
    references: Float[Tensor, "B Q R"]  # boxes (cx, cy, w, h), or points (x, y)
    positions: Float[Tensor, "B Q D"] | None = None  # where the decoder does not make them of the references
    tokens: Int[Tensor, "B Q"] | None = None  # which cell of the flattened pyramid each comes from, if from any
    encoder: Answer | None = None  # the stage "encoder" of these queries
    proposals: Answer | None = None  # of all tokens, in training
    agnostic: bool = False  # classes do not count yet in the proposals
    embedded: Float[Tensor, "B T D"] | None = None  # all cells in the space of queries, outside training
    scoring: Seeds | None = None  # what the branch for classes of a split decoder starts with, where it has its own


@kept
def anchor_table(
    shapes: tuple[tuple[int, int], ...], device: torch.device, side: float = 0.05, margin: float = 0.01
) -> tuple[Float[Tensor, "T 4"], Bool[Tensor, "T 1"]]:
    """Logits of one anchor a cell, row after row, level after level, and which of them are usable.

    The anchor of a cell stands at its centre with sides of 0.05·2^level. Anchors that are not strictly inside
    (0.01, 0.99) are unusable: their logits are +inf (spec 1.4).
    """
    anchors = []
    for level, (height, width) in enumerate(shapes):
        y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        center = torch.stack(((x + 0.5) / width, (y + 0.5) / height), dim=-1).float()
        anchors.append(torch.cat((center, torch.full_like(center, side * 2.0**level)), dim=-1).flatten(0, 1))
    table = torch.cat(anchors)
    usable = ((table > margin) & (table < 1 - margin)).all(dim=-1, keepdim=True)
    return torch.log(table / (1 - table)).masked_fill(~usable, torch.inf).to(device), usable.to(device)


class QuerySelection(nn.Module):
    """The tokens with the best class score become queries; their boxes start at the cell's anchor.

    RT-DETR takes content and boxes from them, DINO the boxes only. Deformable DETR in two stages ranks by class 0, for
    which its encoder learns all objects, and makes content and positions of the boxes (spec 2.3 - 2.5).
    """

    def __init__(self, config: DecoderConfig, classes: int) -> None:
        super().__init__()
        width, raw = config.width, config.select_raw
        self.queries, self.agnostic = config.queries, config.source == "proposals"
        self.proj = nn.Identity() if raw else nn.Linear(width, width)
        self.norm = nn.Identity() if raw else nn.LayerNorm(width)
        self.score_head = nn.Linear(width, classes)
        self.box_head = MLP(width, width, 4, 3, config.head_activation)
        self.content = nn.Embedding(config.queries, width) if config.source == "mixed" else None
        self.expand = nn.Linear(2 * width, 2 * width) if self.agnostic else None  # a box to position and content
        self.expand_norm = nn.LayerNorm(2 * width) if self.agnostic else None
        for layer in (self.proj, self.expand):
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
        nn.init.constant_(self.score_head.bias, focal_bias())
        self.box_head.zero_last()

    def forward(self, memory: Float[Tensor, "B T D"], shapes: tuple[tuple[int, int], ...]) -> Queries:
        """The queries of a batch; at most as many as the pyramid has cells."""
        anchors, usable = anchor_table(shapes, memory.device)
        memory = memory.masked_fill(~usable, 0.0)
        if self.agnostic:
            return self._proposed(memory, anchors)
        # Ranking needs no gradient. Only the chosen tokens go through the heads a second time, with one: the same
        # gradient as through all tokens, for a fraction of the backward pass.
        with without_gradient():
            embedded = self.norm(self.proj(memory))
            tokens = self._best(self.score_head(embedded).amax(dim=-1))
        content = self.norm(self.proj(_pick(memory, tokens)))
        answer = self._answer(content, anchors[tokens])
        boxes, kept = answer.boxes.detach(), None if self.training else embedded
        if self.content is not None:
            learned = self.content.weight[: boxes.shape[1]].expand(len(boxes), -1, -1)
            return Queries(learned, boxes, encoder=answer, tokens=tokens, embedded=kept)
        return Queries(content.detach(), boxes, encoder=answer, tokens=tokens, embedded=kept)

    def _proposed(self, memory: Tensor, anchors: Tensor) -> Queries:
        """Queries made of boxes; in training all tokens answer, and learn which of them are objects."""
        embedded, everything = self.norm(self.proj(memory)), None
        if self.training:
            everything = self._answer(embedded, anchors)
            tokens = self._best(everything.logits[..., 0])
            boxes = _pick(everything.boxes, tokens).detach()
        else:
            tokens = self._best(self.score_head(embedded)[..., 0])
            boxes = self._answer(_pick(embedded, tokens), anchors[tokens]).boxes.detach()
        positions, content = self._expanded(boxes, memory.dtype)
        kept = None if self.training else embedded.detach()
        return Queries(content, boxes, positions, tokens=tokens, embedded=kept, proposals=everything, agnostic=True)

    def _best(self, scores: Tensor) -> Tensor:
        return scores.topk(min(self.queries, scores.shape[1]), dim=1).indices

    def _answer(self, tokens: Tensor, anchors: Tensor) -> Answer:
        return Answer(self.score_head(tokens), (self.box_head(tokens).float() + anchors).sigmoid())

    def score(
        self, memory: Float[Tensor, "B T D"], shapes: tuple[tuple[int, int], ...], tokens: Int[Tensor, "B P"]
    ) -> Float[Tensor, "B P C"]:
        """The class logits of given cells, with gradient and in fp32."""
        usable = anchor_table(shapes, memory.device)[1]
        chosen = _pick(memory.masked_fill(~usable, 0.0), tokens)
        logits: Tensor = self.score_head(self.norm(self.proj(chosen.float())))
        return logits

    @torch.no_grad()
    def of_tokens(
        self, memory: Float[Tensor, "B T D"], shapes: tuple[tuple[int, int], ...], tokens: Int[Tensor, "B Q"]
    ) -> Float[Tensor, "B Q D"]:
        """What queries of given cells start with; like the own ones, without gradient."""
        usable = anchor_table(shapes, memory.device)[1]
        content: Tensor = self.norm(self.proj(_pick(memory.masked_fill(~usable, 0.0), tokens)))
        return content

    @torch.no_grad()
    def of_slots(self, slots: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q D"]:
        """Learned contents by their places, without gradient."""
        assert self.content is not None
        return self.content.weight[slots]

    @torch.no_grad()
    def of_boxes(self, boxes: Float[Tensor, "B Q 4"]) -> tuple[Float[Tensor, "B Q D"], Float[Tensor, "B Q D"]]:
        """Positions and content that queries of given boxes start with, without gradient."""
        return self._expanded(boxes, self.score_head.weight.dtype)

    def _expanded(self, boxes: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        assert self.expand is not None
        assert self.expand_norm is not None
        code = sine_code(boxes, self.expand.in_features // 4).to(dtype)
        positions, content = self.expand_norm(self.expand(code)).chunk(2, dim=-1)
        return positions, content


def _pick(values: Float[Tensor, "B T E"], tokens: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q E"]:
    return values.gather(1, tokens[..., None].expand(-1, -1, values.shape[-1]))


class LearnedPoints(nn.Module):
    """The same queries for every picture: learned positions, and a point made of each (spec 2.2, 2.3).

    Content is learned, too, but with conditional attention it starts at zero. The branch for classes of a split decoder
    may have positions and content of its own, which begin as those of the other; its points are that one's.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        blank = config.attention == "conditional"
        self.width = config.width
        self.embedding = nn.Embedding(config.queries, self.width if blank else 2 * self.width)
        self.scoring: nn.Embedding | None = None
        if config.split.queries == "own":
            self.scoring = nn.Embedding.from_pretrained(self.embedding.weight.detach().clone(), freeze=False)
        self.point = MLP(self.width, self.width, 2, 2 if blank else 1)
        for layer in self.point.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, memory: Float[Tensor, "B T D"], shapes: tuple[tuple[int, int], ...]) -> Queries:
        """The queries of a batch, whatever the pictures show."""
        content, positions = self._of(self.embedding, len(memory))
        points = self.points_of(positions)
        scoring = None
        if self.scoring is not None:
            own, places = self._of(self.scoring, len(memory))
            scoring = Seeds(own, points, places)
        return Queries(content, points, positions, scoring=scoring)

    def _of(self, embedding: nn.Embedding, pictures: int) -> tuple[Tensor, Tensor]:
        """Content and positions."""
        learned = embedding.weight.expand(pictures, -1, -1)
        positions, content = learned[..., : self.width], learned[..., self.width :]
        return content if content.shape[-1] else torch.zeros_like(positions), positions

    def points_of(self, positions: Float[Tensor, "B Q D"]) -> Float[Tensor, "B Q 2"]:
        """The point that each position means."""
        points: Tensor = self.point(positions).float().sigmoid()
        return points


class LearnedAnchors(nn.Module):
    """The same boxes for every picture, whose content starts at zero (DAB-DETR)."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.width = config.width
        self.anchors = nn.Embedding(config.queries, 4)  # logits of boxes

    def forward(self, memory: Float[Tensor, "B T D"], shapes: tuple[tuple[int, int], ...]) -> Queries:
        """The queries of a batch, whatever the pictures show."""
        boxes = self.anchors.weight.sigmoid().expand(len(memory), -1, -1)
        return Queries(boxes.new_zeros(*boxes.shape[:2], self.width), boxes)


class SalientQueries(nn.Module):
    """Task-aware query generation (SD-DETR, spec 3.3): the best boxes of a small detector, and salient points in them.

    A split decoder has points for classes and points for boxes, any other the same for both.

    Args:
        config: Of the decoder.
        classes: C.
        stride: Of the finest level; the boxes of its cells begin with sides of 0.05 at stride 8, as proposals do.
    """

    def __init__(self, config: DecoderConfig, classes: int, stride: int) -> None:
        super().__init__()
        self.queries, self.detached, self.side = config.queries, config.salient.detached, 0.05 * stride / 8
        self.mini = MiniDetector(config, classes)
        self.boxes = SalientPoints(config)
        self.scores = SalientPoints(config) if config.split.joining != "none" else None

    def forward(self, memory: Float[Tensor, "B T D"], shapes: tuple[tuple[int, int], ...]) -> Queries:
        """The queries of a batch; at most as many as the pyramid has cells."""
        maps = level_maps(memory, shapes)
        logits, boxes = self.mini(maps, anchor_table(shapes, memory.device, self.side, 0.0)[0])
        best = logits.detach().amax(dim=-1).topk(min(self.queries, memory.shape[1]), dim=1).indices
        chosen = (boxes.detach() if self.detached else boxes).gather(1, best[..., None].expand(-1, -1, 4))
        level = torch.cat([torch.full((h * w,), i, device=best.device) for i, (h, w) in enumerate(shapes)])[best]
        own = self.boxes(maps, level, chosen)
        return Queries(
            own.content,
            own.references,
            own.positions,
            proposals=Answer(logits, boxes) if self.training else None,
            scoring=None if self.scores is None else self.scores(maps, level, chosen),
        )


def build_queries(
    config: DecoderConfig, classes: int, stride: int
) -> QuerySelection | LearnedPoints | LearnedAnchors | SalientQueries:
    """Where a configuration has its queries from; `stride` is the finest level's."""
    if config.salient.queries:
        return SalientQueries(config, classes, stride)
    match config.source:
        case "points":
            return LearnedPoints(config)
        case "anchors":
            return LearnedAnchors(config)
        case _:
            return QuerySelection(config, classes)
