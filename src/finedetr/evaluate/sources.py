"""What a user points at: a picture, an address, an array, a video, a folder, a glob, or a list of these."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import numpy as np
import torch
from numpy.typing import NDArray

from finedetr.data.images import SUFFIXES, decode, from_pillow, read_image
from finedetr.errors import DataError, UsageError
from finedetr.evaluate.address import fetch, is_address
from finedetr.evaluate.video import Frame, Video, is_video
from finedetr.files import walk

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["Pictures", "Source", "each_picture", "find_pictures", "read_source"]

Source: TypeAlias = "str | os.PathLike[str] | Image.Image | NDArray[np.uint8]"


@dataclass(frozen=True)
class Pictures:
    """What was found.

    Attributes:
        items: Paths, addresses, PIL pictures, arrays or videos, in order.
        single: Whether one picture was meant, so that one answer is expected.
        forgiving: Whether broken files are passed over: nobody named them one by one.
        videos: How many videos of folders and globs are left out. They are taken one by one only: where there is a
            video, the answer is an iterator.
        others: How many other files of folders and globs are left out, by their endings.
    """

    items: tuple[Source | Video, ...]
    single: bool
    forgiving: bool
    videos: int = 0
    others: Counter[str] = field(default_factory=Counter)

    @property
    def left_out(self) -> list[str]:
        """A line on the videos, and one on the other files that are left out."""
        lines = [f"{self.videos} videos are passed over: name them one by one"] if self.videos else []
        if self.others:
            kinds = ", ".join(f"{count} {ending or 'without an ending'}" for ending, count in self.others.most_common())
            lines.append(f"{self.others.total()} files that are no pictures are passed over: {kinds}")
        return lines

    @property
    def video(self) -> bool:
        """Whether there is a video among them: its frames are too many to be held."""
        return any(isinstance(item, Video) for item in self.items)


def find_pictures(source: Source | Iterable[Source]) -> Pictures:
    """The pictures that a source stands for.

    A folder gives the pictures in it and below it, sorted by path, hidden files left out, links followed; a glob those
    that it matches.

    Raises:
        DataError: Where there is no such file, or no picture in it.
        UsageError: For something that is no source.
    """
    if isinstance(source, (str, os.PathLike)):
        return _from_path(os.fspath(source))
    if _is_picture(source):
        return Pictures((cast("Source", source),), single=True, forgiving=False)
    if isinstance(source, torch.Tensor):
        raise UsageError(
            f"a picture as an array is uint8 [H, W, 3] in RGB order; got a tensor {list(source.shape)}",
            code="source",
            hint="Such as tensor.cpu().numpy(); where the channels come first: tensor.permute(1, 2, 0).cpu().numpy().",
        )
    if isinstance(source, (bytes, dict)) or not isinstance(source, Iterable):
        raise UsageError(
            f"a source is a path, a folder, a glob, an address, a PIL image, a uint8 array [H, W, 3], or a list of "
            f"these; got {type(source).__name__}",
            code="source",
        )
    found = [item if _is_picture(item) else find_pictures(item) for item in source]
    items: list[Source | Video] = []
    forgiving, videos, others = bool(found), 0, Counter[str]()
    for item in found:
        if isinstance(item, Pictures):
            items.extend(item.items)
            forgiving &= item.forgiving
            videos += item.videos
            others += item.others
        else:
            items.append(item)
            forgiving = False
    return Pictures(tuple(items), single=False, forgiving=forgiving, videos=videos, others=others)


def each_picture(items: Iterable[Source | Video]) -> Iterator[Source | Frame]:
    """The same, videos as their frames."""
    for item in items:
        if isinstance(item, Video):
            yield from item
        else:
            yield item


def read_source(item: Source | Frame) -> NDArray[np.uint8]:
    """Pixels of one picture: uint8 [H, W, 3] RGB, upright.

    Raises:
        DataError: Where a file or a PIL image cannot be read; it names the file.
        RunError: Where an address gives nothing.
        UsageError: For an array that is no picture.
    """
    if isinstance(item, Frame):
        return item.pixels
    if isinstance(item, str) and is_address(item):
        return decode(fetch(item), item)[0]
    if isinstance(item, (str, os.PathLike)):
        return read_image(os.fspath(item))
    if isinstance(item, np.ndarray):
        return _from_array(item)
    return from_pillow(item, getattr(item, "filename", "") or "a PIL image")


def _is_picture(value: Any) -> bool:
    """A PIL picture or an array, without importing PIL for those who use neither."""
    return isinstance(value, np.ndarray) or hasattr(value, "getexif")


def _from_path(text: str) -> Pictures:
    if is_address(text):
        if is_video(text.partition("?")[0]):
            raise UsageError(f"{text}: videos are read from files", code="source", hint="Download it first.")
        return Pictures((text,), single=True, forgiving=False)
    if "://" in text:
        raise UsageError(
            f"{text}: pictures come from files and from http or https addresses",
            code="source",
            hint="Download it first.",
        )
    if not text:
        raise UsageError("a picture, a folder, a glob or an address is wanted; nothing came", code="source")
    path = Path(text)
    if path.is_dir():
        return _of_many(_below(path), f"{path}: holds no picture")
    if path.exists() and is_video(text):
        return Pictures((Video(text),), single=False, forgiving=False)
    if path.exists():
        return Pictures((str(path),), single=True, forgiving=False)
    if glob.has_magic(text):
        files = [name for name in glob.glob(text, recursive=True) if os.path.isfile(name)]
        return _of_many(files, f"{text}: matches no picture")
    raise DataError(f"{text}: there is no such file or folder", code="missing_image")


def _below(folder: Path) -> list[str]:
    """Files in a folder and below it, hidden ones left out."""
    found = []
    for root, folders, names in walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [os.path.join(root, name) for name in names if not name.startswith(".")]
    return found


def _of_many(files: Sequence[str], nothing: str) -> Pictures:
    """The pictures among many files, sorted; `nothing` says that there are none."""
    pictures, videos, others = [], 0, Counter[str]()
    for name in sorted(files):
        ending = Path(name).suffix.lower()
        if ending in SUFFIXES:
            pictures.append(name)
        elif is_video(name):
            videos += 1
        else:
            others[ending] += 1
    if not pictures:
        hint = f"Known endings: {', '.join(sorted(SUFFIXES))}." if not videos else "Name videos one by one."
        raise DataError(nothing + (f" ({len(files)} other files)" if files else ""), code="none", hint=hint)
    return Pictures(tuple(pictures), single=False, forgiving=True, videos=videos, others=others)


def _from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    """A copy: grey and alpha become RGB; anything that would have to be guessed is refused."""
    if array.dtype == np.uint8 and array.ndim == 2:
        array = array[..., None]
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3, 4) or 0 in array.shape:
        raise UsageError(
            f"a picture as an array is uint8 [H, W, 3] in RGB order; got {array.dtype} {list(array.shape)}",
            code="source",
            hint="Many pictures are a list of arrays. Values in 0..1: times 255 first. From OpenCV: image[..., ::-1].",
        )
    if array.shape[2] == 1:
        array = np.repeat(array, 3, axis=2)
    return np.array(array[..., :3], order="C")
