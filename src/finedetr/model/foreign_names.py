"""What others call the tensors of our models: the official code, and Hugging Face transformers (spec 2.2, 2.3).

One table of renamings for each world, from our names to theirs, applied in order.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

__all__ = ["look_up", "official_names", "transformers_names"]

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


def _rename(key: str, rules: Rules) -> str:
    for pattern, new in rules:
        key = re.sub(pattern, new, key)
    return key


def transformers_names(key: str, *, plain: bool, resnet: bool) -> tuple[str, ...]:
    """Where transformers keeps a tensor of ours; queries and keys are two there."""
    rules = _RESNET_TO_TRANSFORMERS if resnet else ()
    rules += _RTDETR_TO_TRANSFORMERS if plain else ()
    name = _rename(key, rules + _TO_TRANSFORMERS)
    if ".self_attn.qk." in name:
        return tuple(name.replace(".self_attn.qk.", f".self_attn.{part}_proj.") for part in ("q", "k"))
    return (name.replace(".self_attn.v.", ".self_attn.v_proj."),)


def official_names(key: str, *, plain: bool, resnet: bool) -> tuple[str, ...]:
    """Where the official files keep a tensor of ours; queries, keys and values are one there: name, part."""
    del plain
    name = _rename(key, (_RESNET_TO_OFFICIAL if resnet else _HGNET_TO_OFFICIAL) + _TO_OFFICIAL)
    joint = re.sub(r"\.self_attn\.(qk|v)\.(weight|bias)$", r".self_attn.in_proj_\2", name)
    return (f"{joint}@{'qk' if '.self_attn.qk.' in name else 'v'}",) if joint != name else (name,)


def look_up(given: Mapping[str, Tensor], name: str) -> tuple[str, Tensor] | None:
    """A tensor of a file, by any of its spellings; `name@qk` and `name@v` are parts of a joint projection."""
    name, _, part = name.partition("@")
    for spelling in (name, _rename(name, _OLD_SPELLINGS), _rename(name, _RTDETR_HGNET)):
        if spelling in given:
            tensor = given[spelling]
            if part:
                third = tensor.shape[0] // 3
                tensor = tensor[: 2 * third] if part == "qk" else tensor[2 * third :]
            return spelling, tensor
    return None
