from __future__ import annotations

import json
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from finedetr.errors import ConfigError, DataError, UsageError
from finedetr.model.detector import Detector
from finedetr.model.weights import Card, save_weights
from finedetr.model.zoo import ZOO, variant
from finedetr.recipes import PAPERS, RECIPES, build, recipe_for
from finedetr.recipes.published import DEIM, DFINE, row
from finedetr.supervise.matching import PerStage, QualityCost
from finedetr.train.config import flatten, from_dict, to_dict
from finedetr.train.recipe import Average, Recipe, Schedule
from finedetr.train.schedule import FlatCosine, WarmupConstant
from tests.model.test_rtdetrv2 import TINY_RTDETR
from tests.train.tiny import TINY

COCO = 118_287  # training pictures


def published(size: str, recipe: str) -> Recipe:
    return build(variant(f"dfine-{size}"), recipe, random_start=False).resolve(COCO)


@pytest.mark.parametrize(
    ("size", "epochs", "windows"),
    [
        ("n", 160, (4, 78, 148)),
        ("s", 132, (4, 64, 120)),
        ("m", 102, (4, 49, 90)),
        ("l", 58, (4, 29, 50)),
        ("x", 58, (4, 29, 50)),
    ],
)
def test_deim_has_its_published_windows_and_memory_on_coco(
    size: str, epochs: int, windows: tuple[int, int, int]
) -> None:
    recipe = published(size, "deim")
    found = recipe.schedule.windows(recipe.epochs)
    assert (recipe.epochs, (found.start, found.mosaic_end, found.plain_from)) == (epochs, windows)
    steps = COCO // (recipe.batch or 0)
    assert recipe.schedule.warmup_of(epochs * steps) == 2000
    assert recipe.average.decay_for(epochs * steps) == 0.9999
    assert recipe.average.ramp_for(epochs * steps) == 1000


@pytest.mark.parametrize(
    ("size", "epochs", "stop"), [("n", 160, 148), ("s", 132, 120), ("m", 132, 120), ("l", 80, 72), ("x", 80, 72)]
)
def test_d_fine_has_its_published_windows_on_coco(size: str, epochs: int, stop: int) -> None:
    recipe = published(size, "dfine")
    windows = recipe.schedule.windows(recipe.epochs)
    assert (recipe.epochs, windows.start, windows.mosaic_end, windows.plain_from) == (epochs, 0, 0, stop)
    assert recipe.schedule.rates(epochs, 3696) == WarmupConstant(500)


@pytest.mark.parametrize("recipe", ["dfine", "deim"])
@pytest.mark.parametrize("size", "nsmlx")
def test_the_published_rates_hold_at_the_published_batch(size: str, recipe: str) -> None:
    numbers = row({"dfine": DFINE, "deim": DEIM}[recipe], f"dfine-{size}")
    made = published(size, recipe)
    assert made.batch == numbers.batch
    assert made.lr == pytest.approx(numbers.lr)
    assert made.optimizer.backbone * numbers.lr == pytest.approx(numbers.backbone_lr)
    assert made.optimizer.weight_decay == numbers.weight_decay


def test_deim_s_on_coco_has_the_published_curve() -> None:
    curve = published("s", "deim").schedule.rates(132, 3696)
    assert curve == FlatCosine(132 * 3696, 2000, 64 * 3696, 12 * 3696, 0.5)


def test_deim_n_is_constant_after_its_warm_up() -> None:
    curve = published("n", "deim").schedule.rates(160, 924)
    assert {curve.factor(step) for step in (2000, 80_000, 147_840)} == {1.0}


def test_deim_takes_the_twin_of_a_published_variant_and_leaves_others_alone() -> None:
    assert published("s", "deim").model == ZOO["deim-dfine-s"]
    assert build(TINY, "deim", random_start=False).model == TINY


