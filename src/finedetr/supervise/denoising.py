"""Contrastive denoising: queries made from disturbed targets, whose assignment is known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from finedetr.errors import ConfigError
from finedetr.geometry import to_cxcywh, to_xyxy
from finedetr.records import Assignment, QueryGroup, Targets

__all__ = ["Denoising"]


@dataclass(frozen=True)
class Denoising:
    """Noisy copies of the targets as queries: near ones shall find back, far ones shall see nothing (DINO; RT-DETR).

    With M the most targets of any picture, G = max(1, queries // M) groups hold M positives and M negatives each. The
    groups do not see one another; each sees the matching queries, which see none of them. A picture with fewer
    targets has padding slots: class C, a box of zeros. Equal random streams give the official code's tensors.

    A batch without any target gets one group with one padding slot of each kind and weight 0, so that every parameter
    stays in the graph (of every process) and nothing is learned from it.

    Attributes:
        queries: About how many positives there shall be (100 in all published recipes).
        label_noise: Half of this part of the labels is replaced by a random class.
        box_noise: How far a positive's edges move at most, in halves of the box's size; a negative's move one more.
        max_queries: Bound on 2·M·G. Of a picture with more than half as many targets, a random subset is taken.
        multiple: M is rounded up to a multiple of this, for fewer different shapes (torch.compile).
    """

    queries: int = 100
    label_noise: float = 0.5
    box_noise: float = 1.0
    max_queries: int = 400
    multiple: int = 1

    def __post_init__(self) -> None:
        for name, wanted, holds in (
            ("queries", "at least 1", self.queries >= 1),
            ("label_noise", "between 0 and 1", 0 <= self.label_noise <= 1),
            ("box_noise", "at least 0", self.box_noise >= 0),
            ("max_queries", "at least 2 · multiple", self.max_queries >= 2 * self.multiple),
            ("multiple", "at least 1", self.multiple >= 1),
        ):
            if not holds:
                raise ConfigError(f"Denoising.{name}: {wanted} is wanted, {getattr(self, name)} came", code="denoising")

    @torch.no_grad()
    def __call__(self, targets: Targets, classes: int, generator: torch.Generator | None = None) -> QueryGroup:
        """Builds the group of one batch.

        Args:
            targets: The truth.
            classes: C; the label C stands for padding.
            generator: Where the noise is drawn from, on its own device; the default generator if None.
        """
        if len(targets) == 0:
            return _placeholder(targets, classes)
        draw = _Draw(generator, targets.boxes.device)
        rows, chosen = self._choose(targets, draw)
        slots = -(-max(chosen.counts) // self.multiple) * self.multiple
        groups = max(1, min(self.queries, self.max_queries // 2) // slots)
        labels, boxes = chosen.padded(label=classes, slots=slots)
        labels, boxes = labels.repeat(1, 2 * groups), boxes.repeat(1, 2 * groups, 1)
        # one group: M positives, then M negatives
        place = torch.arange(2 * groups * slots, device=labels.device)
        labels = self._disturb_labels(labels, classes, draw)
        boxes = self._disturb_boxes(boxes, place // slots % 2 == 1, draw)
        return QueryGroup(
            name="denoising",
            boxes=boxes,
            labels=labels,
            blocked=(place // (2 * slots))[:, None] != (place // (2 * slots))[None],
            assignment=_positives(chosen, rows, slots, groups),
            sees_matching=True,
        )

    def _choose(self, targets: Targets, draw: _Draw) -> tuple[Int[Tensor, " T"], Targets]:
        """Rows of the targets that become queries, and these targets: all, or a random subset in dense pictures."""
        everyone = torch.arange(len(targets), device=targets.image.device)
        limit = self.max_queries // 2 // self.multiple * self.multiple
        if max(targets.counts) <= limit:
            return everyone, targets
        shuffled = draw.uniform(len(targets)).argsort()
        shuffled = shuffled[targets.image[shuffled].argsort(stable=True)]  # picture after picture, each in random order
        counts = tuple(min(count, limit) for count in targets.counts)
        # places below the limit come first; how many they are is known on the host
        kept = (targets.slot >= limit).long().argsort(stable=True)[: sum(counts)]
        rows = shuffled[kept].sort().values
        return rows, Targets(targets.labels[rows], targets.boxes[rows], targets.image[rows], counts)

    def _disturb_labels(self, labels: Int[Tensor, "B N"], classes: int, draw: _Draw) -> Int[Tensor, "B N"]:
        if self.label_noise == 0:
            return labels
        hit = draw.uniform(*labels.shape) < self.label_noise * 0.5
        other = draw.integers(classes, *labels.shape)
        return torch.where(hit & (labels != classes), other, labels)

    def _disturb_boxes(
        self, boxes: Float[Tensor, "B N 4"], negative: Bool[Tensor, " N"], draw: _Draw
    ) -> Float[Tensor, "B N 4"]:
        if self.box_noise == 0:
            return boxes
        sign = draw.integers(2, *boxes.shape) * 2.0 - 1.0
        reach = draw.uniform(*boxes.shape) + negative[:, None]
        half = boxes[..., 2:].repeat(1, 1, 2) * (0.5 * self.box_noise)
        moved = to_cxcywh((to_xyxy(boxes) + sign * reach * half).clamp(0, 1))
        # edges may have crossed: the size changes its sign, the box keeps its place
        return torch.cat((moved[..., :2], moved[..., 2:].abs()), dim=-1)


@dataclass(frozen=True)
class _Draw:
    """Random numbers from one stream, delivered to one device."""

    generator: torch.Generator | None
    device: torch.device

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self._source).to(self.device)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator, device=self._source).to(self.device)

    @property
    def _source(self) -> torch.device:
        return self.device if self.generator is None else self.generator.device


def _positives(chosen: Targets, rows: Int[Tensor, " T"], slots: int, groups: int) -> Assignment:
    """Slot j of a picture answers for its target j, in the positive half of each group."""
    pairs, device = len(chosen) * groups, rows.device
    first = torch.arange(groups, device=device).repeat_interleave(len(chosen), output_size=pairs) * (2 * slots)
    return Assignment(
        stage=torch.zeros(pairs, dtype=torch.long, device=device),
        image=chosen.image.repeat(groups),
        query=first + chosen.slot.repeat(groups),
        target=rows.repeat(groups),
        count=torch.full((1,), float(pairs), device=device),
        sizes=(pairs,),
    )


def _placeholder(targets: Targets, classes: int) -> QueryGroup:
    """The group of a batch without targets: padding only, weight 0."""
    device, pictures = targets.boxes.device, targets.pictures
    none = torch.zeros(0, dtype=torch.long, device=device)
    return QueryGroup(
        name="denoising",
        boxes=torch.tensor([0.5, 0.5, 0.1, 0.1], device=device).expand(pictures, 2, 4),
        labels=torch.full((pictures, 2), classes, dtype=torch.long, device=device),
        blocked=torch.zeros(2, 2, dtype=torch.bool, device=device),
        assignment=Assignment(none, none, none, none, torch.zeros(1, device=device), (0,)),
        sees_matching=True,
        weight=0.0,
    )
