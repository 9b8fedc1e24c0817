"""Every picture becomes upright RGB bytes, or an error that names the file."""

from __future__ import annotations

import struct
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from finedetr.data.images import decode, read_header, read_image, read_size, resize
from finedetr.errors import DataError

REFUSED = {
    "broken.png",
    "broken_data_stream.png",
    "decompression_bomb.gif",
    "png_decompression_dos.png",
    "truncated_image.png",
    "truncated_jpeg.jpg",
    "zero_width.gif",
    "LICENSE.pillow",
}


def gradient(width: int = 61, height: int = 47) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack((x * 255 // width, y * 255 // height, (x + y) % 256), -1).astype(np.uint8)


def refusal(file: Path) -> DataError | None:
    """The error of a file, if it has one; any other exception is a failure of the test."""
    try:
        read_size(file)
    except DataError as error:
        with pytest.raises(DataError):
            read_image(file)
        return error
    try:
        read_image(file)
    except DataError as error:
        return error
    return None


def test_every_odd_file_is_read_or_refused_by_name(real_data: Path) -> None:
    seen = set()
    for file in sorted((real_data / "odd").iterdir()):
        refused = refusal(file)
        if refused is None:
            pixels = read_image(file)
            assert pixels.dtype == np.uint8
            assert pixels.shape[2:] == (3,)
            assert read_size(file) == (pixels.shape[1], pixels.shape[0])
        else:
            assert refused.code == "data.corrupt_image"
            assert file.name in str(refused)
            seen.add(file.name)
    assert seen == REFUSED


def test_all_orientations_show_the_same_upright_picture(real_data: Path) -> None:
    upright = read_image(real_data / "odd" / "hopper.jpg").astype(int)
    for orientation in range(2, 9):
        turned = read_image(real_data / "odd" / f"hopper_orientation_{orientation}.jpg").astype(int)
        # the files were compressed anew (about 5 levels); any other orientation is more than 30 away
        assert np.abs(turned - upright).mean() < 6, orientation
        assert np.abs(turned[:, ::-1] - upright).mean() > 30, orientation


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_equals_pillow(tmp_path: Path, orientation: int) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", exif=exif, quality=95)
    from PIL import ImageOps

    with Image.open(tmp_path / "a.jpg") as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(read_image(tmp_path / "a.jpg"), expected)
    assert read_size(tmp_path / "a.jpg") == (expected.shape[1], expected.shape[0])
    pixels, factor = decode((tmp_path / "a.jpg").read_bytes(), "a.jpg", 2)
    assert pixels.shape[0] == -(-expected.shape[0] // factor)


def test_plain_jpegs_are_bit_equal_to_pillow(real_data: Path) -> None:
    for file in sorted((real_data / "coco128" / "train2017").iterdir())[:12]:
        with Image.open(file) as image:
            assert np.array_equal(read_image(file), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1"])
def test_modes_become_rgb(tmp_path: Path, mode: str) -> None:
    suffix = "tif" if mode == "CMYK" else "png"
    image = Image.fromarray(gradient()).convert(mode)
    image.save(tmp_path / f"a.{suffix}")
    assert np.array_equal(read_image(tmp_path / f"a.{suffix}"), np.asarray(image.convert("RGB")))


def test_sixteen_bits_are_scaled_and_not_cut(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "a.png")
    assert np.array_equal(read_image(tmp_path / "a.png")[..., 0].ravel(), np.arange(256))


def test_floating_point_pictures_fill_the_bytes(tmp_path: Path) -> None:
    Image.fromarray(np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)).save(tmp_path / "a.tif")
    assert np.array_equal(read_image(tmp_path / "a.tif")[..., 0].ravel(), np.arange(256))


def test_a_png_that_is_called_jpg_is_read(tmp_path: Path) -> None:
    Image.fromarray(gradient()).save(tmp_path / "a.jpg", format="PNG")
    assert np.array_equal(read_image(tmp_path / "a.jpg"), gradient())
    assert read_size(tmp_path / "a.jpg") == (61, 47)


def test_a_jpeg_bomb_is_refused_before_it_is_decoded(tmp_path: Path) -> None:
    stream = BytesIO()
    Image.fromarray(gradient()).save(stream, format="JPEG")
    data = bytearray(stream.getvalue())
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", 60000, 60000)
    (tmp_path / "a.jpg").write_bytes(bytes(data))
    for reader in (read_image, read_size):
        with pytest.raises(DataError, match="60000x60000"):
            reader(tmp_path / "a.jpg")


def test_absent_files_are_named(tmp_path: Path) -> None:
    for reader in (read_image, read_header):
        with pytest.raises(DataError, match=r"none\.jpg") as caught:
            reader(tmp_path / "none.jpg")
        assert caught.value.code == "data.missing_image"


def test_every_cut_of_a_jpeg_is_read_or_refused(tmp_path: Path) -> None:
    stream = BytesIO()
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(gradient()).save(stream, format="JPEG", exif=exif)
    data = stream.getvalue()
    for end in (*range(0, 300, 7), len(data) // 2, len(data) - 3):
        (tmp_path / "a.jpg").write_bytes(data[:end])
        refused = refusal(tmp_path / "a.jpg")
        assert refused is None or refused.code == "data.corrupt_image"


@pytest.mark.parametrize("size", [(640, 640), (32, 96), (47, 61), (20, 200)])
def test_resize_equals_pillow_within_one_level(size: tuple[int, int]) -> None:
    pixels = gradient(211, 97)
    ours = resize(pixels, size).permute(1, 2, 0).numpy().astype(int)
    pillow = np.asarray(Image.fromarray(pixels).resize((size[1], size[0]), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(ours - pillow).max() <= 1
    assert resize(pixels, size).dtype == torch.uint8
