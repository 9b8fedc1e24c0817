"""Files are written whole or not at all; what a crash cut off is passed over; names are given once."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import pytest

from finedetr.errors import RunError, UsageError
from finedetr.files import fresh_stem, read_records, refuse_existing, walk, write_atomically, write_text


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


def test_names_as_long_as_they_can_be(tmp_path: Path) -> None:
    assert write_text(tmp_path / ("x" * 251 + ".txt"), "whole").read_text(encoding="utf-8") == "whole"
    taken: set[str] = set()
    stems = [fresh_stem(own, taken) for own in ("ü" * 125, "ü" * 124, "x" * 200)]
    assert stems == ["ü" * 100, "ü" * 100 + "-2", "x" * 200]


def test_what_is_there_is_not_replaced(tmp_path: Path) -> None:
    there = write_text(tmp_path / "a.txt", "mine")
    refuse_existing([tmp_path / "b.txt"], "Use --overwrite.")
    with pytest.raises(UsageError, match=r"a\.txt exists\n  Use --overwrite") as caught:
        refuse_existing([tmp_path / "b.txt", there], "Use --overwrite.")
    assert caught.value.code == "use.exists"


def test_links_are_walked_and_no_folder_comes_twice(tmp_path: Path) -> None:
    write_text(tmp_path / "far" / "deep" / "x.txt", "")
    write_text(tmp_path / "here" / "z" / "y.txt", "")
    (tmp_path / "here" / "a").symlink_to(tmp_path / "here" / "z")
    (tmp_path / "here" / "far").symlink_to(tmp_path / "far")
    (tmp_path / "far" / "deep" / "up").symlink_to(tmp_path / "far")
    found = [f"{place}/{name}" for place, _, names in walk(tmp_path / "here") for name in names]
    assert found == [f"{tmp_path}/here/z/y.txt", f"{tmp_path}/here/far/deep/x.txt"]
