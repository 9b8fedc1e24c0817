"""Boxes as numbers: the goldens of D-FINE's bins, edges and their inverse; IoU against a loop."""

from __future__ import annotations

import pytest
import torch

from finedetr.errors import ConfigError
from finedetr.geometry import (
    bin_values,
    bracket,
    decode_edges,
    encode_edges,
    giou,
    inverse_sigmoid,
    iou,
    to_cxcywh,
    to_xyxy,
)

# fmt: off
LOWER_HALF = {
    4.0: [-4, -2, -1.78813, -1.591224, -1.408224, -1.238148, -1.080083, -.933182, -.796655, -.66977, -.551845,
          -.442249, -.340393, -.245731, -.157754, -.07599, 0],
    8.0: [-8, -4, -3.491301, -3.034356, -2.623899, -2.255203, -1.924019, -1.626529, -1.359305, -1.119269, -.903654,
          -.709976, -.536003, -.37973, -.239356, -.113264, 0],
}
# fmt: on


@pytest.mark.parametrize("scale", [4.0, 8.0])
def test_bins_are_the_published_ones(scale: float) -> None:
    values = bin_values(33, 0.5, scale)
    golden = torch.tensor(LOWER_HALF[scale])
    assert values.dtype == torch.float32
    torch.testing.assert_close(values[:17], golden, atol=3e-6, rtol=0)
    torch.testing.assert_close(values, -values.flip(0), atol=0, rtol=0)
    assert bool((values.diff() > 0).all())


@pytest.mark.parametrize("bins", [3, 32, 0])
def test_a_number_of_bins_that_cannot_be_is_told(bins: int) -> None:
    with pytest.raises(ConfigError, match="odd number"):
        bin_values(bins)


def test_edges_decode_to_the_golden_box() -> None:
    box = decode_edges(torch.tensor([0.5, 0.5, 0.2, 0.4]), torch.tensor([0.1, -0.2, 0.3, 0.4]), 4.0)
    torch.testing.assert_close(box, torch.tensor([0.505, 0.53, 0.22, 0.42]))


def test_zero_distances_decode_to_the_anchor() -> None:
    anchors = torch.rand(7, 4)
    torch.testing.assert_close(decode_edges(anchors, torch.zeros(7, 4), 8.0), anchors)


@pytest.mark.parametrize("scale", [4.0, 8.0])
def test_encoding_undoes_decoding(scale: float) -> None:
    torch.manual_seed(0)
    anchors, distances = torch.rand(50, 4) + 0.05, torch.randn(50, 4) * 0.5
    boxes = decode_edges(anchors, distances, scale)
    corners = torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), dim=-1)
    torch.testing.assert_close(encode_edges(anchors, corners, scale), distances, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("corners", "bins", "upper"),
    [
        ([0.38, 0.33, 0.61, 0.72], [20, 12, 18, 18], [0.5852, 0.4267, 0.4802, 0.4802]),
        ([0.1, 0.45, 0.9, 0.55], [31, 3, 31, 3], [1.0, 0.4985, 1.0, 0.4985]),
    ],
)
def test_edge_targets_are_the_golden_ones(corners: list[float], bins: list[int], upper: list[float]) -> None:
    distances = encode_edges(torch.tensor([0.5, 0.5, 0.2, 0.4]), torch.tensor(corners), 4.0)
    lower, weight = bracket(distances, bin_values())
    assert lower.tolist() == bins
    torch.testing.assert_close(weight, torch.tensor(upper), atol=1e-4, rtol=0)


def test_distances_outside_the_bins_go_to_the_outermost() -> None:
    lower, weight = bracket(torch.tensor([-4.5, -4.0, 4.0, 99.0, 0.0]), bin_values())
    assert lower.tolist() == [0, 0, 31, 31, 16]
    assert weight.tolist() == [0, 0, 1, 1, 0]


def test_iou_of_hand_made_pairs() -> None:
    a = torch.tensor([[0.5, 0.5, 0.2, 0.2], [0.2, 0.2, 0.2, 0.2], [0.5, 0.5, 0.0, 0.0]])
    b = torch.tensor([[0.6, 0.5, 0.2, 0.2], [0.8, 0.2, 0.2, 0.2], [0.5, 0.5, 0.0, 0.0]])
    torch.testing.assert_close(iou(a, b), torch.tensor([1 / 3, 0.0, 0.0]))
    torch.testing.assert_close(giou(a, b)[:2], torch.tensor([1 / 3, -0.5]))
    assert bool(torch.isfinite(giou(a, b)).all())


def test_formats_are_inverse_and_negative_sizes_count_as_zero() -> None:
    boxes = torch.rand(9, 4)
    torch.testing.assert_close(to_cxcywh(to_xyxy(boxes)), boxes)
    assert to_xyxy(torch.tensor([0.5, 0.5, -0.2, 0.2])).tolist() == pytest.approx([0.5, 0.4, 0.5, 0.6])


def test_the_inverse_sigmoid_clips_its_tails() -> None:
    x = torch.tensor([-0.5, 0.0, 0.3, 1.0, 1.5])
    tail = torch.log(torch.tensor(1e5)).item()
    torch.testing.assert_close(
        inverse_sigmoid(x),
        torch.tensor([-tail, -tail, torch.logit(torch.tensor(0.3)).item(), tail, tail]),
        atol=1e-4,
        rtol=0,
    )
