"""The loop over decoder layers: queries look at one another and at the pyramid, and refine their boxes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from finedetr.geometry import decode_edges, inverse_sigmoid
from finedetr.model.attention import SelfAttention
from finedetr.model.conditional import SpatialQuery
from finedetr.model.config import DecoderConfig
from finedetr.model.decoder_layers import Both, DecoderLayer, Seeds, SplitLayer, of_both
from finedetr.model.heads import BinTable, LocationQuality, expected_distances
from finedetr.model.layers import MLP, focal_bias
from finedetr.model.sines import place_code

__all__ = ["Decoder", "DistributionDecoder", "PlainDecoder", "Refinement", "build_decoder"]


@dataclass(frozen=True, slots=True)
class Refinement:
    """All that the decoder answers for its N queries. The initial stage comes first where it was asked for."""

    logits: Float[Tensor, "S B N C"]
    boxes: Float[Tensor, "S B N 4"]
    stages: tuple[str, ...]
    corners: Float[Tensor, "L B N 4 K"] | None = None  # accumulated edge logits of the layers
    anchors: Float[Tensor, "B N 4"] | None = None
    states: tuple[Float[Tensor, "B N D"], ...] = ()  # behind each layer, where all stages were asked for


class Answers:
    """What the layers have answered so far, and what the next one has to know of it."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []
        self.boxes: list[Tensor] = []
        self.stages: list[str] = []
        self.corners: list[Tensor] = []
        self.states: list[Tensor] = []
        self.anchors: Tensor | None = None
        self.moved: Tensor | None = None  # accumulated edge logits, wanted or not
        self.content: Tensor | None = None  # of the layer before
        self.box: Tensor | None = None  # of the layer before, with its gradient

    def add(self, stage: str, logits: Tensor, boxes: Tensor, corners: Tensor | None = None) -> None:
        """One stage's answer."""
        self.stages.append(stage)
        self.logits.append(logits)
        self.boxes.append(boxes)
        if corners is not None:
            self.corners.append(corners)

    def stacked(self) -> Refinement:
        """All stages as one axis."""
        corners = torch.stack(self.corners) if self.corners else None
        logits, boxes = torch.stack(self.logits), torch.stack(self.boxes)
        return Refinement(logits, boxes, tuple(self.stages), corners, self.anchors, tuple(self.states))


