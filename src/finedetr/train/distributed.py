"""One process or many: who am I, on which device, and the few things that processes tell one another.

Started by `torchrun`, whose variables are RANK, WORLD_SIZE and LOCAL_RANK; without them a run has one process.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from finedetr.errors import RunError, UsageError
from finedetr.kernels.process import prepare_cpu

__all__ = ["World", "choose_device", "open_world"]

PATIENCE = timedelta(minutes=30)  # an evaluation on the first process may take its time


@dataclass(frozen=True)
class World:
    """The processes of a run, seen from one of them."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def main(self) -> bool:
        """Whether this process writes files and talks."""
        return self.rank == 0

    def total(self, values: list[float]) -> list[float]:
        """The sum of each value over all processes; the same everywhere."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor)
        return [float(value) for value in tensor.tolist()]

    def largest(self, values: list[float]) -> list[float]:
        """The largest of each value over all processes: what one of them wants, all do (such as stopping)."""
        if self.size == 1:
            return values
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MAX)
        return [float(value) for value in tensor.tolist()]

    def average(self, gradients: list[torch.Tensor]) -> None:
        """Puts the mean over all processes into each of these, for parameters that `wrap` does not know."""
        if self.size > 1:
            for gradient in gradients:
                distributed.all_reduce(gradient)
                gradient /= self.size

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            distributed.barrier()

    def join_norms(self, detector: nn.Module) -> None:
        """Gives a detector batch norms that see the pictures of all processes (several GPUs only)."""
        if self.size > 1 and self.device.type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(detector)

    def wrap(self, detector: nn.Module, *, unused: bool) -> nn.Module:
        """The detector as one that averages its gradients over processes; itself where there is one process.

        Args:
            detector: On the device already.
            unused: Some trainable parameters take no part in a step.
        """
        if self.size == 1:
            return detector
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(
            detector, device_ids=ids, find_unused_parameters=unused, gradient_as_bucket_view=True
        )


def choose_device(wanted: str = "auto", local_rank: int = 0) -> torch.device:
    """The device for a name: `auto`, `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises:
        UsageError: torch does not know it or the machine does not have it.
    """
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", local_rank)
        return torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise UsageError(
            f"no device is called {wanted!r}", code="device", hint="Use auto, cpu, cuda or cuda:N."
        ) from error
    if device.type == "cuda":
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        index = local_rank if device.index is None else device.index
        if index >= found:
            raise UsageError(
                f"{wanted} was asked for; this machine offers {found} CUDA devices to torch {torch.__version__}",
                code="device",
                hint="Use --device cpu, or install a torch that supports your GPU.",
            )
        return torch.device("cuda", index)
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("mps was asked for, but is not available here", code="device", hint="Use --device cpu.")
    if device.type not in {"cpu", "mps"}:
        raise UsageError(f"device {wanted!r} is not supported", code="device", hint="Use auto, cpu, cuda or mps.")
    return device


@contextmanager
def open_world(device: str = "auto") -> Iterator[World]:
    """Joins the other processes of torchrun, if any, and leaves them at the end.

    Raises:
        UsageError: The device is unknown or absent, or torchrun's variables are incomplete.
        RunError: The other processes do not answer.
    """
    size, rank, local = (
        _variable(name, default) for name, default in (("WORLD_SIZE", 1), ("RANK", 0), ("LOCAL_RANK", 0))
    )
    chosen = choose_device(device, local)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    elif chosen.type == "cpu":
        prepare_cpu()
    if size == 1:
        yield World(device=chosen)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UsageError(
            f"WORLD_SIZE is {size}, but {missing[0]} is not set",
            code="distributed",
            hint="Start many processes with: torchrun --nproc-per-node N -m finedetr train ...",
        )
    try:
        distributed.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo", rank=rank, world_size=size, timeout=PATIENCE
        )
    except (RuntimeError, ValueError) as error:
        raise RunError(f"process {rank} of {size} cannot join the others: {error}", code="distributed") from error
    try:
        yield World(rank, size, chosen)
    finally:
        distributed.destroy_process_group()


def _variable(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError as error:
        raise UsageError(
            f"the environment variable {name} must be an integer, got {text!r}", code="distributed"
        ) from error
