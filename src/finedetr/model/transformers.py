"""Our detectors for Hugging Face transformers: its configuration and its names for the same tensors (spec 2.3)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from finedetr.errors import ModelError
from finedetr.model.config import BackboneConfig, ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.foreign_names import tied_names, transformers_names
from finedetr.model.hgnet import HGNETS
from finedetr.model.resnet import RESNETS
from finedetr.model.token_encoders import DeformableEncoder
from finedetr.model.zoo import ZOO

__all__ = ["has_twin", "resnet_settings", "to_transformers", "transformers_config", "unshaped", "write_transformers"]

FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


def to_transformers(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Our state dict under the names of DFineForObjectDetection and its like (as in memory), tied ones under all."""
    theirs: dict[str, Tensor] = {}
    for key, tensor in state.items():
        names = transformers_names(key, config)
        theirs |= dict(zip(names, tensor.chunk(2) if len(names) == 2 else (tensor,), strict=True))
    return theirs | {other: part for name, part in theirs.items() for other in tied_names(name, config)}


_SAID = {  # what `transformers_config` says of both families, or what decides no answer
    "encoder": ("width", "feedforward", "expansion", "layers", "heads", "temperature", "dropout"),
    "decoder": (
        *("width", "feedforward", "layers", "heads", "points", "queries", "bins", "scale", "up", "answering"),
        "dropout",
    ),
}


def has_twin(config: ModelConfig) -> bool:
    """Whether transformers has such a model: DEIM's SiLU heads are wired as ReLU there, RT-DETRv2 has ResNets only.

    What its configuration does not say has to be as in the family: D-FINE, or RT-DETRv2.
    """
    backbone, plain = config.backbone, config.decoder.boxes == "plain"
    if plain:
        family, freely = ZOO["rtdetrv2-r50"], {"encoder": (), "decoder": ("sampling",)}
        there = backbone.name in RESNETS and not RESNETS[backbone.name].plain and len(set(config.decoder.points)) == 1
    else:
        family, freely = ZOO["dfine-n"], {"encoder": ("depth",), "decoder": ()}
        there = backbone.name in HGNETS

    def is_said(part: str) -> bool:
        mine, theirs = getattr(config, part), getattr(family, part)
        return bool(mine == replace(theirs, **{name: getattr(mine, name) for name in (*_SAID[part], *freely[part])}))

    return there and not backbone.dilated and is_said("encoder") and is_said("decoder")


def unshaped(config: ModelConfig) -> dict[str, Any]:
    """What of transformers' configuration decides answers, but the shape of no tensor."""
    encoder, decoder = config.encoder, config.decoder
    said: dict[str, Any] = {
        "encoder_attention_heads": encoder.heads,
        "decoder_attention_heads": decoder.heads,
        "normalize_before": False,
    }
    if decoder.attention == "deformable":
        said["decoder_n_points"] = list(decoder.points) if decoder.boxes == "distributions" else decoder.points[0]
    if not config.classic:
        return {
            **said,
            "activation_function": "silu",
            "encoder_activation_function": "gelu",
            "decoder_activation_function": decoder.activation,
            "positional_encoding_temperature": 10000,
            "decoder_offset_scale": 0.5,
        }
    said["activation_function"] = decoder.activation
    if decoder.source == "anchors":
        return {**said, "temperature_height": encoder.temperature, "temperature_width": encoder.temperature}
    return {**said, "encoder_n_points": DeformableEncoder.POINTS} if decoder.attention == "deformable" else said


def transformers_config(config: ModelConfig, names: tuple[str, ...]) -> dict[str, Any]:
    """What transformers calls a configuration (`config.json`) of one of our models.

    Raises:
        ModelError: It has no such model.
    """
    encoder, decoder = config.encoder, config.decoder
    resnet = config.backbone.name in RESNETS
    if config.classic:
        raise ModelError(f"{config.name} is read from transformers, and not written for it", code="unsupported")
    if not has_twin(config):
        raise ModelError(
            f"transformers has no model like {config.name!r}",
            code="unsupported",
            hint="The dfine models and rtdetrv2-r18 to r101 can be written for it; DEIM's variants cannot.",
        )
    levels = len(config.backbone.stages)
    channels = (RESNETS if resnet else HGNETS)[config.backbone.name].channels
    common: dict[str, Any] = {
        **unshaped(config),
        "use_pretrained_backbone": False,
        "freeze_backbone_batch_norms": config.backbone.freeze_norm,
        "encoder_in_channels": [channels[stage] for stage in config.backbone.stages],
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
    if resnet:
        return {
            **common,
            "model_type": "rt_detr_v2",
            "architectures": ["RTDetrV2ForObjectDetection"],
            "backbone_config": resnet_settings(config.backbone),
            "decoder_method": "discrete" if decoder.sampling == "discrete" else "default",
        }
    return {
        **common,
        "model_type": "d_fine",
        "architectures": ["DFineForObjectDetection"],
        "backbone_config": _hgnet(config.backbone),
        "depth_mult": float(encoder.depth),
        "max_num_bins": decoder.bins - 1,
        "reg_scale": float(decoder.scale),
        "up": float(decoder.up),
    }


def resnet_settings(config: BackboneConfig) -> dict[str, Any]:
    """What transformers calls the configuration of a ResNet, plain or not."""
    table = RESNETS[config.name]
    return {
        "model_type": "resnet" if table.plain else "rt_detr_resnet",
        "embedding_size": 64,
        "hidden_sizes": list(table.channels),
        "depths": list(table.blocks),
        "layer_type": "bottleneck" if table.bottleneck else "basic",
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
        "out_features": [f"stage{stage + 1}" for stage in config.stages],
    }


def _hgnet(config: BackboneConfig) -> dict[str, Any]:
    table = HGNETS[config.name]
    return {
        "model_type": "hgnet_v2",
        "num_channels": 3,
        "stem_channels": [3, *table.stem],
        "depths": [row.blocks for row in table.stages],
        "hidden_sizes": [row.outputs for row in table.stages],
        "stage_in_channels": [row.inputs for row in table.stages],
        "stage_mid_channels": [row.middle for row in table.stages],
        "stage_out_channels": [row.outputs for row in table.stages],
        "stage_num_blocks": [row.blocks for row in table.stages],
        "stage_numb_of_layers": [row.layers for row in table.stages],
        "stage_downsample": [row.downsample for row in table.stages],
        "stage_light_block": [row.light for row in table.stages],
        "stage_kernel_size": [row.kernel for row in table.stages],
        "use_learnable_affine_block": config.affine,
        "out_features": [f"stage{stage + 1}" for stage in config.stages],
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
    for key, tensor in to_transformers(detector.state_dict(), detector.config).items():
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
    config, preprocessing, weights = (folder / name for name in FILES)
    for file, document in ((config, settings), (preprocessing, processor)):
        file.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    save_file(state, weights, metadata={"format": "pt"})
    return folder
