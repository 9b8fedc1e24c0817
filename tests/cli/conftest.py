"""One thread: the tensors here are so small that a second one only waits, and spins where the machine is busy."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from finedetr.model.detector import Detector
from finedetr.model.weights import Card, save_weights
from tests.train.tiny import TINY


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Untrained, of two classes."""
    path = tmp_path_factory.mktemp("weights") / "a.safetensors"
    card = Card(TINY, ("hen", "egg, brown"), (3, 9), size=(64, 64))
    return str(save_weights(path, Detector(TINY, 2), card))
