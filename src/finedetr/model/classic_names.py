"""What Hugging Face transformers calls the tensors of the classic DETRs (spec 2.2, 2.3), from our names to theirs."""

from __future__ import annotations

from finedetr.model.config import ModelConfig
from finedetr.model.rules import ATTENTION, CONV_NORM, FEEDFORWARD, OLD_BACKBONE, OLD_LINEAR, RESNET_BLOCK, Rules

__all__ = ["BACKBONES", "FILES", "classic_rules"]

_BACKBONE: Rules = (
    (r"^backbone\.stem\.0\.", "model.backbone.model.embedder.embedder."),
    *RESNET_BLOCK,
    (r"^backbone\.stages\.(\d+)\.(\d+)\.shortcut\.", r"model.backbone.model.encoder.stages.\1.layers.\2.shortcut."),
    *CONV_NORM,
)
_SHARED: Rules = (
    (r"^encoder\.input_proj\.(\d)\.(\d)\.", r"model.input_proj.\1.\2."),
    (r"^encoder\.input_proj\.0\.", "model.input_projection."),
    (r"^encoder\.level_embedding$", "model.level_embed"),
    (r"^encoder\.scale\.", "model.encoder.query_scale."),
    (r"^encoder\.layers\.(\d+)\.norm1\.", r"model.encoder.layers.\1.self_attn_layer_norm."),
    (r"^encoder\.layers\.(\d+)\.norm2\.", r"model.encoder.layers.\1.final_layer_norm."),
    (r"^encoder\.layers\.", "model.encoder.layers."),
    (r"^selection\.embedding\.", "model.query_position_embeddings."),
    (r"^selection\.anchors\.", "model.query_refpoint_embeddings."),
    (r"^selection\.proj\.", "model.enc_output."),
    (r"^selection\.norm\.", "model.enc_output_norm."),
    (r"^selection\.expand\.", "model.pos_trans."),
    (r"^selection\.expand_norm\.", "model.pos_trans_norm."),
    (r"^decoder\.norm\.", "model.decoder.layernorm."),
    (r"^decoder\.spatial\.scale\.", "model.decoder.query_scale."),
    (r"^decoder\.spatial\.size\.", "model.decoder.ref_anchor_head."),
    (r"^decoder\.query_position_head\.", "model.decoder.ref_point_head."),
    (r"^decoder\.layers\.", "model.decoder.layers."),
    *FEEDFORWARD,
)
_DECODER: Rules = (
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    *ATTENTION,
    (r"\.self_attn\.qk\.", ".self_attn.{q|k}_proj."),
    (r"\.self_attn\.v\.", ".self_attn.v_proj."),
)
_DEFORMABLE: Rules = (
    (r"^selection\.point\.layers\.0\.", "model.reference_points."),
    (r"(encoder_attn|encoder\.layers\.\d+\.self_attn)\.value\.", r"\1.value_proj."),
    (r"(encoder_attn|encoder\.layers\.\d+\.self_attn)\.out\.", r"\1.output_proj."),
    (r"self_attn\.out\.", "self_attn.o_proj."),
)
_CONDITIONAL: Rules = (
    (r"^selection\.point\.", "model.decoder.ref_point_head."),
    (r"^decoder\.score_heads\.0\.", "class_labels_classifier."),
    (r"^decoder\.box_heads\.0\.", "bbox_predictor."),
    (r"attn\.out\.", "attn.o_proj."),
    (r"decoder(\.layers\.\d+\.self_attn)\.\{q\|k\}_proj\.", r"decoder\1.{q|k}_content_proj."),
    (r"self_attn\.position\.", "self_attn.{q|k}_pos_proj."),
    (r"encoder_attn\.query\.", "encoder_attn.q_content_proj."),
    (r"encoder_attn\.key\.", "encoder_attn.k_content_proj."),
    (r"encoder_attn\.value\.", "encoder_attn.v_proj."),
    (r"encoder_attn\.query_position\.", "encoder_attn.q_pos_proj."),
    (r"encoder_attn\.key_position\.", "encoder_attn.k_pos_proj."),
    (r"encoder_attn\.spatial\.", "encoder_attn.q_pos_sine_proj."),
)
_DAB: Rules = (
    *OLD_BACKBONE,
    (r"^decoder\.score_heads\.0\.", "class_embed."),
    (r"^decoder\.box_heads\.0\.", "bbox_predictor."),
    (r"encoder(\.layers\.\d+)\.mlp\.", r"encoder\1."),
    (r"(layers\.\d+)\.act\.", r"\1.activation_fn."),
    (r"decoder(\.layers\.\d+)\.activation_fn\.", r"decoder\1.mlp.activation_fn."),
    (r"encoder(\.layers\.\d+)\.self_attention\.qk\.", r"encoder\1.self_attn.{q|k}_proj."),
    (r"encoder(\.layers\.\d+)\.self_attention\.v\.", r"encoder\1.self_attn.v_proj."),
    (r"encoder(\.layers\.\d+)\.self_attention\.out\.", r"encoder\1.self_attn.out_proj."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.self_attn.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.cross_attn.cross_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.mlp.final_layer_norm."),
    (r"\.self_attention\.qk\.", ".self_attn.self_attn_{query|key}_content_proj."),
    (r"\.self_attention\.position\.", ".self_attn.self_attn_{query|key}_pos_proj."),
    (r"\.self_attention\.v\.", ".self_attn.self_attn_value_proj."),
    (r"\.self_attention\.out\.", ".self_attn.self_attn.output_proj."),
    (r"\.cross_attention\.out\.", ".cross_attn.cross_attn.output_proj."),
    (r"\.cross_attention\.(query|key)\.", r".cross_attn.cross_attn_\1_content_proj."),
    (r"\.cross_attention\.(query|key)_position\.", r".cross_attn.cross_attn_\1_pos_proj."),
    (r"\.cross_attention\.value\.", ".cross_attn.cross_attn_value_proj."),
    (r"\.cross_attention\.spatial\.", ".cross_attn.cross_attn_query_pos_sine_proj."),
)
FILES: Rules = (  # what save_pretrained writes
    *OLD_BACKBONE,
    (r"(decoder\.layers\.\d+)\.self_attn\.([qk])_(content|pos)_proj\.", r"\1.sa_\2\3_proj."),
    (r"(decoder\.layers\.\d+)\.self_attn\.v_proj\.", r"\1.sa_v_proj."),
    (r"(decoder\.layers\.\d+)\.encoder_attn\.q_pos_sine_proj\.", r"\1.ca_qpos_sine_proj."),
    (r"(decoder\.layers\.\d+)\.encoder_attn\.([qk])_(content|pos)_proj\.", r"\1.ca_\2\3_proj."),
    (r"(decoder\.layers\.\d+)\.encoder_attn\.v_proj\.", r"\1.ca_v_proj."),
    *OLD_LINEAR,
)
BACKBONES: Rules = (  # where the backbone is timm's, as in the published files; blocks and stages count from 0 here
    (r"embedder\.embedder\.convolution\.", "conv1."),
    (r"embedder\.embedder\.normalization\.", "bn1."),
    *(
        rule
        for stage in range(4)
        for rule in (
            (
                rf"encoder\.stages\.{stage}\.layers\.(\d+)\.shortcut\.convolution\.",
                rf"layer{stage + 1}.\1.downsample.0.",
            ),
            (
                rf"encoder\.stages\.{stage}\.layers\.(\d+)\.shortcut\.normalization\.",
                rf"layer{stage + 1}.\1.downsample.1.",
            ),
            *(
                (
                    rf"encoder\.stages\.{stage}\.layers\.(\d+)\.layer\.{conv}\.{theirs}\.",
                    rf"layer{stage + 1}.\1.{ours}{conv + 1}.",
                )
                for conv in range(3)
                for theirs, ours in (("convolution", "conv"), ("normalization", "bn"))
            ),
        )
    ),
)


def classic_rules(config: ModelConfig) -> Rules:
    """Renamings from our names to those that transformers has in memory, in order; "{q|k}" stands for two of them."""
    if config.decoder.source == "anchors":
        return _BACKBONE + _SHARED + _DAB
    if config.decoder.attention == "conditional":
        return _BACKBONE + _SHARED + _DECODER + _CONDITIONAL
    # heads are tied to the decoder's where boxes are refined; the one behind the layers is the encoder's
    inside = "model.decoder." if config.decoder.refine else ""
    scores = "model.decoder." if config.decoder.source == "proposals" else ""
    heads: Rules = (
        (r"^decoder\.box_heads\.", f"{inside}bbox_embed."),
        (r"^decoder\.score_heads\.", f"{scores}class_embed."),
        (r"^selection\.box_head\.", f"{inside}bbox_embed.{config.decoder.layers}."),
        (r"^selection\.score_head\.", f"{scores}class_embed.{config.decoder.layers}."),
    )
    return _BACKBONE + _SHARED + _DECODER + heads + _DEFORMABLE
