from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import finedetr
from finedetr.errors import ConfigError, DataError, FineDETRError, ModelError, UsageError
from finedetr.model.zoo import variant
from finedetr.train.recipe import Recipe
from tests.train.conftest import one_thread as one_thread
from tests.train.small import draw, small_recipe


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("data"), train=4, val=2)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> object:
    out = tmp_path_factory.mktemp("runs") / "a"
    return finedetr.train(data, recipe=small_recipe(), out=out, epochs=1, device="cpu", quiet=True)


def test_training_gives_a_run_that_can_be_asked(run: object, data: Path) -> None:
    model = run.model("cpu")  # type: ignore[attr-defined]
    picture = next((data / "val").glob("*.jpg"))
    one = model(picture, threshold=0.0)
    assert isinstance(one, finedetr.Detections)
    assert one.names == model.names
    assert len(one) == len(model.predict([str(picture)], threshold=0.0)[0]) > 0
    assert len(list(model.stream(str(data / "val")))) == 2
    none = model(np.zeros((50, 40, 3), dtype=np.uint8), threshold=1.0)
    assert none.xyxy.shape == (0, 4)


def test_an_evaluation_by_hand_repeats_the_run(run: object, data: Path) -> None:
    by_hand = finedetr.load(run.folder, device="cpu").evaluate(data, workers=0)  # type: ignore[attr-defined]
    assert by_hand.diagnosis is None
    assert by_hand.metrics() == run.best.metrics()  # type: ignore[attr-defined]
    assert [r["kind"] for r in run.metrics][-1] == "evaluation"  # type: ignore[attr-defined]


def test_an_evaluation_runs_as_the_model_was_loaded(run: object, data: Path) -> None:
    model = finedetr.load(run.folder, device="cpu", precision="bf16", top=3)  # type: ignore[attr-defined]
    seen = []
    model._predictor.detector.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    evaluation = model.evaluate(data, workers=0, errors=True)
    assert evaluation.detections == 6
    assert len(evaluation.diagnosis.thresholds) == len(evaluation.per_class)
    assert seen == [True]


def test_a_run_goes_on_and_starts_others(run: object, data: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has done all of its 1 epochs"):
        finedetr.resume(run.folder, device="cpu", quiet=True)  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"a resumed run keeps its recipe; these differ: optimizer\.clip 0\.1 -> 0\.5"):
        finedetr.resume(run.folder, optimizer={"clip": 0.5}, quiet=True)  # type: ignore[attr-defined]
    longer = finedetr.resume(run.folder, epochs=2, device="cpu", quiet=True)  # type: ignore[attr-defined]
    assert longer.result.epochs == 2
    tuned = finedetr.train(
        data,
        weights=longer.folder,
        out=tmp_path / "b",
        epochs=1,
        batch=4,
        workers=0,
        device="cpu",
        quiet=True,
    )
    assert tuned.model("cpu").card.size == (64, 64)
    assert "weights: kept     disc" in (tmp_path / "b" / "train.log").read_text()


