"""Compiles a kernel of this room for the processor that it runs on, once, and loads it."""

from __future__ import annotations

import atexit
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from finedetr._env import read

__all__ = ["address", "call", "floats", "library", "pixels", "room", "state", "takes"]

HERE = Path(__file__).parent
FLAGS = ("-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fopenmp", "-fPIC")
PATIENCE = 120  # seconds that a compiler may take

_given_up: set[tuple[str, ...]] = set()  # compilers that could not compile one of them: said once, not for each


def takes(*tensors: Tensor) -> bool:
    """Whether a kernel may answer for these: ordinary tensors on a CPU, nothing that a graph is being made of."""
    return not torch.compiler.is_compiling() and all(
        type(tensor) in (Tensor, torch.nn.Parameter)  # none of those that only pretend to have numbers
        and tensor.device.type == "cpu"
        and tensor.dtype in (torch.float32, torch.bfloat16)
        for tensor in tensors
    )


def address(tensor: Tensor) -> ctypes.c_void_p:
    """Where the first number of a contiguous tensor is."""
    assert tensor.is_contiguous()
    return ctypes.c_void_p(tensor.data_ptr())


def pixels(x: Tensor) -> Tensor:
    """A map [B, D, H, W] as kernels read it, [B, H, W, D]."""
    return x.permute(0, 2, 3, 1)


def floats(*shape: int) -> Tensor:
    """Room for float32 numbers in the memory of this machine, whatever torch's defaults are."""
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def room(size: Any, arguments: ctypes.Structure, dtype: torch.dtype = torch.float32) -> Tensor:
    """Room for as many threads as torch has; `size`, a function of the kernel, says how much one of them needs."""
    size.restype = ctypes.c_long
    return torch.empty(torch.get_num_threads() * size(ctypes.byref(arguments)), dtype=dtype, device="cpu")


def call(function: Any, *given: object) -> None:
    """Calls a function of a kernel with structures, contiguous tensors and numbers, and torch's number of threads."""
    function(*(_as_c(thing) for thing in given), torch.get_num_threads())


def _as_c(thing: object) -> object:
    if isinstance(thing, Tensor):
        return address(thing)
    return ctypes.byref(thing) if isinstance(thing, ctypes.Structure) else thing


@functools.cache
def library(name: str, **sizes: int) -> ctypes.CDLL | None:
    """`name`.c of this room, compiled with some sizes as constants; None where this machine cannot.

    That is so where `FINEDETR_KERNELS` is "off", on other systems than Linux, and without a C compiler. Compiled files
    are kept in the user's cache. They call the OpenMP that torch has loaded, so that there is one pool of threads.
    """
    compiler = _compiler()
    if compiler is None or compiler in _given_up:
        return None
    try:
        try:
            return ctypes.CDLL(str(_compiled(compiler, name, sizes)))
        except OSError:  # kept by another system that shares this home
            return ctypes.CDLL(str(_compiled(compiler, name, sizes, again=True)))
    except (OSError, subprocess.SubprocessError) as error:
        _given_up.add(compiler)
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"{name}.c could not be compiled by `{shlex.join(compiler)}`: training on this CPU takes longer than it "
            f"could. With FINEDETR_KERNELS=off nothing is said of it. The compiler said: {said.strip()[-500:]}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


def state() -> str:
    """In words, whether this machine has kernels; compiles one to see."""
    if read("FINEDETR_KERNELS") == "off":
        return "off, by FINEDETR_KERNELS"
    if not sys.platform.startswith("linux"):
        return "none, only Linux has them"
    compiler = _compiler()
    if compiler is None:
        return "none for want of a C compiler (cc, gcc or clang): training on this CPU takes half as long again"
    if library("normalization") is None:
        return f"none, {shlex.join(compiler)} could not compile them"
    return f"compiled by {shlex.join(compiler)}"


@functools.cache
def _compiler() -> tuple[str, ...] | None:
    """The C compiler of this machine, as words of a command."""
    if read("FINEDETR_KERNELS") == "off" or not sys.platform.startswith("linux"):
        return None
    for words in (read("CC").split(), ["cc"], ["gcc"], ["clang"]):
        if words and shutil.which(words[0]):
            return tuple(words)
    return None


def _compiled(compiler: tuple[str, ...], name: str, sizes: dict[str, int], *, again: bool = False) -> Path:
    """The shared library, taken from the cache or, where it is not there or `again`, made."""
    defines = tuple(f"-D{size}={value}" for size, value in sorted(sizes.items()))
    words = (*compiler, *FLAGS, *defines)
    sources = b"".join((HERE / part).read_bytes() for part in (f"{name}.c", "vectors.h"))
    key = hashlib.sha256(b"\0".join((sources, shlex.join(words).encode(), _processor())))
    file = f"{name}-{key.hexdigest()[:16]}.so"
    for folder in _caches():
        target = folder / file
        if target.is_file() and not again:
            return target
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            with tempfile.TemporaryDirectory(dir=folder) as room:
                part, whole = Path(room, "part.o"), Path(room, "whole.so")
                _run(*words, "-c", str(HERE / f"{name}.c"), "-o", str(part))
                _run(*compiler, "-shared", str(part), "-o", str(whole), "-lm")
                os.replace(whole, target)  # whole, or not there: other processes may be at it
            return target
        except OSError:
            continue
    raise OSError("no folder can be written to")


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True, timeout=PATIENCE)


def _caches() -> Iterator[Path]:
    """Where compiled files are kept: the user's cache, or, where that cannot be written, a folder of this process."""
    yield Path(read("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "finedetr" / "kernels"
    yield _own_folder()


@functools.cache
def _own_folder() -> Path:
    folder = tempfile.mkdtemp(prefix="finedetr-kernels-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


def _processor() -> bytes:
    """What tells this kind of processor from others: a home may be shared among machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    except OSError:
        lines = []
    told = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return "\n".join((platform.machine(), *told)).encode()
