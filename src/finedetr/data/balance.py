"""How often a picture stands in an epoch, so that rare classes are seen more often: repeat-factor sampling."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from finedetr.data.dataset import Dataset

__all__ = ["draw_epoch", "epoch_length", "repeat_factors"]


def repeat_factors(data: Dataset, threshold: float) -> NDArray[np.float64]:
    """How often each picture stands in an epoch, on average; 1 or more (Gupta et al., LVIS, CVPR 2019).

    A class with boxes in a share f of the pictures has the factor max(1, sqrt(threshold / f)), a picture the largest
    factor of its classes, and 1 where it has none. Crowd boxes do not count.

    Args:
        data: The training split.
        threshold: Classes in a smaller share of the pictures are repeated; LVIS has 0.001. 0 repeats nothing.
    """
    picture = np.repeat(np.arange(len(data)), np.diff(data.starts))[~data.crowd]
    labels = data.labels[~data.crowd]
    pairs = np.unique(np.stack((picture, labels), 1), axis=0)
    pictures = np.bincount(pairs[:, 1], minlength=len(data.categories)).clip(min=1)  # a class may have none
    factor = np.maximum(1.0, np.sqrt(threshold * len(data) / pictures))
    factors = np.ones(len(data))
    np.maximum.at(factors, pairs[:, 0], factor[pairs[:, 1]])
    return factors


def epoch_length(data: Dataset, threshold: float) -> int:
    """Pictures of an epoch, repeated ones counted; an epoch may have one more."""
    return int(repeat_factors(data, threshold).sum()) if threshold > 0 else len(data)


def draw_epoch(rng: np.random.Generator, factors: NDArray[np.float64]) -> NDArray[np.int64]:
    """The pictures of one epoch in random order: each floor(r) or ceil(r) times, r on average.

    The published sampler rounds each factor by a coin of its own, so that the length of an epoch varies. Here the
    factors stand in a row, in random order, and a comb with teeth one apart is laid upon them at a random place: each
    picture gets its share just the same, and no epoch is shorter than floor(sum of r), which fixes its steps.
    """
    order = rng.permutation(len(factors))
    ends = np.cumsum(factors[order])
    ends[-1] = factors.sum()  # the same in every order, to the last bit
    teeth = np.floor(ends + rng.random()).astype(np.int64)
    counts = np.diff(teeth, prepend=0)
    epoch: NDArray[np.int64] = rng.permutation(np.repeat(order, counts))
    return epoch
