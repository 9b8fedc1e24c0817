"""What we put on the Hub: files that we and transformers read, a card, and clear words where it refuses. No network."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import finedetr
from finedetr.cli import main
from finedetr.errors import RunError, UsageError
from finedetr.model.detector import Detector
from finedetr.model.publish import push, write_repository
from finedetr.model.weights import Card, load_weights, save_weights
from finedetr.model.zoo import variant
from tests.model.oracle import assert_same_answers, randomize

hub = pytest.importorskip("huggingface_hub")
errors = pytest.importorskip("huggingface_hub.errors")

NAMES = ("hen", "egg | boiled", "füchsin")


def made(name: str = "dfine-n", **card: Any) -> tuple[Detector, Card]:
    torch.manual_seed(0)
    detector = Detector(variant(name), 3).eval()
    randomize(detector)
    return detector, Card(detector.config, NAMES, (1, 4, 9), **card)


@dataclass
class FakeHub:
    """The part of HfApi that is used; remembers what it was given."""

    private: bool = True
    error: Exception | None = None
    said: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> str:
        assert exist_ok
        if self.error:
            raise self.error
        self.said.append(f"create {repo_id} {'private' if private else 'public'}")
        return f"https://huggingface.co/{repo_id}"

    def repo_info(self, repo_id: str) -> FakeHub:
        return self

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self.said.append(f"upload {repo_id}: {commit_message}")
        self.files = {file.name: file.read_bytes() for file in Path(folder_path).iterdir()}


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setattr(hub, "HfApi", lambda: fake)
    return fake


@pytest.mark.parametrize("name", ["dfine-n", "deim-dfine-n", "rtdetrv2-r18-dsp"])
def test_what_is_pushed_is_read_back_as_it_was(
    name: str, fake: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector, card = made(name, size=(64, 96), recipe={"name": "deim"}, metrics={"AP": 0.5})
    assert push("me/mine", detector, card, license="apache-2.0") == "https://huggingface.co/me/mine"
    assert fake.said == ["create me/mine public", f"upload me/mine: {name} by FineDETR"]
    for file, content in fake.files.items():
        (tmp_path / file).write_bytes(content)
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    for place in ("hf://me/mine", tmp_path):
        model = finedetr.load(place, device="cpu")
        assert model.card == card
        assert len(model(np.zeros((50, 60, 3), dtype=np.uint8), threshold=0.0)) > 0
    again, _ = load_weights(tmp_path / "finedetr.safetensors")
    state = detector.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in again.state_dict().items())
    settings = json.loads((tmp_path / "config.json").read_text())
    assert settings["id2label"]["1"] == "egg | boiled"
    assert settings["finedetr"]["names"] == list(NAMES)
    assert (tmp_path / "model.safetensors").is_file() == ("model_type" in settings) == (not name.startswith("deim"))


def test_transformers_reads_it_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    detector, card = made(size=(320, 320))
    write_repository(tmp_path, "me/mine", detector, card, license="apache-2.0")
    theirs = transformers.AutoModelForObjectDetection.from_pretrained(tmp_path).eval()
    assert theirs.config.id2label == dict(enumerate(NAMES))
    assert_same_answers(detector, theirs, (320, 320))


def test_the_card_has_metadata_that_the_hub_understands(tmp_path: Path) -> None:
    detector, card = made(recipe={"name": "deim"}, metrics={"AP": 0.51234, "AP50": 0.7, "AP_small": -1.0, "AR1": 0.4})
    write_repository(tmp_path, "me/mine", detector, card, license="CC-BY-4.0", dataset="hens")
    model_card = hub.ModelCard.load(tmp_path / "README.md")
    data = model_card.data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-4.0", "finedetr", "object-detection")
    assert {(r.dataset_name, r.metric_name, r.metric_type, r.metric_value) for r in data.eval_results} == {
        ("hens", "AP", "mAP", 0.5123),
        ("hens", "AP50", "mAP50", 0.7),
    }
    for line in ("# mine", "| AP | 0.5123 |", "- 9: füchsin", 'finedetr.load("hf://me/mine")', "640x640"):
        assert line in model_card.content
    unmeasured, card = made()
    write_repository(tmp_path, "me/mine", unmeasured, card, license="apache-2.0")
    assert hub.ModelCard.load(tmp_path / "README.md").data.eval_results is None


def test_a_private_push_never_lands_in_a_public_repository(fake: FakeHub) -> None:
    detector, card = made()
    push("me/mine", detector, card, license="apache-2.0", private=True)
    assert fake.said[0] == "create me/mine private"
    fake.private, fake.files = False, {}
    with pytest.raises(UsageError, match=r"me/mine exists and is public"):
        push("me/mine", detector, card, license="apache-2.0", private=True)
    assert not fake.files


def refusal(status: int) -> Exception:
    error = RuntimeError(f"{status} Client Error\nRequest id 7")
    error.response = type("Response", (), {"status_code": status})()  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (errors.LocalTokenNotFoundError("no token"), "(?s)no valid token.*hf auth login"),
        (refusal(401), "(?s)no valid token.*HF_TOKEN"),
        (refusal(403), "(?s)token may not write to me/mine.*write permission"),
        (ConnectionError("no route"), r"(?s)ConnectionError: no route\).*--folder DIR"),
    ],
)
def test_where_the_hub_refuses_the_message_says_what_helps(fake: FakeHub, error: Exception, message: str) -> None:
    fake.error = error
    with pytest.raises(RunError, match=message) as caught:
        push("me/mine", *made(), license="apache-2.0")
    assert caught.value.code == "run.upload"


@pytest.mark.parametrize("name", ["mine", "/mine", "me/", "a/b/c"])
def test_a_repository_has_an_owner_and_a_name(fake: FakeHub, name: str) -> None:
    with pytest.raises(UsageError, match="names no repository"):
        push(name, *made(), license="apache-2.0")
    assert not fake.said


def test_the_command_wants_a_license_and_says_what_it_depends_on(
    fake: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(save_weights(tmp_path / "a.safetensors", *made()))
    assert main(["models", "push", file, "me/mine"]) == 2
    said = capsys.readouterr().err
    assert "use.required: models push needs --license" in said
    assert "Peterande/D-FINE publishes, if these began with them: Apache-2.0" in said
    assert not fake.said
    assert main(["models", "push", file, "me/mine", "--license", "apache-2.0", "--private", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["result"]["address"] == "https://huggingface.co/me/mine"
    assert fake.said == ["create me/mine private", "upload me/mine: dfine-n by FineDETR"]
    words = ["models", "push", file, "me/mine", "--license", "apache-2.0", "--folder", str(tmp_path / "repository")]
    assert main(words) == 0
    assert finedetr.load(tmp_path / "repository", device="cpu").names == NAMES
    (tmp_path / "repository" / "README.md").write_text("mine")
    assert main(words) == 2
    assert "use.exists" in capsys.readouterr().err
    assert (tmp_path / "repository" / "README.md").read_text() == "mine"
    assert main([*words, "--overwrite"]) == 0
    assert (tmp_path / "repository" / "README.md").read_text() != "mine"
    assert len(fake.said) == 2
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: str(tmp_path / "repository"))
    capsys.readouterr()
    assert main(["models", "pull", "hf://me/mine"]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "repository")
    model = finedetr.load(file, device="cpu")
    assert model.push_to_hub("me/mine", license="apache-2.0").endswith("me/mine")
