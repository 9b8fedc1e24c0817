"""Weights that others wrote: official checkpoints and folders of Hugging Face transformers (spec 2.1 - 2.4).

For every tensor that a model of ours has, its name over there is looked up, so what is not found is known by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from finedetr.errors import ModelError
from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.foreign_names import look_up, official_names, transformers_names
from finedetr.model.zoo import ZOO

__all__ = ["COCO_IDS", "COCO_NAMES", "Foreign", "is_foreign", "read_foreign"]

COCO_NAMES = (
    *("person", "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "traffic light"),
    *("fire hydrant", "stop sign", "parking meter", "bench", "bird", "cat", "dog", "horse", "sheep", "cow"),
    *("elephant", "bear", "zebra", "giraffe", "backpack", "umbrella", "handbag", "tie", "suitcase", "frisbee"),
    *("skis", "snowboard", "sports ball", "kite", "baseball bat", "baseball glove", "skateboard", "surfboard"),
    *("tennis racket", "bottle", "wine glass", "cup", "fork", "knife", "spoon", "bowl", "banana", "apple"),
    *("sandwich", "orange", "broccoli", "carrot", "hot dog", "pizza", "donut", "cake", "chair", "couch"),
    *("potted plant", "bed", "dining table", "toilet", "tv", "laptop", "mouse", "remote", "keyboard"),
    *("cell phone", "microwave", "oven", "toaster", "sink", "refrigerator", "book", "clock", "vase"),
    *("scissors", "teddy bear", "hair drier", "toothbrush"),
)
"""COCO's 80 classes in the order in which published detectors answer."""

_NOT_IN_COCO = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_IDS = tuple(number for number in range(1, 91) if number not in _NOT_IN_COCO)
"""Their category ids: 1 to 90 with ten gaps."""


@dataclass(frozen=True)
class Foreign:
    """A detector that somebody else's file holds."""

    config: ModelConfig
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    state: dict[str, Tensor]  # under our names


def is_foreign(path: Path) -> bool:
    """Whether a path looks like an official checkpoint or a folder of transformers."""
    return path.suffix in {".pth", ".pt"} or _transformers_folder(path) is not None


def read_foreign(path: Path) -> Foreign:
    """Reads an official `.pth` (D-FINE, DEIM, RT-DETRv2) or a folder of transformers (d_fine, rt_detr, rt_detr_v2).

    Nothing of a file is executed. Which model it is follows from the shapes of its tensors; D-FINE and its DEIM twin
    have the same, so the word "deim" in the file's name decides between them.

    Raises:
        ModelError: Unreadable, or no model of the table fits, or tensors are left over: they are named, and so is the
            closest model.
    """
    folder = _transformers_folder(path)
    if folder is not None:
        given, settings = _read_transformers(folder)
        names_of: Callable[..., tuple[str, ...]] = transformers_names
    else:
        given, settings = _read_official(path), {}
        names_of = official_names
    config, state, used = _fit(given, names_of, path)
    if isinstance(settings.get("num_queries"), int):
        config = replace(config, decoder=replace(config.decoder, queries=settings["num_queries"]))
    names, ids = _classes(len(state["selection.score_head.bias"]), settings)
    ignored = ("num_batches_tracked", "n_points_scale", "num_points_scale", "anchors", "valid_mask")
    aliases = ("decoder.decoder.up", "decoder.decoder.reg_scale")
    unused = [
        key
        for key in given
        if key not in used and not key.endswith(ignored) and key not in aliases and not _tied(key, given)
    ]
    if unused:
        raise ModelError(
            f"{path} looks like {config.name}, but holds {len(unused)} tensors more: {', '.join(unused[:5])}",
            code="mismatch",
        )
    return Foreign(config, names, ids, state)


def _transformers_folder(path: Path) -> Path | None:
    folder = path if path.is_dir() else path.parent if path.name == "model.safetensors" else None
    if folder is None or not (folder / "config.json").is_file() or not (folder / "model.safetensors").is_file():
        return None
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return folder if isinstance(settings, dict) and "model_type" in settings else None


