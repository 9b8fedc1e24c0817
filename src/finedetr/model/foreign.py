"""Weights under other people's names: the official checkpoints and Hugging Face transformers (spec 2.1 - 2.3).

There is one table of renamings for each world, from our names to theirs. Reading goes the same way round: for every
tensor that a model of ours has, its name over there is looked up, so what is not found is known by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from finedetr.errors import ModelError
from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.hgnet import HGNETS
from finedetr.model.resnet import RESNETS
from finedetr.model.zoo import ZOO

__all__ = [
    "COCO_IDS",
    "COCO_NAMES",
    "Foreign",
    "is_foreign",
    "read_foreign",
    "to_transformers",
    "transformers_config",
    "write_transformers",
]

Rules = tuple[tuple[str, str], ...]

_RESNET_TO_TRANSFORMERS: Rules = (
    (r"^backbone\.stem\.(\d)\.", r"model.backbone.model.embedder.embedder.\1."),
    (r"^backbone\.stages\.(\d+)\.(\d+)\.convs\.", r"model.backbone.model.encoder.stages.\1.layers.\2.layer."),
    (r"^backbone\.stages\.0\.(\d+)\.shortcut\.", r"model.backbone.model.encoder.stages.0.layers.\1.shortcut."),
    (
        r"^backbone\.stages\.(\d+)\.(\d+)\.shortcut\.",
        r"model.backbone.model.encoder.stages.\1.layers.\2.shortcut.1.",
    ),
)
_RTDETR_TO_TRANSFORMERS: Rules = (
    (r"^decoder\.box_heads\.", "model.decoder.bbox_embed."),
    (r"^decoder\.layers\.(\d+)\.norm2\.", r"model.decoder.layers.\1.encoder_attn_layer_norm."),
    (r"\.cross_attention\.value\.", ".cross_attention.value_proj."),
    (r"\.cross_attention\.out\.", ".cross_attention.output_proj."),
    (r"layers\.(\d+)\.linear([12])\.", r"layers.\1.mlp.fc\2."),
)
_TO_TRANSFORMERS: Rules = (
    (r"^backbone\.stem\.", "model.backbone.model.embedder."),
    (r"^backbone\.stages\.", "model.backbone.model.encoder.stages."),
    (r"^(model\.backbone.*)\.conv\.weight$", r"\1.convolution.weight"),
    (r"^(model\.backbone.*)\.norm\.", r"\1.normalization."),
    (r"^(model\.backbone.*)\.affine\.", r"\1.lab."),
    (r"\.squeeze\.", ".aggregation.0."),
    (r"\.expand\.", ".aggregation.1."),
    (r"^encoder\.input_proj\.(\d+)\.conv\.", r"model.encoder_input_proj.\1.0."),
    (r"^encoder\.input_proj\.(\d+)\.norm\.", r"model.encoder_input_proj.\1.1."),
    (r"^decoder_input_proj\.(\d+)\.conv\.", r"model.decoder_input_proj.\1.0."),
    (r"^decoder_input_proj\.(\d+)\.norm\.", r"model.decoder_input_proj.\1.1."),
    (r"^encoder\.layers\.(\d+)\.norm1\.", r"model.encoder.aifi.0.layers.\1.self_attn_layer_norm."),
    (r"^encoder\.layers\.(\d+)\.norm2\.", r"model.encoder.aifi.0.layers.\1.final_layer_norm."),
    (r"^encoder\.layers\.", "model.encoder.aifi.0.layers."),
    (r"^encoder\.", "model.encoder."),
    (r"_blocks\.(\d+)\.cv1\.", r"_blocks.\1.conv1."),
    (r"_blocks\.(\d+)\.cv2\.0\.", r"_blocks.\1.csp_rep1."),
    (r"_blocks\.(\d+)\.cv2\.1\.", r"_blocks.\1.conv2."),
    (r"_blocks\.(\d+)\.cv3\.0\.", r"_blocks.\1.csp_rep2."),
    (r"_blocks\.(\d+)\.cv3\.1\.", r"_blocks.\1.conv3."),
    (r"_blocks\.(\d+)\.cv4\.", r"_blocks.\1.conv4."),
    (r"downsample_convs\.(\d+)\.cv(\d)\.", r"downsample_convs.\1.conv\2."),
    (r"^selection\.proj\.", "model.enc_output.0."),
    (r"^selection\.norm\.", "model.enc_output.1."),
    (r"^selection\.score_head\.", "model.enc_score_head."),
    (r"^selection\.box_head\.", "model.enc_bbox_head."),
    (r"^label_embedding\.", "model.denoising_class_embed."),
    (r"^decoder\.bin_table\.", "model.decoder."),
    (r"^decoder\.query_position_head\.", "model.decoder.query_pos_head."),
    (r"^decoder\.initial_box_head\.", "model.decoder.pre_bbox_head."),
    (r"^decoder\.score_heads\.", "model.decoder.class_embed."),
    (r"^decoder\.edge_heads\.", "model.decoder.bbox_embed."),
    (r"^decoder\.quality_heads\.(\d+)\.mlp\.", r"model.decoder.lqe_layers.\1.reg_conf."),
    (r"^decoder\.layers\.(\d+)\.norm1\.", r"model.decoder.layers.\1.self_attn_layer_norm."),
    (r"^decoder\.layers\.(\d+)\.norm3\.", r"model.decoder.layers.\1.final_layer_norm."),
    (r"\.cross_attention\.", ".encoder_attn."),
    (r"^decoder\.", "model.decoder."),
    (r"layers\.(\d+)\.linear1\.", r"layers.\1.mlp.layers.0."),
    (r"layers\.(\d+)\.linear2\.", r"layers.\1.mlp.layers.1."),
    (r"\.self_attention\.out\.", ".self_attn.o_proj."),
    (r"\.self_attention\.", ".self_attn."),
)
_OLD_SPELLINGS: Rules = (  # what save_pretrained writes; and RT-DETR's first version
    (r"^encoder\.input_proj\.(\d+)\.conv\.", r"encoder.input_proj.\1.0."),
    (r"^encoder\.input_proj\.(\d+)\.norm\.", r"encoder.input_proj.\1.1."),
    (r"model\.encoder\.aifi\.", "model.encoder.encoder."),
    (r"\.mlp\.layers\.0\.", ".fc1."),
    (r"\.mlp\.layers\.1\.", ".fc2."),
    (r"\.mlp\.fc", ".fc"),
    (r"\.o_proj\.", ".out_proj."),
)
_RESNET_TO_OFFICIAL: Rules = (
    (r"^backbone\.stem\.0\.", "backbone.conv1.conv1_1."),
    (r"^backbone\.stem\.1\.", "backbone.conv1.conv1_2."),
    (r"^backbone\.stem\.2\.", "backbone.conv1.conv1_3."),
    (r"^backbone\.stages\.(\d+)\.(\d+)\.convs\.0\.", r"backbone.res_layers.\1.blocks.\2.branch2a."),
    (r"^backbone\.stages\.(\d+)\.(\d+)\.convs\.1\.", r"backbone.res_layers.\1.blocks.\2.branch2b."),
    (r"^backbone\.stages\.(\d+)\.(\d+)\.convs\.2\.", r"backbone.res_layers.\1.blocks.\2.branch2c."),
    (r"^backbone\.stages\.0\.(\d+)\.shortcut\.", r"backbone.res_layers.0.blocks.\1.short."),
    (r"^backbone\.stages\.(\d+)\.(\d+)\.shortcut\.", r"backbone.res_layers.\1.blocks.\2.short.conv."),
)
_HGNET_TO_OFFICIAL: Rules = (
    (r"^(backbone\..*)\.norm\.", r"\1.bn."),
    (r"^(backbone\..*)\.affine\.", r"\1.lab."),
    (r"\.squeeze\.", ".aggregation.0."),
    (r"\.expand\.", ".aggregation.1."),
)
_TO_OFFICIAL: Rules = (
    (r"^decoder\.(layers)\.", r"decoder.decoder.\1."),
    (r"^decoder\.quality_heads\.(\d+)\.mlp\.", r"decoder.decoder.lqe_layers.\1.reg_conf."),
    (r"^decoder\.bin_table\.", "decoder."),
    (r"^decoder\.query_position_head\.", "decoder.query_pos_head."),
    (r"^decoder\.initial_box_head\.", "decoder.pre_bbox_head."),
    (r"^decoder\.score_heads\.", "decoder.dec_score_head."),
    (r"^decoder\.(edge|box)_heads\.", "decoder.dec_bbox_head."),
    (r"^decoder_input_proj\.", "decoder.input_proj."),
    (r"^label_embedding\.", "decoder.denoising_class_embed."),
    (r"^selection\.(proj|norm)\.", r"decoder.enc_output.\1."),
    (r"^selection\.score_head\.", "decoder.enc_score_head."),
    (r"^selection\.box_head\.", "decoder.enc_bbox_head."),
    (r"^encoder\.layers\.", "encoder.encoder.0.layers."),
    (r"downsample_convs\.(\d+)\.cv(\d)\.", r"downsample_convs.\1.0.cv\2."),
    (r"\.cross_attention\.value\.", ".cross_attn.value_proj."),
    (r"\.cross_attention\.out\.", ".cross_attn.output_proj."),
    (r"\.cross_attention\.", ".cross_attn."),
    (r"\.self_attention\.out\.", ".self_attn.out_proj."),
    (r"\.self_attention\.", ".self_attn."),
)

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
        names_of: Callable[..., tuple[str, ...]] = _transformers_names
    else:
        given, settings = _read_official(path), {}
        names_of = _official_names
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


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names of DFineForObjectDetection or RTDetrV2ForObjectDetection (as in memory)."""
    theirs: dict[str, Tensor] = {}
    plain = any(key.startswith("decoder.box_heads.") for key in state)
    resnet = any(key.startswith("backbone.stem.0.") for key in state)
    for key, tensor in state.items():
        names = _transformers_names(key, plain=plain, resnet=resnet)
        for name, part in zip(names, tensor.chunk(2) if len(names) == 2 else (tensor,), strict=True):
            theirs[name] = part
            if name.startswith(("model.decoder.class_embed.", "model.decoder.bbox_embed.")):
                theirs[name.removeprefix("model.decoder.")] = part
    return theirs


