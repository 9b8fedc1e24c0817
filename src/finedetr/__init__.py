"""FineDETR: real-time detection transformers that are yours. A front door of a few names, each loaded when used.

>>> import finedetr
>>> model = finedetr.load("runs/a")  # doctest: +SKIP
>>> detections = model("street.jpg", threshold=0.4)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from finedetr._version import __version__

if TYPE_CHECKING:
    from finedetr.api import Model as Model
    from finedetr.api import load as load
    from finedetr.api import resume as resume
    from finedetr.api import train as train
    from finedetr.detections import Detections as Detections
    from finedetr.errors import FineDETRError as FineDETRError

__all__ = ["Detections", "FineDETRError", "Model", "__version__", "load", "resume", "train"]

_HOMES = {
    "Detections": "finedetr.detections",
    "FineDETRError": "finedetr.errors",
    "Model": "finedetr.api",
    "load": "finedetr.api",
    "resume": "finedetr.api",
}


def __getattr__(name: str) -> Any:
    """Loads a name from its home when it is first asked for."""
    if name == "train":  # the package of that name can be called
        return importlib.import_module("finedetr.train")
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'finedetr' has no attribute {name!r}")
