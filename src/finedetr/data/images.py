"""Files to pixels: every picture becomes RGB bytes, upright, or a DataError that names the file.

Plain JPEGs go through libjpeg-turbo (simplejpeg, bit-identical to Pillow and half the time); everything else, and every
JPEG that the fast path refuses, goes through Pillow. Orientation (EXIF) is always applied.
"""

from __future__ import annotations

import struct
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from finedetr.errors import DataError

__all__ = ["SUFFIXES", "Header", "decode", "from_pillow", "read_header", "read_image", "read_size", "resize"]

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".jfif"})
if find_spec("PIL._avif"):  # Pillow reads it from 11.3 on, where it was built so
    SUFFIXES |= {".avif"}
MAX_PIXELS = 178_956_970  # Pillow's own limit against decompression bombs
ORIENTATION = 274  # the EXIF tag
SWAPPED = (5, 6, 7, 8)  # orientations that exchange width and height
STANDALONE = frozenset({0x01, *range(0xD0, 0xD9)})  # JPEG markers without a body
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG markers that hold the size


@dataclass(frozen=True, slots=True)
class Header:
    """What the first bytes of a picture tell. `width` and `height` are the stored ones, before EXIF is applied."""

    width: int
    height: int
    orientation: int = 1
    plain: bool = False  # a JPEG that simplejpeg decodes exactly as Pillow does

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as one sees the picture, EXIF applied."""
        return (self.height, self.width) if self.orientation in SWAPPED else (self.width, self.height)


def read_image(path: str | Path) -> NDArray[np.uint8]:
    """Pixels of a file as uint8 [H, W, 3] RGB, EXIF orientation applied; the first frame of an animation.

    Raises:
        DataError: `data.missing_image` or `data.corrupt_image`, naming the file.
    """
    return decode(read_bytes(path), path)[0]


def read_bytes(path: str | Path) -> bytes:
    """The bytes of a file; DataError `data.missing_image` where it cannot be opened."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be opened ({why})", code="missing_image") from error


def decode(
    data: bytes, path: str | Path, reduce: int = 1, buffer: bytearray | None = None
) -> tuple[NDArray[np.uint8], int]:
    """Pixels of an encoded picture, and by which factor (1, 2, 4, 8) they are smaller than it is.

    Args:
        data: The bytes of the file.
        path: The file's name, for messages.
        reduce: How much smaller the picture may come (a power of two); only plain JPEGs use it, in the DCT domain.
        buffer: Memory to decode a plain JPEG into, enlarged as needed; the result is then good until its next use.

    Returns:
        uint8 [ceil(H / factor), ceil(W / factor), 3] and the factor.
    """
    header = jpeg_header(data)
    if header is not None and header.width * header.height > MAX_PIXELS:
        raise corrupt(path, f"{header.width}x{header.height} pixels are more than {MAX_PIXELS}")
    if header is not None and header.plain:
        if header.orientation != 1:
            reduce = 1  # the padding of the last block would end up on the first side
        low = (0, 0) if reduce == 1 else (-(-header.height // reduce), -(-header.width // reduce))
        if buffer is not None and len(buffer) < header.width * header.height * 3:
            buffer.extend(bytes(header.width * header.height * 3 - len(buffer)))
        try:
            pixels = simplejpeg.decode_jpeg(data, min_height=low[0], min_width=low[1], min_factor=2, buffer=buffer)
        except ValueError:
            pixels = None  # Pillow forgives more, and says better what is wrong
        if pixels is not None:
            factor = reduce if pixels.shape[:2] == low else 1
            if factor == 1 and pixels.shape[:2] != (header.height, header.width):
                raise corrupt(path, "the decoder returned another size than the header says")
            return upright(pixels, header.orientation), factor
    return decode_with_pillow(data, path), 1


def decode_with_pillow(data: bytes, path: str | Path) -> NDArray[np.uint8]:
    """Any picture that Pillow reads, as uint8 [H, W, 3] RGB."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # half-broken metadata is no reason to worry anybody
            opened = Image.open(BytesIO(data))
    except Exception as error:  # decoders raise whatever they like: OSError, ValueError, SyntaxError, struct.error ...
        raise corrupt(path, reason(error)) from error
    return from_pillow(opened, path)


def from_pillow(opened: Image.Image, path: str | Path) -> NDArray[np.uint8]:
    """A picture of Pillow's, decoded yet or not, as uint8 [H, W, 3] RGB, upright.

    Args:
        opened: The picture.
        path: The file's name, for messages.

    Raises:
        DataError: `data.corrupt_image`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opened.load()
            image = to_rgb(ImageOps.exif_transpose(opened))
    except Exception as error:
        raise corrupt(path, reason(error)) from error
    if 0 in image.size:
        raise corrupt(path, f"the picture has no pixels ({image.width}x{image.height})")
    return np.array(image)


def to_rgb(image: Image.Image) -> Image.Image:
    """Eight-bit RGB of any Pillow mode. More than eight bits are scaled, not cut off."""
    mode = image.mode
    if mode == "RGB":
        return image
    if mode.startswith("I") or mode == "F":
        return Image.fromarray(to_bytes(np.asarray(image), sixteen=mode != "I" or image.format == "PPM")).convert("RGB")
    if mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")
    return image.convert("RGB")


def to_bytes(values: NDArray[Any], *, sixteen: bool) -> NDArray[np.uint8]:
    """Grey values of more than eight bits as bytes.

    Integers of 16 bits fill 0..65535 by their type. A 32-bit or floating-point picture does not say what white is:
    its largest value decides between 1.0, 255 and 65535.
    """
    if np.issubdtype(values.dtype, np.floating):
        values = np.nan_to_num(values)
        sixteen = False
    top = float(values.max(initial=0))
    if sixteen or top > 255:
        white = 65535.0
    elif np.issubdtype(values.dtype, np.floating) and top <= 1:
        white = 1.0
    else:
        white = 255.0
    return np.clip(np.rint(values.astype(np.float64) * (255.0 / white)), 0, 255).astype(np.uint8)


def upright(pixels: NDArray[np.uint8], orientation: int) -> NDArray[np.uint8]:
    """Applies an EXIF orientation (1..8) to [H, W, 3]; a view where it can be."""
    if orientation in SWAPPED:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):  # then mirrored left to right ...
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):  # ... and top to bottom
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def reason(error: Exception) -> str:
    """One line on why Pillow gave up."""
    if isinstance(error, UnidentifiedImageError):
        return "no known picture format"
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def corrupt(path: str | Path, why: str) -> DataError:
    """The error of a picture that cannot be decoded."""
    return DataError(
        f"{path}: cannot be decoded ({why})", code="corrupt_image", hint="Replace the file or take it off the list."
    )


