"""The detector: the only place where backbone, encoder, queries and decoder meet."""

from __future__ import annotations

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from finedetr.errors import ConfigError
from finedetr.model.backbones import build_backbone
from finedetr.model.config import ModelConfig
from finedetr.model.decoder import DistributionDecoder, Refinement, build_decoder, join_blocked
from finedetr.model.decoder_layers import Seeds
from finedetr.model.encoders import build_encoder
from finedetr.model.layers import ConvNorm
from finedetr.model.queries import Answer, LearnedPoints, Queries, QuerySelection, build_queries
from finedetr.records import Edges, Output, Prediction, QueryGroup, Trace

__all__ = ["Detector"]


class Detector(nn.Module):
    """Images to answers.

    Args:
        config: What it is made of; see `finedetr.model.zoo.variant`.
        classes: Number of classes C.
    """

    def __init__(self, config: ModelConfig, classes: int) -> None:
        super().__init__()
        self.config, self.classes = config, classes
        decoder, width = config.decoder, config.decoder.width
        self.backbone = build_backbone(config.backbone)
        self.encoder = build_encoder(config.encoder, self.backbone.channels)
        self.decoder_input_proj = nn.ModuleList(
            ConvNorm(config.encoder.width, width)
            if config.encoder.width != width or decoder.project_memory
            else nn.Identity()
            for _ in config.strides
        )
        self.selection = build_queries(decoder, classes, config.strides[0])
        # row C stands for padding slots and stays zero
        self.label_embedding = (
            nn.Embedding(classes + 1, width, padding_idx=classes) if decoder.boxes_are_queries else None
        )
        self.decoder = build_decoder(decoder, classes, config.encoder.temperature)
        for module in (*self.encoder.input_proj, *self.decoder_input_proj):
            if isinstance(module, ConvNorm):
                nn.init.xavier_uniform_(module.conv.weight)

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        extra: tuple[QueryGroup, ...] = (),
        all_stages: bool | None = None,
    ) -> Output:
        """Detects.

        Args:
            images: RGB in [0, 1]; H and W multiples of the largest stride (32).
            extra: Query groups from outside. Whatever they hold, the matching queries answer the same.
            all_stages: Answer at all stages, ("encoder", "initial", "layer0", …), or only at the last; by default all
                in training and only the last in eval.

        Raises:
            ConfigError: H or W is no multiple of the largest stride.
            ConfigError: A group is made of boxes and labels, and this detector's queries are not.
        """
        self._check_size(images)
        all_stages = self.training if all_stages is None else all_stages
        maps = self.backbone(images)
        necks = self.encoder.enter(maps)
        pyramid = self.encoder(necks)
        memory = tuple(project(level) for project, level in zip(self.decoder_input_proj, pyramid, strict=True))
        shapes = tuple((int(level.shape[-2]), int(level.shape[-1])) for level in memory)
        tokens = torch.cat([level.permute(0, 2, 3, 1).flatten(1, 2) for level in memory], dim=1)
        queries = self.selection(tokens, shapes)

        blocked = None
        if extra:
            blocked = join_blocked(
                [group.boxes.shape[1] for group in extra],
                [group.blocked for group in extra],
                [group.sees_matching for group in extra],
                queries.references.shape[1],
                images.device,
            )
        seeds, scoring = self._join(extra, queries, tokens, shapes)
        answers = self.decoder(seeds.content, seeds.references, memory, blocked, all_stages, seeds.positions, scoring)
        trace = None
        if all_stages:
            own, selection = queries.references.shape[1], self.selection
            score = partial(selection.score, tokens, shapes) if isinstance(selection, QuerySelection) else None
            trace = Trace(
                shapes,
                queries.tokens,
                queries.references,
                maps,
                necks,
                tuple(state[:, -own:] for state in answers.states),
                queries.embedded,
                queries.content,
                queries.positions,
                score,
            )
        return self._output(answers, queries, extra, all_stages, pyramid, trace)

    def _output(
        self,
        answers: Refinement,
        queries: Queries,
        extra: tuple[QueryGroup, ...],
        all_stages: bool,
        pyramid: tuple[Tensor, ...],
        trace: Trace | None,
    ) -> Output:
        """Cuts the answers of the joined queries into their groups, the matching group last."""
        sizes = [group.boxes.shape[1] for group in extra]
        sizes.append(answers.boxes.shape[2] - sum(sizes))
        # split, not slices: their gradients come back as one concatenation
        cut = zip(
            answers.logits.float().split(sizes, dim=2),
            answers.boxes.split(sizes, dim=2),
            [None] * len(sizes) if answers.corners is None else answers.corners.split(sizes, dim=2),
            [None] * len(sizes) if answers.anchors is None else answers.anchors.split(sizes, dim=1),
            strict=True,
        )
        *groups, own = (self._prediction(answers.stages, *parts) for parts in cut)
        if all_stages and queries.encoder is not None:
            own = Prediction(
                torch.cat((queries.encoder.logits.float()[None], own.logits)),
                torch.cat((queries.encoder.boxes[None], own.boxes)),
                ("encoder", *own.stages),
                own.edges,
            )
        judged = list(zip(extra, groups, strict=True))
        if queries.proposals is not None:
            judged.append(_proposals(queries.proposals, queries.agnostic, self.config.decoder.salient.weight))
        return Output(own, tuple(judged), pyramid, trace)

    def _prediction(
        self, stages: tuple[str, ...], logits: Tensor, boxes: Tensor, corners: Tensor | None, anchors: Tensor | None
    ) -> Prediction:
        if corners is None or anchors is None:
            return Prediction(logits, boxes, stages)
        assert isinstance(self.decoder, DistributionDecoder)
        table = self.decoder.bin_table
        return Prediction(logits, boxes, stages, Edges(corners, anchors, table.values, table.scale))

    def _join(
        self, extra: tuple[QueryGroup, ...], queries: Queries, tokens: Tensor, shapes: tuple[tuple[int, int], ...]
    ) -> tuple[Seeds, Seeds | None]:
        """What all queries start with, ours last; the second for the branch for classes, where ours have their own."""
        own = Seeds(queries.content, queries.references, queries.positions)
        if not extra:
            return own, queries.scoring
        dtype, size = queries.content.dtype, queries.references.shape[-1]
        content = [self._content(group, tokens, shapes).to(dtype) for group in extra]
        references = [self._references(group, size) for group in extra]
        positions = None if queries.positions is None else [self._positions(group).to(dtype) for group in extra]

        def joined(seeds: Seeds) -> Seeds:
            return Seeds(
                torch.cat([*content, seeds.content], dim=1),
                torch.cat([*references, seeds.references], dim=1),
                None
                if positions is None or seeds.positions is None
                else torch.cat([*positions, seeds.positions], dim=1),
            )

        return joined(own), None if queries.scoring is None else joined(queries.scoring)

    def _content(self, group: QueryGroup, memory: Tensor, shapes: tuple[tuple[int, int], ...]) -> Tensor:
        if group.content is not None:
            return group.content
        if isinstance(self.selection, QuerySelection):
            if group.tokens is not None:
                return self.selection.of_tokens(memory, shapes, group.tokens)
            if group.slots is not None:
                return self.selection.of_slots(group.slots)
            if group.labels is None:
                return self.selection.of_boxes(group.boxes)[1]
        if self.label_embedding is None or group.labels is None:
            raise self._not_of_boxes(group)
        embedded: Tensor = self.label_embedding(group.labels)
        return embedded

    def _references(self, group: QueryGroup, size: int) -> Tensor:
        if group.own_points and group.positions is not None and isinstance(self.selection, LearnedPoints):
            return self.selection.points_of(group.positions)
        return group.boxes[..., :size]

    def _positions(self, group: QueryGroup) -> Tensor:
        if group.positions is not None:
            return group.positions
        if isinstance(self.selection, QuerySelection) and group.labels is None:
            return self.selection.of_boxes(group.boxes)[0]
        raise self._not_of_boxes(group)

    def _not_of_boxes(self, group: QueryGroup) -> ConfigError:
        return ConfigError(
            f"{self.config.name} has learned positions, so boxes and labels make no queries for it; the group "
            f"{group.name!r} brings nothing else",
            code="conflict",
            hint="Train it without denoising queries (--denoise false), or use a dab or dino model.",
        )

    def _check_size(self, images: Tensor) -> None:
        height, width = images.shape[-2:]
        stride = self.config.largest_stride
        if height % stride or width % stride:
            near = [max(stride, side // stride * stride) for side in (int(height), int(width))]
            raise ConfigError(
                f"{self.config.name} needs a height and width that are multiples of {stride}, got {height}x{width}",
                code="size",
                hint=f"Use {near[0]}x{near[1]} or {near[0] + stride}x{near[1] + stride}.",
            )


def _proposals(answer: Answer, agnostic: bool, weight: float) -> tuple[QueryGroup, Prediction]:
    """What the encoder of a detector in two stages answers for all tokens (spec 2.3, 3.3)."""
    boxes, nothing = answer.boxes, answer.boxes.new_zeros(*answer.boxes.shape[:2], 0)
    group = QueryGroup("proposals", boxes.detach(), content=nothing, agnostic=agnostic, weight=weight)
    return group, Prediction(answer.logits.float()[None], boxes[None], ("encoder",))