def transformers_config(config: ModelConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """What transformers calls a configuration (`config.json`) of one of our models.

    Raises:
        ModelError: It has no such model: DEIM's SiLU heads are wired as ReLU there, and RT-DETRv2 has ResNets only.
    """
    encoder, decoder = config.encoder, config.decoder
    resnet = config.backbone.name in RESNETS
    if decoder.activation != "relu" or decoder.position_layers != 2 or resnet != (decoder.boxes == "plain"):
        raise ModelError(
            f"transformers has no model like {config.name!r}",
            code="unsupported",
            hint="The dfine models and rtdetrv2-r18 to r101 can be written for it; DEIM's variants cannot.",
        )
    levels = len(config.backbone.stages)
    common: dict[str, Any] = {
        "use_pretrained_backbone": False,
        "freeze_backbone_batch_norms": config.backbone.freeze_norm,
        "encoder_hidden_dim": encoder.width,
        "encoder_ffn_dim": encoder.feedforward,
        "encoder_layers": encoder.layers,
        "encode_proj_layers": [levels - 1],
        "hidden_expansion": float(encoder.expansion),
        "feat_strides": list(config.strides),
        "decoder_in_channels": [encoder.width] * levels,
        "d_model": decoder.width,
        "decoder_ffn_dim": decoder.feedforward,
        "num_feature_levels": levels,
        "decoder_layers": decoder.answering or decoder.layers,
        "num_queries": decoder.queries,
        "id2label": {str(index): name for index, name in enumerate(names)},
        "label2id": {name: index for index, name in enumerate(names)},
    }
    features = [f"stage{stage + 1}" for stage in config.backbone.stages]
    if resnet:
        table = RESNETS[config.backbone.name]
        widths = [(4 if table.bottleneck else 1) * width for width in (64, 128, 256, 512)]
        backbone = {
            "model_type": "rt_detr_resnet",
            "embedding_size": 64,
            "hidden_sizes": widths,
            "depths": list(table.blocks),
            "layer_type": "bottleneck" if table.bottleneck else "basic",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
            "out_features": features,
        }
        return {
            **common,
            "model_type": "rt_detr_v2",
            "architectures": ["RTDetrV2ForObjectDetection"],
            "backbone_config": backbone,
            "encoder_in_channels": [widths[stage] for stage in config.backbone.stages],
            "decoder_n_points": decoder.points[0],
        }
    rows = HGNETS[config.backbone.name]
    stages = {
        "stage_in_channels": [row.inputs for row in rows.stages],
        "stage_mid_channels": [row.middle for row in rows.stages],
        "stage_out_channels": [row.outputs for row in rows.stages],
        "stage_num_blocks": [row.blocks for row in rows.stages],
        "stage_numb_of_layers": [row.layers for row in rows.stages],
        "stage_downsample": [row.downsample for row in rows.stages],
        "stage_light_block": [row.light for row in rows.stages],
        "stage_kernel_size": [row.kernel for row in rows.stages],
    }
    return {
        **common,
        "model_type": "d_fine",
        "architectures": ["DFineForObjectDetection"],
        "backbone_config": {
            "model_type": "hgnet_v2",
            "num_channels": 3,
            "stem_channels": [3, *rows.stem],
            "depths": [row.blocks for row in rows.stages],
            "hidden_sizes": [row.outputs for row in rows.stages],
            **stages,
            "use_learnable_affine_block": config.backbone.affine,
            "out_features": features,
        },
        "encoder_in_channels": [rows.stages[stage].outputs for stage in config.backbone.stages],
        "depth_mult": float(encoder.depth),
        "decoder_n_points": list(decoder.points),
        "max_num_bins": decoder.bins - 1,
        "reg_scale": float(decoder.scale),
    }


def write_transformers(
    folder: Path, detector: Detector, names: tuple[str, ...], size: tuple[int, int] = (640, 640)
) -> Path:
    """Writes a folder that `transformers` loads with `from_pretrained`: model, configuration, preprocessing.

    Args:
        folder: Made where it is absent; its three files are replaced.
        detector: Trained weights.
        names: Class names in the order of the answers.
        size: (height, width) of the input.

    Raises:
        ModelError: See `transformers_config`.
    """
    settings = transformers_config(detector.config, names)
    layers = settings["decoder_layers"]
    state = {}
    for key, tensor in to_transformers(detector.state_dict()).items():
        beyond = re.match(r"model\.decoder\.(layers|class_embed|bbox_embed|lqe_layers)\.(\d+)\.", key)
        if key.startswith("model.") and not (beyond and int(beyond[2]) >= layers):
            state[key] = tensor.detach().to("cpu").contiguous().clone()
    processor = {
        "image_processor_type": "RTDetrImageProcessor",
        "do_resize": True,
        "size": {"height": size[0], "width": size[1]},
        "resample": 2,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": False,
        "do_pad": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, document in (("config.json", settings), ("preprocessor_config.json", processor)):
        (folder / name).write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


# -------------------------------------------------------------------------------------------------------------- names


def _rename(key: str, rules: Rules) -> str:
    for pattern, new in rules:
        key = re.sub(pattern, new, key)
    return key


def _transformers_names(key: str, *, plain: bool, resnet: bool) -> tuple[str, ...]:
    """Where transformers keeps a tensor of ours; queries and keys are two there."""
    rules = _RESNET_TO_TRANSFORMERS if resnet else ()
    rules += _RTDETR_TO_TRANSFORMERS if plain else ()
    name = _rename(key, rules + _TO_TRANSFORMERS)
    if ".self_attn.qk." in name:
        return tuple(name.replace(".self_attn.qk.", f".self_attn.{part}_proj.") for part in ("q", "k"))
    return (name.replace(".self_attn.v.", ".self_attn.v_proj."),)


def _official_names(key: str, *, plain: bool, resnet: bool) -> tuple[str, ...]:
    """Where the official files keep a tensor of ours; queries, keys and values are one there: name, part."""
    del plain
    name = _rename(key, (_RESNET_TO_OFFICIAL if resnet else _HGNET_TO_OFFICIAL) + _TO_OFFICIAL)
    joint = re.sub(r"\.self_attn\.(qk|v)\.(weight|bias)$", r".self_attn.in_proj_\2", name)
    return (f"{joint}@{'qk' if '.self_attn.qk.' in name else 'v'}",) if joint != name else (name,)


def _look_up(given: Mapping[str, Tensor], name: str) -> tuple[str, Tensor] | None:
    """A tensor of a file, by its new or its old spelling; `name@qk` and `name@v` are parts of a joint projection."""
    name, _, part = name.partition("@")
    for spelling in (name, _rename(name, _OLD_SPELLINGS)):
        if spelling in given:
            tensor = given[spelling]
            if part:
                third = tensor.shape[0] // 3
                tensor = tensor[: 2 * third] if part == "qk" else tensor[2 * third :]
            return spelling, tensor
    return None


def _tied(key: str, given: Mapping[str, Tensor]) -> bool:
    return key.startswith(("class_embed.", "bbox_embed.")) and f"model.decoder.{key}" in given


# -------------------------------------------------------------------------------------------------------------- files


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
        raise ModelError(
            f"{path} is no checkpoint that holds numbers only: {str(error).splitlines()[0]}", code="schema"
        ) from error
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
    rows = sorted(ZOO.values(), key=lambda row: row.name.startswith("deim-") != wants_deim)
    best: tuple[int, str, list[str]] | None = None
    for config in rows:
        count = _count_classes(given)
        with torch.device("meta"):
            own = Detector(config, count).state_dict()
        plain, resnet = config.decoder.boxes == "plain", config.backbone.name.startswith("R")
        state, used, faults = {}, set(), []
        for key, tensor in own.items():
            found = [_look_up(given, name) for name in names_of(key, plain=plain, resnet=resnet)]
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


def _count_classes(given: Mapping[str, Tensor]) -> int:
    for name in ("decoder.enc_score_head.bias", "model.enc_score_head.bias"):
        if name in given:
            return len(given[name])
    return len(COCO_NAMES)
