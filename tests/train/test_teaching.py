"""Runs with teachers: what they change, what they must not change, and that nothing of them is left in a student."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

import finedetr
from finedetr.distill import teachers
from finedetr.distill.queries import AuxiliaryQueries, PredictionQueries, QueryPrior
from finedetr.distill.terms import FeatureDistillation, LogitsDistillation
from finedetr.errors import DataError, Interrupted, UsageError
from finedetr.model.detector import Detector
from finedetr.model.weights import load_weights
from finedetr.recipes import PAPERS, build
from finedetr.recipes.deim import deim
from finedetr.recipes.rtdetrv2 import rtdetrv2
from finedetr.supervise.matching import PerStage
from finedetr.supervise.terms import Focal, QualityFocal
from finedetr.train.checkpoint import load_state
from finedetr.train.config import flatten, from_dict, to_dict
from finedetr.train.folder import RunFolder
from finedetr.train.recipe import Recipe, Teaching
from finedetr.train.session import Request, begin, resume
from tests.distill.small import weights_of
from tests.model.test_rtdetrv2 import TINY_RTDETR
from tests.train.small import draw, small_recipe, stop_after

BOTH = ("detrdistill", "od-detr")
FROZEN = {"matching/layer1/LogitsDistillation", "matching/layer0/FeatureDistillation", "prior/layer1/BoxL1"}
AVERAGE = {
    "prediction/initial/PredictionDistillation",
    "auxiliary/layer1/BoxGIoU",
    "auxiliary/layer0/MatchabilityAware",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"), train=8, val=2)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return weights_of(tmp_path_factory.mktemp("teacher"))


def taught(*papers: str, **changes: Any) -> Recipe:
    recipe = small_recipe(epochs=2, teaching=Teaching(start=0.0, ramp=0.0, watch=2), **changes)
    for paper in papers:
        recipe = PAPERS[paper](recipe)
    return recipe


def ran(data: Path, recipe: Recipe, out: Path, teacher: Path | None = None) -> RunFolder:
    begin(Request(data, recipe, out, teacher=teacher, device="cpu", quiet=True))
    return RunFolder(out)


def losses(folder: RunFolder) -> list[dict[str, float]]:
    return [record["losses"] for record in folder.records() if record["kind"] == "step"]


def tensors(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


def test_teachers_of_no_weight_leave_a_run_as_it_is(data: Path, teacher: Path, tmp_path: Path) -> None:
    # queries are chosen by scores that tie in bfloat16: a rounding more or less in the weights would choose other ones
    slow: dict[str, Any] = {"lr": 1e-6, "precision": "fp32"}
    plain = ran(data, taught(**slow), tmp_path / "plain")
    recipe = taught(*BOTH, **slow)
    terms = recipe.objective.with_weights(
        {"LogitsDistillation": 0.0, "FeatureDistillation": 0.0, "PredictionDistillation": 0.0}
    )
    recipe = replace(
        recipe,
        objective=replace(terms, policy=replace(terms.policy, weight=0.0)),
        sources=tuple(replace(source, weight=0.0) for source in recipe.sources),
    )
    assert recipe.teachers == ()
    silent = ran(data, recipe, tmp_path / "silent")
    assert losses(silent) == losses(plain)
    # somebody speaks, but what it says has no weight
    some = replace(recipe, sources=(QueryPrior(weight=1e-30), *recipe.sources[1:]))
    assert some.teachers == ("frozen",)
    own = [{k: v for k, v in step.items() if k.startswith("matching")} for step in losses(plain)]
    heard = losses(ran(data, some, tmp_path / "heard", teacher))
    for before, after in zip(own, heard, strict=True):
        assert {k: v for k, v in after.items() if k in before} == pytest.approx(before, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("papers", "expected"),
    [
        (("detrdistill",), FROZEN),
        (("od-detr",), AVERAGE),
        (BOTH, FROZEN | AVERAGE),
    ],
    ids=["detrdistill", "od-detr", "both"],
)
def test_each_paper_runs_on_deim_and_leaves_no_trace(
    papers: tuple[str, ...], expected: set[str], data: Path, teacher: Path, tmp_path: Path
) -> None:
    folder = ran(data, taught(*papers), tmp_path / "a", teacher if "detrdistill" in papers else None)
    for step in losses(folder):
        assert expected <= step.keys()
    plain = Detector(taught().model, 6).state_dict()
    student = tensors(folder.best_weights)
    assert {name: t.shape for name, t in student.items()} == {name: t.shape for name, t in plain.items()}
    load_weights(folder.best_weights)
    measured = [record["teaching"] for record in folder.records() if record["kind"] == "evaluation"]
    assert "instability_student" in measured[-1]
    assert 0 <= measured[-1]["hits_average" if "od-detr" in papers else "hits_frozen"] <= 1
    assert ("teacher: frozen, wide" in folder.log.read_text()) == ("detrdistill" in papers)


@pytest.mark.parametrize("paper", ["detrdistill-released", "detrdistill-paper"])
def test_the_other_readings_run_on_plain_boxes(paper: str, data: Path, teacher: Path, tmp_path: Path) -> None:
    host = rtdetrv2(replace(Recipe(model=TINY_RTDETR), size=(64, 64)))
    small = taught(model=TINY_RTDETR, objective=host.objective)
    assert isinstance(small.objective.policy, PerStage)
    folder = ran(data, PAPERS["od-detr"](PAPERS[paper](small)), tmp_path / "a", teacher)
    names = losses(folder)[-1].keys()
    assert {"matching/layer2/SecondBox", "matching/layer2/LogitsDistillation", "auxiliary/layer0/Varifocal"} <= names


def test_a_run_with_adapters_and_an_average_goes_on_exactly(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ran(data, taught(*BOTH), tmp_path / "whole", teacher)
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        ran(data, taught(*BOTH), tmp_path / "cut", teacher)
    monkeypatch.undo()
    saved = load_state(RunFolder(tmp_path / "cut").last)
    assert set(saved["adapters"]) == {f"layers.encoder{n}.{part}" for n in (0, 1) for part in ("weight", "bias")}
    assert not any("conv_" in name or "adapter" in name for name in saved["model"])
    resume(tmp_path / "cut", device="cpu", quiet=True)
    assert losses(RunFolder(tmp_path / "cut")) == losses(whole)
    one, two = tensors(whole.last_weights), tensors(RunFolder(tmp_path / "cut").last_weights)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_pictures_without_labels_take_part_and_a_run_with_them_goes_on_exactly(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Python: --teacher and --unlabelled, a run in one piece and a run that is interrupted after three steps."""
    more = draw(tmp_path / "more", train=5, val=1) / "train"
    recipe = replace(taught(*BOTH), teaching=replace(taught().teaching, unlabelled=0.75, start=0.0, ramp=0.0))
    asked = {"recipe": recipe, "teacher": teacher, "unlabelled": more, "device": "cpu", "quiet": True}
    whole = RunFolder(finedetr.train(data, out=tmp_path / "whole", **asked).folder)  # type: ignore[arg-type]
    assert "5 pictures in" in whole.log.read_text()
    assert "3 beside each batch of 4" in whole.log.read_text()
    assert losses(whole)[0].keys() >= FROZEN | AVERAGE
    alone = losses(ran(data, replace(recipe, epochs=1), tmp_path / "alone", teacher))
    assert losses(whole)[0]["matching/layer1/LogitsDistillation"] != alone[0]["matching/layer1/LogitsDistillation"]
    stop_after(monkeypatch, 3)
    with pytest.raises(Interrupted):
        finedetr.train(data, out=tmp_path / "cut", **asked)  # type: ignore[arg-type]
    monkeypatch.undo()
    finedetr.resume(tmp_path / "cut", device="cpu", quiet=True)
    assert losses(RunFolder(tmp_path / "cut")) == losses(whole)


