"""What a detector costs: operations of one picture, counted without computing anything, and its time, measured."""

from __future__ import annotations

import copy
import time

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_operations", "latencies"]


def count_operations(model: nn.Module, size: tuple[int, int] = (640, 640)) -> int:
    """Two for each multiplication with an addition of convolutions and matrix products, for a batch of one picture.

    Nothing else is counted, neither norms nor activations nor the sampling of deformable attention: so do the published
    tables. The forward pass runs on torch's meta device, where tensors have shapes but no numbers.

    Args:
        model: Left as it is. The cost that is published is that of a deployed detector (`deployed`).
        size: (height, width) of the picture.
    """
    if any(not tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        model = copy.deepcopy(model).to("meta")
    # a mode of inference leaves no operations to count
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.inference_mode(False), torch.no_grad():
        model.eval()(torch.empty(1, 3, *size))
    return int(counter.get_total_flops())


@torch.inference_mode()
def latencies(models: list[nn.Module], size: tuple[int, int], device: torch.device, rounds: int = 5) -> list[float]:
    """Seconds of a forward pass of one picture: the shortest of some rounds, in which the models take turns.

    Args:
        models: In eval mode, on `device`.
        size: (height, width) of the picture.
        device: Where they are.
        rounds: How many, at the most; after three seconds no other begins. One before them warms up.
    """
    images = torch.rand(1, 3, *size, device=device)
    least, begun = [float("inf")] * len(models), 0.0
    for index in range(rounds + 1):
        if index > 1 and time.perf_counter() - begun > 3:
            break
        for place, model in enumerate(models):
            start = time.perf_counter()
            model(images)
            if device.type != "cpu":
                torch.accelerator.synchronize()
            if index:
                least[place] = min(least[place], time.perf_counter() - start)
        begun = begun or time.perf_counter()
    return least
