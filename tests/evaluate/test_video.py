"""Videos are frames one after the other; without the library the message says what to install."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finedetr.data.dataset import Dataset
from finedetr.errors import DataError, UsageError
from finedetr.evaluate import video
from finedetr.evaluate.predictor import Predictor
from finedetr.evaluate.video import Frame, Video, VideoWriter
from tests.evaluate.cases import solid_pictures
from tests.evaluate.test_predictor import predictor_for


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return solid_pictures(tmp_path)


@pytest.fixture
def predictor(dataset: Dataset) -> Predictor:
    return predictor_for(dataset, batch=2)


def written(path: Path, frames: int = 5, size: tuple[int, int] = (65, 48)) -> Path:
    pytest.importorskip("av")
    with VideoWriter(path, Fraction(10)) as writer:
        for number in range(frames):
            writer.add(Image.new("RGB", size, (40 * number, 100, 50)))
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    path = written(tmp_path / "new" / "clip.mp4")
    assert [file.name for file in path.parent.iterdir()] == ["clip.mp4"]
    frames = list(Video(str(path)))
    assert [frame.number for frame in frames] == [0, 1, 2, 3, 4]
    assert [round(frame.seconds, 3) for frame in frames] == [0, 0.1, 0.2, 0.3, 0.4]
    assert frames[0].pixels.shape == (48, 66, 3), "sides are even"
    assert [abs(int(frame.pixels[20, 20, 0]) - 40 * frame.number) < 12 for frame in frames] == [True] * 5
    assert Video(str(path)).rate() == 10


def test_a_broken_video_is_told(tmp_path: Path, predictor: Predictor) -> None:
    pytest.importorskip("av")
    for name, content in (("empty.mp4", b""), ("text.mkv", b"no video"), ("picture.avi", b"RIFF")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name}: cannot be decoded"):
            list(predictor.stream(str(tmp_path / name)))


def test_a_video_that_ends_early_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    av = pytest.importorskip("av")
    whole, cut = tmp_path / "whole.mkv", tmp_path / "cut.mkv"
    random = np.random.default_rng(0)
    with av.open(str(whole), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height = 64, 48
        for _ in range(20):
            frame = av.VideoFrame.from_ndarray(random.integers(0, 255, (48, 64, 3), dtype=np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    cut.write_bytes(whole.read_bytes()[: whole.stat().st_size // 2])
    with caplog.at_level(logging.WARNING):
        assert len(list(Video(str(whole)))) == len(list(Video(str(written(tmp_path / "w.mp4", frames=20))))) == 20
        assert not caplog.text
        assert 0 < len(list(Video(str(cut)))) < 20
    assert "data.corrupt_video" in caplog.text
    assert "of 2.0 seconds; is the file complete?" in caplog.text


def test_our_own_videos_are_known_again(tmp_path: Path) -> None:
    assert Video(str(written(tmp_path / "clip.mp4"))).is_ours()
    (tmp_path / "text.mp4").write_text("no video")
    for name in ("text.mp4", "absent.mp4"):
        assert not Video(str(tmp_path / name)).is_ours()


def test_frames_come_one_after_the_other_with_their_numbers(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[int] = []

    def frames(self: Video) -> Iterator[Frame]:
        for number in range(30):
            decoded.append(number)
            yield Frame(self.path, number, number / 10, np.full((48, 64, 3), 10 * (number % 2), np.uint8))

    monkeypatch.setattr(Video, "__iter__", frames)
    (tmp_path / "clip.MP4").write_bytes(b"")
    found: Any = predictor(str(tmp_path / "clip.MP4"))
    first = next(found)
    assert len(decoded) < 10, "it is not decoded to its end before the first answer"
    assert (first.frame, first.seconds, first.size) == (0, 0.0, (64, 48))
    assert first.path == str(tmp_path / "clip.MP4")
    assert first.draw().size == (64, 48)
    assert [answer.frame for answer in found] == list(range(1, 30))


def test_without_the_library_the_message_says_what_to_install(
    predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    (tmp_path / "clip.mp4").write_bytes(b"")
    with pytest.raises(UsageError, match=r"finedetr\[video\]") as caught:
        list(predictor.stream(str(tmp_path / "clip.mp4")))
    assert caught.value.code == "use.extra"


def test_a_telephone_that_was_held_upright() -> None:
    class Turned:
        rotation = -90

    pixels = np.arange(6, dtype=np.uint8).reshape(1, 2, 3)
    assert video._upright(pixels, Turned()).shape == (2, 1, 3)
    assert json.dumps(video._upright(pixels, object()).tolist()) == json.dumps(pixels.tolist())
