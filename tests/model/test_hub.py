"""Published weights by name; no test needs a network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from finedetr.errors import ModelError
from finedetr.model.detector import Detector
from finedetr.model.hub import PUBLISHED, fetch, is_name
from finedetr.model.transformers import write_transformers
from finedetr.model.weights import load_weights
from finedetr.model.zoo import ZOO, variant
from finedetr.train.folder import find_weights

hub = pytest.importorskip("huggingface_hub")


def test_every_name_begins_with_its_model() -> None:
    assert all(any(name.startswith(f"{model}-") for model in ZOO) for name in PUBLISHED)
    assert is_name("dfine-s-coco")
    assert is_name("hf://me/mine@v2")
    assert not is_name("runs/mine")


def test_a_name_becomes_a_detector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    write_transformers(tmp_path, Detector(variant("dfine-n"), 3), ("a", "b", "c"))
    asked = []

    def local(repository: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((repository, revision, tuple(allow_patterns)))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", local)
    for name in ("dfine-n-coco", Path("hf://me/mine@v2")):
        detector, card = load_weights(find_weights(name))
        assert (card.config.name, card.names) == ("dfine-n", ("a", "b", "c"))
        assert not detector.training
    ours, theirs = ("config.json", "finedetr.safetensors"), ("config.json", "model.safetensors")
    assert asked == [
        (*where, files)
        for where in (("ustc-community/dfine-nano-coco", None), ("me/mine", "v2"))
        for files in (ours, theirs)
    ]


def test_without_a_network_the_message_says_what_to_place_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*_: object, **__: object) -> str:
        raise hub.errors.LocalEntryNotFoundError("offline")

    monkeypatch.setattr(hub, "snapshot_download", refuses)
    with pytest.raises(ModelError, match=r"(?s)config\.json and model\.safetensors of .*dfine-nano-coco.*by hand"):
        find_weights("dfine-n-coco")
    with pytest.raises(ModelError, match="names nothing on the Hub"):
        fetch("hf://justme")
    with pytest.raises(ModelError, match="no weights at"):
        find_weights(tmp_path / "absent")
