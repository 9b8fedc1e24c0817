"""What a detector costs: operations of one picture, counted without computing anything."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_operations"]


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
