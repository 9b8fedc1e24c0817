"""FineDETR: real-time detection transformers that are yours. A front door of a few names, each loaded when used."""

from __future__ import annotations

from finedetr._version import __version__

__all__ = ["__version__"]
