"""One affine map of RGB does what the published chain of steps does."""

from __future__ import annotations

import colorsys

import numpy as np
import pytest
import torch

from finedetr.data.color import color_steps, distort, distort_affinely, turn_hue
from finedetr.data.sampling import turn_canvas
from finedetr.data.transforms import Augmentation, Color

GREY = np.array((0.2989, 0.587, 0.114))


def picture(low: int = 60, high: int = 170) -> np.ndarray:
    """Muted colors, so that no step leaves 0..255 and clipping plays no part."""
    return np.random.default_rng(0).integers(low, high, (23, 17, 3)).astype(np.uint8)


def step_by_step(pixels: np.ndarray, color: Color) -> np.ndarray:
    """The published order, each step by itself, in floats."""
    x = pixels.astype(float)

    def contrast(x: np.ndarray) -> np.ndarray:
        return x if color.contrast is None else color.contrast * x + (1 - color.contrast) * (x @ GREY).mean()

    if color.brightness is not None:
        x = x * color.brightness
    if color.contrast_first:
        x = contrast(x)
    if color.saturation is not None:
        x = color.saturation * x + (1 - color.saturation) * (x @ GREY)[..., None]
    if color.hue is not None:
        x = np.rint(x)  # the published code keeps bytes between its steps; here they are whole levels at the hue only
        hsv = np.array([colorsys.rgb_to_hsv(*p) for p in x.reshape(-1, 3) / 255])
        x = np.array([colorsys.hsv_to_rgb((h + color.hue) % 1, s, v) for h, s, v in hsv]).reshape(x.shape) * 255
    if not color.contrast_first:
        x = contrast(x)
    return x if color.channels is None else x[..., list(color.channels)]


def sampled(pixels: np.ndarray) -> np.ndarray:
    """A picture in which every eighth pixel is like all of them, so that its mean grey is exact."""
    return np.repeat(np.repeat(pixels, 8, 0), 8, 1)


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("channels", [None, (2, 0, 1)])
@pytest.mark.parametrize("hue", [None, -0.05, 0.03])
def test_a_distortion_does_what_its_published_steps_do(
    first: bool, channels: tuple[int, int, int], hue: float | None
) -> None:
    color = Color(1.1, 0.7, 1.2, hue, first, channels)
    pixels = sampled(picture())
    ours = distort(torch.from_numpy(pixels), color).numpy()
    assert np.abs(ours - step_by_step(pixels, color)).max() <= (0.52 if hue is None else 1.02), (
        "rounded once, or at the hue and at the end"
    )
    assert np.abs(ours.astype(int) - pixels).mean() > 5


@pytest.mark.parametrize("turns", [-0.05, -0.01, 0.0, 0.02, 0.05])
def test_hue_turns_exactly_as_in_hsv(turns: float) -> None:
    rng = np.random.default_rng(1)
    ties = np.array([[a, b, c] for a in (0, 1, 128, 255) for b in (0, 1, 128, 255) for c in (0, 1, 128, 255)])
    pixels = np.concatenate((rng.integers(0, 256, (3000, 3)), ties)).astype(np.float32)
    ours = turn_hue(torch.from_numpy(pixels.T.astype(np.int16)), turns).numpy().T
    hsv = [colorsys.rgb_to_hsv(*(p / 255.0)) for p in pixels.astype(float)]
    expected = np.array([colorsys.hsv_to_rgb((h + turns) % 1, s, v) for h, s, v in hsv]) * 255
    assert np.abs(ours - expected).max() < 0.51, "the rounding to whole levels"


def test_values_are_rounded_and_clipped() -> None:
    pixels = torch.tensor([[[0, 100, 250]]], dtype=torch.uint8)
    assert distort_affinely(pixels, np.eye(3) * 1.126, np.zeros(3)).tolist() == [[[0, 113, 255]]]
    assert distort_affinely(pixels, np.eye(3), np.full(3, -30.0)).tolist() == [[[0, 70, 220]]]


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (8, 8), (7, 9), (300, 200)])
@pytest.mark.parametrize("hue", [None, 0.04])
def test_any_number_of_pixels(shape: tuple[int, int], hue: float | None) -> None:
    pixels = torch.randint(0, 256, (*shape, 1), dtype=torch.uint8).expand(*shape, 3)
    assert torch.equal(distort(pixels, Color(hue=hue, channels=(1, 2, 0))), pixels), "grey has no hue"


def test_steps_without_hue_are_one_map() -> None:
    sample = torch.rand(3, 10) * 255
    assert len(color_steps(Color(1.1, 0.7, 1.2, None, False, (1, 0, 2)), sample)) == 1
    assert len(color_steps(Color(1.1, 0.7, 1.2, 0.01, False, (1, 0, 2)), sample)) == 3
    assert color_steps(Color(), sample) == ()


def test_the_black_around_a_mosaic_takes_part_in_the_contrast() -> None:
    canvas = torch.full((1, 80, 80, 3), 200.0)
    out = torch.empty((320, 320, 3), dtype=torch.uint8)
    turn = np.array([[1.0, 0, 120], [0, 1.0, 120]])
    turn_canvas(canvas, turn, Color(contrast=0.5), out)
    mean = 200 / 16
    assert out[0, 0].tolist() == pytest.approx([0.5 * mean] * 3, abs=1)
    assert out[160, 160].tolist() == pytest.approx([100 + 0.5 * mean] * 3, abs=1)
    turn_canvas(canvas, turn, None, out)
    assert out[0, 0].tolist() == [0, 0, 0]
    assert out[160, 160].tolist() == [200, 200, 200]


def test_drawn_factors_stay_in_their_ranges() -> None:
    drawn = [Color.draw(np.random.default_rng(seed), Augmentation(photometric=1)) for seed in range(300)]
    colors = [color for color in drawn if color is not None]
    assert len(colors) == 300
    ranges = {"brightness": (0.875, 1.125), "contrast": (0.5, 1.5), "saturation": (0.5, 1.5), "hue": (-0.05, 0.05)}
    for name, (low, high) in ranges.items():
        values = [getattr(color, name) for color in colors]
        assert low <= min(values) < low + 0.1 * (high - low)
        assert high - 0.1 * (high - low) < max(values) <= high
    assert Color.draw(np.random.default_rng(0), Augmentation(photometric=0)) is None
