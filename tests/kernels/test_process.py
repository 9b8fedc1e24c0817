"""Settings of a process."""

from __future__ import annotations

import gc
import os

import pytest

from finedetr.kernels.process import prepare_cpu, settled


def test_what_there_is_is_left_alone_until_the_end() -> None:
    before = gc.get_freeze_count()
    with settled():
        assert gc.get_freeze_count() > before
        assert gc.isenabled()  # what is made from here on is looked at
    assert gc.get_freeze_count() == 0


def test_a_capacity_that_somebody_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
    monkeypatch.setenv(name, "77")
    prepare_cpu()
    assert os.environ[name] == "77"
    monkeypatch.delenv(name)
    prepare_cpu()
    assert int(os.environ[name]) > 1024