def test_a_resumed_run_says_that_pictures_without_labels_came_or_went(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = draw(tmp_path / "more", train=2, val=1) / "train"
    stop_after(monkeypatch, 1)
    with pytest.raises(Interrupted):
        finedetr.train(
            data,
            recipe=taught("detrdistill"),
            out=tmp_path / "a",
            teacher=teacher,
            unlabelled=more,
            device="cpu",
            quiet=True,
        )
    monkeypatch.undo()
    picture = next(more.iterdir())
    picture.with_stem("another").write_bytes(picture.read_bytes())
    finedetr.resume(tmp_path / "a", device="cpu", quiet=True)
    said = RunFolder(tmp_path / "a").log.read_text()
    assert "had 2 pictures without labels and has 3 now" in said
    assert "pictures for training and has" not in said


def test_pictures_without_labels_need_a_teacher_and_a_folder(data: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no teacher says anything about them"):
        Request(data, taught(), tmp_path / "a", unlabelled=tmp_path)
    Request(data, taught("od-detr"), tmp_path / "a", unlabelled=tmp_path)
    for folder, what in ((tmp_path, "holds no pictures"), (tmp_path / "none", "no folder of pictures")):
        request = Request(data, taught("detrdistill"), tmp_path / "a", teacher=teacher, unlabelled=folder, quiet=True)
        with pytest.raises(DataError, match=what):
            begin(request)


def test_a_teacher_of_other_classes_is_matched_by_name(data: Path, tmp_path: Path) -> None:
    other = weights_of(tmp_path, names=("star", "tree", "disc"))
    folder = ran(data, replace(taught("detrdistill"), epochs=1), tmp_path / "a", other)
    said = folder.log.read_text()
    assert "2 in common; it does not know square, triangle, ring, cross; not used: tree" in said
    assert "teachers add" not in said  # too short a run to tell


def test_the_share_of_the_teachers_is_said(
    data: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teachers, "_PRICED", 3)
    monkeypatch.setattr(teachers, "_WARMING", 1)
    folder = ran(data, taught("detrdistill"), tmp_path / "a", teacher)
    assert "% to a step" in folder.log.read_text()


def test_half_precision_keeps_what_teachers_say_finite(data: Path, teacher: Path, tmp_path: Path) -> None:
    folder = ran(data, replace(taught(*BOTH), precision="bf16", epochs=1), tmp_path / "a", teacher)
    assert all(value == value for step in losses(folder) for value in step.values())


def test_parts_that_need_a_teacher_say_so(data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="parts that a teacher teaches, and there is none"):
        ran(data, taught("detrdistill"), tmp_path / "a")


def test_a_recipe_with_teachers_survives_json_and_names_its_parts() -> None:
    recipe = taught(*BOTH)
    assert from_dict(to_dict(recipe)) == recipe
    flat = flatten(to_dict(recipe))
    assert flat["objective.LogitsDistillation.pairing"] == "common"
    assert flat["sources.AuxiliaryQueries.ranks"] == 2
    assert flat["objective.policy.base.cost.giou"] == 2.0
    assert "LogitsDistillation" in recipe.formula()
    assert "TeacherVotes" in recipe.formula()
    assert recipe.formula().endswith("QueryPrior, PredictionQueries, AuxiliaryQueries")
    assert recipe.teachers == ("frozen", "average")
    assert replace(recipe, sources=(PredictionQueries(), AuxiliaryQueries())).teachers == ("frozen", "average")


def test_the_average_is_phased_in_by_shares_of_the_run() -> None:
    teaching = Teaching(start=0.1, ramp=0.1, start_steps=1000, ramp_steps=1000)
    assert [teaching.strength(step, 100) for step in (0, 9)] == [0, 0]
    assert 0 < teaching.strength(10, 100) < teaching.strength(15, 100) < 1
    assert teaching.strength(20, 100) == 1
    assert teaching.strength(999, 10**6) == 0
    assert teaching.strength(2000, 10**6) == 1
    assert Teaching(start=0.0, ramp=0.0).strength(0, 100) == 1


def test_classes_keep_their_form_unless_the_paper_is_asked_for() -> None:
    base = deim(Recipe(model=small_recipe().model))
    assert PAPERS["od-detr"](base).objective.names[0] == "MatchabilityAware"
    assert PAPERS["od-detr-paper"](base).objective.names[0] == "QualityFocal"
    focal = replace(base, objective=base.objective.swap("MatchabilityAware", Focal(2.0)))
    assert PAPERS["od-detr"](focal).objective.terms[0] == QualityFocal(2.0)


def test_a_teacher_alone_means_detrdistill() -> None:
    made = build(small_recipe().model, teacher=True, random_start=True)
    assert made.name == "deim+detrdistill"
    assert {LogitsDistillation, FeatureDistillation} <= {type(term) for term in made.objective.terms}
    chosen = build(small_recipe().model, extras=("detrdistill-paper",), teacher=True, random_start=True)
    assert chosen.name == "deim+detrdistill-paper"
    assert deim(Recipe(model=small_recipe().model)).teachers == ()
