"""CopyBlend (DEIMv2): objects of a batch, pasted half transparent into its pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from finedetr.data.transforms import Augmentation
from finedetr.records import Targets

__all__ = ["Paste", "paste", "plan_pastes"]


@dataclass(frozen=True, slots=True)
class Paste:
    """A rectangle of one picture, blended into another one; all in pixels."""

    source: int
    left: int
    top: int
    image: int
    x: int  # where its left upper corner comes to lie
    y: int
    width: int
    height: int


def plan_pastes(
    targets: Targets, shape: Sequence[int], augmentation: Augmentation, rng: np.random.Generator
) -> tuple[list[Paste], Targets]:
    """Which objects are pasted where, and the targets with them.

    Each picture gets up to `copy_blend_objects` different objects of the whole batch, its own included, at random
    places inside it. The new box is the object's; the pasted rectangle is larger where both pictures have room.
    Pictures without truth get none.

    Args:
        targets: Of the batch, on the CPU.
        shape: (H, W) of the pictures.
        augmentation: How many objects, how large at least, and how much margin.
        rng: Where chance comes from.
    """
    height, width = int(shape[0]), int(shape[1])
    corners = _pixels(targets.boxes.numpy(), height, width)
    sizes = corners[:, 2:] - corners[:, :2]
    pool = np.flatnonzero((sizes.min(axis=1, initial=width) > 0) & (sizes.prod(axis=1) >= augmentation.copy_blend_area))
    source, pastes = targets.image.numpy(), []
    rows, boxes, counts = [], [], []
    for image, (start, count) in enumerate(zip(targets.starts, targets.counts, strict=True)):
        room = augmentation.copy_blend_objects if image < targets.with_truth else 0
        chosen = rng.choice(pool, min(room, len(pool)), replace=False)
        rows += [*range(start, start + count), *(int(row) for row in chosen)]
        boxes.append(targets.boxes[start : start + count])
        counts.append(count + len(chosen))
        for row in chosen:
            (left, top), (w, h) = corners[row, :2].tolist(), sizes[row].tolist()
            x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            boxes.append(torch.tensor([[(x + w / 2) / width, (y + h / 2) / height, w / width, h / height]]))
            share = rng.uniform(*augmentation.copy_blend_margin)
            margin_x, margin_y = int(w * share), int(h * share)
            before_x, before_y = min(margin_x, left, x), min(margin_y, top, y)
            after_x = min(margin_x, width - left - w, width - x - w)
            after_y = min(margin_y, height - top - h, height - y - h)
            pastes.append(
                Paste(
                    *(int(source[row]), left - before_x, top - before_y),
                    *(image, x - before_x, y - before_y),
                    *(w + before_x + after_x, h + before_y + after_y),
                )
            )
    image_of = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts, dtype=torch.long))
    joined = torch.cat(boxes).to(targets.boxes.dtype) if boxes else targets.boxes
    labels = targets.labels[torch.tensor(rows, dtype=torch.long)]
    return pastes, Targets(labels, joined, image_of, tuple(counts), targets.annotated)


def _pixels(boxes: NDArray[np.float32], height: int, width: int) -> NDArray[np.int64]:
    """Corners in whole pixels, inside the picture."""
    scale = np.array([width, height, width, height])
    corners = np.concatenate((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), axis=1) * scale
    clipped: NDArray[np.int64] = np.clip(corners.astype(np.int64), 0, scale)
    return clipped


def paste(images: Float[Tensor, "B 3 H W"], pastes: Sequence[Paste], share: float) -> Float[Tensor, "B 3 H W"]:
    """The pictures with the rectangles blended in, one after another; `share` is what remains of what was there."""
    out = images.clone()
    for p in pastes:
        patch = images[p.source, :, p.top : p.top + p.height, p.left : p.left + p.width]
        place = out[p.image, :, p.y : p.y + p.height, p.x : p.x + p.width]
        place.mul_(share).add_(patch, alpha=1 - share)
    return out
