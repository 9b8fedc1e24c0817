"""Files: written whole or not at all, read however they were cut off, under names that nobody has yet."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from finedetr.errors import RunError, UsageError

__all__ = ["fresh_stem", "read_records", "refuse_existing", "walk", "write_atomically", "write_text"]

LONGEST = 200  # bytes of a stem that we give: disks allow 255 for the whole name


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
    short = zlib.crc32(path.name.encode(errors="surrogatepass"))  # the name itself may be as long as a name can be
    temporary = path.with_name(f".{short:08x}.{os.getpid()}.tmp")
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


def refuse_existing(paths: Iterable[Path], hint: str) -> None:
    """UsageError `use.exists`, naming the first of these that is there already; `hint` says what to do then."""
    for path in paths:
        if path.exists():
            raise UsageError(f"{path} exists", code="exists", hint=hint)


def walk(folder: str | Path) -> Iterator[tuple[str, list[str], list[str]]]:
    """As `os.walk`, in the order of the names, through links to folders, too; no folder comes twice."""
    walked = {os.path.realpath(folder)}
    for place, folders, names in os.walk(folder, followlinks=True):
        kept = []
        for name in sorted(folders, key=lambda name: (os.path.islink(os.path.join(place, name)), name)):
            target = os.path.realpath(os.path.join(place, name))
            if target not in walked:
                walked.add(target)
                kept.append(name)
        folders[:] = kept
        yield place, folders, sorted(names)


def fresh_stem(own: str, taken: set[str], suffix: str = "") -> str:
    """A file's name without its ending, numbered where it is taken already; from now on it is.

    Case makes no difference, as on some disks. What is too long for a file's name is cut.

    Args:
        own: The name that it would have.
        taken: What has been given, small letters.
        suffix: The ending, where names that differ in it may stand side by side.
    """
    if len(data := own.encode(errors="surrogatepass")) > LONGEST:
        own = data[:LONGEST].decode(errors="ignore")
    stem, number = own, 1
    while (key := (stem + suffix).casefold()) in taken:
        number += 1
        stem = f"{own}-{number}"
    taken.add(key)
    return stem
