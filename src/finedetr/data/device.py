"""What is done to a batch where it is trained: mixup, pasted objects, multi-scale, bytes to floats."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from finedetr.data.blend import paste, plan_pastes
from finedetr.data.transforms import Augmentation, Windows
from finedetr.errors import ConfigError
from finedetr.records import Batch, Targets

__all__ = ["OnDevice", "base_sizes", "denormalize", "mix", "normalize"]

STRIDE = 32
MIX = 2  # the stream of random numbers, beside those of the loader


@dataclass(frozen=True)
class OnDevice:
    """Mixup, pasted objects and multi-scale of a batch, and its pictures as floats in 0..1.

    Random numbers follow from (seed, epoch, step) alone: every rank draws the same, and a resumed run repeats them.
    """

    augmentation: Augmentation
    windows: Windows
    size: tuple[int, int]  # (H, W) that the loader delivers
    seed: int = 0
    device: torch.device | str = "cpu"
    mean: tuple[float, float, float] | None = None  # of values in 0..1; D-FINE and DEIM use neither
    std: tuple[float, float, float] | None = None
    interpolation: str = "bilinear"  # of multi-scale; the published code uses "nearest"

    def __post_init__(self) -> None:
        if (self.mean is None) != (self.std is None):
            raise ConfigError("wanted both mean and std, or neither")
        if self.interpolation not in ("bilinear", "nearest"):
            raise ConfigError(f"interpolation: wanted bilinear or nearest; got {self.interpolation!r}")

    def __call__(self, batch: Batch, *, epoch: int, step: int) -> tuple[Float[Tensor, "B 3 h w"], Targets]:
        """Pictures as floats, possibly of another size, and their targets, on the device."""
        rng = np.random.default_rng((self.seed, epoch, step, MIX))
        chances = rng.random(3)
        active = self.windows.kind(epoch)
        images = batch.images.to(self.device, non_blocking=True).float().div_(255)
        low, high = self.augmentation.mixup_share
        share = round(low + (high - low) * float(chances[1]), 6)
        mixed = active.mixup and chances[0] < self.augmentation.mixup
        if not mixed and active.copy_blend and rng.random() < self.augmentation.copy_blend:
            pastes, targets = plan_pastes(batch.targets, images.shape[-2:], self.augmentation, rng)
            images, targets = paste(images, pastes, share), targets.to(self.device, non_blocking=True)
        else:
            targets = batch.targets.to(self.device, non_blocking=True)
        if mixed:
            images, targets = mix(images, targets, share)
        if active.multi_scale and self.augmentation.multi_scale_repeat is not None:
            sizes = base_sizes(self.size, self.augmentation.multi_scale_repeat)
            size = sizes[min(int(chances[2] * len(sizes)), len(sizes) - 1)]
            if size != tuple(images.shape[2:]):
                corners = {} if self.interpolation == "nearest" else {"align_corners": False}
                images = F.interpolate(images, size=size, mode=self.interpolation, **corners)
        return normalize(images, self.mean, self.std), targets


def normalize(
    images: Float[Tensor, "B 3 H W"], mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Float[Tensor, "B 3 H W"]:
    """(images - mean) / std for each channel; unchanged without them."""
    if mean is None or std is None:
        return images
    shift, scale = _channels(images, mean), _channels(images, std)
    return (images - shift) / scale


def denormalize(
    images: Float[Tensor, "B 3 H W"], mean: tuple[float, ...] | None, std: tuple[float, ...] | None
) -> Float[Tensor, "B 3 H W"]:
    """The inverse of `normalize`."""
    if mean is None or std is None:
        return images
    return images * _channels(images, std) + _channels(images, mean)


def _channels(images: Tensor, values: tuple[float, ...]) -> Float[Tensor, "1 3 1 1"]:
    return torch.tensor(values, device=images.device).view(1, 3, 1, 1)


def mix(images: Float[Tensor, "B 3 H W"], targets: Targets, share: float) -> tuple[Float[Tensor, "B 3 H W"], Targets]:
    """MixUp as DEIM has it: each picture is blended with the one before it, and has the boxes of both, all in full.

    `share` is the weight of the picture itself; the first of the batch is blended with the last. Pictures without truth
    are blended with one another.
    """
    starts, counts, known = targets.starts, targets.counts, targets.with_truth
    rest = len(counts) - known
    before = [*((i - 1) % known for i in range(known)), *(known + (i - 1) % rest for i in range(rest))]
    images = images * share + images[before] * (1 - share)
    rows: list[int] = []
    for picture in range(len(counts)):
        for source in (picture, before[picture]):
            rows.extend(range(starts[source], starts[source] + counts[source]))
    joined = tuple(count + counts[other] for count, other in zip(counts, before, strict=True))
    row = torch.tensor(rows, dtype=torch.long).to(targets.boxes.device, non_blocking=True)
    image = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(joined, dtype=torch.long))
    return images, Targets(
        targets.labels[row],
        targets.boxes[row],
        image.to(targets.boxes.device, non_blocking=True),
        joined,
        targets.annotated,
    )


def base_sizes(size: tuple[int, int], repeat: int) -> list[tuple[int, int]]:
    """The sizes of multi-scale training, all multiples of 32; the base size stands in the list `repeat` times.

    For 640 and r: 480, 512, 544, 576, 608, 640 r times, 800, 768, 736, 704, 672, as published. A rectangle follows its
    longer side, the shorter one keeps its share as nearly as 32 pixels allow.
    """
    base = max(size)
    steps = (base - int(base * 0.75 / STRIDE) * STRIDE) // STRIDE
    longer = [int(base * 0.75 / STRIDE) * STRIDE + i * STRIDE for i in range(steps)]
    longer += [base] * repeat
    longer += [int(base * 1.25 / STRIDE) * STRIDE - i * STRIDE for i in range(steps)]
    return [
        size if side == base else (scaled(size[0], side, base), scaled(size[1], side, base)) for side in longer
    ] or [size]


def scaled(extent: int, side: int, base: int) -> int:
    """An extent by side / base, as a multiple of 32."""
    return max(STRIDE, round(extent * side / base / STRIDE) * STRIDE)
