"""What a run would be: its recipe, its lengths, its learning rate with the reason, its memory. Nothing is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from finedetr.model.cost import count_operations, latencies
from finedetr.model.deploy import deployed
from finedetr.model.detector import Detector
from finedetr.model.weights import read_card
from finedetr.train.config import flatten, to_dict
from finedetr.train.distributed import choose_device
from finedetr.train.plan import Plan
from finedetr.train.recipe import Recipe
from finedetr.train.session import Request, balance_line, unlabelled_line

__all__ = ["describe", "expected_memory"]

ROOM = 1.35  # what denoising queries, losses and workspaces need beyond the forward pass


def describe(request: Request, base: Recipe, made: Recipe) -> tuple[dict[str, Any], str]:
    """The resolved recipe and plan, as a document and as text.

    Args:
        request: What the flags ask for.
        base: The recipe before its flags: tells where a value comes from.
        made: The recipe before --config, too.
    """
    data = request.open()
    pictures = len(data.train)
    recipe = request.recipe.resolve(pictures)
    batch = recipe.batch or 1
    plan = Plan.of(recipe, recipe.epochs, data.train)
    windows = plan.windows
    beside = recipe.teaching.beside(batch) if data.unlabelled else 0
    memory = expected_memory(recipe, len(data.train.categories), beside)
    if request.teacher:  # its weights; what its forward pass needs is free again before the student's
        with torch.device("meta"):
            card = read_card(request.teacher)
            memory += 4 * sum(p.numel() for p in Detector(card.config, len(card.names)).parameters())
    cost = price(recipe, len(data.train.categories), choose_device(request.device))
    values = flatten(to_dict(recipe))
    layers = [flatten(to_dict(each)) for each in (request.recipe, base, made)]
    origins = {key: _origin(key, value, layers, recipe.name) for key, value in values.items()}
    document = {
        "recipe": to_dict(recipe),
        "origins": origins,
        "objective": recipe.formula(),
        "batch": batch,
        "batch_reason": request.recipe.why_batch(recipe, pictures),
        "lr": recipe.lr,
        "lr_reason": request.recipe.why_rate(recipe),
        "pictures": pictures,
        "steps": plan.total,
        "warmup_steps": recipe.schedule.warmup_of(plan.total),
        "strength": recipe.schedule.strength(plan.total),
        "windows": {"start": windows.start, "mosaic_end": windows.mosaic_end, "plain_from": windows.plain_from},
        "price": cost,
        "average_decay": plan.decay,
        "memory_bytes": memory,
        "teacher": str(request.teacher) if request.teacher else None,
        "unlabelled": {"folder": str(request.unlabelled), "pictures": len(data.unlabelled), "in_a_batch": beside}
        if data.unlabelled
        else None,
        "out": str(request.out),
    }
    dense_epochs = windows.mosaic_end > windows.start
    parts = [name for name in ("mosaic", "mixup") if dense_epochs and getattr(plan.augmentation, name)]
    dense = f"{' and '.join(parts)} from {windows.start} to {windows.mosaic_end}" if parts else "no mosaic, no mixup"
    width = max(map(len, values))
    lines = [f"{key:{width}}  {_short(value)}  ({origins[key]})" for key, value in values.items()]
    lines += [
        "",
        f"data       {data.train.evidence}; {pictures} pictures, {len(data.train.labels)} boxes",
        f"model      {recipe.model.name}, {len(data.train.categories)} classes, {recipe.size[0]}x{recipe.size[1]}",
        f"objective  {recipe.formula()}",
        f"plan       {recipe.epochs} epochs x {plan.steps} steps; {dense}; plain from {windows.plain_from}; "
        f"warm-up {recipe.schedule.warmup_of(plan.total)} steps",
        *plan.why_milder,
        *([balance_line(recipe, data)] if recipe.balance else []),
        *_price_line(cost),
        f"average    decay {plan.decay:.6g}",
        *([f"teacher    {request.teacher}"] if request.teacher else []),
        *([unlabelled_line(recipe, data)] if data.unlabelled else []),
        request.recipe.why_batch(recipe, pictures),
        request.recipe.why_rate(recipe),
        f"memory     about {memory / 2**30:.1f} GiB for one process with the whole batch",
        f"out        {request.out}",
    ]
    return document, "\n".join(lines)


def price(recipe: Recipe, classes: int, device: torch.device) -> dict[str, list[float]] | None:
    """What the host costs, and the detector that its split decoder makes of it, with random weights; None: it is whole.

    Parameters, GFLOPs, and milliseconds of one picture's forward pass on the device.
    """
    host = recipe.model.whole
    if host == recipe.model:
        return None
    both = [deployed(Detector(config, classes)).eval().to(device) for config in (host, recipe.model)]
    return {
        "parameters": [sum(p.numel() for p in detector.parameters()) for detector in both],
        "gflops": [count_operations(detector, recipe.size) / 1e9 for detector in both],
        "milliseconds": [1000 * seconds for seconds in latencies([*both], recipe.size, device)],
    }


def _price_line(found: dict[str, list[float]] | None) -> list[str]:
    if found is None:
        return []
    rows = (
        ("M parameters", [number / 1e6 for number in found["parameters"]]),
        ("GFLOPs", found["gflops"]),
        ("ms a picture here", found["milliseconds"]),
    )
    said = ", ".join(f"{host:.1f} -> {split:.1f} {what} ({split / host - 1:+.0%})" for what, (host, split) in rows)
    return [f"price      {said}, against the host whose decoder is whole"]


def expected_memory(recipe: Recipe, classes: int, beside: int = 0) -> int:
    """Bytes of one training process: weights, gradients, moments, average, and what the backward pass keeps.

    The forward pass runs on torch's meta device, where tensors have shapes but no numbers; what autograd would save is
    added up for one picture and multiplied by the pictures of a part of the batch. Denoising queries, losses and
    workspaces add about a third (measured on the CPU, D-FINE-N at 256 and S at 320: 0.87 and 1.09 GiB, within 3 %).
    `beside` pictures without labels stand beside each batch.
    """
    with torch.device("meta"):
        detector = Detector(recipe.model, classes).train()
        height, width = recipe.size
        images = torch.empty(1, 3, height, width)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # an address means something only while its storage lives
        return tensor

    alive: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = detector(images)
    del output
    for parameter in detector.parameters():
        kept.pop(parameter.untyped_storage()._cdata, None)
    parameters = sum(p.numel() for p in detector.parameters())
    multi_scale = 1.25**2 if recipe.augmentation.multi_scale_repeat else 1.0
    half = 0.6 if recipe.precision in ("bf16", "fp16") else 1.0
    part = ((recipe.batch or 1) + beside) / recipe.accumulate
    return round(parameters * 4 * 5 + ROOM * sum(kept.values()) * part * multi_scale * half)


def _origin(key: str, value: object, layers: list[dict[str, Any]], recipe: str) -> str:
    """Who set a value: the first layer, from above, below which it is another one."""
    for name, below in zip(("derived", "flag", "file"), layers, strict=True):
        if below.get(key) != value:
            return name
    return recipe


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) < 60 else text[:57] + "..."
