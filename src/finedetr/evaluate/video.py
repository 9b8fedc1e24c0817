"""Videos frame by frame, in and out, through PyAV (the extra `video`)."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from finedetr.errors import DataError, RunError, UsageError

__all__ = ["Frame", "Video", "VideoWriter", "is_video"]

log = logging.getLogger("finedetr.evaluate")
SUFFIXES = frozenset({".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".ts", ".wmv", ".flv"})
RATE = 25  # frames a second, of a video that does not tell its own
COMPLETE = 0.95  # the share of its length after which a video may end
COMMENT = "finedetr"  # in each video that is written, so that it is known again


@dataclass(frozen=True, eq=False)
class Frame:
    """One picture of a video.

    Attributes:
        path: The video.
        number: Of the frame, from 0.
        seconds: When it is shown.
        pixels: uint8 [H, W, 3] RGB.
    """

    path: str
    number: int
    seconds: float
    pixels: NDArray[np.uint8]


@dataclass(frozen=True)
class Video:
    """A video file. Iterating decodes it, one frame after the other; one that ends early is told."""

    path: str

    def __iter__(self) -> Iterator[Frame]:
        av = _library(self.path)
        try:
            with av.open(self.path) as container:
                if not container.streams.video:
                    raise DataError(f"{self.path}: holds no video", code="corrupt_video")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                first = last = 0.0
                for number, frame in enumerate(container.decode(stream)):
                    pixels, last = frame.to_ndarray(format="rgb24"), float(frame.time or 0)
                    first = first if number else last
                    yield Frame(self.path, number, last, _upright(pixels, frame))
                shown = last - first + 1 / float(stream.average_rate or RATE)
                wanted = (container.duration or 0) / av.time_base  # some formats know the end, and do not miss it
                if shown < COMPLETE * wanted:
                    log.warning(
                        "data.corrupt_video: %s: its pictures end after %.1f of %.1f seconds; is the file complete?",
                        self.path,
                        shown,
                        wanted,
                    )
        except (av.FFmpegError, ValueError) as error:
            raise DataError(
                f"{self.path}: cannot be decoded ({error})", code="corrupt_video", hint="Is the file complete?"
            ) from error

    def rate(self) -> Fraction:
        """Frames a second."""
        av = _library(self.path)
        with av.open(self.path) as container:
            return Fraction(container.streams.video[0].average_rate or RATE)

    def is_ours(self) -> bool:
        """Whether it is there, and a `VideoWriter` wrote it."""
        av = _library(self.path)
        try:
            with av.open(self.path) as container:
                return bool(container.metadata.get("comment") == COMMENT)
        except (av.FFmpegError, ValueError):
            return False


class VideoWriter:
    """Pictures of one size as an MP4, which appears under its name when it is complete.

    Args:
        path: Ends in .mp4.
        rate: Frames a second.
    """

    def __init__(self, path: str | Path, rate: Fraction) -> None:
        self.path, self.rate = Path(path), rate
        self.part = self.path.with_name(f".{self.path.stem}.{os.getpid()}.part.mp4")
        self.container: Any = None
        self.stream: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def add(self, picture: Image.Image) -> None:
        """The next picture."""
        av = _library(str(self.path))
        if self.container is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.container = av.open(str(self.part), "w")
            self.container.metadata["comment"] = COMMENT
            self.stream = self.container.add_stream(_codec(av), rate=self.rate)
            self.stream.width, self.stream.height = (side + side % 2 for side in picture.size)  # 4:2:0 needs even sides
            self.stream.pix_fmt = "yuv420p"
        size = (self.stream.width, self.stream.height)
        if picture.size != size:
            picture = picture.resize(size)
        for packet in self.stream.encode(av.VideoFrame.from_image(picture)):
            self.container.mux(packet)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.container is None:
            return
        try:
            for packet in self.stream.encode():
                self.container.mux(packet)
            self.container.close()
            os.replace(self.part, self.path)  # what there is after Ctrl-C can be watched
        except (OSError, ValueError) as problem:
            self.part.unlink(missing_ok=True)
            raise RunError(f"{self.path}: the video cannot be written ({problem})", code="io") from problem


def is_video(path: str) -> bool:
    """Whether a file is a video, by its ending."""
    return os.path.splitext(path)[1].lower() in SUFFIXES


def _codec(av: Any) -> str:
    """H.264 where the library was built with it, for every player knows it."""
    return "libx264" if "libx264" in av.codecs_available else "mpeg4"


def _upright(pixels: NDArray[np.uint8], frame: Any) -> NDArray[np.uint8]:
    """Turns the frames of a telephone that was held upright."""
    turns = round(getattr(frame, "rotation", 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(pixels, turns))


def _library(path: str) -> Any:
    try:
        import av
    except ImportError as error:
        raise UsageError(
            f"{path} is read with the package av ({error})",
            code="extra",
            hint='Install it with: pip install "finedetr[video]" (its binaries hold GPL code).',
        ) from error
    return av