class Decoder(nn.Module, ABC):
    """The loop. What a layer answers, and how it moves the boxes, is left to the two kinds below.

    Args:
        config: What it is made of.
        classes: C.
        temperature: See `DecoderLayer`.
    """

    def __init__(self, config: DecoderConfig, classes: int, temperature: float) -> None:
        super().__init__()
        width = config.width
        self.width, self.margin = width, config.logit_margin
        self.answering, self.refine = config.answering or config.layers, config.refine
        self.position_limit, self.position_once = config.position_limit, config.position_once
        self.coded = config.source != "tokens"  # positions are made of the boxes' sine code
        self.query_position_head = _position_head(config)
        self.split = config.split.joining != "none"
        layer_kind = SplitLayer if self.split else DecoderLayer
        self.layers = nn.ModuleList(
            layer_kind(config, temperature, first=index == 0 and not config.salient.queries)
            for index in range(config.layers)
        )
        heads = 1 if config.shared_scores else config.layers
        self.score_heads = nn.ModuleList(nn.Linear(width, classes) for _ in range(heads))
        self.spatial = (
            SpatialQuery(width, sized=config.source == "anchors") if config.attention == "conditional" else None
        )
        self.common_modulation = config.split.modulation == "boxes"
        self.norm = nn.LayerNorm(width) if config.final_norm else None
        own_norm = self.split and config.final_norm and not config.split.shared_norm
        self.score_norm = nn.LayerNorm(width) if own_norm else None
        self.task_moves = _task_moves(config)
        for layer in self.query_position_head.layers if self.query_position_head is not None else ():
            assert isinstance(layer, nn.Linear)
            nn.init.xavier_uniform_(layer.weight)
        for head in self.score_heads:
            assert isinstance(head, nn.Linear)
            nn.init.constant_(head.bias, focal_bias())
        if config.source != "tokens":  # the classic DETRs initialize every matrix so
            for part in self.layers.modules():
                if isinstance(part, SelfAttention):
                    nn.init.xavier_uniform_(part.out.weight)

    def forward(
        self,
        content: Float[Tensor, "B N D"],
        references: Float[Tensor, "B N R"],
        memory: tuple[Float[Tensor, "B D H W"], ...],
        blocked: Bool[Tensor, "*B E N"] | None = None,
        all_stages: bool = True,
        positions: Float[Tensor, "B N D"] | None = None,
        scoring: Seeds | None = None,
    ) -> Refinement:
        """Refines the boxes of all queries, layer after layer.

        Args:
            content: What each query starts with.
            references: Where each query starts to look: a box, or a point.
            memory: The pyramid, finest level first.
            blocked: See `SelfAttention.forward`.
            all_stages: Answer at every stage (training, teachers) or only at the last.
            positions: Of the queries, for all layers; None: they are made of the references.
            scoring: What the branch for classes of a split decoder starts with; None: the same.
        """
        x, reference, given, answers = self._begin(content, references, positions, scoring)
        count = len(self.layers) if self.training else self.answering
        places = given
        for index, layer in enumerate(self.layers[:count]):
            if given is None and (places is None or not self.position_once):
                places = of_both(self._positions, reference, Both.same(content))
            x = layer(x, places, self._where(x, reference, first=index == 0), memory, blocked)
            if all_stages:
                answers.states.append(x.mean)
            reference = self._answer(index, x, reference, answers, all_stages, index == count - 1)
        return answers.stacked()

    def _begin(
        self, content: Tensor, references: Tensor, positions: Tensor | None, scoring: Seeds | None
    ) -> tuple[Both, Both, Both | None, Answers]:
        """What each branch starts with, and no answers."""
        seeds = Seeds(content, references, positions) if scoring is None else scoring
        x = Both(seeds.content, content)
        if self.task_moves is not None:
            x = Both(*(x[i] + move(x[i]) for i, move in enumerate(self.task_moves)))
        given = None
        if positions is not None:
            given = Both(positions if seeds.positions is None else seeds.positions, positions)
        return x, Both(seeds.references, references), given, Answers()

    def _where(self, x: Both, reference: Both, *, first: bool) -> Both:
        """Where a layer looks: at references, or with the spatial queries that are made of them."""
        spatial = self.spatial
        if spatial is None:
            return reference
        stretching = Both.same(x.boxes) if self.common_modulation else x
        return of_both(lambda state, where: spatial(state, where, first=first), stretching, reference)

    def _positions(self, boxes: Tensor, like: Tensor) -> Tensor:
        assert self.query_position_head is not None
        boxes = place_code(boxes, self.width // 2) if self.coded else boxes
        positions: Tensor = self.query_position_head(boxes.to(like.dtype))
        limit = self.position_limit
        return positions if limit is None else positions.clamp(-limit, limit)

    def _logits(self, references: Tensor) -> Tensor:
        """Of boxes; of points, with zeros for the size."""
        logits = inverse_sigmoid(references, self.margin)
        return logits if logits.shape[-1] == 4 else F.pad(logits, (0, 2))

    def _shown(self, x: Both) -> Both:
        """What the heads read of a state."""
        if self.norm is None:
            return x
        if self.score_norm is None:
            return of_both(self.norm, x)
        return Both(self.score_norm(x.scores), self.norm(x.boxes))

    def _score(self, index: int, x: Both) -> Tensor:
        logits: Tensor = self.score_heads[index % len(self.score_heads)](x.scores)
        return logits

    @abstractmethod
    def _answer(self, index: int, x: Both, reference: Both, answers: Answers, all_stages: bool, last: bool) -> Both:
        """Adds what layer `index` answers where that is wanted; where the next layer looks."""


def _position_head(config: DecoderConfig) -> MLP | None:
    """What makes positions of boxes, or of their sine code; None where queries bring them."""
    width, layers, act = config.width, config.position_layers, config.head_activation
    match config.source:
        case "points" | "proposals":
            return None
        case "tokens":
            return MLP(4, 2 * width if layers == 2 else width, width, layers, act)
        case "anchors" | "mixed":
            return MLP(2 * width, width, width, 2, act)


def _task_moves(config: DecoderConfig) -> nn.ModuleList | None:
    """What makes the queries of the two branches of one, where that is not learned for each; begins with nothing.

    After the light version of spec 6.2.
    """
    if config.split.queries == "shared" or config.source == "points":
        return None
    moves = nn.ModuleList(nn.Linear(config.width, config.width) for _ in Both._fields)
    for parameter in moves.parameters():
        nn.init.zeros_(parameter)
    return moves


def _start(head: MLP, config: DecoderConfig) -> None:
    """A box head starts with the answer zero: boxes begin at their references, those of points small (spec 2.3)."""
    head.zero_last()
    if config.source == "points" and config.attention == "deformable":
        with torch.no_grad():
            head.last.bias[2:] = -2.0


class DistributionDecoder(Decoder):
    """D-FINE: a first plain box, then every layer refines the distributions of its four edges (FDR, LQE)."""

    def __init__(self, config: DecoderConfig, classes: int, temperature: float) -> None:
        super().__init__(config, classes, temperature)
        width, act = config.width, config.head_activation
        self.bin_table = BinTable(config.bins, config.up, config.scale)
        self.initial_box_head = MLP(width, width, 4, 3, act)
        heads = 1 if config.shared_boxes else config.layers
        self.edge_heads = nn.ModuleList(MLP(width, width, 4 * config.bins, 3, act) for _ in range(heads))
        self.quality_heads = nn.ModuleList(LocationQuality(act) for _ in range(config.layers))
        _start(self.initial_box_head, config)
        for head in self.edge_heads:
            assert isinstance(head, MLP)
            head.zero_last()

    def _answer(self, index: int, x: Both, reference: Both, answers: Answers, all_stages: bool, last: bool) -> Both:
        x = self._shown(x)
        if index == 0:
            initial = (self.initial_box_head(x.boxes).float() + self._logits(reference.boxes)).sigmoid()
            answers.anchors = initial.detach()
            if all_stages:
                answers.add("initial", self._score(0, x), initial)
        assert answers.anchors is not None
        head = self.edge_heads[index % len(self.edge_heads)]
        moved = head(x.boxes if answers.content is None else x.boxes + answers.content.detach()).float()
        moved = moved.unflatten(-1, (4, -1))
        corners = moved if answers.moved is None else moved + answers.moved
        probabilities = corners.softmax(dim=-1)
        distances = expected_distances(probabilities, self.bin_table.values)
        box: Tensor = decode_edges(answers.anchors, distances, self.bin_table.scale)
        if all_stages or last:
            logits = self._score(index, x) + self.quality_heads[index](probabilities.to(x.scores.dtype))
            answers.add(f"layer{index}", logits, box, corners)
        answers.moved, answers.content = corners, x.boxes
        return Both.same(box.detach()) if self.refine else reference


class PlainDecoder(Decoder):
    """Every layer moves the box by four numbers, or all layers move the first reference (without `refine`).

    In RT-DETR and DINO each box's loss reaches the layer before, too, "look forward twice" (DINO, eq. 5): the answer
    stands on the box before with its gradient, the reference of the next layer has none. Where a norm stands before the
    heads, the next reference is made without it, of the same head (DAB-DETR, DINO; spec 2.4).
    """

    def __init__(self, config: DecoderConfig, classes: int, temperature: float) -> None:
        super().__init__(config, classes, temperature)
        heads = 1 if config.shared_boxes else config.layers
        self.box_heads = nn.ModuleList(
            MLP(config.width, config.width, 4, 3, config.head_activation) for _ in range(heads)
        )
        self.look_twice = config.look_twice
        for index, head in enumerate(self.box_heads):
            assert isinstance(head, MLP)
            head.zero_last()
            if index == 0:
                _start(head, config)

    def _answer(self, index: int, x: Both, reference: Both, answers: Answers, all_stages: bool, last: bool) -> Both:
        head, base = self.box_heads[index % len(self.box_heads)], self._logits(reference.boxes)
        moved = None
        if all_stages or last:
            shown = self._shown(x)
            moved = head(shown.boxes).float()
            # the same numbers; the gradient goes one layer further, and no more than one
            start = base if answers.box is None else self._logits(answers.box)
            answers.add(f"layer{index}", self._score(index, shown), (moved + start).sigmoid())
        if last or not self.refine:
            return reference
        if moved is None or self.norm is not None:
            moved = head(x.boxes).float()
        box: Tensor = (moved + base).sigmoid()
        if self.look_twice:
            answers.box = box
        return Both.same(box.detach())


def build_decoder(
    config: DecoderConfig, classes: int, temperature: float = 10000.0
) -> DistributionDecoder | PlainDecoder:
    """The decoder that a configuration names, behind an encoder whose sine codes have a temperature."""
    kind = DistributionDecoder if config.boxes == "distributions" else PlainDecoder
    return kind(config, classes, temperature)


def join_blocked(
    sizes: list[int], own: list[Tensor | None], sees: list[bool], queries: int, device: torch.device
) -> Tensor:
    """The attention block of all extra groups.

    A group sees itself, as its own mask allows, and on request the matching queries; never another group.

    Args:
        sizes: Queries of each extra group.
        own: Each group's own [Q, Q] or [B, Q, Q] block, or None where all of it is visible.
        sees: Whether each group sees the matching queries.
        queries: Number of matching queries, which stand last.
        device: Where the mask is built.
    """
    extra, batch = sum(sizes), max((mask.shape[:-2] for mask in own if mask is not None), key=len, default=())
    blocked = torch.ones(*batch, extra, extra + queries, dtype=torch.bool, device=device)
    stop = 0
    for size, mask, open_ in zip(sizes, own, sees, strict=True):
        start, stop = stop, stop + size
        blocked[..., start:stop, start:stop] = False if mask is None else mask
        if open_:
            blocked[..., start:stop, extra:] = False
    return blocked
