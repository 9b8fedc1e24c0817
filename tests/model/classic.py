"""The classic hosts in small, and the same random detector in `transformers`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.resnet import RESNETS, ResNetTable
from finedetr.model.transformers import resnet_settings, to_transformers
from finedetr.model.zoo import variant
from tests.model.oracle import randomize

CLASSES = 5
RECIPES = {
    "conditional-detr-r50": "conditional-detr",
    "dab-detr-r50": "dab-detr",
    "deformable-detr-r50": "deformable-detr",
    "deformable-detr-r50-refine": "deformable-detr",
    "deformable-detr-r50-two-stage": "deformable-detr",
    "dino-r50": "dino",
}
"""Rows, one of each kind, and the recipe that is their own."""
RESNETS["tiny"] = ResNetTable((1, 1, 1, 2), bottleneck=False, plain=True)


def small(name: str, *, layers: int = 3, encoders: int = 2, queries: int = 7, **decoder: Any) -> ModelConfig:
    """A row of the table with a small backbone, few layers and few queries."""
    row = variant(name)
    return replace(
        row,
        name=f"small-{name}",
        backbone=replace(row.backbone, name="tiny"),
        encoder=replace(row.encoder, width=64, feedforward=32, layers=encoders, heads=4),
        decoder=replace(row.decoder, width=64, feedforward=48, layers=layers, heads=4, queries=queries, **decoder),
    )


def random_detector(config: ModelConfig, seed: int = 0) -> Detector:
    """Nothing zero, nothing one: norms, heads, offsets and all."""
    torch.manual_seed(seed)
    detector = Detector(config, CLASSES).eval()
    randomize(detector, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for part in detector.modules():
            if isinstance(part, nn.LayerNorm | nn.GroupNorm):
                part.weight.add_(0.3 * torch.randn(part.weight.shape, generator=generator))
                part.bias.add_(0.3 * torch.randn(part.bias.shape, generator=generator))
    return detector


def answers_and_exported(detector: Detector) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(logits, boxes) of a picture by the detector, and by its exported graph."""

    class Answers(nn.Module):
        def __init__(self, model: Detector) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            answers = self.model(images).matching
            return answers.logits, answers.boxes

    images, answers = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(1)), Answers(detector)
    with torch.no_grad():
        return answers(images), torch.export.export(answers, (images,)).module()(images)


def settings(config: ModelConfig) -> dict[str, Any]:
    """What transformers calls this configuration."""
    encoder, decoder = config.encoder, config.decoder
    return {
        "use_timm_backbone": False,
        "use_pretrained_backbone": False,
        "backbone": None,
        "backbone_config": resnet_settings(config.backbone),
        "d_model": decoder.width,
        "hidden_size": decoder.width,
        "encoder_layers": encoder.layers,
        "encoder_ffn_dim": encoder.feedforward,
        "encoder_attention_heads": encoder.heads,
        "decoder_layers": decoder.layers,
        "decoder_ffn_dim": decoder.feedforward,
        "decoder_attention_heads": decoder.heads,
        "num_queries": decoder.queries,
        "two_stage_num_proposals": decoder.queries,
        "num_feature_levels": len(config.strides),
        "with_box_refine": decoder.refine,
        "two_stage": decoder.source == "proposals",
        "auxiliary_loss": False,
        "num_labels": CLASSES,
        "attn_implementation": "eager",
    }


def theirs_of(config: ModelConfig) -> nn.Module:
    """`transformers`' detector of the same make, without weights."""
    import transformers as hub

    kind = {"conditional": "ConditionalDetr", "deformable": "DeformableDetr"}[config.decoder.attention]
    if config.decoder.source == "anchors":
        kind = "DabDetr"
    with torch.device("meta"):  # random numbers that nobody reads take a while
        theirs = getattr(hub, f"{kind}ForObjectDetection")(getattr(hub, f"{kind}Config")(**settings(config))).eval()
    assert isinstance(theirs, nn.Module)
    if config.backbone.dilated:  # a ResNet of transformers cannot; its convolutions can
        (stages,) = (m for key, m in theirs.named_modules() if key.endswith("model.encoder.stages"))
        for index, layer in enumerate(stages[3].layers):  # type: ignore[index]
            for conv in (m for m in layer.modules() if isinstance(m, nn.Conv2d)):
                conv.stride = (1, 1)
                if conv.kernel_size == (3, 3) and index:
                    conv.dilation = conv.padding = (2, 2)
    return theirs


def untie(theirs: nn.Module) -> None:
    """A fresh model has one class head for all layers, under many names (spec 2.3); a loaded one need not."""
    import copy

    for path in ("class_embed", "bbox_embed"):
        heads = getattr(theirs, path, None)
        if isinstance(heads, nn.ModuleList):
            fresh = nn.ModuleList(copy.deepcopy(head) for head in heads)
            setattr(theirs, path, fresh)
            if getattr(theirs.model.decoder, path, None) is not None:
                setattr(theirs.model.decoder, path, fresh)


def copied(ours: Detector) -> dict[str, Tensor]:
    """Our weights under the names of transformers in memory, which has no denoising queries here."""
    state = {key: tensor for key, tensor in ours.state_dict().items() if not key.startswith("label_embedding")}
    return to_transformers(state, ours.config)


def stages_of(theirs: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and boxes of all layers, which they show to their loss only."""
    shown: list[Tensor] = []

    def listen(*given: Any, **_: Any) -> tuple[Tensor, dict[str, Tensor], None]:
        shown.extend(given[5:7])
        return torch.zeros(()), {}, None

    conditional, states = hasattr(theirs, "class_labels_classifier"), []

    def normed(_: nn.Module, __: object, out: Any) -> None:
        """Asked for all layers, that of transformers gives each the norm of the one before, as nobody published it."""
        out.intermediate_hidden_states = theirs.model.decoder.layernorm(torch.stack(states))  # type: ignore[operator, union-attr]
        theirs.config.auxiliary_loss = True  # type: ignore[union-attr]

    if conditional:
        theirs.model.decoder.register_forward_hook(normed)  # type: ignore[union-attr]
        for layer in theirs.model.decoder.layers:  # type: ignore[union-attr]
            layer.register_forward_hook(lambda _, __, out: states.append(out))
    theirs.config.auxiliary_loss, theirs.loss_function = not conditional, listen  # type: ignore[union-attr, assignment]
    theirs(pixel_values=images, labels=[{}] * len(images))
    logits, boxes = shown
    return logits, boxes


def classic_pair(config: ModelConfig) -> tuple[Detector, nn.Module]:
    """Our detector at random weights and theirs with the same ones, both in eval mode."""
    ours, theirs = random_detector(config), theirs_of(config)
    untie(theirs)
    theirs.to_empty(device="cpu").load_state_dict(copied(ours))
    return ours, theirs
