"""Published weights of DEIMv2 on genuine pictures: its authors' deployed graph beside our model with the same weights.

    python -m benchmarks.published_graph deimv2_hgnetv2_atto_coco.onnx --data ../shared/data/coco128

The graph (of their `export_onnx.py`) has norms folded into convolutions. Its numbers are put back into a file with the
names of an official checkpoint, whose norms change nothing, and that file is read as any other official `.pth`. Then
both see the same pictures: the table says how far apart detections are, and both AP by the same evaluator. Needs `onnx`
and `onnxruntime`. Writes `benchmarks/results/published_graph-MODEL.json`.

With `--save FILE.safetensors` the weights are kept for `finedetr train --weights`. Norms that change nothing would ruin
them at the first step of a training, in which norms go by the batch, so each is given the mean and variance that its
input has on these pictures, with a scale and a shift that undo them.
"""

from __future__ import annotations

import argparse
import json
import re
import tempfile
from collections.abc import Iterable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import numpy_helper
from tests.model.oracle import official
from torch import Tensor, nn

from finedetr.data.formats import open_dataset
from finedetr.data.loader import EvaluationLoader
from finedetr.evaluate.coco import Evaluator
from finedetr.evaluate.inference import Inference
from finedetr.model.classes import COCO_NAMES
from finedetr.model.detector import Detector
from finedetr.model.weights import load_weights, save_weights
from finedetr.model.zoo import published_input, variant

EPS = 1e-5  # of the norms


def module_of(node: str) -> str:
    """The official module that a node of the graph belongs to: /model/a/layers/layers.0/Conv -> a.layers.0."""
    path = node.removeprefix("/model/").split("/")[:-1]
    parts = [part for part, after in zip_longest(path, path[1:], fillvalue="") if not after.startswith(f"{part}.")]
    return re.sub(r"^decoder\.decoder\.(?!layers|lqe_layers)", "decoder.", ".".join(parts))


def official_file(graph: onnx.GraphProto, name: str, path: Path) -> None:
    """Writes the weights of a deployed graph under the names of an official checkpoint."""
    given = {tensor.name: torch.from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in graph.initializer}
    state = official(Detector(variant(name), 80))
    taken: set[str] = set()

    def put(key: str, value: Tensor) -> None:
        assert state[key].shape == value.shape, (key, state[key].shape, value.shape)
        state[key] = value
        taken.add(key)

    for key in state:  # norms that change nothing, second branches that answer nothing
        if key.endswith("running_var"):
            norm = key.removesuffix("running_var")
            for part, value in {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1 - EPS}.items():
                put(norm + part, torch.full_like(state[norm + part], value))
        if re.search(r"bottlenecks\.\d\.conv2\.conv\.weight$", key):
            put(key, torch.zeros_like(state[key]))
    for tensor, value in given.items():
        if tensor.startswith("model.") and tensor.removeprefix("model.") in state:
            put(tensor.removeprefix("model."), value)
    joint: dict[str, list[Tensor]] = {}
    for node in graph.node:
        values = [given[i] for i in node.input if i in given]
        module = module_of(node.name)
        if node.op_type == "Conv":
            conv = re.sub(r"conv_bn_fused$", "conv", module)
            conv = re.sub(r"(bottlenecks\.\d)\.conv$", r"\1.conv1.conv", conv)
            norms = (re.sub(r"conv$", "bn", conv), re.sub(r"conv$", "norm", conv), re.sub(r"\.1$", ".2", conv))
            norm = next(norm for norm in norms if f"{norm}.running_var" in state)
            put(f"{conv}.weight", values[0])
            put(f"{norm}.bias", values[1])
        elif node.op_type == "MatMul" and values and module.endswith("self_attn"):
            joint.setdefault(f"{module}.in_proj_weight", []).append(values[0].T)
        elif node.op_type == "Add" and values and module.endswith("self_attn"):
            joint.setdefault(f"{module}.in_proj_bias", []).append(values[0])
        elif node.op_type == "MatMul" and values and values[0].ndim == 2:
            key = re.sub(r"_\d+$", "", module) + ".weight"
            if key not in taken:  # heads that all layers share come once for each
                put(key, values[0].T.contiguous())
    for key, parts in joint.items():
        put(key, torch.cat(parts[:3]))
    for key in list(state):  # tensors that are kept under several names
        if match := re.match(r"decoder\.dec_bbox_head\.[12]\.(.*)", key):
            put(key, state[f"decoder.dec_bbox_head.0.{match[1]}"])
    unused = r"dec_score_head\.[01]|lqe_layers\.[01]|denoising|anchors|valid_mask|num_points|num_batches|up$|reg_scale"
    missing = [key for key in state if key not in taken and not re.search(unused, key)]
    assert not missing, missing
    torch.save({"model": state}, path)


