"""The detector as it is shipped: norms folded into convolutions, re-parameterized branches merged, one stage only."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from finedetr.model.decoder import DistributionDecoder
from finedetr.model.detector import Detector
from finedetr.model.encoders import Halve, RepConv
from finedetr.model.layers import ConvNorm, FrozenBatchNorm2d

__all__ = ["deployed", "fold_norms"]


def deployed(detector: Detector, *, everything: bool = True) -> Detector:
    """A copy in eval mode that answers the same at the final stage with fewer operations.

    Every convolution takes in its norm, every `RepConv` becomes one 3×3 convolution, and the heads that only training
    reads are gone, so the copy answers the final stage only.

    Args:
        detector: Left as it is.
        everything: Fold the norms of the backbone and of the input projections, too. The official code leaves them to
            the runtime (spec 1.4), and its deployed parameter counts are those of `everything=False`.
    """
    model = copy.deepcopy(detector).eval()
    kept: set[nn.Module] = set()
    if not everything:
        kept = {*model.backbone.modules(), *model.encoder.input_proj, *model.decoder_input_proj}
        kept |= {module.project for module in model.encoder.modules() if isinstance(module, Halve)}
    fold_norms(model, kept)
    decoder = model.decoder
    per_layer = [decoder.layers, decoder.score_heads]
    if isinstance(decoder, DistributionDecoder):
        per_layer += [decoder.edge_heads, decoder.quality_heads]
    else:
        per_layer.append(decoder.box_heads)
    for parts in per_layer:
        del parts[decoder.answering :]  # layers that only training runs
    behind = [decoder.score_heads]
    if isinstance(decoder, DistributionDecoder):
        behind.append(decoder.quality_heads)
    for parts in behind:
        for index in range(len(parts) - 1):  # a head that all layers share stays
            parts[index] = nn.Identity()
    return model.requires_grad_(False)


@torch.no_grad()
def fold_norms(model: Detector, kept: Collection[nn.Module] = ()) -> Detector:
    """Puts norms into convolutions and merges branches, in place: the same answers at all stages, no more training.

    Args:
        model: In eval mode it answers as before, but for rounding.
        kept: Modules whose norms stay.
    """
    for module in model.modules():
        if isinstance(module, ConvNorm) and module not in kept:
            _fold(module)
    for module in model.modules():
        if isinstance(module, RepConv):
            _merge(module)
    return model.requires_grad_(False)


def _fold(module: ConvNorm) -> None:
    """Puts the norm's scale into the weights and its shift into a bias."""
    norm = module.norm
    if not isinstance(norm, _BatchNorm | FrozenBatchNorm2d):
        return
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    old = module.conv
    conv = nn.Conv2d(
        old.in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        old.dilation,  # type: ignore[arg-type]
        old.groups,
        device=old.weight.device,
        dtype=old.weight.dtype,
    )
    assert conv.bias is not None
    conv.weight = nn.Parameter(old.weight * scale[:, None, None, None])  # not a copy into it: the layout stays
    conv.bias.copy_(norm.bias - norm.running_mean * scale)
    module.conv, module.norm = conv, nn.Identity()


def _merge(module: RepConv) -> None:
    """Adds the 1×1 branch to the middle of the 3×3 one."""
    if module.conv2 is None:  # deployed already
        return
    large, small = module.conv1.conv, module.conv2.conv
    assert large.bias is not None
    assert small.bias is not None
    weight: Tensor = F.pad(small.weight, (1, 1, 1, 1))
    large.weight.add_(weight)
    large.bias.add_(small.bias)
    module.conv2 = None
