"""Official files of a backbone alone (HGNetv2, ResNet-vd, torchvision's ResNet, ViT): into that of a new detector."""

from __future__ import annotations

import re
from pathlib import Path

from torch import nn

from finedetr.errors import ModelError
from finedetr.model.detector import Detector
from finedetr.model.foreign import read_official
from finedetr.model.foreign_names import gather, inside_official, official_names
from finedetr.model.hgnet import HGNETS
from finedetr.model.resnet import RESNETS
from finedetr.model.vit import AdaptedViT

__all__ = ["load_backbone", "official_file"]

_UNUSED = ("num_batches_tracked", "bias_mask")
_CLASSIFIER = ("fc.weight", "fc.bias")  # of torchvision's files
_STORAGE = "github.com/{}/storage/releases/download/{}/"
_RESNETS = {
    "R18": "ResNet18_vd_pretrained_from_paddle.pth",
    "R34": "ResNet34_vd_pretrained_from_paddle.pth",
    "R50": "ResNet50_vd_ssld_v2_pretrained_from_paddle.pth",
    "R101": "ResNet101_vd_ssld_pretrained_from_paddle.pth",
}
_TORCHVISION = {"resnet50": "resnet50-0676ba61.pth", "resnet101": "resnet101-63fe2227.pth"}  # its first weights


def official_file(backbone: str) -> str:
    """Where the authors keep the weights of a backbone (spec 1.1, 1.2); empty where they keep none."""
    if re.fullmatch(r"B\d", backbone) and backbone in HGNETS:
        return _STORAGE.format("Peterande", "dfinev1.0") + f"PPHGNetV2_{backbone}_stage1.pth"
    if backbone in _TORCHVISION:
        return f"download.pytorch.org/models/{_TORCHVISION[backbone]}"
    return _STORAGE.format("lyuwenyu", "v0.1") + _RESNETS[backbone] if backbone in _RESNETS else ""


def load_backbone(detector: Detector, path: str | Path) -> list[tuple[str, str]]:
    """Starts the backbone of a detector from an official file that holds nothing else; it is changed in place.

    Returns:
        (what, which) for a table: how many tensors, and those of stages that the detector does not have.

    Raises:
        ModelError: Unreadable, or a tensor is missing, left over or of another shape; they are named.
    """
    path, config = Path(path), detector.config
    name, backbone = config.backbone.name, detector.backbone
    part: nn.Module
    if isinstance(backbone, AdaptedViT):  # the adapter is no part of such a file
        part, own, prefix, stages = backbone.pretrained, "backbone.vit.", inside_official(name), 0
    else:
        part, own, prefix, stages = backbone, "backbone.", "backbone.", len(backbone.stages)
    given = read_official(path)

    def names_of(key: str) -> tuple[str, ...]:
        return tuple(theirs.removeprefix(prefix) for theirs in official_names(own + key, config))

    found = gather(part.state_dict(), names_of, given)
    unused = (*_UNUSED, *_CLASSIFIER) if name in RESNETS and RESNETS[name].plain else _UNUSED
    rest = [key for key in given if key not in found.used and not key.endswith(unused)]
    beyond = [key for key in rest if _stage(key) >= stages]
    faults = found.faults + [f"left over {key}" for key in rest if key not in beyond]
    if faults:
        official = official_file(name)
        raise ModelError(
            f"{path} does not fit the backbone {name} of {detector.config.name}: {'; '.join(faults[:5])}"
            + (f" and {len(faults) - 5} more" if len(faults) > 5 else ""),
            code="mismatch",
            hint=f"The official file is {official}" if official else "",
        )
    part.load_state_dict(found.state)
    rows = [("backbone", f"{len(found.used)} tensors of {path.name}")]
    return rows + ([("dropped", f"{len(beyond)} tensors of stages that {name} has not here")] if beyond else [])


def _stage(key: str) -> int:
    """Which stage a tensor belongs to; -1: none."""
    found = re.match(r"(?:stages|res_layers)\.(\d+)\.|layer(\d)\.", key)
    if found is None:
        return -1
    return int(found[1]) if found[1] else int(found[2]) - 1