@torch.no_grad()
def give_back_norms(detector: Detector, batches: Iterable[Tensor]) -> None:
    """Makes every norm one that normalizes these pictures, and a scale and a shift that undo it."""
    sums: dict[nn.Module, Tensor] = {}  # of values, squares, and how many there were

    def count(norm: nn.Module, given: tuple[Tensor]) -> None:
        x = given[0].transpose(0, 1).flatten(1).double()
        now = torch.stack((x.sum(1), x.square().sum(1), torch.full_like(x[:, 0], x.shape[1])))
        sums[norm] = sums.get(norm, torch.zeros_like(now)) + now

    norms = [module for module in detector.modules() if isinstance(module, nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(count) for norm in norms]
    for images in batches:
        detector(images.float().div(255))
    for hook in hooks:
        hook.remove()
    for norm in norms:
        total, squares, number = sums[norm]
        mean = total / number
        variance = (squares / number - mean.square()).clamp(min=0)
        norm.bias.add_(mean)
        norm.weight.copy_((variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def main() -> None:
    """Prints and writes the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("graph", type=Path)
    parser.add_argument("--data", default="../shared/data/coco128")
    parser.add_argument("--split", default="train")
    parser.add_argument("--model", default="deimv2-atto")
    parser.add_argument("--save", type=Path, help="a .safetensors file that can be trained")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    dataset = open_dataset(args.data, args.split)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "deimv2_official.pth"
        official_file(onnx.load(args.graph).graph, args.model, file)
        detector, card = load_weights(file)
    size = published_input(variant(args.model)).size
    if args.save:
        give_back_norms(detector, (pictures.images for pictures, _ in EvaluationLoader(dataset, size, 8, 0)))
        save_weights(args.save, detector, card)
    ours, theirs = Evaluator(dataset), Evaluator(dataset)
    session = onnxruntime.InferenceSession(args.graph, providers=["CPUExecutionProvider"])
    to_truth = np.array([dataset.categories.names.index(name) for name in COCO_NAMES])
    inference = Inference()
    apart: list[tuple[float, float]] = []  # (pixels, difference of scores) of what answers a detection of the graph
    for pictures, (index,) in EvaluationLoader(dataset, size, 1, 0):
        given = dataset.sizes[[index]]
        boxes, score, label = (answer[0] for answer in inference(detector.eval(), pictures.images, given))
        feed = {"images": pictures.images.float().div(255).numpy(), "orig_target_sizes": given.astype(np.int64)}
        their_label, their_boxes, their_score = (answer[0] for answer in session.run(None, feed))
        for place in np.flatnonzero(their_score > 0.05):  # in whatever order: near ties change places
            pixels = np.abs(boxes - their_boxes[place]).max(axis=1)
            alike = np.abs(score - their_score[place]) + 1000.0 * (label != their_label[place])
            nearest = int(np.argmin(pixels + 1000 * alike))
            apart.append((pixels[nearest], alike[nearest]))
        ours.add(index, boxes, score, to_truth[label])
        theirs.add(index, their_boxes, their_score, to_truth[their_label])
    pixels, alike = np.array(apart).T
    same = (pixels < 1) & (alike < 0.005)
    mine, published = ours.result(), theirs.result()
    document: dict[str, Any] = {
        "command": f"python -m benchmarks.published_graph {args.graph.name} --model {args.model}",
        "pictures": len(dataset),
        "detections of the graph above 0.05": len(apart),
        "found here, of the same class, within a pixel and 0.005 of score": float(same.mean()),
        "pixels apart, of those: median, largest": [float(np.median(pixels[same])), float(pixels[same].max())],
        "score apart, of those: median, largest": [float(np.median(alike[same])), float(alike[same].max())],
        "AP of the graph": published.ap,
        "AP here": mine.ap,
        "AP50 of the graph": published.ap50,
        "AP50 here": mine.ap50,
    }
    for name, value in document.items():
        print(f"{name}: {value}")
    args.results.mkdir(exist_ok=True)
    path = args.results / f"published_graph-{args.model}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
