"""What a run says while it goes on: a live line on a terminal, plain lines elsewhere, and the same in train.log."""

from __future__ import annotations

import logging
import os
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

__all__ = ["Reporter", "Stopwatch", "clock"]


def clock(seconds: float) -> str:
    """A duration for people: 42s, 3:07, 2:05:09."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"


class Reporter:
    """Says things on stderr, and the same in a file; collects warnings of other rooms on the way.

    Args:
        file: Where the same text goes, appended; None: nowhere.
        quiet: Say nothing on stderr. Also for all processes but the first.
        stream: Instead of stderr.
    """

    def __init__(self, file: Path | None = None, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self._file = file.open("a", encoding="utf-8", errors="backslashreplace") if file else None
        live = not quiet and self.stream.isatty() and not os.environ.get("CI")
        self.console = Console(file=self.stream, highlight=False) if live else None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._handler = _Handler(self)
        self.warnings: list[str] = []

    def __enter__(self) -> Reporter:
        logging.getLogger("finedetr").addHandler(self._handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        logging.getLogger("finedetr").removeHandler(self._handler)
        if self._file:
            self._file.close()
            self._file = None

    def line(self, text: str) -> None:
        """One line that stays."""
        if self._file:
            self._file.write(text + "\n")
            self._file.flush()
        if self.quiet:
            return
        if self.console:
            self.console.print(escape(text), soft_wrap=True)
        else:
            print(text, file=self.stream, flush=True)

    def warn(self, text: str) -> None:
        """One line that stays and is kept for the end."""
        self.warnings.append(text)
        self.line(f"warning: {text}")

    def live(self, text: str, done: float, total: float) -> bool:
        """The moving line; False where there is no terminal, so that the caller prints now and then instead."""
        if not self.console:
            return False
        if self._progress is None:
            self._progress = Progress(
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self.console,
                transient=True,
            )
            self._task = self._progress.add_task("", total=total)
            self._progress.start()
        assert self._task is not None
        self._progress.update(self._task, description=escape(text), completed=done, total=total)
        return True

    def stop(self) -> None:
        """Takes the moving line away."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class _Handler(logging.Handler):
    """Warnings of other rooms become lines of the run."""

    def __init__(self, reporter: Reporter) -> None:
        super().__init__(logging.WARNING)
        self.reporter = reporter

    def emit(self, record: logging.LogRecord) -> None:
        self.reporter.warn(record.getMessage())


class Stopwatch:
    """Seconds by what they were spent on, since the last reset."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}
        self._last = time.monotonic()

    def lap(self, name: str) -> float:
        """Counts the time since the last lap as `name`; gives it back."""
        now = time.monotonic()
        seconds, self._last = now - self._last, now
        self.spent[name] = self.spent.get(name, 0.0) + seconds
        return seconds

    @property
    def total(self) -> float:
        """Seconds of all laps since the last reset."""
        return sum(self.spent.values())

    def share(self, name: str) -> float:
        """The part of the time since the last reset that went into `name`."""
        return self.spent.get(name, 0.0) / self.total if self.total else 0.0

    def reset(self) -> None:
        """Forgets what was spent."""
        self.spent.clear()
