"""`finedetr predict`: annotated pictures and JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from finedetr.cli.flags import output, parse, spell
from finedetr.detections import Detections
from finedetr.errors import DataError, FineDETRError, UsageError
from finedetr.evaluate.address import is_address
from finedetr.evaluate.pictures import is_ours, save_picture
from finedetr.evaluate.predictor import Predictor
from finedetr.evaluate.results import as_files
from finedetr.evaluate.sources import Pictures, find_pictures
from finedetr.evaluate.video import Video, VideoWriter, is_video
from finedetr.files import fresh_stem, refuse_existing, write_text
from finedetr.kernels.process import prepare_cpu
from finedetr.model.weights import Card, load_weights
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
    """Replace labels that are in --out already, and pictures that are not of an earlier predict."""
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
    if not flags.overwrite:
        refuse_existing(_theirs(flags, sources), "Give another --out, or --overwrite to replace it.")
    device = choose_device(flags.device)
    if device.type == "cpu":
        prepare_cpu()
    detector, card = load_weights(weights, device, queries=flags.queries)
    card = replace(card, size=flags.size or card.size)
    predictor = Predictor(
        detector, card, device, flags.batch, precision=flags.precision, workers=flags.workers, top=flags.top
    )
    kept: list[_Kept] = []
    try:
        _predict(predictor, flags, kept)
    except BaseException as error:  # what was found until then is kept, after Ctrl-C too
        if kept:
            _write(kept, flags, card)
        if isinstance(error, FineDETRError):
            error.details |= {"pictures": [one.document for one in kept], "out": str(flags.out)}
        raise
    if predictor.broken and not kept:
        first = next(iter(predictor.broken.values()))
        raise DataError(f"none of {len(predictor.broken)} pictures can be read, first: {first}", code="corrupt_image")
    _write(kept, flags, card)
    if flags.json:
        documents = [one.document for one in kept]
        passed = [f"{message}; it is passed over" for message in predictor.broken.values()]
        passed += [line for found in sources for line in found.left_out]
        return {"result": {"pictures": documents, "out": str(flags.out)}, "warnings": passed}
    return None


@dataclass(frozen=True)
class _Kept:
    """What was found in a picture: without its pixels, as a line, and the name of its files without their endings."""

    answer: Detections
    document: dict[str, Any]
    stem: str


def _predict(predictor: Predictor, flags: Predict, kept: list[_Kept]) -> None:
    """Asks about each source, one after the other; draws, prints and adds to `kept` what was found."""
    with _Annotated(flags.out) as annotated:
        for source in flags.source:
            asked = predictor.stream(source, flags.threshold, flags.batch, nms=flags.nms, tile=flags.tile)
            for found in asked:
                document = _document(found)
                stem = annotated.name(found)
                if flags.draw:
                    document["picture"] = str(annotated.add(found, stem))
                kept.append(_Kept(replace(found, image=None), document, stem))
                if not flags.json:
                    output(json.dumps(document, ensure_ascii=False))


def _write(kept: Sequence[_Kept], flags: Predict, card: Card) -> None:
    """Writes the lines and the labels of all that was found."""
    answers, stems = [one.answer for one in kept], [one.stem for one in kept]
    lines = "".join(f"{json.dumps(one.document, ensure_ascii=False)}\n" for one in kept)
    file = write_text(flags.out / "predictions.jsonl", lines)
    if flags.format != "json":
        for path, text in as_files(flags.format, answers, stems, card.names, card.category_ids).items():
            write_text(flags.out / path, text)
    if not flags.json:
        print(f"{sum(map(len, answers))} detections in {len(kept)} pictures: {file}", file=sys.stderr)


def _check(flags: Predict) -> None:
    """There is a source; frames are no files with labels; the input has pixels."""
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
    if flags.size and min(flags.size) < 1:
        raise UsageError(f"size: 1 or more is wanted, {flags.size[0]} and {flags.size[1]} came", code="range")


def _theirs(flags: Predict, sources: Sequence[Pictures]) -> list[Path]:
    """Where nothing may be replaced: labels, which somebody may have corrected, and pictures of no earlier predict."""
    labels = {"coco": ["predictions.json"], "csv": ["predictions.csv"], "yolo": ["classes.txt"], "json": []}
    paths = [flags.out / name for name in labels[flags.format]]
    if flags.format == "yolo":
        paths += flags.out.glob("labels/*")
    taken: set[str] = set()
    for item in (item for found in sources for item in found.items if flags.draw):
        video = item if isinstance(item, Video) else None
        stem = fresh_stem(_stem(video.path if video else str(item)), taken)
        path = flags.out / f"{stem}{'.mp4' if video else '.jpg'}"
        if path.exists() and not (Video(str(path)).is_ours() if video else is_ours(path)):
            paths.append(path)
    return paths


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


def _stem(path: str) -> str:
    """The name of a file or an address without its ending."""
    return Path(path.partition("?")[0] if "://" in path else path).stem


class _Annotated:
    """Writes annotated pictures, and the frames of a video as one video."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.stem = ""
        self.taken: set[str] = set()
        self.video: VideoWriter | None = None

    def __enter__(self) -> _Annotated:
        return self

    def __exit__(self, *error: Any) -> None:
        if self.video is not None:
            self.video.__exit__(*error)

    def name(self, found: Detections) -> str:
        """A stem that nobody has yet, numbered where it is taken; the frames of a video share one."""
        if not found.frame:
            self.stem = fresh_stem(_stem(found.path or "picture"), self.taken)
        return self.stem

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
