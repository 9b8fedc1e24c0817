"""The same random detector in `transformers`."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.foreign_names import official_names, tied_names
from finedetr.model.layers import FrozenBatchNorm2d
from finedetr.model.transformers import to_transformers, transformers_config


def transformers_detector(config: ModelConfig, classes: int) -> nn.Module:
    """`transformers`' detector of the same make, in eval mode, at its own random weights."""
    from transformers import DFineConfig, DFineForObjectDetection, RTDetrV2Config, RTDetrV2ForObjectDetection

    if config.decoder.activation != "relu":  # the nearest there is, for benchmarks
        config = replace(config, decoder=replace(config.decoder, activation="relu", position_layers=2))
    settings = transformers_config(config, tuple(f"c{index}" for index in range(classes)))
    settings["eval_size"] = None  # positions and anchors are made anew for every input
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


def pair(config: ModelConfig, classes: int, seed: int = 0) -> tuple[Detector, nn.Module]:
    """Our detector at random weights and theirs with the same ones, both in eval mode."""
    torch.manual_seed(seed)
    ours = Detector(config, classes).eval()
    randomize(ours, seed)
    theirs = transformers_detector(config, classes)
    missing, unexpected = theirs.load_state_dict(to_transformers(ours.state_dict(), config), strict=False)
    assert not unexpected, unexpected
    assert all(key.endswith(("num_points_scale", "n_points_scale")) for key in missing), missing
    return ours, theirs


def official(detector: Detector) -> dict[str, Tensor]:
    """Our weights as the official code would save them, with all that a reader has to leave out."""
    config, theirs = detector.config, {}
    for key, tensor in detector.state_dict().items():
        names = official_names(key, config)
        for name, part in zip(names, tensor.chunk(len(names)) if len(names) > 1 else (tensor,), strict=True):
            joint, _, which = name.partition("@")
            theirs[joint] = torch.cat((theirs[joint], part)) if which == "v" else part
    theirs["decoder.anchors"], theirs["decoder.valid_mask"] = torch.zeros(1, 9, 4), torch.zeros(1, 9, 1)
    for index in range(config.decoder.layers):
        theirs[f"decoder.decoder.layers.{index}.cross_attn.num_points_scale"] = torch.zeros(12)
    for key in list(theirs):
        theirs |= dict.fromkeys(tied_names(key, config), theirs[key])
        if key.startswith("backbone.dinov3.blocks.") and key.endswith("qkv.bias"):
            width = len(theirs[key]) // 3
            theirs[f"{key}_mask"] = torch.tensor([1.0, 0.0, 1.0]).repeat_interleave(width)
    return theirs


def assert_same_answers(ours: Detector, theirs: nn.Module, size: tuple[int, int]) -> Tensor:
    """Holds our logits and boxes to theirs within 1e-4, query by query; returns the images [1, 3, H, W] they saw.

    Ties of the top-k may choose a few other tokens, and in another order: a query is known by its initial box.
    """
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        mine, other = ours(images, all_stages=True).matching, theirs(pixel_values=images)
    distance, index = torch.cdist(mine.boxes[0, 0], other.enc_topk_bboxes[0], p=torch.inf).min(dim=-1)
    common = distance < 1e-5
    assert common.float().mean() > 0.97
    torch.testing.assert_close(mine.logits[-1, 0][common], other.logits[0][index][common], atol=1e-4, rtol=0)
    torch.testing.assert_close(mine.boxes[-1, 0][common], other.pred_boxes[0][index][common], atol=1e-4, rtol=0)
    return images
