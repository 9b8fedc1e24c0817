from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import finedetr
from finedetr.cli import main
from finedetr.errors import ConfigError, UsageError
from finedetr.supervise.matching import FocalCost, PerStage
from finedetr.train.config import merge, to_dict
from finedetr.train.folder import RunFolder
from finedetr.train.recipe import Recipe
from finedetr.train.session import Request, begin, saved_recipe
from finedetr.train.template import read_template
from tests.train.small import draw, small_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"), train=8, val=1)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose batch, learning rate and precision were derived."""
    out = tmp_path_factory.mktemp("runs") / "a"
    recipe = replace(small_recipe(epochs=1), batch=None, optimizer=replace(small_recipe().optimizer, clip=0.7))
    begin(Request(data, recipe, out, device="cpu", quiet=True))
    return out


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["train", *words, "--dry-run", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)["result"]
    assert isinstance(result, dict)
    return result


def written(path: Path, document: object) -> Path:
    path.write_text(json.dumps(document))
    return path


def test_a_runs_configuration_makes_the_same_run(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, where = saved_recipe(RunFolder(run))
    plan = planned(capsys, "--config", str(run))
    assert plan["recipe"] == to_dict(saved)
    assert plan["pictures"] == 8  # of the same data
    again = finedetr.train(data, config=run / "config.json", out=tmp_path / "b", device="cpu", quiet=True)
    assert saved_recipe(RunFolder(again.folder))[0] == saved
    both = [RunFolder(path).read_json(path / "config.json") for path in (run, again.folder)]
    assert both[0]["derived"] == both[1]["derived"] == ["batch", "lr", "precision"]
    assert RunFolder(run).best_weights.read_bytes() == RunFolder(again.folder).best_weights.read_bytes()
    assert where["path"] == str(data.resolve())


def test_a_configuration_without_newer_fields_keeps_its_meaning(run: Path, tmp_path: Path) -> None:
    document = json.loads((run / "config.json").read_text())
    del document["recipe"]["diverged_after"], document["recipe"]["optimizer"]["grouping"]
    start = read_template(written(tmp_path / "old.json", document))
    assert start.over(Recipe(epochs=999)) == saved_recipe(RunFolder(run))[0]


def test_flags_go_before_the_file_and_what_follows_from_them_is_derived_anew(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved, _ = saved_recipe(RunFolder(run))
    more = planned(capsys, "--config", str(run), "--epochs", "7", "--optimizer.lr", "0.004")
    assert (more["recipe"]["epochs"], more["origins"]["epochs"]) == (7, "flag")
    assert (more["recipe"]["optimizer"]["clip"], more["origins"]["optimizer.clip"]) == (0.7, "file")
    haste = saved.schedule.hasten  # of a run of a few steps
    assert more["lr"] == pytest.approx(haste * 0.004 * (4 / saved.optimizer.batch) ** 0.5)
    bigger = planned(capsys, "--config", str(run), "--batch", "8")
    assert bigger["lr"] == pytest.approx((saved.lr or 0) * 2**0.5)
    assert bigger["origins"]["lr"] == "derived"


def test_a_part_of_a_recipe_goes_on_top_of_any_recipe(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    part = written(
        tmp_path / "part.json", {"epochs": 5, "optimizer": {"clip": 0.9}, "model": {"decoder": {"queries": 9}}}
    )
    words = ["--data", str(data), "--config", str(part), "--recipe", "dfine", "--model", "dfine-n"]
    plan = planned(capsys, *words, "--epochs", "6")
    assert (plan["recipe"]["epochs"], plan["recipe"]["optimizer"]["clip"]) == (6, 0.9)
    assert (plan["recipe"]["model"]["name"], plan["recipe"]["model"]["decoder"]["queries"]) == ("dfine-n", 9)
    assert (plan["origins"]["epochs"], plan["origins"]["optimizer.clip"]) == ("flag", "file")
    assert plan["origins"]["average.memory"].startswith("dfine")


def test_parts_of_the_objective_keep_their_kind_or_change_it() -> None:
    recipe = merge(Recipe(), {"objective": {"policy": {"cost": {"kind": "FocalCost", "label": 3}}}}, "x")
    assert recipe.objective.policy == replace(Recipe().objective.policy, cost=FocalCost(label=3.0))
    assert recipe.objective.terms == Recipe().objective.terms
    other = merge(Recipe(), {"objective": {"policy": {"kind": "PerStage"}}}, "x")
    assert other.objective.policy == PerStage()
    assert merge(Recipe(), {}, "x") == Recipe()


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"epoch": 3}, "unknown key 'epoch'\n  Did you mean epochs"),
        ({"optimizer": {"wieght_decay": 0}}, "optimizer: unknown key 'wieght_decay'\n  Did you mean weight_decay"),
        ({"optimizer": {"clip": "much"}}, "optimizer: clip: float is wanted, 'much' came"),
        ({"optimizer": 3}, "optimizer: a table of Optimizer is wanted"),
        ({"objective": {"policy": {"kind": "PerStag"}}}, "the kind of a MatchingPolicy is wanted, 'PerStag' came"),
        ({"size": [64, 65]}, "multiples of 32 are wanted, 65 is none"),
        ({"recipe": {"epoch": 3}}, "recipe: unknown key 'epoch'"),
        ({"recipe": {}, "wieghts": None}, "unknown key 'wieghts'\n  Did you mean weights"),
        ({"finedetr": "1", "recipee": {}}, "unknown key 'recipee'\n  Did you mean recipe"),
        ({"finedetr": "1"}, "has no recipe"),
        ({"recipe": {}, "data": 3}, "data: a table with a path is wanted, 3 came"),
        ({"recipe": {}, "data": {}}, "data: a table with a path is wanted, {} came"),
        ({"recipe": {}, "weights": []}, "weights: a path is wanted, [] came"),
        ({"recipe": {}, "derived": "lr"}, "derived: a list of names is wanted, 'lr' came"),
        ([], "a table of a recipe is wanted, list came"),
    ],
)
def test_a_mistake_in_the_file_is_an_error_that_says_where(tmp_path: Path, document: object, message: str) -> None:
    path = written(tmp_path / "my.json", document)
    with pytest.raises(ConfigError, match=r"(my\.json|multiples)") as raised:
        read_template(path).over(Recipe())
    assert message in str(raised.value)
    assert raised.value.exit == 2


def test_what_cannot_go_together_is_refused(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in (["--model", "dfine-n"], ["--recipe", "deim"], ["--with", "scratch"], ["--resume", str(run)]):
        assert main(["train", "--config", str(run), *words]) == 2
        assert "use.conflict" in capsys.readouterr().err
    with pytest.raises(UsageError, match="exclude each other"):
        finedetr.train(data, "dfine-n", config=run)
    assert main(["train", "--data", str(data), "--config", str(tmp_path / "nothing.json")]) == 2
    assert "use.not_found" in capsys.readouterr().err
    (tmp_path / "broken.json").write_text("{")
    assert main(["train", "--data", str(data), "--config", str(tmp_path / "broken.json")]) == 2
    assert "is no JSON" in capsys.readouterr().err


def test_one_kind_of_weights_takes_the_place_of_the_other(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"recipe": {}, "backbone_weights": "b0.pth", "teacher": "big"}')
    template, none = read_template(tmp_path), {"weights": None, "unlabelled": None}
    assert template.files() == {**none, "backbone_weights": Path("b0.pth"), "teacher": Path("big")}
    assert template.files(["weights"])["backbone_weights"] is None
    assert template.files(["teacher"]) == {**none, "backbone_weights": Path("b0.pth"), "teacher": None}