def test_a_run_goes_on_without_absent_pictures_where_that_is_asked_for(tmp_path: Path) -> None:
    data = draw(tmp_path / "data", train=4, val=1)
    next((data / "train").glob("*.jpg")).unlink()
    settings = {"recipe": small_recipe(epochs=1), "out": tmp_path / "a", "device": "cpu", "quiet": True}
    with pytest.raises(DataError, match="1 of 4 pictures are listed but absent") as raised:
        finedetr.train(data, **settings)
    assert "--skip-missing" in str(raised.value.hint)
    assert finedetr.train(data, **settings, skip_missing=True).result.steps == 1
    again = finedetr.resume(tmp_path / "a", epochs=2, device="cpu", quiet=True)
    assert "absent" in " ".join(again.result.warnings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epoch": 3}, r"train\(\) has no setting 'epoch'. Did you mean epochs"),
        ({"optimizer": {"weigth_decay": 0}}, r"optimizer has no setting 'weigth_decay'. Did you mean weight_decay"),
    ],
)
def test_an_unknown_setting_is_a_type_error_with_a_suggestion(settings: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        finedetr.train("nowhere", **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 1.5}, r"train\(\): epochs: int is wanted, 1\.5 came"),
        ({"batch": "2"}, r"train\(\): batch: int is wanted, '2' came"),
        ({"size": 64}, r"train\(\): size: a list of 2 is wanted, 64 came"),
        ({"size": (64, 64, 64)}, r"train\(\): size: a list of 2 is wanted"),
        ({"precision": "int4"}, r"train\(\): precision: one of auto, fp32, bf16, fp16 is wanted, 'int4' came"),
        ({"optimizer": {"clip": "1"}}, r"train\(\): optimizer: clip: float is wanted, '1' came"),
        ({"recipe": 5}, r"train\(\): recipe: str is wanted, 5 came"),
        ({"seed": 2**63}, r"seed: less than 2\*\*63 is wanted"),
    ],
)
def test_a_setting_of_the_wrong_type_is_named_before_anything_is_read(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        finedetr.train("nowhere", **settings)


def test_a_model_is_not_loaded_at_a_size_that_is_none(run: object) -> None:
    with pytest.raises(ConfigError, match=r"load\(\): size: a list of 2 is wanted, 640 came"):
        finedetr.load(run.folder, size=640)  # type: ignore[attr-defined, arg-type]
    with pytest.raises(ConfigError, match=r"load\(\): batch: int is wanted"):
        finedetr.load(run.folder, batch=2.0)  # type: ignore[attr-defined, arg-type]


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_a_run_is_not_replaced_by_one_that_needs_it_or_cannot_begin(run: object, data: Path, tmp_path: Path) -> None:
    out = tmp_path / "a"
    shutil.copytree(run.folder, out)  # type: ignore[attr-defined]
    before = contents(out)
    settings = {"out": out, "overwrite": True, "device": "cpu", "quiet": True}
    with pytest.raises(UsageError, match="belongs to the run that --overwrite would replace"):
        finedetr.train(data, weights=out, **settings)
    (tmp_path / "bad.pth").write_text("no weights")
    with pytest.raises(ModelError, match="no checkpoint"):
        finedetr.train(data, recipe=small_recipe(), backbone_weights=tmp_path / "bad.pth", **settings)
    assert contents(out) == before


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("recipe.size", [32, 32], r"keeps its recipe; these differ: size \[64, 64\] -> \[32, 32\]"),
        ("data.path", None, r"data\.path: str is wanted, None came"),
        ("teacher", 5, r"teacher: str is wanted, 5 came"),
    ],
)
def test_a_run_whose_configuration_was_edited_is_not_resumed(
    run: object, tmp_path: Path, key: str, value: object, message: str
) -> None:
    shutil.copytree(run.folder, tmp_path / "a")  # type: ignore[attr-defined]
    file = tmp_path / "a" / "config.json"
    document = json.loads(file.read_text())
    *tables, last = key.split(".")
    table = document
    for name in tables:
        table = table[name]
    table[last] = value
    file.write_text(json.dumps(document))
    with pytest.raises(FineDETRError, match=message):
        finedetr.resume(tmp_path / "a", epochs=2, device="cpu", quiet=True)


def test_what_a_recipe_has_already_is_not_said_again(tmp_path: Path) -> None:
    for said in ({"model": "dfine-n"}, {"extras": ["fdr"]}):
        with pytest.raises(UsageError, match="a Recipe has its model and its papers"):
            finedetr.train("nowhere", recipe=Recipe(), **said)
    with pytest.raises(UsageError, match="no part of the recipe dfine listens to a teacher"):
        finedetr.train("nowhere", recipe=Recipe(), teacher=__file__)


def test_errors_of_the_front_door_are_ours(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no weights at"):
        finedetr.load(tmp_path / "nothing")
    with pytest.raises(ModelError, match="holds no weights: it is no run"):
        finedetr.load(tmp_path)
    with pytest.raises(UsageError, match="no model is called 'dfine-z'"):
        finedetr.train("x", "dfine-z")
    for wrong in (variant("dfine-n"), 3, ["dfine-n"]):
        with pytest.raises(UsageError, match="the name of a model is wanted"):
            finedetr.train("x", wrong)  # type: ignore[arg-type]
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        finedetr.trian  # noqa: B018
