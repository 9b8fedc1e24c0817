"""CSV: headers are matched loosely, backgrounds are rows without numbers, every fault names file and line."""

from __future__ import annotations

from pathlib import Path

import pytest

from finedetr.data.formats import list_splits, open_dataset
from finedetr.errors import DataError
from tests.data.test_formats import codes, picture, write

HEADER = "image,xmin,ymin,xmax,ymax,label\n"


def table(root: Path, text: str, name: str = "train.csv") -> Path:
    for file in ("a.jpg", "b.jpg"):
        picture(root / "images" / file)
    return write(root / name, text)


def test_rows_become_boxes_and_a_bare_name_is_a_background(tmp_path: Path) -> None:
    table(tmp_path, f"{HEADER}a.jpg,10,20,40,60,dog\nb.jpg,,,,,\na.jpg,0,0,50.5,50,cat\n")
    table(tmp_path, f"{HEADER}b.jpg,1,2,3,4,emu\n", "valid.csv")
    assert list_splits(tmp_path) == ("train", "val")
    data = open_dataset(tmp_path, "train")
    assert data.layout == "csv"
    assert data.categories.names == ("cat", "dog", "emu"), "the same table for all splits"
    assert [Path(file).name for file in data.files] == ["a.jpg", "b.jpg"]
    assert data.starts.tolist() == [0, 2, 2]
    assert data.boxes.tolist() == [[10, 20, 40, 60], [0, 0, 50.5, 50]]
    assert open_dataset(tmp_path, "validation").labels.tolist() == [2]
    assert len(open_dataset(tmp_path / "valid.csv")) == 1


def test_an_empty_table_beside_another_is_not_dropped(tmp_path: Path) -> None:
    table(tmp_path, f"{HEADER}a.jpg,10,20,40,60,dog\n")
    write(tmp_path / "val.csv", "")
    for read in (list_splits, open_dataset):
        with pytest.raises(DataError, match=r"val\.csv: is empty\n  A split without boxes has a header: image,xmin"):
            read(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "filename,width,height,class,xmin,ymin,xmax,ymax\na.jpg,100,80,dog,1,2,30,40\n",
        "\ufeffImage Path;X1;Y1;X2;Y2;Class Name\r\nimages\\a.jpg;1;2;30;40;dog\r\n\r\n",
        "label\tLeft\tTop\tRight\tBottom\timg\ndog\t1\t2\t30\t40\ta.jpg\n",
        'image,x_min,y_min,x_max,y_max,category,difficult\n"a.jpg",1,2,30,40,"dog",0\n',
    ],
)
def test_headers_are_matched_loosely(tmp_path: Path, text: str) -> None:
    data = open_dataset(table(tmp_path, text))
    assert data.boxes.tolist() == [[1, 2, 30, 40]]
    assert data.categories.names == ("dog",)


def test_crowd_and_numbered_classes(tmp_path: Path) -> None:
    rows = "a.jpg,1,2,30,40,10,1\na.jpg,1,2,30,40,9,0\n"
    data = open_dataset(table(tmp_path, f"{HEADER.strip()},iscrowd\n{rows}"))
    assert data.categories.names == ("9", "10")
    assert data.crowd.tolist() == [True, False]
    assert codes(data) == {"data.crowd": 1}


def test_one_picture_may_be_written_in_several_ways(tmp_path: Path) -> None:
    data = open_dataset(table(tmp_path, f"{HEADER}images/a.jpg,1,2,30,40,dog\nimages\\a.jpg,5,6,30,40,dog\n"))
    assert data.starts.tolist() == [0, 2]
    assert codes(data) == {}


def test_numbers_of_thousands_of_digits_are_words(tmp_path: Path) -> None:
    digits = "1" * 5000
    rows = f"a.jpg,1,2,30,40,{digits},{digits},80\na.jpg,1,2,30,40,2,100,80\nb.jpg,1,2,3,4,10,{10**15},80\n"
    data = open_dataset(table(tmp_path, f"{HEADER.strip()},width,height\n{rows}"))
    assert data.categories.names == ("10", digits, "2"), "words, in the alphabet's order"
    assert data.sizes.tolist() == [[100, 80], [100, 80]]


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        (f"{HEADER}a.jpg,1,2,3,x,dog\n", "data.box", r"train\.csv:2: wanted xmin, ymin, xmax, ymax as numbers"),
        (f"{HEADER}a.jpg,1,2,3,4,dog\n,1,2,3,4,dog\n", "data.csv", r"train\.csv:3: names no picture"),
        (f"{HEADER}a.jpg,1,2,3,4,\n", "data.csv", r"train\.csv:2: the box has no label"),
        (f"{HEADER}a.jpg,1,2,,4,dog\n", "data.box", r"train\.csv:2: wanted"),
        (f"{HEADER}a.jpg,0.1,0.2,0.5,0.9,dog\n", "data.box", r"train\.csv:2: all corners are within 0\.\.1"),
        (f"{HEADER}a.jpg,1,nan,3,4,dog\n", "data.nonfinite", r"train\.csv:2: the box contains NaN"),
        (f"{HEADER}a.jpg,1,2\n", "data.box", r"train\.csv:2: wanted"),
        (f"{HEADER}c.jpg,1,2,3,4,dog\n", "data.missing_image", "c.jpg"),
        (f"{HEADER}a.jpg,,,,,\n", "data.keys", "no row has a label"),
        (HEADER, "data.empty_split", "names no pictures"),
        ("image,label\na.jpg,dog\n", "data.keys", r"train\.csv:1: wanted a header"),
        ("", "data.keys", r"train\.csv:1: wanted a header"),
    ],
)
def test_a_fault_names_file_and_line(tmp_path: Path, text: str, code: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(table(tmp_path, text))
    assert caught.value.code == code


def test_another_encoding_is_an_error(tmp_path: Path) -> None:
    file = table(tmp_path, HEADER)
    file.write_bytes(HEADER.encode() + "a.jpg,1,2,30,40,Fluß\n".encode("latin-1"))
    with pytest.raises(DataError, match="cannot be read after line 1"):
        open_dataset(file)
    file.write_text(f'{HEADER}a.jpg,1,2,3,4,"dog\na.jpg,1,2,3,4,cat\n')
    with pytest.raises(DataError, match="cannot be read after line 1"):  # a quote that is never closed
        open_dataset(file)
    file.write_text(f"{HEADER}a.jpg,1,2,3,4,{'x' * 200_000}\n")
    with pytest.raises(DataError, match="field limit"):
        open_dataset(file)
    with pytest.raises(DataError, match="no known layout"):
        open_dataset(write(tmp_path / "other" / "results.csv", "epoch,loss\n1,2\n").parent)
