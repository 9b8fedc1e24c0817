"""`finedetr env`: versions, devices and variables, to paste into a report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finedetr._env import VARIABLES
from finedetr._version import __version__
from finedetr.cli.flags import output, parse, spell

PACKAGES = (
    "torch",
    "numpy",
    "pillow",
    "safetensors",
    "hotcoco",
    "simplejpeg",
    "tyro",
    "rich",
    "supervision",
    "av",
    "datasets",
)


@dataclass(frozen=True)
class Env:
    """Show versions, devices and the environment variables that are read."""

    json: bool = False
    """Print one JSON document."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    flags = parse(Env, spell(words), "finedetr env")
    import torch

    from finedetr.kernels.library import state

    gpus = (
        [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    )
    document = {
        "finedetr": __version__,
        "python": sys.version.split()[0],
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in PACKAGES},
        "threads": torch.get_num_threads(),
        "gpus": gpus,
        "kernels": state(),
        "variables": {v.name: os.environ.get(v.name) for v in VARIABLES},
    }
    if flags.json:
        return {"result": document, "warnings": []}
    for name in ("finedetr", "python", "system", "cores", "threads"):
        output(f"{name:32} {document[name]}")
    for name in PACKAGES:
        output(f"{name:32} {_version(name) or 'not installed'}")
    output(f"{'gpus':32} {', '.join(gpus) or 'none that torch can use'}")
    output(f"{'kernels for the CPU':32} {document['kernels']}")
    for variable in VARIABLES:
        output(f"{variable.name:32} {os.environ.get(variable.name, '(unset)'):14} {variable.meaning}")
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
