"""Queries of salient points (SD-DETR): where they look, what learns from whom, and what they are made of."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from finedetr.errors import ConfigError
from finedetr.model.config import ModelConfig, SalientConfig, SplitConfig
from finedetr.model.detector import Detector
from finedetr.model.queries import SalientQueries
from finedetr.model.salient import SalientPoints, region_features, sample
from finedetr.model.weights import transfer_weights
from tests.model.classic import CLASSES, random_detector, small
from tests.model.test_split import HOSTS, NAMES, saved
from tests.train.tiny import TINY


def salient(name: str, joining: str = "token", **more: Any) -> ModelConfig:
    decoder = HOSTS[name].decoder
    split = SplitConfig(joining=joining)  # type: ignore[arg-type]
    return replace(HOSTS[name], decoder=replace(decoder, split=split, salient=SalientConfig(queries=True, **more)))


def selection_of(config: ModelConfig, *, random: bool = False) -> SalientQueries:
    torch.manual_seed(0)
    detector = random_detector(config) if random else Detector(config, CLASSES)
    assert isinstance(detector.selection, SalientQueries)
    return detector.selection


def linear_maps(sizes: tuple[tuple[int, int], ...], channels: int = 2) -> tuple[Tensor, ...]:
    """x in the first half of the channels and y in the second, plus ten for each level."""
    maps = []
    for index, (height, width) in enumerate(sizes):
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        half = channels // 2
        maps.append(torch.cat((x.expand(half, -1, -1), y.expand(half, -1, -1)))[None] + 10 * index)
    return tuple(maps)


def test_a_linear_map_is_sampled_exactly_on_its_own_level() -> None:
    maps = linear_maps(((8, 6), (4, 3)))
    places = 0.3 + 0.4 * torch.rand(1, 5, 7, 2, generator=torch.Generator().manual_seed(0))
    level = torch.tensor([[0, 1, 0, 1, 1]])
    found = sample(maps, level, places)
    torch.testing.assert_close(found, places + 10 * level[..., None, None], atol=1e-5, rtol=1e-5)


def test_regions_are_read_row_by_row_in_the_middle_of_their_parts() -> None:
    box = torch.tensor([[[0.5, 0.45, 0.4, 0.2]]])
    found = region_features(linear_maps(((10, 10),)), torch.zeros(1, 1, dtype=torch.long), box, 4).view(4, 4, 2)
    torch.testing.assert_close(found[0, :, 0], torch.tensor([0.35, 0.45, 0.55, 0.65]))
    torch.testing.assert_close(found[:, 2, 1], torch.tensor([0.375, 0.425, 0.475, 0.525]))


def test_points_begin_in_the_middle_and_stay_inside_whatever_they_see() -> None:
    decoder = salient("deformable").decoder
    generator = torch.Generator().manual_seed(0)
    maps = tuple(torch.randn(2, 64, side, side, generator=generator) for side in (8, 4, 2, 1))
    boxes = torch.rand(2, 9, 4, generator=generator) * 0.5 + 0.1
    level = torch.randint(0, 4, (2, 9), generator=generator)
    task = SalientPoints(decoder)
    middle = boxes[..., None, :2]
    assert torch.equal(task.points(maps, level, boxes), middle.expand(-1, -1, 8, -1))
    seeds = task(maps, level, boxes)
    torch.testing.assert_close(seeds.content, sample(maps, level, middle)[:, :, 0])
    torch.testing.assert_close(seeds.references, boxes[..., :2])
    for parameter in task.parameters():
        torch.nn.init.normal_(parameter, std=2.0, generator=generator)
    points = task.points(maps, level, boxes)
    assert ((points - middle).abs() <= boxes[..., None, 2:] / 2 + 1e-6).all()
    assert points.std(dim=2).max() > 0.05


@pytest.mark.parametrize("detached", [True, False])
def test_points_learn_by_sampling_and_boxes_by_their_own_losses(detached: bool) -> None:
    queries = selection_of(salient("conditional", detached=detached), random=True).train()
    memory = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    found = queries(memory, ((4, 4),))
    assert found.scoring is not None
    found.content.square().sum().backward(retain_graph=True)
    assert all(layer.weight.grad.any() for layer in queries.boxes.layers)
    assert queries.scores is not None
    assert all(parameter.grad is None for parameter in queries.scores.parameters())
    moved = [name for name, p in queries.mini.named_parameters() if p.grad is not None and p.grad.any()]
    assert bool(moved) != detached
    found.scoring.content.square().sum().backward()
    assert all(layer.weight.grad.any() for layer in queries.scores.layers)


def test_fewer_cells_than_queries_give_fewer_queries() -> None:
    queries = selection_of(salient("conditional"))
    shapes = {count: queries(torch.randn(1, count, 64), ((1, count),)).content.shape[1] for count in (3, 7, 20)}
    assert shapes == {3: 3, 7: 7, 20: 7}


@pytest.mark.parametrize("name", ["conditional", "deformable", "dab"])
def test_the_small_detector_answers_for_all_cells_in_training_only(name: str) -> None:
    detector = random_detector(salient(name, weight=0.5))
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    assert detector(images, all_stages=True).groups == ()
    ((group, answers),) = detector.train()(images).groups
    cells = 2 * 3 if len(detector.config.strides) == 1 else 8 * 12 + 4 * 6 + 2 * 3 + 1 * 2
    assert (group.name, group.agnostic, group.weight) == ("proposals", False, 0.5)
    assert answers.logits.shape == (1, 2, cells, CLASSES)


def test_boxes_of_cells_begin_around_them_in_proportion_to_their_stride() -> None:
    queries = selection_of(salient("deformable")).train()
    found = queries(torch.randn(1, 85, 64), ((8, 8), (4, 4), (2, 2), (1, 1))).proposals
    assert found is not None
    torch.testing.assert_close(found.boxes[0, 0], torch.tensor([1 / 16, 1 / 16, 0.05, 0.05]))
    torch.testing.assert_close(found.boxes[0, -1], torch.tensor([0.5, 0.5, 0.4, 0.4]))
    single = selection_of(salient("conditional")).train()(torch.randn(1, 4, 64), ((2, 2),)).proposals
    assert single is not None
    torch.testing.assert_close(single.boxes[0, 0], torch.tensor([0.25, 0.25, 0.2, 0.2]))


@pytest.mark.parametrize(("tower", "kernels"), [("conv", [3] * 4), ("mlp", [1] * 4), ("linear", [])])
def test_towers_see_the_neighbours_or_not(tower: str, kernels: list[int]) -> None:
    queries = selection_of(salient("conditional", tower=tower))
    layers = queries.mini.box_tower.layers
    assert [layer.kernel_size[0] for layer in layers if isinstance(layer, torch.nn.Conv2d)] == kernels
    assert queries(torch.randn(1, 6, 64), ((2, 3),)).content.shape == (1, 6, 64)


def test_one_branch_has_one_kind_of_points() -> None:
    assert selection_of(salient("conditional", "none")).scores is None
    both = selection_of(salient("conditional"))
    assert both.scores is not None
    assert [p.shape for p in both.scores.parameters()] == [p.shape for p in both.boxes.parameters()]


def test_what_starts_at_random_and_what_is_left_over_is_said(tmp_path: Path) -> None:
    _, path = saved(small("conditional-detr-r50", layers=2, encoders=1), tmp_path)
    detector = Detector(salient("conditional"), CLASSES)
    transfer = transfer_weights(detector, NAMES, path)
    assert {row.split(" (")[0] for row in transfer.fresh} == {f"selection.{p}" for p in ("mini", "boxes", "scores")}
    assert all(row.endswith("at random") for row in transfer.fresh)
    left = {"selection.embedding (1)", "selection.point (4)"}
    assert set(transfer.unused) == left | {"decoder.layers.*.cross_attention (2)"}  # contents are there from the start


def test_queries_that_are_tokens_have_no_salient_points() -> None:
    with pytest.raises(ConfigError, match="take the place of learned queries"):
        replace(TINY, decoder=replace(TINY.decoder, salient=SalientConfig(queries=True)))
    with pytest.raises(ConfigError, match="multiple of 32"):
        salient("conditional", points=0)
