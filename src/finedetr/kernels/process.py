"""Settings of this process, for training and torch on a CPU."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["prepare_cpu", "settled"]


@contextmanager
def settled() -> Iterator[None]:
    """Python looks for cycles of garbage among what is made from here on, no more among what there is already.

    That is some hundred thousand objects of torch and the model, in which it finds nothing; looking took a thirtieth
    of a training step.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def prepare_cpu() -> None:
    """Settings of the libraries below torch, without which a training step on the CPU takes longer."""
    _keep_freed_memory()
    # oneDNN makes a function for each shape of each convolution and product, and by default forgets all but the last
    # 1024: fewer than a model needs that sees pictures of several sizes. Read when the first one is made, not later.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "16384")


def _keep_freed_memory() -> None:
    """Lets the C library keep freed memory for the next tensor instead of giving it back to the system.

    A training step on the CPU frees and takes hundreds of megabytes; every page that comes anew from the system costs a
    fault, on a virtual machine ten microseconds and more. Only glibc has the setting; elsewhere nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return
    setting = getattr(ctypes.CDLL(None), "mallopt", None)
    if setting is None:
        return
    options = {"M_MMAP_THRESHOLD": -3, "M_TRIM_THRESHOLD": -1, "M_TOP_PAD": -2}  # malloc.h
    setting(options["M_MMAP_THRESHOLD"], 32 * 2**20)  # the most that glibc takes
    setting(options["M_TRIM_THRESHOLD"], 2**31 - 1)
    setting(options["M_TOP_PAD"], 64 * 2**20)
