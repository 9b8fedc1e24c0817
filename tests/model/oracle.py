"""The same random detector in `transformers`: the key map of spec 2.3, from our names to theirs."""

from __future__ import annotations

import re

import torch
from torch import Tensor, nn

from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.hgnet import HGNETS
from finedetr.model.layers import FrozenBatchNorm2d

RULES = [
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
    (r"\.self_attention\.v\.", ".self_attn.v_proj."),
]


def to_transformers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state dict under the names of `transformers`' DFineForObjectDetection in memory."""
    theirs: dict[str, Tensor] = {}
    for key, tensor in state.items():
        for pattern, new in RULES:
            key = re.sub(pattern, new, key)
        if ".self_attention.qk." in key:
            for name, part in zip(("q_proj", "k_proj"), tensor.chunk(2), strict=True):
                theirs[key.replace(".self_attention.qk.", f".self_attn.{name}.")] = part
            continue
        theirs[key] = tensor
        if key.startswith(("model.decoder.class_embed.", "model.decoder.bbox_embed.")):
            theirs[key.removeprefix("model.decoder.")] = tensor
    return theirs


def transformers_detector(config: ModelConfig, classes: int, size: tuple[int, int]) -> nn.Module:
    """`transformers`' detector of the same make, in eval mode, at its own random weights."""
    from transformers import DFineConfig, DFineForObjectDetection

    rows = HGNETS[config.backbone.name]
    encoder, decoder = config.encoder, config.decoder
    levels = len(config.backbone.stages)
    backbone = {
        "model_type": "hgnet_v2",
        "num_channels": 3,
        "stem_channels": [3, *rows.stem],
        "depths": [row.blocks for row in rows.stages],
        "hidden_sizes": [row.outputs for row in rows.stages],
        "stage_in_channels": [row.inputs for row in rows.stages],
        "stage_mid_channels": [row.middle for row in rows.stages],
        "stage_out_channels": [row.outputs for row in rows.stages],
        "stage_num_blocks": [row.blocks for row in rows.stages],
        "stage_numb_of_layers": [row.layers for row in rows.stages],
        "stage_downsample": [row.downsample for row in rows.stages],
        "stage_light_block": [row.light for row in rows.stages],
        "stage_kernel_size": [row.kernel for row in rows.stages],
        "use_learnable_affine_block": config.backbone.affine,
        "out_features": [f"stage{stage + 1}" for stage in config.backbone.stages],
    }
    theirs = DFineConfig(
        backbone_config=backbone,
        use_pretrained_backbone=False,
        freeze_backbone_batch_norms=config.backbone.freeze_norm,
        encoder_in_channels=[rows.stages[stage].outputs for stage in config.backbone.stages],
        encoder_hidden_dim=encoder.width,
        encoder_ffn_dim=encoder.feedforward,
        encode_proj_layers=[levels - 1],
        hidden_expansion=float(encoder.expansion),
        depth_mult=float(encoder.depth),
        feat_strides=list(config.strides),
        decoder_in_channels=[encoder.width] * levels,
        d_model=decoder.width,
        decoder_ffn_dim=decoder.feedforward,
        num_feature_levels=levels,
        decoder_layers=decoder.layers,
        decoder_n_points=list(decoder.points),
        num_queries=decoder.queries,
        max_num_bins=decoder.bins - 1,
        reg_scale=float(decoder.scale),
        eval_size=None,
        num_labels=classes,
    )
    return DFineForObjectDetection(theirs).eval()


def randomize(module: nn.Module, seed: int = 0) -> None:
    """Gives every norm, gate and zero-initialized head random numbers, so that nothing is constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, nn.BatchNorm2d | FrozenBatchNorm2d):
                part.running_mean.copy_(0.1 * torch.randn(part.running_mean.shape, generator=generator))
                part.running_var.copy_(0.5 + torch.rand(part.running_var.shape, generator=generator))
                part.weight.copy_(0.8 + 0.4 * torch.rand(part.weight.shape, generator=generator))
                part.bias.copy_(0.1 * torch.randn(part.bias.shape, generator=generator))
        for name, parameter in module.named_parameters():
            if name.endswith((".affine.scale", ".affine.bias")):
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
            elif parameter.requires_grad and parameter.ndim >= 1 and not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def pair(config: ModelConfig, classes: int, size: tuple[int, int], seed: int = 0) -> tuple[Detector, nn.Module]:
    """Our detector at random weights and theirs with the same ones, both in eval mode."""
    torch.manual_seed(seed)
    ours = Detector(config, classes).eval()
    randomize(ours, seed)
    theirs = transformers_detector(config, classes, size)
    missing, unexpected = theirs.load_state_dict(to_transformers(ours.state_dict()), strict=False)
    assert not unexpected, unexpected
    assert all(key.endswith("num_points_scale") for key in missing), missing
    return ours, theirs
