"""The resume state on disk: atomic, verified, and loadable without running code."""

from __future__ import annotations

import io
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from finedetr._version import __version__
from finedetr.errors import ModelError, RunError
from finedetr.files import write_atomically

__all__ = ["link_file", "load_state", "save_state"]

FORMAT = 1


def save_state(path: str | Path, state: dict[str, Any]) -> Path:
    """Writes a resume state of plain builtins and tensors.

    Raises:
        TypeError: The state holds something that could not be loaded again without running code; says where.
        RunError: The disk is full, or what was written cannot be read back.
    """
    _check_plain(state, "state")

    def write(file: BinaryIO) -> None:
        buffer = io.BytesIO()  # torch wants to seek while it writes; one write then fails or succeeds as a whole
        torch.save({"format": FORMAT, "finedetr": __version__, **state}, buffer)
        file.write(buffer.getbuffer())
        file.flush()
        _check_readable(Path(file.name))

    return write_atomically(Path(path), write)


def link_file(source: Path, target: Path) -> Path:
    """Gives a complete state a second name, atomically, without writing it twice where the file system can link."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    with suppress(OSError):
        temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
        os.replace(temporary, target)
    except OSError:
        write_atomically(target, lambda file: file.write(source.read_bytes()))
    return target


def load_state(path: str | Path) -> dict[str, Any]:
    """Reads a resume state onto the CPU, running no code of the file.

    Raises:
        ModelError: The file is absent, damaged, or no resume state of this version.
    """
    path = Path(path)
    if not path.is_file():
        raise ModelError(
            f"no resume state at {path}", code="not_found", hint="Give the folder of a run that has saved."
        )
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of damaged bytes torch's reader makes any error there is
        first = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelError(f"{path} is damaged or no resume state: {first}", code="schema") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else type(state).__name__
        raise ModelError(
            f"{path} has format {found}, this finedetr {__version__} reads {FORMAT}",
            code="schema",
            hint="Resume with the version that wrote it.",
        )
    return state


def _check_readable(path: Path) -> None:
    """Reads the index and the header of what was written, and its checksums of everything but the tensors."""
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if "/data/" not in name:
                    archive.read(name)
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise RunError(f"{path} cannot be read back after writing: {error}", code="io") from error


def _check_plain(value: object, where: str) -> None:
    if value is None or isinstance(value, (bool, int, float, str, bytes, Tensor)):
        return
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, (str, int)):
                raise TypeError(f"{where}: a key must be a str or an int, got {key!r}")
            _check_plain(item, f"{where}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_plain(item, f"{where}[{index}]")
    else:
        raise TypeError(f"{where}: a resume state holds plain values and tensors only, got {type(value).__name__}")
