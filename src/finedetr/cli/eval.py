"""`finedetr eval`: weights measured on a data set."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from finedetr.cli.flags import output, parse, spell
from finedetr.data.dataset import listed
from finedetr.data.formats import open_dataset
from finedetr.detections import THRESHOLD
from finedetr.errors import UsageError
from finedetr.evaluate.diagnosis import COSTS, check_costs, diagnose
from finedetr.evaluate.evaluation import Evaluation
from finedetr.evaluate.inference import Inference
from finedetr.evaluate.pictures import save_picture, worst_sheet
from finedetr.evaluate.predictor import evaluate_detector
from finedetr.files import write_text
from finedetr.kernels.process import prepare_cpu
from finedetr.model.detector import Detector
from finedetr.model.weights import Card, load_weights, save_weights
from finedetr.train.distributed import choose_device
from finedetr.train.folder import RunFolder, find_weights


@dataclass(frozen=True)
class Eval:
    """Measure weights on a data set: COCO's twelve numbers, per class and by size.

    Writes evaluation_SPLIT.json and predictions_SPLIT.json (COCO results in the data set's own ids), with --errors also
    worst_SPLIT.jpg.
    """

    weights: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its best weights), a weight file, a folder of transformers, or a name such as dfine-s-coco."""
    data: Path | None = None
    """The data set. Unset: that of the run."""
    split: str = "val"
    """Its split."""
    layout: str | None = None
    """coco, yolo, voc or csv, where the data set could be read as several."""
    skip_missing: bool = False
    """Go on without pictures that are listed but absent, however many they are."""
    batch: int = 8
    """Pictures at a time."""
    size: tuple[int, int] | None = None
    """Height and width of the input. Unset: that of the weights."""
    queries: int | None = None
    """Another number of queries. Unset: that of the weights."""
    top: int | None = None
    """Detections kept of each picture. Unset: 300, or one for each query where there are more."""
    max_detections: int = 100
    """The best so many detections of a picture and class count."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Of the forward pass."""
    workers: int = 2
    """Processes that read pictures."""
    out: Path | None = None
    """Folder of what is written. Unset: the run, or where the weights are."""
    per_class: bool = True
    """Show a line for each class."""
    errors: bool = False
    """Say what goes wrong, too: TIDE's six kinds of error, confused classes, thresholds, the worst pictures."""
    thresholds: Literal["f1", "cost"] | None = None
    """Keep in the weights the score of each class with the best F1 or the least cost on this split, for predict."""
    costs: tuple[float, float] | None = None
    """For --thresholds cost: of a box that is wrong, and of an object that is missed. Unset: 1 and 1."""
    json: bool = False
    """Print one JSON document instead of tables."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    words = spell(words)
    flags = parse(Eval, ["--no-per-class" if w == "--per-class=False" else w for w in words], "finedetr eval")
    file = find_weights(flags.weights)
    if flags.thresholds:
        _check_keeping(flags, file)
    costs = _costs(flags)
    data = flags.data or _data_of(flags.weights)
    where = flags.weights if flags.weights.is_dir() else flags.weights.parent
    folder = flags.out or (where if flags.weights.exists() else Path())  # nothing goes into the Hub's cache
    folder.mkdir(parents=True, exist_ok=True)  # here: a folder that cannot be is told before the work
    device = choose_device(flags.device)
    if device.type == "cpu":
        prepare_cpu()
    detector, card = load_weights(file, device, queries=flags.queries)
    dataset = open_dataset(data, flags.split, layout=flags.layout, skip_missing=flags.skip_missing)
    for note in dataset.notes:
        print(note, file=sys.stderr)
    evaluation, evaluator = evaluate_detector(
        detector,
        dataset,
        flags.size or card.size,
        Inference(device, flags.precision, card.mean, card.std, flags.top),
        batch=flags.batch,
        workers=flags.workers,
        names=card.names,
        max_detections=flags.max_detections,
        progress=_progress,
    )
    if flags.errors or flags.thresholds:
        evaluation = replace(evaluation, diagnosis=diagnose(evaluator, flags.thresholds or "f1", costs))
    if flags.thresholds:
        _keep_thresholds(file, detector, card, evaluation)
    document = {**evaluation.to_dict(), "weights": str(file), "data": str(data), "split": flags.split}
    numbers = write_text(folder / f"evaluation_{flags.split}.json", json.dumps(document, ensure_ascii=False))
    results = write_text(folder / f"predictions_{flags.split}.json", json.dumps(evaluator.coco_results()))
    files = [str(numbers), str(results)]
    sheet = worst_sheet(evaluation, evaluator) if flags.errors else None
    if sheet is not None:
        files.append(str(save_picture(sheet, folder / f"worst_{flags.split}.jpg")))
    if flags.json:
        lost = evaluation.unreadable
        warnings = [f"{lost} pictures cannot be read and are not measured"] if lost else []
        return {"result": {**document, "files": files}, "warnings": warnings}
    output(evaluation.table(per_class=flags.per_class, terminal=sys.stdout.isatty()))
    print("\n".join(files), file=sys.stderr)
    return None


def _costs(flags: Eval) -> tuple[float, float]:
    """What --thresholds cost weighs."""
    if flags.costs is not None and flags.thresholds != "cost":
        raise UsageError(
            "--costs mean nothing without --thresholds cost", code="conflict", hint="Add --thresholds cost."
        )
    costs = flags.costs or COSTS
    check_costs(costs)
    return costs


def _check_keeping(flags: Eval, file: Path) -> None:
    """Thresholds go into a file of one's own, and belong to its weights as they are."""
    if not flags.weights.exists():
        raise UsageError(
            f"{file} is in the Hub's cache, which others share: thresholds cannot be kept there",
            code="conflict",
            hint=f"Copy it first: finedetr models convert {file} mine.safetensors",
        )
    if file.suffix != ".safetensors":
        raise UsageError(
            f"{file} is not in finedetr's own format and cannot keep thresholds",
            code="conflict",
            hint="Write it in ours first: finedetr models convert",
        )
    usual = Eval(flags.weights)
    other = [
        f"--{name.replace('_', '-')}"
        for name in ("size", "queries", "top", "max_detections")
        if getattr(flags, name) != getattr(usual, name)
    ]
    if other:
        raise UsageError(
            f"--thresholds are kept for the weights as they are; {listed(other)} would measure something else",
            code="conflict",
            hint=f"Leave {listed(other)} out, or --thresholds.",
        )


def _keep_thresholds(file: Path, detector: Detector, card: Card, evaluation: Evaluation) -> None:
    """Writes the thresholds into the weights' card; a class that could not be measured gets the usual one."""
    assert evaluation.diagnosis is not None
    found = {entry.name: entry.threshold for entry in evaluation.diagnosis.thresholds if entry.f1 >= 0}
    save_weights(file, detector, replace(card, thresholds=tuple(found.get(name, THRESHOLD) for name in card.names)))
    print(f"thresholds of {len(found)} classes are kept in {file}", file=sys.stderr)


def _data_of(weights: Path) -> Path:
    """Where the data of a run was."""
    with contextlib.suppress(Exception):
        folder = RunFolder.existing(weights)
        return Path(folder.read_json(folder.config)["data"]["path"])
    raise UsageError("eval needs --data", code="required", hint=f"Such as: finedetr eval {weights} --data pictures/")


def _progress(done: int, total: int) -> None:
    """A moving line on a terminal only."""
    if sys.stderr.isatty() and not os.environ.get("CI"):
        print(f"\r{done}/{total} batches", end="\n" if done == total else "", file=sys.stderr, flush=True)
