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
from finedetr.errors import DataError, UsageError
from finedetr.evaluate.address import is_address
from finedetr.evaluate.pictures import save_picture
from finedetr.evaluate.predictor import Predictor
from finedetr.evaluate.results import as_files
from finedetr.evaluate.sources import Pictures, find_pictures
from finedetr.evaluate.video import Video, VideoWriter, is_video
from finedetr.files import fresh_stem, write_text
from finedetr.model.weights import load_weights
from finedetr.train.distributed import choose_device
from finedetr.train.folder import find_weights


@dataclass(frozen=True)
class Predict:
    """Detect in pictures: annotated copies and predictions.jsonl in a folder, JSON lines on stdout."""

    weights: Annotated[Path, tyro.conf.Positional]
    """A run's folder (its best weights), a weight file, a folder of transformers, or a name such as dfine-s-coco."""
    source: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Pictures, folders, globs, http(s) addresses, videos."""
    out: Path = Path("runs/predict")
    """Folder of what is written."""
    threshold: float | None = None
    """Detections with a lower score are left out. Unset: the weights' own thresholds (eval --thresholds), or 0.4."""
    tile: int | None = None
    """Cut larger pictures into overlapping tiles of this side in pixels, for objects that are small in them."""
    format: Literal["json", "coco", "yolo", "csv"] = "json"
    """Besides JSON lines: labels for pictures, as a COCO JSON or CSV with scores, or as YOLO label files."""
    nms: float | None = None
    """Suppress overlaps of one class above this IoU. Off: the detector needs none."""
    size: tuple[int, int] | None = None
    """Height and width of the input. Unset: that of the weights."""
    queries: int | None = None
    """Another number of queries. Unset: that of the weights."""
    top: int | None = None
    """Detections kept of each picture. Unset: 300 (--tile: of each), or one for each query where there are more."""
    batch: int = 8
    """Pictures at a time."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "fp32"
    """Of the forward pass."""
    workers: int = 2
    """Threads that read pictures."""
    draw: bool = True
    """Write annotated pictures (of a video, an MP4)."""
    overwrite: bool = False
    """Replace the label files of --format yolo that are in --out already."""
    json: bool = False
    """Print one JSON document instead of lines."""


def run(words: Sequence[str]) -> dict[str, Any] | None:
    """The command."""
    flags = parse(Predict, spell(words, own=("format",)), "finedetr predict")
    _check(flags)
    weights = find_weights(flags.weights)
    sources = [find_pictures(source) for source in flags.source]
    if flags.draw:
        _check_pictures(sources, flags.out)
    device = choose_device(flags.device)
    detector, card = load_weights(weights, device, queries=flags.queries)
    card = replace(card, size=flags.size or card.size)
    predictor = Predictor(
        detector, card, device, flags.batch, precision=flags.precision, workers=flags.workers, top=flags.top
    )
    answers: list[Detections] = []
    documents: list[dict[str, Any]] = []
    with _Annotated(flags.out) as annotated:
        for found in _found(predictor, flags):
            document = _document(found)
            stem = annotated.name(found)
            if flags.draw:
                document["picture"] = str(annotated.add(found, stem))
            answers.append(replace(found, image=None))
            documents.append(document)
            if not flags.json:
                output(json.dumps(document, ensure_ascii=False))
    if predictor.broken and not answers:
        first = next(iter(predictor.broken.values()))
        raise DataError(f"none of {len(predictor.broken)} pictures can be read, first: {first}", code="corrupt_image")
    text = "".join(f"{json.dumps(document, ensure_ascii=False)}\n" for document in documents)
    files = {Path("predictions.jsonl"): text}
    if flags.format != "json":
        files |= as_files(flags.format, answers, annotated.stems, card.names, card.category_ids)
    written = [write_text(flags.out / path, content) for path, content in files.items()]
    if flags.json:
        passed = [f"{message}; it is passed over" for message in predictor.broken.values()]
        videos = sum(found.videos for found in sources)
        passed += [f"{videos} videos are passed over: name them one by one"] if videos else []
        return {"result": {"pictures": documents, "out": str(flags.out)}, "warnings": passed}
    boxes = sum(map(len, answers))
    print(f"{boxes} detections in {len(documents)} pictures: {written[0]}", file=sys.stderr)
    return None


def _found(predictor: Predictor, flags: Predict) -> Iterator[Detections]:
    """Detections of each source, one after the other."""
    for source in flags.source:
        yield from predictor.stream(source, flags.threshold, flags.batch, nms=flags.nms, tile=flags.tile)


def _check(flags: Predict) -> None:
    """There is a source; frames are no files with labels; labels that somebody may have corrected are not replaced."""
    if not flags.source:
        raise UsageError(
            "predict needs a source", code="required", hint=f"Such as: finedetr predict {flags.weights} pictures/"
        )
    for source in flags.source:
        if flags.format != "json" and is_video(source):
            raise UsageError(
                f"{source}: a frame of a video is no file that {flags.format} labels could belong to",
                code="conflict",
                hint="Use --format json.",
            )
    labels = flags.out / "labels"
    if flags.format == "yolo" and not flags.overwrite and labels.is_dir() and any(labels.iterdir()):
        raise UsageError(
            f"{labels} holds labels already", code="exists", hint="Give another --out, or --overwrite to replace them."
        )


def _check_pictures(sources: Sequence[Pictures], out: Path) -> None:
    """Annotated pictures bear the names of their sources, and must not replace one."""
    folder = out.resolve()
    for found in sources:
        for item in found.items:
            name = item.path if isinstance(item, Video) else str(item)
            path = Path(name)
            if not is_address(name) and folder in (path.parent.resolve(), path.resolve().parent):
                raise UsageError(
                    f"--out {out} is the folder of {name}: annotated pictures would replace it",
                    code="conflict",
                    hint="Give another --out, or --no-draw.",
                )


def _document(found: Detections) -> dict[str, Any]:
    """One line of predictions.jsonl."""
    moment = {} if found.frame is None else {"frame": found.frame, "seconds": round(found.seconds or 0.0, 3)}
    width, height = found.size
    return {"path": found.path, **moment, "width": width, "height": height, "detections": found.to_records()}


class _Annotated:
    """Writes annotated pictures, and the frames of a video as one video.

    Attributes:
        stems: The name of each picture without its ending; pictures of one name in several folders get numbers.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.stems: list[str] = []
        self.taken: set[str] = set()
        self.video: VideoWriter | None = None

    def __enter__(self) -> _Annotated:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.video is not None:
            self.video.__exit__(*error)

    def name(self, found: Detections) -> str:
        """A stem that nobody has yet; the frames of a video share one."""
        if not found.frame:
            path = found.path.partition("?")[0] if found.path and "://" in found.path else found.path
            self.stems.append(fresh_stem(Path(path).stem if path else "picture", self.taken))
        return self.stems[-1]

    def add(self, found: Detections, stem: str) -> Path:
        """Writes what was found into a picture, or into the next frame."""
        if found.frame is None:
            return save_picture(found.draw(), self.out / f"{stem}.jpg")
        assert found.path is not None
        if found.frame == 0:
            self.__exit__(None, None, None)
            self.video = VideoWriter(self.out / f"{stem}.mp4", Video(found.path).rate())
        assert self.video is not None
        self.video.add(found.draw())
        return self.video.path
