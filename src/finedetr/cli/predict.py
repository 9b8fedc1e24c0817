"""`finedetr predict`: annotated pictures and JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from finedetr.cli.flags import output, parse, spell
from finedetr.detections import Detections
from finedetr.evaluate.pictures import save_picture
from finedetr.evaluate.predictor import Predictor
from finedetr.model.weights import load_weights
from finedetr.train.checkpoint import write_atomically
from finedetr.train.distributed import choose_device
from finedetr.train.folder import find_weights


@dataclass(frozen=True)
class Predict:
    """Detect in pictures: annotated copies and predictions.jsonl in a folder, JSON lines on stdout."""

    weights: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its best weights), a weight file, a folder of transformers, or a name such as dfine-s-coco."""
    source: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Pictures, folders, globs."""
    out: Path = Path("runs/predict")
    """Folder of what is written."""
    threshold: float = 0.4
    """Detections with a lower score are left out."""
    nms: float | None = None
    """Suppress overlaps of one class above this IoU. Off: the detector needs none."""
    size: tuple[int, int] | None = None
    """Height and width of the input. Unset: that of the weights."""
    queries: int | None = None
    """Another number of queries. Unset: that of the weights."""
    top: int | None = None
    """Detections kept of each picture. Unset: 300, or one for each query where there are more."""
    batch: int = 8
    """Pictures at a time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Of the forward pass."""
    workers: int = 2
    """Threads that read pictures."""
    draw: bool = True
    """Write annotated pictures."""
    json: bool = False
    """Print one JSON document instead of lines."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    flags = parse(Predict, spell(words), "finedetr predict")
    device = choose_device(flags.device)
    detector, card = load_weights(find_weights(flags.weights), device, queries=flags.queries)
    card = replace(card, size=flags.size or card.size)
    predictor = Predictor(
        detector, card, device, flags.batch, precision=flags.precision, workers=flags.workers, top=flags.top
    )
    names = _Names()
    lines, documents = [], []
    for found in _found(predictor, flags):
        document = {
            "path": found.path,
            "width": found.size[0],
            "height": found.size[1],
            "detections": found.to_records(),
        }
        if flags.draw:
            document["picture"] = str(save_picture(found.draw(), flags.out / names.fresh(found.path)))
        lines.append(json.dumps(document, ensure_ascii=False))
        documents.append(document)
        if not flags.json:
            output(lines[-1])
    text = "".join(f"{line}\n" for line in lines)
    path = write_atomically(flags.out / "predictions.jsonl", lambda file: file.write(text.encode()))
    if flags.json:
        passed = [f"{file}: passed over" for file in predictor.broken]
        return {"result": {"pictures": documents, "out": str(flags.out)}, "warnings": passed}
    boxes = sum(len(document["detections"]) for document in documents)  # type: ignore[arg-type]
    print(f"{boxes} detections in {len(documents)} pictures: {path}", file=sys.stderr)
    return None


def _found(predictor: Predictor, flags: Predict) -> Iterator[Detections]:
    """Detections of each source, one after the other."""
    for source in flags.source:
        yield from predictor.stream(source, flags.threshold, flags.batch, nms=flags.nms)


class _Names:
    """A file name for each annotated picture; pictures of one name in several folders get numbers."""

    def __init__(self) -> None:
        self.given: dict[str, int] = {}

    def fresh(self, path: str | None) -> str:
        """A name that nobody has yet."""
        stem = Path(path).stem if path else "picture"
        self.given[stem] = self.given.get(stem, 0) + 1
        return f"{stem}.jpg" if self.given[stem] == 1 else f"{stem}-{self.given[stem]}.jpg"
