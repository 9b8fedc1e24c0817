"""Shapes in signatures are checked while the tests run; the real pictures are found or their tests skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

install_import_hook(
    ["finedetr.records", "finedetr.geometry", "finedetr.supervise", "finedetr.distill"], "beartype.beartype"
)

import torch  # noqa: E402 - after the hook

torch.set_num_threads(min(2, os.cpu_count() or 1))

SHARED = Path(os.environ.get("FINEDETR_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture
def real_data() -> Path:
    """The folder of real pictures that is kept beside a checkout; tests that need it skip where it is absent."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"real pictures are absent: {folder} (set FINEDETR_SHARED to the folder that holds data/)")
    return folder
