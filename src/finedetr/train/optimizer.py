"""AdamW over groups of parameters that are told apart by what their module is, never by its name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from finedetr.errors import ConfigError
from finedetr.model.deformable import DeformableAttention
from finedetr.model.layers import LearnableAffine
from finedetr.model.queries import LearnedPoints

__all__ = ["Grouping", "adamw", "parameter_groups"]

NORMS = (_BatchNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.InstanceNorm2d, nn.LocalResponseNorm)


@dataclass(frozen=True)
class Grouping:
    """Which parameters decay, and which train at the backbone's rate. The defaults are what the papers intend.

    The official code groups by regular expressions that miss their mark (spec 4.1); `finedetr.recipes` has those
    splits as rows for whoever wants to repeat them.
    """

    decay_backbone_norms: bool = False
    """Decay the weights and biases of the backbone's norms."""
    decay_affine: bool = False
    """Decay the scale and shift of the backbone's learnable affine blocks."""
    decay_biases: bool = False
    """Decay the biases of layers that are no norms."""
    backbone_norms_at_main_rate: bool = False
    """Train the backbone's norms at the rate of the rest."""


def parameter_groups(
    detector: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    backbone: float = 1.0,
    aim: float = 1.0,
    grouping: Grouping | None = None,
) -> list[dict[str, object]]:
    """The trainable parameters of a detector in at most six groups, each with its name, rate and decay.

    Args:
        detector: A module whose `backbone` attribute is its backbone; where that has a part `pretrained`, it is meant.
        lr: The rate of everything else than the backbone.
        weight_decay: Decay of what decays.
        backbone: The backbone's rate as a multiple of `lr`.
        aim: The rate of sampling offsets and learned points as a multiple of `lr`; 1 makes no group of them.
        grouping: Which parameters decay.

    Raises:
        ConfigError: Nothing is trainable, or one parameter is shared by modules that belong to different groups.
    """
    grouping = grouping or Grouping()
    backbone_ = getattr(detector, "backbone", nn.Module())
    inside = set(getattr(backbone_, "pretrained", backbone_).modules())
    aims = set(_aims(detector)) if aim != 1 else set()
    where: dict[nn.Parameter, tuple[str, bool]] = {}
    names: dict[nn.Parameter, str] = {}
    for prefix, module in detector.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            part, decays = _group_of(module, name, module in inside, grouping)
            group = ("aim" if module in aims else part, decays)
            full = f"{prefix}.{name}" if prefix else name
            if where.setdefault(parameter, group) != group:
                raise ConfigError(
                    f"{names[parameter]} and {full} are one parameter, but belong to two groups of the optimizer: "
                    f"{where[parameter]} and {group}",
                    code="groups",
                )
            names.setdefault(parameter, full)
    wanted = {parameter for parameter in detector.parameters() if parameter.requires_grad}
    if not wanted:
        raise ConfigError("nothing is left to train: every parameter is frozen", code="frozen")
    assert set(where) == wanted, "every trainable parameter belongs to exactly one group"
    groups: list[dict[str, object]] = []
    for key in sorted(set(where.values()), reverse=True):  # the main group with decay comes first
        part, decays = key
        rate = lr * {"backbone": backbone, "aim": aim}.get(part, 1.0)
        groups.append(
            {
                "name": f"{part}, {'decay' if decays else 'no decay'}",
                "params": [parameter for parameter, group in where.items() if group == key],
                "lr": rate,
                "initial_lr": rate,
                "weight_decay": weight_decay if decays else 0.0,
            }
        )
    return groups


def _aims(detector: nn.Module) -> Iterator[nn.Module]:
    """What decides where a query looks."""
    for module in detector.modules():
        if isinstance(module, DeformableAttention):
            yield module.sampling_offsets
        elif isinstance(module, LearnedPoints):
            yield from module.point.layers


def _group_of(module: nn.Module, name: str, in_backbone: bool, grouping: Grouping) -> tuple[str, bool]:
    """(part, whether it decays) of one parameter of a module."""
    norm, affine = isinstance(module, NORMS), isinstance(module, LearnableAffine)
    if norm:
        decays = in_backbone and grouping.decay_backbone_norms
    elif affine:
        decays = grouping.decay_affine
    elif name.endswith("bias"):  # a layer's own bias, such as Linear.bias or MultiheadAttention.in_proj_bias
        # the official expressions that spare biases look at encoder and decoder only; the backbone has no others
        decays = grouping.decay_biases
    else:
        decays = True
    at_main_rate = not in_backbone or (norm and grouping.backbone_norms_at_main_rate)
    return ("main" if at_main_rate else "backbone", decays)


def adamw(groups: list[dict[str, object]], betas: tuple[float, float] = (0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW in its fused form where the device has one, else with one call for many tensors (foreach)."""
    parameters = [p for group in groups for p in group["params"]]  # type: ignore[attr-defined]
    kinds = {parameter.device.type for parameter in parameters}
    floating = all(parameter.is_floating_point() for parameter in parameters)
    if floating and kinds <= {"cpu", "cuda"} and len(kinds) == 1:
        return torch.optim.AdamW(groups, betas=betas, fused=True)
    return torch.optim.AdamW(groups, betas=betas, foreach=True)
