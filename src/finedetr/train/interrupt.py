"""Ctrl-C and SIGTERM as a request: finish the step, save, say how to go on. The second one exits at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from finedetr.errors import Interrupted

__all__ = ["Interruption", "exit_status"]

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_status(number: int) -> int:
    """What a shell expects of a process that ended by a signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + number


class Interruption:
    """Catches the two signals while a `with` block runs; `requested` is the signal that came, or 0."""

    def __init__(self) -> None:
        self.requested = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(exit_status(number))  # the second one: the user does not want to wait
        self.requested = number

    def error(self, how_to_go_on: str) -> Interrupted:
        """What to raise once everything is saved."""
        number = self.requested or signal.SIGINT
        name = "Ctrl-C" if number == signal.SIGINT else "SIGTERM"
        error = Interrupted(f"stopped by {name}; everything is saved", code="interrupted", hint=how_to_go_on)
        error.exit = exit_status(number)
        return error
