"""Files are written whole or not at all; what a crash cut off is passed over; names are given once."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest

from finedetr.errors import RunError
from finedetr.files import fresh_stem, read_records, write_atomically, write_text


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_that_cannot_be_finished_leaves_the_old_one_and_no_litter(durable: bool, tmp_path: Path) -> None:
    path = write_text(tmp_path / "deep" / "a.txt", "old \udcff")
    assert path.read_text(encoding="utf-8") == "old \\udcff"

    def full(file: BinaryIO) -> None:
        file.write(b"new")
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"a\.txt cannot be written: No space left"):
        write_atomically(path, full, durable=durable)
    assert path.read_text(encoding="utf-8").startswith("old")
    assert [file.name for file in path.parent.iterdir()] == ["a.txt"]
    with pytest.raises(RunError, match="cannot be written"):
        write_text(path / "b.txt", "")


def test_records_are_the_whole_lines(tmp_path: Path) -> None:
    assert read_records(tmp_path / "none.jsonl") == []
    path = write_text(tmp_path / "a.jsonl", '{"a": 1}\n[2]\n\n{"b": 2}\n{"c": ')
    assert read_records(path) == [{"a": 1}, {"b": 2}]


def test_a_name_is_given_once() -> None:
    taken: set[str] = set()
    assert [fresh_stem(own, taken) for own in ("x", "x", "x-2", "X")] == ["x", "x-2", "x-2-2", "X-3"]
    taken = set()
    assert [fresh_stem("x", taken, suffix) for suffix in (".jpg", ".png", ".JPG")] == ["x", "x", "x-2"]
