"""Every environment variable that finedetr reads, with its meaning. `finedetr env` prints them."""

from __future__ import annotations

import os
from dataclasses import dataclass

__all__ = ["VARIABLES", "Variable", "read"]


@dataclass(frozen=True)
class Variable:
    """One variable: its name, what it is when unset, and one sentence."""

    name: str
    default: str
    meaning: str


VARIABLES = (
    Variable("FINEDETR_LOG", "warning", "Python log level: debug shows the traceback of every error."),
    Variable("FINEDETR_KERNELS", "on", "off: no C kernels are compiled for training on the CPU."),
    Variable("CC", "", "The C compiler of those kernels; by default cc, gcc or clang."),
    Variable("XDG_CACHE_HOME", "", "Where their compiled files are kept, in finedetr/kernels; by default ~/.cache."),
    Variable("NO_COLOR", "", "Set to anything: no colors on the terminal."),
    Variable("CI", "", "Set to anything: plain lines instead of a live progress line."),
    Variable("WORLD_SIZE", "1", "Number of processes; set by torchrun."),
    Variable("RANK", "0", "Number of this process; set by torchrun."),
    Variable("LOCAL_RANK", "0", "Number of this process on its machine; set by torchrun."),
    Variable("MASTER_ADDR", "", "Where the processes meet; set by torchrun."),
    Variable("MASTER_PORT", "", "Where the processes meet; set by torchrun."),
    Variable("CUDA_VISIBLE_DEVICES", "", "Which GPUs torch sees."),
    Variable("OMP_NUM_THREADS", "", "Threads of torch on the CPU."),
    Variable("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024", "Functions that torch keeps on the CPU; training sets 16384."),
    Variable("RAYON_NUM_THREADS", "", "Threads of the evaluation."),
)


def read(name: str) -> str:
    """The value of a variable of the table."""
    variable = next(variable for variable in VARIABLES if variable.name == name)
    return os.environ.get(name, variable.default)
