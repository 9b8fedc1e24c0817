"""The tests of a kernel skip, and say why, where this machine cannot compile one."""

from __future__ import annotations

import pytest

from finedetr.kernels.library import library


@pytest.fixture(autouse=True, scope="session")
def _compiled() -> None:
    if library("normalization") is None:
        pytest.skip("no C kernel could be compiled: that takes Linux and a C compiler, and FINEDETR_KERNELS not off")
