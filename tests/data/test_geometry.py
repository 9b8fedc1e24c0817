"""Boxes against pixels: painted rectangles are found where the boxes say they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finedetr.data.dataset import Categories, Dataset
from finedetr.data.dense import plan_mosaic, plan_sample
from finedetr.data.sampling import draw, load
from finedetr.data.transforms import Active, Augmentation, Plan, Windows, plan_plain, plan_standard

# far apart in every channel, and nothing blends two of them into a third
COLORS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)])
STILL = Augmentation(photometric=0)


def painted(folder: Path, sizes: list[tuple[int, int]], suffix: str = ".png", each: int = 1) -> Dataset:
    """Grey pictures with solid rectangles; the class of a box is its color, and no color stands twice in a picture."""
    rng = np.random.default_rng(5)
    files, boxes, labels, starts = [], [], [], [0]
    for number, (width, height) in enumerate(sizes):
        pixels = np.full((height, width, 3), 128, dtype=np.uint8)
        for box in range(each):
            label = (number * each + box) % len(COLORS)
            band = width // each
            x1 = band * box + int(rng.integers(2, band // 4))
            y1 = int(rng.integers(2, height // 3))
            x2, y2 = x1 + int(rng.integers(band // 4, band // 2)), y1 + int(rng.integers(height // 4, height // 2))
            pixels[y1:y2, x1:x2] = COLORS[label]
            boxes.append((x1, y1, x2, y2))
            labels.append(label)
        starts.append(len(boxes))
        files.append(str(folder / f"{number}{suffix}"))
        Image.fromarray(pixels).save(files[-1], quality=98, subsampling=0) if suffix == ".jpg" else Image.fromarray(
            pixels
        ).save(files[-1])
    array = np.array(boxes, dtype=np.float32)
    return Dataset(
        split="train",
        layout="test",
        evidence="painted",
        files=tuple(files),
        ids=np.arange(1, len(files) + 1),
        sizes=np.array(sizes, dtype=np.int32),
        starts=np.array(starts),
        labels=np.array(labels, dtype=np.int64),
        boxes=array,
        crowd=np.zeros(len(array), dtype=bool),
        area=(array[:, 2] - array[:, 0]) * (array[:, 3] - array[:, 1]),
        annotation_ids=np.arange(1, len(array) + 1),
        categories=Categories(tuple(range(6)), tuple("rgbymc")),
    )


def rendered(plan: Plan, dataset: Dataset) -> np.ndarray:
    out = torch.empty((*plan.size, 3), dtype=torch.uint8)
    draw(plan, lambda i, reduce: load(dataset.files[i], reduce, tuple(dataset.sizes[i])), out)
    return out.numpy()


def found(pixels: np.ndarray, label: int) -> tuple[float, float, float, float] | None:
    """The hull of all pixels that are nearer to a color than to grey and black."""
    near = np.abs(pixels.astype(int) - COLORS[label]).max(2) < 100
    if near.sum() < 4:
        return None
    ys, xs = np.flatnonzero(near.any(1)), np.flatnonzero(near.any(0))
    return float(xs[0]), float(ys[0]), float(xs[-1] + 1), float(ys[-1] + 1)


def compare(plan: Plan, dataset: Dataset, tolerance: float = 1.5) -> int:
    """Checks every box whose color stands once in the picture; how many those were."""
    pixels, checked = rendered(plan, dataset), 0
    limit = np.array((plan.size[1], plan.size[0]) * 2)
    for label in range(len(COLORS)):
        boxes = plan.truth.boxes[plan.truth.labels == label]
        hull = found(pixels, label)
        if len(boxes) != 1 or hull is None or (boxes[0, 2:] - boxes[0, :2] < 4).any():
            continue
        if plan.turn is not None and ((boxes[0] < 1) | (boxes[0] > limit - 1)).any():
            continue  # the clipped hull of a turned box is larger than the hull of what is left of it
        assert np.abs(boxes[0] - hull).max() <= tolerance, (label, boxes[0], hull)
        checked += 1
    return checked


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("size", [(160, 160), (96, 192), (320, 256)])
def test_boxes_lie_on_their_pixels_in_every_window(tmp_path: Path, suffix: str, size: tuple[int, int]) -> None:
    sizes = [(300, 200), (201, 333), (640, 479), (97, 131), (1003, 777), (256, 256)]
    dataset = painted(tmp_path, sizes, suffix)
    checked = {"plain": 0, "standard": 0, "mosaic": 0}
    for seed in range(6):
        for index in range(len(dataset)):
            rng = np.random.default_rng((seed, index))
            checked["plain"] += compare(plan_plain(rng, dataset, index, STILL, size), dataset)
            checked["standard"] += compare(plan_standard(rng, dataset, index, STILL, size), dataset)
        checked["mosaic"] += compare(plan_mosaic(rng, dataset, seed % len(dataset), STILL, size), dataset, 1.75)
    assert checked["plain"] == 36
    assert checked["standard"] > 20
    assert checked["mosaic"] >= 3


@pytest.mark.parametrize("size", [(160, 160), (96, 192)])
def test_boxes_turn_with_their_pictures(tmp_path: Path, size: tuple[int, int]) -> None:
    dataset = painted(tmp_path, [(300, 200), (201, 333), (256, 256)])
    turning = Augmentation(photometric=0, quarter_turns=1.0)
    seen, checked = set(), 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        plan = plan_sample(rng, dataset, seed % 3, turning, Active("standard", standard=True), size)
        seen.add(plan.quarters)
        checked += compare(plan, dataset)
    assert seen == ({1, 2, 3} if size[0] == size[1] else {2})
    assert checked > 10


def test_a_large_jpeg_is_decoded_small_and_its_boxes_still_fit(tmp_path: Path) -> None:
    dataset = painted(tmp_path, [(1001, 805), (2003, 1203)], ".jpg", each=2)
    for index, reduce in ((0, 4), (1, 4)):
        plan = plan_plain(np.random.default_rng(1), dataset, index, STILL, (160, 160))
        assert plan.tiles[0].reduce == reduce
        assert compare(plan, dataset, 1.0) == 2


def test_scaling_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((400, 400, 3), dtype=np.uint8)
    stripes[:, ::2] = 255  # one-pixel stripes: sampled without a filter they become black or white
    Image.fromarray(stripes).save(tmp_path / "0.png")
    dataset = painted(tmp_path / "", [(400, 400)])
    Image.fromarray(stripes).save(dataset.files[0])
    for plan in (
        plan_plain(np.random.default_rng(0), dataset, 0, STILL, (100, 100)),
        plan_mosaic(
            np.random.default_rng(3), dataset, 0, Augmentation(photometric=0, mosaic_scale=(0.6, 0.6)), (100, 100)
        ),
    ):
        middle = rendered(plan, dataset)[35:65, 35:65].astype(int)
        assert abs(middle.mean() - 127) < 8
        assert middle.std() < 12


def test_flip_mirrors_pixels_and_boxes(tmp_path: Path) -> None:
    dataset = painted(tmp_path, [(200, 200)])
    left, right = (
        plan_plain(np.random.default_rng(0), dataset, 0, Augmentation(photometric=0, flip=p), (96, 96)) for p in (0, 1)
    )
    assert np.array_equal(rendered(left, dataset)[:, ::-1], rendered(right, dataset))
    assert np.allclose(left.truth.boxes[:, 0], 96 - right.truth.boxes[:, 2])


def test_labels_and_areas_are_filtered_with_their_boxes(tmp_path: Path) -> None:
    dataset = painted(tmp_path, [(300, 240)] * 4, each=3)
    dropped = 0
    for seed in range(60):
        active = Active("mosaic", mosaic=True, standard=True)
        plan = plan_sample(np.random.default_rng(seed), dataset, seed % 4, STILL, active, (128, 128))
        truth = plan.truth
        assert len(truth.boxes) == len(truth.labels) == len(truth.area)
        known = {(int(label), float(area)) for label, area in zip(dataset.labels, dataset.area, strict=True)}
        assert all((int(c), float(a)) in known for c, a in zip(truth.labels, truth.area, strict=True))
        assert (truth.boxes >= 0).all()
        assert (truth.boxes <= 128).all()
        assert ((truth.boxes[:, 2:] - truth.boxes[:, :2]) >= 1).all()
        dropped += len(truth.labels) < 3 * (4 if plan.turn is not None else 1)
    assert dropped > 10


def test_crowd_boxes_are_left_out_of_training(tmp_path: Path) -> None:
    dataset = painted(tmp_path, [(200, 200)], each=3)
    dataset.crowd[1] = True
    plan = plan_plain(np.random.default_rng(0), dataset, 0, STILL, (64, 64))
    assert plan.truth.labels.tolist() == [0, 2]


def test_windows_follow_the_published_schedule() -> None:
    deim = Windows(4, 29, 50)
    names = [deim.kind(epoch).name for epoch in range(58)]
    assert names == ["start"] * 4 + ["mosaic"] * 25 + ["standard"] * 21 + ["plain"] * 8
    assert [deim.kind(e).mixup for e in (3, 4, 28, 29)] == [False, True, True, False]
    assert [deim.kind(e).multi_scale for e in (0, 49, 50)] == [True, True, False]
    dfine = Windows.dfine(72)
    assert [dfine.kind(e).name for e in (0, 71, 72)] == ["standard", "standard", "plain"]
    assert not any(dfine.kind(e).mosaic or dfine.kind(e).mixup for e in range(80))


def test_probabilities_are_the_published_ones(tmp_path: Path) -> None:
    dataset = painted(tmp_path, [(200, 160)] * 2)
    mosaic = flips = colors = 0
    active = Windows(0, 1, 2).kind(0)
    for seed in range(2000):
        plan = plan_sample(np.random.default_rng(seed), dataset, 0, Augmentation(), active, (64, 64))
        mosaic += plan.turn is not None
        flips += plan.flip and plan.turn is None
        color = plan.color
        colors += (
            sum(x is not None for x in (color.brightness, color.contrast, color.saturation, color.hue)) if color else 0
        )
    assert abs(mosaic / 2000 - 0.5) < 0.04
    assert abs(flips / (2000 - mosaic) - 0.5) < 0.05
    assert abs(colors / 8000 - 0.5) < 0.03


def test_zoom_out_and_crop_keep_their_ranges(tmp_path: Path) -> None:
    dataset = painted(tmp_path, [(400, 300)])
    only_zoom = Augmentation(photometric=0, crop=0, flip=0, zoom_out=1)
    ratios = []
    for seed in range(300):
        plan = plan_standard(np.random.default_rng(seed), dataset, 0, only_zoom, (200, 200))
        x0, y0, x1, y1 = plan.tiles[0].target
        ratios.append(200 / (x1 - x0))
        assert 0 <= x0 < x1 <= 200
        assert 0 <= y0 < y1 <= 200
    assert 0.99 < min(ratios) < 1.1
    assert 3.6 < max(ratios) < 4.1
    only_crop = Augmentation(photometric=0, zoom_out=0, flip=0, crop=1)
    cropped = 0
    for seed in range(300):
        plan = plan_standard(np.random.default_rng(seed), dataset, 0, only_crop, (200, 200))
        x0, y0, x1, y1 = plan.tiles[0].source
        wide, tall = x1 - x0, y1 - y0
        if (wide, tall) != (400, 300):
            cropped += 1
            assert 0.3 * 400 - 1 <= wide <= 400
            assert 0.3 * 300 - 1 <= tall <= 300
            assert 0.49 <= wide / tall <= 2.05
            assert len(plan.truth.labels) == 1, "the center of a box is always within"
    assert cropped > 150