def test_deimv2_is_trained_by_its_own_recipe() -> None:
    small = build(variant("deimv2-s"), random_start=False)
    assert small == build(variant("deimv2-s"), "deimv2", random_start=False)
    assert (small.epochs, small.optimizer.lr, small.normalization is not None) == (132, 5e-4, True)
    assert small.optimizer.lr * small.optimizer.backbone == pytest.approx(2.5e-5)
    assert round(small.schedule.late_matching * small.epochs) == 100
    assert small.augmentation.copy_blend == 0.5
    atto = build(variant("deimv2-atto"), random_start=False)
    assert atto.size == (320, 320)
    assert [type(term).__name__ for term in atto.objective.terms] == ["MatchabilityAware", "BoxL1", "BoxGIoU"]
    assert (atto.augmentation.mosaic, atto.augmentation.mixup, atto.augmentation.min_size) == (0.3, 0.0, 12)


def test_deim_on_plain_boxes_takes_the_objective_of_rt_detrv2() -> None:
    recipe = build(variant("rtdetrv2-r18"), random_start=False)
    assert recipe.model == ZOO["deim-rtdetrv2-r18"]
    assert recipe.objective.names == ("MatchabilityAware", "BoxL1", "BoxGIoU")
    assert isinstance(recipe.objective.policy, PerStage)
    assert (recipe.optimizer.lr, recipe.optimizer.batch, recipe.epochs) == (2e-4, 16, 120)
    published = build(variant("rtdetrv2-r101"), "rtdetrv2", random_start=False)
    assert published.optimizer.lr * published.optimizer.backbone == pytest.approx(1e-6)
    with pytest.raises(UsageError, match="refines distributions of edges, and rtdetrv2-r18 has plain boxes"):
        build(variant("rtdetrv2-r18"), "dfine", random_start=False)


