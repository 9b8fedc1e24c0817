"""From a recipe to a trained detector. Called as a function, `finedetr.train(...)`, it is the front door's `train`."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """This package, which shares its name with the most used function: importing any file of it must not hide that."""

    def __call__(self, *args: Any, **settings: Any) -> Any:
        return importlib.import_module("finedetr.api").train(*args, **settings)


sys.modules[__name__].__class__ = _Room