def _read_transformers(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = settings["model_type"]
    if kind not in {"d_fine", "rt_detr", "rt_detr_v2"}:
        raise ModelError(
            f"{folder / 'config.json'}: no model of type {kind!r} is read",
            code="unknown_model",
            hint="d_fine, rt_detr and rt_detr_v2 are.",
        )
    try:
        return load_file(folder / "model.safetensors"), settings
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{folder / 'model.safetensors'} is unreadable: {error}", code="schema") from error


def _read_official(path: Path) -> dict[str, Tensor]:
    """The moving average where there is one, otherwise the model (spec 2.1)."""
    if not path.is_file():
        raise ModelError(f"no weights at {path}", code="not_found", hint="Give a run folder or a weight file.")
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the pickle machine raises, and that is anything
        reason = (str(error).splitlines() or ["it is empty"])[0]
        raise ModelError(f"{path} is no checkpoint that holds numbers only: {reason}", code="schema") from error
    for step in (("ema", "module"), ("model",), ()):
        found: Any = document
        for key in step:
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
            return {str(key).removeprefix("module."): value for key, value in found.items()}
    raise ModelError(f"{path} holds no table of tensors under ema.module, model or at its top", code="schema")


def _classes(count: int, settings: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    labels = settings.get("id2label")
    if isinstance(labels, Mapping) and len(labels) == count:
        names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    elif count == len(COCO_NAMES):
        names = COCO_NAMES
    else:
        names = tuple(f"class {index}" for index in range(count))
    if count == len(COCO_NAMES) and names[0] == "person":
        return COCO_NAMES, COCO_IDS  # some files spell a few names in the way of Pascal VOC
    return names, tuple(range(count))


def _fit(
    given: Mapping[str, Tensor], names_of: Callable[..., tuple[str, ...]], path: Path
) -> tuple[ModelConfig, dict[str, Tensor], set[str]]:
    """The model of the table whose every tensor is in the file with its shape."""
    wants_deim = "deim" in str(path).lower()
    rows = sorted(_rows(), key=lambda row: row.name.startswith("deim-") != wants_deim)
    count = _count_classes(given)
    best: tuple[int, str, list[str]] | None = None
    for config in rows:
        with torch.device("meta"):
            own = Detector(config, count).state_dict()
        plain, resnet = config.decoder.boxes == "plain", config.backbone.name.startswith("R")
        state, used, faults = {}, set(), []
        for key, tensor in own.items():
            found = [look_up(given, name) for name in names_of(key, plain=plain, resnet=resnet)]
            if any(part is None for part in found):
                if not key.endswith("num_batches_tracked"):
                    faults.append(f"missing {key}")
                else:
                    state[key] = torch.zeros((), dtype=torch.long)
                continue
            parts = [part for part in found if part is not None]
            used |= {name for name, _ in parts}
            joined = torch.cat([value for _, value in parts]) if len(parts) > 1 else parts[0][1]
            if joined.numel() == tensor.numel() == 1:
                joined = joined.reshape(tensor.shape)
            if joined.shape != tensor.shape:
                faults.append(f"{key} is {tuple(joined.shape)}, expected {tuple(tensor.shape)}")
            state[key] = joined
        if not faults:
            return config, state, used
        if best is None or len(faults) < best[0]:
            best = (len(faults), config.name, faults[:3])
    assert best is not None
    raise ModelError(
        f"{path} fits no model of `finedetr models`; the closest, {best[1]}, lacks {best[0]} tensors: "
        f"{'; '.join(best[2])}",
        code="mismatch",
    )


def _rows() -> Iterator[ModelConfig]:
    """The models of the table; those that answer before their last layer also without the layers behind."""
    for config in ZOO.values():
        yield config
        if config.decoder.answering is not None:
            yield replace(config, decoder=replace(config.decoder, layers=config.decoder.answering, answering=None))


def _count_classes(given: Mapping[str, Tensor]) -> int:
    for name in ("decoder.enc_score_head.bias", "model.enc_score_head.bias"):
        if name in given:
            return len(given[name])
    return len(COCO_NAMES)


def _tied(key: str, given: Mapping[str, Tensor]) -> bool:
    return key.startswith(("class_embed.", "bbox_embed.")) and f"model.decoder.{key}" in given