def test_a_short_run_warms_up_and_remembers_in_proportion() -> None:
    recipe = build(variant("dfine-n"), random_start=True).resolve(200)
    total = 10 * (200 // (recipe.batch or 0))
    assert recipe.schedule.warmup_of(total) <= 0.05 * total
    decay, ramp = recipe.average.decay_for(total), recipe.average.ramp_for(total)
    left = 1.0  # what is left of the random weights in the average after half of the run
    for step in range(1, total // 2 + 1):
        left *= decay * (1 - 2.718281828 ** (-step / ramp))
    assert left < 1e-2


def test_random_weights_train_the_whole_backbone_at_the_full_rate() -> None:
    for name in ZOO:
        recipe = build(variant(name), random_start=True)
        assert recipe.optimizer.backbone == 1
        assert not recipe.model.backbone.freeze_stem
        assert not recipe.model.backbone.freeze_norm
        assert recipe.model.backbone.freeze_stages == 0
        assert not recipe.schedule.restart


def test_the_rate_follows_the_batch_and_says_so() -> None:
    recipe = replace(Recipe(), batch=8)
    resolved = recipe.resolve(1000)
    assert resolved.lr == pytest.approx(1e-4)
    assert recipe.why_rate(resolved).startswith("learning rate 0.0001 = 0.0002 x sqrt(8/32), scaled from batch 32")
    asked = replace(recipe, lr=3e-4)
    assert asked.resolve(1000).lr == 3e-4
    assert "as asked" in asked.why_rate(asked.resolve(1000))
    linear = replace(recipe, optimizer=replace(recipe.optimizer, scaling="linear"))
    assert linear.resolve(1000).lr == pytest.approx(5e-5)


def test_a_short_run_has_a_higher_rate_and_says_so() -> None:
    def rate(recipe: Recipe, epochs: int) -> tuple[float, str]:
        planned = replace(recipe, epochs=epochs, batch=8)
        resolved = planned.resolve(800)  # 100 steps an epoch
        assert resolved.lr
        return resolved.lr / recipe.optimizer.rate_at(8), planned.why_rate(resolved)

    deim = build(variant("dfine-n"), random_start=False)
    long = deim.schedule.long_steps // 100
    assert rate(deim, long)[0] == rate(deim, 2 * long)[0] == 1
    assert rate(deim, long // 4)[0] == pytest.approx(2)
    assert rate(deim, 1)[0] == deim.schedule.hasten
    assert "for a short run" not in rate(deim, long)[1]
    why = "= 0.0008 x sqrt(8/128) x 2, scaled from batch 128 and higher for a short run (schedule.long_steps);"
    assert why in rate(deim, long // 4)[1]
    assert rate(build(variant("dfine-n"), "dfine", random_start=False), 1)[0] == 1  # the paper's original
    asked = replace(deim, lr=1e-4, epochs=1).resolve(800)
    assert asked.lr == 1e-4


@pytest.mark.parametrize(("field", "value"), [("long_steps", -1), ("hasten", 0.5), ("warmup_steps", -1)])
def test_a_schedule_that_cannot_be_names_the_field(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"schedule.{field}: \d or more is wanted, {value} came"):
        Schedule(**{field: value})


@pytest.mark.parametrize(("pictures", "batch"), [(1, 4), (100, 4), (200, 8), (400, 16), (5000, 32)])
def test_few_pictures_get_a_smaller_batch(pictures: int, batch: int) -> None:
    assert Recipe().resolve(pictures).batch == batch


def test_resolving_twice_changes_nothing() -> None:
    once = build(variant("dfine-s"), random_start=True).resolve(300)
    assert once.resolve(300) == once
    with pytest.raises(DataError, match="no pictures"):
        once.resolve(0)


@pytest.mark.parametrize("name", [*RECIPES, *PAPERS])
def test_every_recipe_survives_json(name: str) -> None:
    extras = () if name in RECIPES else (name,)
    for model in ("dfine-m", "rtdetrv2-r18", "dino-r50"):
        refused = {"dfine-m": {"fdr"}, "rtdetrv2-r18": {"dfine"}, "dino-r50": {"dfine", "official-groups"}}
        if name in refused[model] | {"sd-queries"}:  # these have one branch, and tokens for queries
            with pytest.raises(UsageError):
                build(variant(model), name if name in RECIPES else "deim", extras, random_start=False)
            continue
        recipe = build(variant(model), name if name in RECIPES else "deim", extras, random_start=False)
        assert from_dict(json.loads(json.dumps(to_dict(recipe)))) == recipe


def test_every_recipe_states_its_paper_and_what_to_expect() -> None:
    for table in (RECIPES, PAPERS):
        for name, function in table.items():
            assert function.__doc__, name
            assert name == "constant-rate" or "Expect" in function.__doc__ or "published" in function.__doc__, name


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("optimizer", "wieght_decay"), 1.0, "optimizer: unknown key 'wieght_decay'\n  Did you mean weight_decay"),
        (("epochs",), "ten", "epochs: int is wanted, 'ten' came"),
        (("epochs",), True, "epochs: int is wanted, True came"),
        (("size",), [640], "size: a list of 2 is wanted"),
        (("precision",), "fp61", "precision: one of auto, fp32, bf16, fp16 is wanted, 'fp61' came\n  Did you mean"),
        (("objective", "terms"), [{"kind": "BoxGioU"}], r"terms\[0\]: the kind of a Term is wanted, 'BoxGioU' came"),
        (("objective", "policy"), 3, "policy: the kind of a MatchingPolicy is wanted"),
        (("model", "decoder"), [], "decoder: a table of DecoderConfig is wanted"),
        (("size",), [640, 650], "multiples of 32 are wanted, 650 is none\n  The nearest legal ones are 640 and 672"),
        (("schedule", "flat"), 0.95, "flat <= plain"),
    ],
)
def test_a_wrong_document_is_an_error_that_says_where(path: tuple[str, ...], value: object, message: str) -> None:
    document = to_dict(Recipe())
    place: Any = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=message):
        from_dict(document)


def test_every_field_of_the_tree_has_one_home() -> None:
    flat = flatten(to_dict(Recipe()))
    assert flat["optimizer.lr"] == 2e-4
    assert flat["objective.policy.kind"] == "UnionOfStages"
    assert sum(key.endswith("weight_decay") for key in flat) == 1