# ---------------------------------------------------------------------------------------------------------- headers


def read_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of a picture as one sees it, EXIF applied; reads the header only."""
    return read_header(path).size


def read_header(path: str | Path) -> Header:
    """Size and orientation of a file without decoding it.

    Raises:
        DataError: `data.missing_image` or `data.corrupt_image`, naming the file.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
            if start[:2] == b"\xff\xd8":
                header = jpeg_header(start) or jpeg_header(start + file.read())
                if header is not None:
                    return checked(header, path)
            if start[:8] == b"\x89PNG\r\n\x1a\n":
                header = png_header(start, file)
                if header is not None:
                    return checked(header, path)
    except (OSError, ValueError) as error:  # ValueError: no file can have this name
        why = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be opened ({why})", code="missing_image") from error
    return checked(header_with_pillow(path), path)


def checked(header: Header, path: str | Path) -> Header:
    """The same header, or the error of a picture without pixels or with far too many."""
    if header.width <= 0 or header.height <= 0:
        raise corrupt(path, f"the picture has no pixels ({header.width}x{header.height})")
    if header.width * header.height > MAX_PIXELS:
        raise corrupt(path, f"{header.width}x{header.height} pixels are more than {MAX_PIXELS}")
    return header


def header_with_pillow(path: str | Path) -> Header:
    """Header of any format that Pillow knows."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                return Header(image.width, image.height, int(image.getexif().get(ORIENTATION, 1) or 1))
    except Exception as error:
        raise corrupt(path, reason(error)) from error


def png_header(start: bytes, file: Any) -> Header | None:
    """Header of a PNG, found by hopping over its chunks; None where metadata needs Pillow's reading.

    (Pillow's `getexif` would decode the whole picture to look for a late eXIf chunk.)
    """
    if len(start) < 24:
        return None
    width, height = struct.unpack(">II", start[16:24])
    position = 8
    while True:
        file.seek(position)
        chunk = file.read(8)
        if len(chunk) < 8 or chunk[4:] == b"IEND":
            return Header(width, height)
        if chunk[4:] in (b"eXIf", b"iTXt", b"zTXt", b"tEXt"):
            return None
        position += 12 + int(struct.unpack(">I", chunk[:4])[0])


def jpeg_header(data: bytes) -> Header | None:
    """Size, orientation and kind of a JPEG, read from its markers; None if these bytes do not reach the size."""
    if data[:2] != b"\xff\xd8":
        return None
    position, orientation, transformed, end = 2, 1, True, len(data)
    while position + 4 <= end:
        if data[position] != 0xFF:
            return None
        marker = data[position + 1]
        if marker == 0xFF:  # fill bytes before a marker
            position += 1
            continue
        if marker in STANDALONE:
            position += 2
            continue
        length = (data[position + 2] << 8) | data[position + 3]
        body = position + 4
        if marker in FRAMES:
            if body + 6 > end:
                return None
            height, width = struct.unpack(">HH", data[body + 1 : body + 5])
            bits, components = data[body], data[body + 5]
            plain = (
                bits == 8 and (components == 1 or (components == 3 and transformed)) and marker in (0xC0, 0xC1, 0xC2)
            )
            return Header(width, height, orientation, plain and width > 0 and height > 0)
        if marker == 0xDA:
            return None
        if marker == 0xE1 and data[body : body + 6] == b"Exif\0\0":
            if body + length - 2 > end:
                return None
            orientation = exif_orientation(data[body + 6 : body + length - 2])
        if marker == 0xEE and data[body : body + 5] == b"Adobe" and length >= 14 and body + 12 <= end:
            transformed = data[body + 11] != 0  # 0: stored as RGB or CMYK
        position = body + length - 2
    return None


def exif_orientation(tiff: bytes) -> int:
    """The orientation tag of an EXIF block, 1 where there is none or it makes no sense."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return 1
    try:
        (offset,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, offset)
        for entry in range(entries):
            at = offset + 2 + 12 * entry
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, at)
            if tag == ORIENTATION:
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


# ----------------------------------------------------------------------------------------------------------- resize


def resize(image: NDArray[np.uint8], size: tuple[int, int]) -> UInt8[Tensor, "3 H W"]:
    """The published evaluation preprocessing: squash to (H, W), bilinear with anti-aliasing as Pillow does it.

    The result has channels last in memory (a view of [H, W, 3]), which is also what makes this fast.
    """
    pixels = torch.from_numpy(np.ascontiguousarray(image))[None].permute(0, 3, 1, 2)
    if tuple(pixels.shape[2:]) == tuple(size):
        return pixels[0]
    return F.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True)[0]
