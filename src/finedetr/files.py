"""Files: names that nobody has yet."""

from __future__ import annotations

__all__ = ["fresh_stem"]


def fresh_stem(own: str, taken: set[str], suffix: str = "") -> str:
    """A file's name without its ending, numbered where it is taken already; from now on it is.

    Case makes no difference, as on some disks.

    Args:
        own: The name that it would have.
        taken: What has been given, small letters.
        suffix: The ending, where names that differ in it may stand side by side.
    """
    stem, number = own, 1
    while (key := (stem + suffix).casefold()) in taken:
        number += 1
        stem = f"{own}-{number}"
    taken.add(key)
    return stem
