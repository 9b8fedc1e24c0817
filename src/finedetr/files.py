"""Files: written whole or not at all, read however they were cut off, under names that nobody has yet."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from finedetr.errors import RunError

__all__ = ["fresh_stem", "read_records", "write_atomically", "write_text"]


def write_atomically(path: Path, write: Callable[[BinaryIO], object], *, durable: bool = True) -> Path:
    """Lets `write` fill a file that takes its place only when it is complete and on the disk.

    The temporary file stands in the same folder, so that a crash at any moment leaves the old file or the new one. It
    is made by a plain open(), so that it has the permissions of the umask (`tempfile` would leave 0600).

    Args:
        path: The file; its folder is made.
        write: Gets the open temporary file.
        durable: Wait until the disk has it. False for what is easily made again, such as a thousand pictures.

    Raises:
        RunError: The disk is full or the folder cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            write(file)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            _sync_folder(path.parent)
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}", code="io") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path


def _sync_folder(folder: Path) -> None:
    """Makes the renaming itself durable, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows does not open folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str, *, durable: bool = True) -> Path:
    """Writes UTF-8 atomically; what no encoding has, such as the name of a file that is no text, is escaped.

    `durable`: see `write_atomically`.
    """
    return write_atomically(path, lambda file: file.write(text.encode(errors="backslashreplace")), durable=durable)


def read_records(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a line that a crash cut off is left out, an absent file has none."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict):
                records.append(record)
    return records


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