def test_the_flags_of_a_run_are_documented() -> None:
    for kind in (Recipe, Schedule, Average):
        source = Path(__import__("inspect").getsourcefile(kind)).read_text(encoding="utf-8")
        for field in fields(kind):
            if is_dataclass(field.type) or field.name in {"optimizer", "schedule", "average", "augmentation"}:
                continue
            if field.name in {"denoising", "objective", "evaluating", "saving", "model", "teaching"}:
                continue
            after = source.split(f"    {field.name}: ", 1)[1].split("\n", 2)[1]
            assert after.strip().startswith('"""'), f"{kind.__name__}.{field.name} has no sentence"


def test_late_matching_changes_the_cost_only_in_the_last_part() -> None:
    recipe = replace(build(variant("dfine-s"), "deim", ("late-matching",), random_start=False), epochs=132)
    assert recipe.objective_at(99, recipe.epochs) == recipe.objective
    assert isinstance(recipe.objective_at(100, recipe.epochs).policy.cost, QualityCost)  # type: ignore[attr-defined]
    assert recipe.objective_at(100, recipe.epochs).terms == recipe.objective.terms
    # where a time budget left five epochs of it, the last one is late
    assert [recipe.objective_at(epoch, 5) == recipe.objective for epoch in range(5)] == [True] * 4 + [False]


def test_a_restart_shortens_the_memory() -> None:
    average = Average()
    assert [round(average.decay_after(n, 10**6), 6) for n in (1, 2, 3)] == [0.9999, 0.9998, 0.9997]
    assert average.decay_after(1, 100) == pytest.approx(0.9)


@pytest.mark.parametrize(("recipe", "extras"), [("demi", ()), ("deim", ("official-group",))])
def test_a_misspelled_recipe_is_suggested(recipe: str, extras: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match="Did you mean"):
        build(TINY, recipe, extras, random_start=True)


def test_a_paper_for_recipe_names_the_flag_of_papers() -> None:
    with pytest.raises(UsageError, match="no recipe is called 'fdr'") as raised:
        build(TINY, "fdr", random_start=True)
    assert "--with fdr" in str(raised.value.hint)


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        ("evaluating", {"every": 0}, r"evaluating\.every: 1 or more is wanted, 0 came"),
        ("optimizer", {"betas": (1.5, 0.9)}, r"optimizer\.betas"),
        ("schedule", {"warmup_steps": -5}, r"schedule\.warmup_steps: 0 or more is wanted, -5 came"),
        ("schedule", {"gamma": -1.0}, r"schedule\.gamma: 0 to 1 is wanted, -1\.0 came"),
        ("schedule", {"late_matching": -7.0}, r"schedule\.late_matching"),
        ("saving", {"seconds": 0.0}, "saving: wanted seconds above 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused(part: str, values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(getattr(Recipe(), part), **values)


def test_two_forms_of_one_paper_are_refused() -> None:
    with pytest.raises(ConfigError, match="two sources of queries of the kind PredictionQueries"):
        build(TINY, "deim", ("od-detr", "od-detr-paper"), random_start=True)


def test_weights_keep_their_model_and_papers_still_change_it(tmp_path: Path) -> None:
    config = replace(TINY_RTDETR, name="mine")
    path = save_weights(tmp_path / "a.safetensors", Detector(config, 2), Card(config, ("a", "b"), (1, 2), (64, 96)))
    recipe = recipe_for(extras=("fdr",), weights=path)
    assert (recipe.model.decoder.boxes, recipe.size) == ("distributions", (64, 96))
    assert "FineGrainedLocalization" in recipe.objective.names
    assert recipe_for(weights=path).model == config


def test_an_odd_batch_names_its_parts() -> None:
    with pytest.raises(ConfigError, match="10 pictures cannot be worked off in 4 equal parts"):
        replace(Recipe(), batch=10, accumulate=4)
