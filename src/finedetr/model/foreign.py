"""Weights that others wrote: official checkpoints and folders of Hugging Face transformers (spec 2.1 - 2.4).

For every tensor that a model of ours has, its name over there is looked up, so what is not found is known by name.
"""

from __future__ import annotations

import functools
import json
import math
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from finedetr.errors import ModelError
from finedetr.model.classes import COCO_IDS, COCO_NAMES, OBJECTS365_NAMES
from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.foreign_names import gather, official_names, tied_names, transformers_names
from finedetr.model.resnet import RESNETS
from finedetr.model.transformers import unshaped
from finedetr.model.zoo import ZOO

__all__ = ["Foreign", "is_foreign", "read_foreign", "read_official"]

WEIGHTS = "model.safetensors"
_SCORES = (
    *("decoder.enc_score_head.weight", "model.enc_score_head.weight"),  # official, transformers
    *("class_labels_classifier.weight", "class_embed.weight", "class_embed.0.weight"),  # the classic DETRs
    "model.decoder.class_embed.0.weight",
)
_KINDS = ("d_fine", "rt_detr", "rt_detr_v2", "conditional_detr", "dab-detr", "deformable_detr")  # of transformers


@dataclass(frozen=True)
class Foreign:
    """A detector that somebody else's file holds."""

    config: ModelConfig
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    state: dict[str, Tensor]  # under our names


def is_foreign(path: Path) -> bool:
    """Whether a path looks like an official checkpoint, or a folder as it lies on the Hub."""
    return path.suffix in {".pth", ".pt"} or _hub_folder(path) is not None or _is_official(path)


def read_foreign(path: Path) -> Foreign:
    """Reads an official checkpoint, or a folder of transformers (see `_KINDS`).

    Official ones are `.pth` files of D-FINE, DEIM, DEIMv2 and RT-DETR(v2), and `.safetensors` files with their names,
    alone or in a folder beside the `config.json` with which DEIMv2 lies on the Hub.

    Nothing of a file is executed. Which model it is follows from the shapes of its tensors. D-FINE and its DEIM twin
    have the same, and so has RT-DETRv2 with discrete sampling: of official files, the words "deim" and "dsp" in the
    name (see `_title`) decide; transformers has no DEIM, and its configuration says how it samples.

    Raises:
        ModelError: Unreadable, or no model of the table fits, or tensors are left over: they are named, and so is the
            closest model.
    """
    folder = _hub_folder(path)
    settings = _settings(folder) if folder is not None else {}
    names_of: Callable[..., tuple[str, ...]]  # of a key and a configuration
    if folder is not None and "model_type" in settings:
        given, names_of = _read_transformers(folder, settings), transformers_names
    else:
        given, names_of = read_official(path if folder is None else folder / WEIGHTS), official_names
    title = "" if names_of is transformers_names else _title(path, folder)
    rows = [_with_queries(row, settings) for row in _rows() if _may_be(row, settings)]
    config, state, used = _fit(given, names_of, _likely_first(rows, given, title), path)
    if settings.get("decoder_method") == "discrete":
        config = _sampled(config)
    config = _with_bins(config, state, path)
    if names_of is transformers_names:
        _check_settings(config, settings, path)
    names, ids = _classes(len(state["decoder.score_heads.0.bias"]), settings)
    ignored = ("num_batches_tracked", "n_points_scale", "num_points_scale", "anchors", "valid_mask", "bias_mask")
    tied = {
        other: name for name in used for one in tied_names(name, config) for other in (one, *tied_names(one, config))
    }
    same = {key for key, name in tied.items() if key in given and torch.equal(given[key], given[name])}
    unused = [key for key in given if key not in used | same and not key.endswith(ignored)]
    if unused:
        raise ModelError(
            f"{path} looks like {config.name}, but holds {len(unused)} tensors more: {', '.join(unused[:5])}",
            code="mismatch",
        )
    return Foreign(config, names, ids, state)


def _hub_folder(path: Path) -> Path | None:
    """The folder of somebody else's model.safetensors and config.json."""
    folder = path if path.is_dir() else path.parent if path.name == WEIGHTS else None
    if folder is None or not (folder / WEIGHTS).is_file() or not _settings(folder):
        return None
    try:
        with safe_open(str(folder / WEIGHTS), framework="pt") as file:
            ours = "finedetr" in (file.metadata() or {})
    except (SafetensorError, OSError):
        ours = False  # reading it will say what is wrong
    return None if ours else folder


def _settings(folder: Path) -> dict[str, Any]:
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return settings if isinstance(settings, dict) else {}


def _is_official(path: Path) -> bool:
    """Whether a .safetensors file has no card of ours but names of the official code."""
    if path.suffix != ".safetensors" or not path.is_file():
        return False
    try:
        with safe_open(str(path), framework="pt") as file:
            return any(key.startswith("decoder.decoder.") for key in list(file.keys()))
    except (SafetensorError, OSError):
        return False


