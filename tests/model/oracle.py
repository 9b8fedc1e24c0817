"""The same random detector in `transformers`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.foreign import to_transformers, transformers_config
from finedetr.model.layers import FrozenBatchNorm2d


def transformers_detector(config: ModelConfig, classes: int, size: tuple[int, int]) -> nn.Module:
    """`transformers`' detector of the same make, in eval mode, at its own random weights."""
    from transformers import DFineConfig, DFineForObjectDetection, RTDetrV2Config, RTDetrV2ForObjectDetection

    del size  # positions and anchors are made anew for every input
    if config.decoder.activation != "relu":  # the nearest there is, for benchmarks
        config = replace(config, decoder=replace(config.decoder, activation="relu", position_layers=2))
    settings = transformers_config(config, tuple(f"c{index}" for index in range(classes)))
    settings["eval_size"] = None
    if settings["model_type"] == "d_fine":
        return DFineForObjectDetection(DFineConfig(**settings)).eval()
    return RTDetrV2ForObjectDetection(RTDetrV2Config(**settings)).eval()


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Gives every norm, gate and zero-initialized head random numbers, so that nothing is constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d | FrozenBatchNorm2d):
                part.running_mean.copy_(0.1 * torch.randn(part.running_mean.shape, generator=generator))
                part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
                part.weight.copy_(0.8 + 0.4 * torch.rand(part.weight.shape, generator=generator))
                part.bias.copy_(0.1 * torch.randn(part.bias.shape, generator=generator))
        for name, parameter in module.named_parameters():
            if name.endswith((".affine.scale", ".affine.bias")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad and parameter.ndim >= 1 and not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def pair(config: ModelConfig, classes: int, size: tuple[int, int], seed: int = 0) -> tuple[Detector, nn.Module]:
    """Our detector at random weights and theirs with the same ones, both in eval mode."""
    torch.manual_seed(seed)
    ours = Detector(config, classes).eval()
    randomize(ours, seed)
    theirs = transformers_detector(config, classes, size)
    missing, unexpected = theirs.load_state_dict(to_transformers(ours.state_dict()), strict=False)
    assert not unexpected, unexpected
    assert all(key.endswith(("num_points_scale", "n_points_scale")) for key in missing), missing
    return ours, theirs
