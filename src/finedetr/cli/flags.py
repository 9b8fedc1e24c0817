"""Dataclasses as flags, through tyro: both common spellings are taken, and a miss is one clear message."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import tyro

from finedetr.errors import UsageError

__all__ = ["output", "parse", "peek", "spell"]

T = TypeVar("T")
SPELLINGS = {
    "batch-size": "batch",
    "imgsz": "size",
    "img-size": "size",
    "image-size": "size",
    "num-workers": "workers",
    "output-dir": "out",
    "output": "out",
    "save": "out",
    "conf": "threshold",
    "learning-rate": "lr",
    "num-queries": "queries",
    "num-top-queries": "top",
    "max-dets": "max-detections",
    "format": "layout",
    "exist-ok": "overwrite",
}
"""Other tools' words for our flags."""

BOX = re.compile(r"^[╭╰│─+|\s]+(?!-)|[╮╯│─+|\s]+$")
TITLES = {"Value error", "Invalid choice", "Parsing error", "Unrecognized options", "Required options"}
RULE = re.compile(r"[╭╰│─╮╯+|\s-]*")


def spell(words: Sequence[str], own: Sequence[str] = ()) -> list[str]:
    """The same words in our spelling: `--imgsz 640` becomes `--size 640 640`.

    Args:
        words: What was typed.
        own: Flags of the command that are meant as they are spelled.
    """
    spelled: list[str] = []
    for word in words:
        if word.startswith("--"):
            name, sign, value = word[2:].partition("=")
            name = name.replace("_", "-")
            name = name if name in own else SPELLINGS.get(name, name)
            spelled += [f"--{name}", *([value] if sign else [])]
        else:
            spelled.append(word)
    if "--size" in spelled:
        at = spelled.index("--size") + 1
        numbers = [word for word in spelled[at : at + 2] if word.isdigit()]
        if len(numbers) == 1:
            spelled.insert(at, numbers[0])
    return spelled


def peek(words: Sequence[str], name: str) -> list[str]:
    """The values of one flag, before anything is parsed; empty where it is absent."""
    if name not in words:
        return []
    values = []
    for word in words[list(words).index(name) + 1 :]:
        if word.startswith("--"):
            break
        values.append(word)
    return values


def parse(kind: type[T], words: Sequence[str], command: str, default: T | None = None) -> T:
    """Words as an instance of a dataclass.

    Raises:
        UsageError: A flag is unknown, missing or of the wrong type; the message suggests the nearest ones.
        SystemExit: Help was asked for, and given.
    """
    said, complained = io.StringIO(), io.StringIO()
    options: dict[str, Any] = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(complained):
            if {"-h", "--help"} & set(words):
                return _tyro(kind, words, command, options)
            with contextlib.redirect_stdout(said), _wide():
                return _tyro(kind, words, command, options)
    except SystemExit as done:
        if not done.code:
            raise
        text = complained.getvalue() or said.getvalue()
        lines = [BOX.sub("", line) for line in text.splitlines() if not RULE.fullmatch(line)]
        lines = [line for line in lines if not line.startswith("For full helptext")]
        if len(lines) > 1 and lines[0] in TITLES:
            lines = lines[1:]
        message, *rest = lines or ["the flags cannot be understood"]
        raise UsageError(
            message, code="unknown_key" if "nrecognized" in message else "type", hint="\n  ".join(rest)
        ) from None


def _tyro(kind: type[T], words: Sequence[str], command: str, options: dict[str, Any]) -> T:
    config = (tyro.conf.FlagCreatePairsOff,)
    answer: T = tyro.cli(kind, args=list(words), prog=command, config=config, **options)
    return answer


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """No line of a message is broken: it is not shown in tyro's box."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "500"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def output(text: str) -> None:
    """A result, on stdout."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()
