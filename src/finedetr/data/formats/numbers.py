"""Whole numbers and sizes as annotations write them; what no machine holds is none."""

from __future__ import annotations

from typing import Any

__all__ = ["told_size", "whole"]

MOST_DIGITS = 18  # of a number written as text: the most that always fit into 64 bits
LARGEST_SIDE = 1 << 20


def whole(value: Any) -> int | None:
    """An integer that is written as one, as an integral float or as digits; None for anything else."""
    if isinstance(value, bool):
        return None
    if isinstance(value, int):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str) and value.strip().isdecimal() and len(value.strip()) <= MOST_DIGITS:
        return int(value)
    return None


def told_size(width: Any, height: Any) -> tuple[int, int]:
    """(width, height) in pixels as annotations tell it; (0, 0) where they do not, or where no picture is so large."""
    sides = whole(width) or 0, whole(height) or 0
    return sides if min(sides) > 0 and max(sides) < LARGEST_SIDE else (0, 0)
