"""What others call the tensors of our models: the official code, and Hugging Face transformers (spec 2.2, 2.3).

Tables of renamings from our names to theirs, for each world and what its models are made of, applied in order.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from finedetr.model.classic_names import BACKBONES, FILES, classic_rules
from finedetr.model.config import ModelConfig
from finedetr.model.resnet import RESNETS
from finedetr.model.rules import ATTENTION, CONV_NORM, FEEDFORWARD, OLD_LINEAR, RESNET_BLOCK, SQUEEZE, Rules, rename
from finedetr.model.vit import VITS

__all__ = ["Gathered", "gather", "inside_official", "look_up", "official_names", "tied_names", "transformers_names"]

_RESNET_TO_TRANSFORMERS: Rules = (
    (r"^backbone\.stem\.(\d)\.", r"model.backbone.model.embedder.embedder.\1."),
    *RESNET_BLOCK,
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
    *FEEDFORWARD,
)
_TO_TRANSFORMERS: Rules = (
    (r"^backbone\.stem\.", "model.backbone.model.embedder."),
    (r"^backbone\.stages\.", "model.backbone.model.encoder.stages."),
    *CONV_NORM,
    (r"^(model\.backbone.*)\.affine\.", r"\1.lab."),
    *SQUEEZE,
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
    (r"^decoder\.", "model.decoder."),
    (r"layers\.(\d+)\.linear1\.", r"layers.\1.mlp.layers.0."),
    (r"layers\.(\d+)\.linear2\.", r"layers.\1.mlp.layers.1."),
    (r"\.self_attention\.out\.", ".self_attn.o_proj."),
    *ATTENTION,
)
_OLD_SPELLINGS: Rules = (  # what save_pretrained writes; RT-DETR's first version; one of two names of one parameter
    (r"^decoder\.(up|reg_scale)$", r"decoder.decoder.\1"),
    (r"^encoder\.input_proj\.(\d+)\.conv\.", r"encoder.input_proj.\1.0."),
    (r"^encoder\.input_proj\.(\d+)\.norm\.", r"encoder.input_proj.\1.1."),
    (r"model\.encoder\.aifi\.", "model.encoder.encoder."),
    (r"\.mlp\.layers\.0\.", ".fc1."),
    (r"\.mlp\.layers\.1\.", ".fc2."),
    *OLD_LINEAR,
)
_RTDETR_HGNET: Rules = (  # RT-DETRv2's own HGNetv2, where padding and convolution are one sequence
    (r"\.aggregation\.0\.", ".aggregation_squeeze_conv."),
    (r"\.aggregation\.1\.", ".aggregation_excitation_conv."),
    (r"stem\.(stem2[ab])\.conv\.", r"stem.\1.conv.1."),
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
_RESNET_TO_TORCHVISION: Rules = (
    (r"^backbone\.stem\.0\.conv\.", "backbone.conv1."),
    (r"^backbone\.stem\.0\.norm\.", "backbone.bn1."),
    (r"^(backbone\.stages\..*)\.shortcut\.conv\.", r"\1.downsample.0."),
    (r"^(backbone\.stages\..*)\.shortcut\.norm\.", r"\1.downsample.1."),
    *(  # blocks and stages count from 0 here
        (rf"^(backbone\.stages\..*)\.convs\.{conv}\.{ours}\.", rf"\1.{theirs}{conv + 1}.")
        for conv in range(3)
        for ours, theirs in (("conv", "conv"), ("norm", "bn"))
    ),
    *((rf"^backbone\.stages\.{stage}\.", f"backbone.layer{stage + 1}.") for stage in range(4)),
)
_HGNET_TO_OFFICIAL: Rules = (
    (r"^(backbone\..*)\.norm\.", r"\1.bn."),
    (r"^(backbone\..*)\.affine\.", r"\1.lab."),
    *SQUEEZE,
)
_VIT_TO_OFFICIAL: Rules = (
    (r"^backbone\.joins\.(\d)\.conv\.", r"backbone.convs.\1."),
    (r"^backbone\.joins\.(\d)\.norm\.", r"backbone.norms.\1."),
    (r"^backbone\.detail\.stem\.conv\.", "backbone.sta.stem.0."),
    (r"^backbone\.detail\.stem\.norm\.", "backbone.sta.stem.1."),
    (r"^backbone\.detail\.convs\.0\.conv\.", "backbone.sta.conv2.0."),
    (r"^backbone\.detail\.convs\.0\.norm\.", "backbone.sta.conv2.1."),
    (r"^backbone\.detail\.convs\.1\.conv\.", "backbone.sta.conv3.1."),  # behind an activation
    (r"^backbone\.detail\.convs\.1\.norm\.", "backbone.sta.conv3.2."),
    (r"^backbone\.detail\.convs\.2\.conv\.", "backbone.sta.conv4.1."),
    (r"^backbone\.detail\.convs\.2\.norm\.", "backbone.sta.conv4.2."),
    (r"^backbone\.vit\.class_token$", "backbone.vit.cls_token"),
    (r"^backbone\.vit\.patches\.", "backbone.vit.patch_embed.proj."),
    (r"^backbone\.vit\.positions\.", "backbone.vit.rope_embed."),
    (r"^backbone\.vit\.blocks\.(\d+)\.(qkv|proj)\.", r"backbone.vit.blocks.\1.attn.\2."),
    (r"^backbone\.vit\.blocks\.(\d+)\.linear([12])\.", r"backbone.vit.blocks.\1.mlp.fc\2."),
    (r"^backbone\.vit\.blocks\.(\d+)\.scale([12])$", r"backbone.vit.blocks.\1.ls\2.gamma"),
)
_GATED_VIT_TO_OFFICIAL: Rules = ((r"^(backbone\.vit\..*)\.mlp\.fc2\.", r"\1.mlp.w3."),)
_DEIMV2_TO_OFFICIAL: Rules = (
    (r"^decoder\.layers\.(\d+)\.(gateway\.norm|norm\d)\.weight$", r"decoder.layers.\1.\2.scale"),
    (r"^decoder\.layers\.(\d+)\.linear1\.", r"decoder.layers.\1.swish_ffn.w12."),
    (r"^decoder\.layers\.(\d+)\.linear2\.", r"decoder.layers.\1.swish_ffn.w3."),
    (r"^encoder\.down([12])\.project\.conv\.", r"encoder.down_sample\1.1."),
    (r"^encoder\.down([12])\.project\.norm\.", r"encoder.down_sample\1.2."),
    (r"^encoder\.mix\.", "encoder.bi_fusion.cv."),
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


def transformers_names(key: str, config: ModelConfig) -> tuple[str, ...]:
    """Where transformers keeps a tensor of ours; queries and keys are two there."""
    if config.classic:
        name = rename(key, classic_rules(config))
        found = re.search(r"\{(\w+)\|(\w+)\}", name)
        return (name,) if found is None else tuple(name.replace(found[0], part) for part in found.groups())
    rules = _RESNET_TO_TRANSFORMERS if config.backbone.name in RESNETS else ()
    rules += _RTDETR_TO_TRANSFORMERS if config.decoder.boxes == "plain" else ()
    name = rename(key, rules + _TO_TRANSFORMERS)
    if ".self_attn.qk." in name:
        return tuple(name.replace(".self_attn.qk.", f".self_attn.{part}_proj.") for part in ("q", "k"))
    return (name.replace(".self_attn.v.", ".self_attn.v_proj."),)


def tied_names(name: str, config: ModelConfig) -> tuple[str, ...]:
    """Under which names over there a tensor is kept once more."""
    layers, shared = range(config.decoder.layers), config.decoder.shared_boxes or config.decoder.shared_scores
    if (head := re.match(r"(class_embed|bbox_embed|decoder\.dec_bbox_head)\.0\.", name)) and shared:
        return tuple(f"{head[1]}.{layer}.{name[head.end() :]}" for layer in layers)
    if name.startswith("bbox_predictor.") and config.decoder.refine:
        return (name.replace("bbox_predictor.", "model.decoder.bbox_embed."),)
    if name.startswith(("model.decoder.class_embed.", "model.decoder.bbox_embed.")):
        return (name.removeprefix("model.decoder."),)
    return (name.replace("decoder.", "decoder.decoder."),) if name in ("decoder.up", "decoder.reg_scale") else ()


def official_names(key: str, config: ModelConfig) -> tuple[str, ...]:
    """Where the official files keep a tensor of ours.

    Queries, keys and values of the decoder are one there (`name@part`); the two halves of a gated layer of DINOv3 two.
    """
    name = rename(key, _backbone_rules(config.backbone.name))
    if config.decoder.gated:
        name = rename(name, _DEIMV2_TO_OFFICIAL)
    name = rename(name, _TO_OFFICIAL)
    if ".mlp.fc1." in name and VITS[config.backbone.name].gated:
        return tuple(name.replace(".fc1.", f".{half}.") for half in ("w1", "w2"))
    joint = re.sub(r"\.self_attn\.(qk|v)\.(weight|bias)$", r".self_attn.in_proj_\2", name)
    return (f"{joint}@{'qk' if '.self_attn.qk.' in name else 'v'}",) if joint != name else (name,)


def _backbone_rules(name: str) -> Rules:
    if name in RESNETS:
        return _RESNET_TO_TORCHVISION if RESNETS[name].plain else _RESNET_TO_OFFICIAL
    if name not in VITS:
        return _HGNET_TO_OFFICIAL
    gated = _GATED_VIT_TO_OFFICIAL if VITS[name].gated else ()
    return _VIT_TO_OFFICIAL + gated + ((r"^backbone\.vit\.", inside_official(name)),)


def inside_official(vit: str) -> str:
    """What the names of a vision transformer's tensors begin with in DEIMv2's files."""
    return "backbone.dinov3." if VITS[vit].dinov3 else "backbone.dinov3._model."


@lru_cache(maxsize=65536)  # every row of the table asks for much the same names
def _spellings(name: str) -> tuple[str, ...]:
    """All ways in which files of transformers spell a name that it has in memory."""
    file = rename(name, FILES)
    timm = (rename(file, BACKBONES), rename(name, BACKBONES)) if name.startswith("model.backbone.") else ()
    old = (rename(name, _OLD_SPELLINGS), rename(name, _RTDETR_HGNET))
    return (name, *old, file, *timm, name.removeprefix("model.decoder."))


@dataclass(frozen=True)
class Gathered:
    """What a file has of a model of ours."""

    state: dict[str, Tensor]  # under our names
    used: set[str]  # their names
    faults: list[str]


def gather(
    own: Mapping[str, Tensor],
    names_of: Callable[[str], tuple[str, ...]],
    given: Mapping[str, Tensor],
    absent: tuple[str, ...] = (),
) -> Gathered:
    """Finds every tensor of ours in a file.

    Args:
        own: Ours, for their shapes.
        names_of: Where one of them is over there; several are joined.
        given: The tensors of the file.
        absent: Beginnings of those that the file may lack, which are zero then; counts of batches always may.
    """
    gathered = Gathered({}, set(), [])
    for key, tensor in own.items():
        names = names_of(key)
        found = [part for part in (look_up(given, name) for name in names) if part is not None]
        if len(found) < len(names):
            if key.endswith("num_batches_tracked") or key.startswith(absent):
                gathered.state[key] = torch.zeros(tensor.shape, dtype=tensor.dtype)
            else:
                gathered.faults.append(f"missing {names[0].partition('@')[0]}")
            continue
        gathered.used.update(name for name, _ in found)
        values = [value for _, value in found]
        if len(values) == 1 and values[0].numel() == tensor.numel() == 1:
            values = [values[0].reshape(tensor.shape)]
        wrong = [value for value in values if value.shape[1:] != tensor.shape[1:] or value.ndim != tensor.ndim]
        if wrong or sum(len(value) if value.ndim else 1 for value in values) != (len(tensor) if tensor.ndim else 1):
            said = " and ".join(str(tuple(value.shape)) for value in values)
            gathered.faults.append(f"{names[0].partition('@')[0]} is {said}, expected {tuple(tensor.shape)}")
        else:
            gathered.state[key] = torch.cat(values) if len(values) > 1 else values[0]
    return gathered


def look_up(given: Mapping[str, Tensor], name: str) -> tuple[str, Tensor] | None:
    """A tensor of a file, by any of its spellings; `name@qk` and `name@v` are parts of a joint projection."""
    name, _, part = name.partition("@")
    for spelling in _spellings(name):
        if spelling in given:
            tensor = given[spelling]
            if part and tensor.ndim:
                third = tensor.shape[0] // 3
                tensor = tensor[: 2 * third] if part == "qk" else tensor[2 * third :]
            return spelling, tensor
    return None