def _read_transformers(folder: Path, settings: Mapping[str, Any]) -> dict[str, Tensor]:
    kind = settings["model_type"]
    if kind not in _KINDS:
        raise ModelError(
            f"{folder / 'config.json'}: no model of type {kind!r} is read",
            code="unknown_model",
            # its deimv2 recomputes positions in every layer and projects before the selection of queries (spec 2.3)
            hint=f"{', '.join(_KINDS[:-1])} and {_KINDS[-1]} are; DEIMv2 is read as its authors publish it.",
        )
    return _read_tensors(folder / WEIGHTS)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is unreadable: {error}", code="schema", hint="Is it whole? Fetch or copy it again."
        ) from error


def _is_archive(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # its table says what cannot be
        return False


def read_official(path: Path) -> dict[str, Tensor]:
    """The tensors of an official `.pth`: the moving average where there is one, otherwise the model (spec 2.1).

    Raises:
        ModelError: It is absent, or holds more than numbers, or no table of tensors.
    """
    if not path.is_file():
        raise ModelError(f"no weights at {path}", code="not_found", hint="Give a run folder or a weight file.")
    if path.suffix == ".safetensors":
        return _read_tensors(path)
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the pickle machine raises, and that is anything
        reason = (str(error).splitlines() or ["it is empty"])[0]
        with path.open("rb") as file:  # an archive, whose table stands at its end
            cut = file.read(4) == b"PK\x03\x04" and not _is_archive(path)
        raise ModelError(
            f"{path} is cut off or damaged" if cut else f"{path} is no checkpoint that holds numbers only: {reason}",
            code="schema",
            hint="Fetch or copy it again." if cut else "",
        ) from error
    if isinstance(document, Mapping) and {"format", "finedetr"} <= document.keys():
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        raise ModelError(
            f"{path} is a state that a run of finedetr goes on from, no weights",
            code="mismatch",
            hint=f"Use {run} (its best weights), or a file of {run / 'weights'}.",
        )
    for step in (("ema", "module"), ("model",), ()):
        found: Any = document
        for key in step:
            found = found.get(key) if isinstance(found, Mapping) else None
        if isinstance(found, Mapping) and found and all(isinstance(value, Tensor) for value in found.values()):
            strange = [key for key, value in found.items() if value.layout != torch.strided or value.is_quantized]
            if strange:
                raise ModelError(f"{path}: {strange[0]} is sparse or quantized; plain tensors are read", code="schema")
            return {str(key).removeprefix("module."): value for key, value in found.items()}
    raise ModelError(f"{path} holds no table of tensors under ema.module, model or at its top", code="schema")


def _classes(count: int, settings: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[int, ...]]:
    labels = settings.get("id2label")
    if isinstance(labels, Mapping) and len(labels) == count and all(key.isdecimal() for key in labels):
        names = tuple(str(labels[key]) for key in sorted(labels, key=int))
        # COCO's 91 outputs have ten that stand for nothing, all called "N/A"
        names = tuple(name if names.count(name) == 1 else f"{name} {index}" for index, name in enumerate(names))
    elif count == len(COCO_NAMES):
        names = COCO_NAMES
    elif count == len(OBJECTS365_NAMES) + 1:
        names = ("unused", *OBJECTS365_NAMES)  # they answer with category ids, which begin with 1
    else:
        names = tuple(f"class {index}" for index in range(count))
    if count == len(COCO_NAMES) and names[0] == "person":
        return COCO_NAMES, COCO_IDS  # some files spell a few names in the way of Pascal VOC
    return names, tuple(range(count))


def _fit(
    given: Mapping[str, Tensor],
    names_of: Callable[..., tuple[str, ...]],
    rows: list[ModelConfig],
    path: Path,
) -> tuple[ModelConfig, dict[str, Tensor], set[str]]:
    """The model of the table whose every tensor is in the file with its shape."""
    count = _count_classes(given)
    best: tuple[int, str, list[str]] | None = None
    for config in rows:
        absent = ("label_embedding",) if config.classic else ()
        found = gather(_blueprint(config, count), functools.partial(names_of, config=config), given, absent)
        if not found.faults:
            return config, found.state, found.used
        if best is None or len(found.faults) < best[0]:
            best = (len(found.faults), config.name, found.faults[:3])
    if best is None:
        raise ModelError(
            f"{path} is of no model of `finedetr models`, as its config.json describes it",
            code="mismatch",
            hint="Of deformable_detr there are: one stage, with_box_refine, both stages with it; 4 levels or 1.",
        )
    raise ModelError(
        f"{path} fits no model of `finedetr models`; the closest, {best[1]}, lacks {best[0]} tensors: "
        f"{'; '.join(best[2])}",
        code="mismatch",
    )


@functools.cache
def _blueprint(config: ModelConfig, count: int) -> dict[str, Tensor]:
    """The tensors of a model without their numbers."""
    with torch.device("meta"):
        return Detector(config, count).state_dict()


def _title(path: Path, folder: Path | None) -> str:
    """What whoever made a file calls it: the name of the file, its folder, or its repository in the Hub's cache."""
    if folder is None:
        return path.name.lower()
    folder = folder.resolve()
    return (folder.parent.parent if folder.parent.name == "snapshots" else folder).name.lower()


def _likely_first(rows: list[ModelConfig], given: Mapping[str, Tensor], title: str) -> list[ModelConfig]:
    """The rows of the table, those most like the file first: building a model, even without numbers, takes a moment."""
    shape = _shape(given)
    resnet = any("res_layers" in key or ".embedder.embedder." in key for key in given)

    def unlike(row: ModelConfig) -> tuple[bool, ...]:
        return (
            (row.decoder.width, row.decoder.layers) != shape or (row.backbone.name in RESNETS) != resnet,
            row.name.startswith("deim-") != ("deim" in title),
            row.name.endswith("-dsp") != ("dsp" in title),
        )

    return sorted(rows, key=unlike)


def _sampled(config: ModelConfig) -> ModelConfig:
    """The same model that samples the pyramid at single cells, under that one's name."""
    name = config.name.removesuffix("-dsp") + "-dsp"
    return replace(config, name=name, decoder=replace(config.decoder, sampling="discrete"))


def _check_settings(config: ModelConfig, settings: Mapping[str, Any], path: Path) -> None:
    """Holds a configuration of transformers to the model in what decides answers and no shape."""
    for key, wanted in unshaped(config).items():
        given = settings.get(key, wanted)
        if isinstance(wanted, list) and isinstance(given, int):
            given = [given] * len(wanted)
        if given != wanted:
            raise ModelError(
                f"{path} looks like {config.name}, for which {key} is {wanted!r}; its config.json says {given!r}",
                code="mismatch",
                hint="Only what answers as the published model does is read.",
            )


def _with_bins(config: ModelConfig, state: Mapping[str, Tensor], path: Path) -> ModelConfig:
    """The same model, whose bins mean what the file says: `reg_scale` and `up` are numbers of the weights."""
    if config.decoder.boxes == "plain":
        return config
    scale, up = (float(state[f"decoder.bin_table.{name}"]) for name in ("reg_scale", "up"))
    if not (math.isfinite(scale) and math.isfinite(up) and min(scale, up) > 0):
        raise ModelError(
            f"{path}: reg_scale and up say what the bins of edges mean; wanted numbers above 0, got {scale} and {up}",
            code="schema",
        )
    return replace(config, decoder=replace(config.decoder, scale=scale, up=up))


def _rows() -> Iterator[ModelConfig]:
    """The models of the table; those that answer before their last layer also without the layers behind."""
    for config in ZOO.values():
        yield config
        if config.decoder.answering is not None:
            yield replace(config, decoder=replace(config.decoder, layers=config.decoder.answering, answering=None))


def _may_be(row: ModelConfig, settings: Mapping[str, Any]) -> bool:
    """Whether a model of the table is of the make that a configuration of transformers describes."""
    decoder = row.decoder
    match settings.get("model_type"):
        case "conditional_detr":
            fits = decoder.attention == "conditional" and decoder.source == "points"
        case "dab-detr":
            fits = decoder.source == "anchors"
        case "deformable_detr":
            source = "proposals" if settings.get("two_stage") else "points"
            shape = (source, bool(settings.get("with_box_refine")), settings.get("num_feature_levels", 4))
            own = (decoder.source, decoder.refine, len(row.strides))
            fits = row.classic and decoder.attention == "deformable" and own == shape
        case None:
            return not row.classic
        case _:
            return not row.classic and not row.name.startswith("deim-")
    tables = [settings.get(key) for key in ("backbone_kwargs", "backbone_config")]
    backbone = {key: value for table in tables if isinstance(table, dict) for key, value in table.items()}
    return fits and row.backbone.dilated == (bool(settings.get("dilation")) or backbone.get("output_stride") == 16)


def _with_queries(row: ModelConfig, settings: Mapping[str, Any]) -> ModelConfig:
    """The same model with as many queries as the configuration says."""
    count = settings.get("two_stage_num_proposals" if row.decoder.source == "proposals" else "num_queries")
    if count is None:
        return row
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ModelError(f"config.json: at least 1 query is wanted, {count!r} came", code="schema")
    return replace(row, decoder=replace(row.decoder, queries=count))


def _shape(given: Mapping[str, Tensor]) -> tuple[int, int]:
    """Width and layers of the decoder in a file."""
    layers = {match[1] for key in given if (match := re.match(r"(?:model|decoder)\.decoder\.layers\.(\d+)\.", key))}
    scores = _scores(given)
    return (0 if scores is None else scores.shape[1]), len(layers)


def _count_classes(given: Mapping[str, Tensor]) -> int:
    scores = _scores(given)
    return len(COCO_NAMES) if scores is None else len(scores)


def _scores(given: Mapping[str, Tensor]) -> Tensor | None:
    """The weights of a class head [C, D], if the file has any."""
    heads = (given[name] for name in _SCORES if name in given)
    return next((head for head in heads if head.ndim == 2 and len(head)), None)
