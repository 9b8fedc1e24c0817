"""Three layouts, sniffed; every fault is an error that names its place, or a counted note."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from finedetr.cli import main
from finedetr.data.dataset import Dataset
from finedetr.data.formats import list_splits, open_dataset
from finedetr.errors import DataError


def picture(path: Path, width: int = 100, height: int = 80, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[274] = orientation
    Image.new("RGB", (width, height), (90, 120, 30)).save(path, exif=exif)


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def codes(dataset: Dataset) -> dict[str, int]:
    return {note.code: note.count for note in dataset.notes}


def content(**changes: Any) -> dict[str, Any]:
    """Two pictures (one empty), ids with gaps, one crowd region."""
    base: dict[str, Any] = {
        "images": [
            {"id": 7, "file_name": "a.jpg", "width": 100, "height": 80},
            {"id": 3, "file_name": "b.jpg", "width": 100, "height": 80},
        ],
        "annotations": [
            {"id": 11, "image_id": 7, "category_id": 18, "bbox": [10, 20, 30, 40], "area": 900, "iscrowd": 0},
            {"id": 12, "image_id": 7, "category_id": 5, "bbox": [0, 0, 50, 50], "area": 2500, "iscrowd": 1},
        ],
        "categories": [{"id": 18, "name": "dog"}, {"id": 5, "name": "plane"}],
    }
    return base | changes


def coco(folder: Path, data: Any) -> Path:
    for name in ("a.jpg", "b.jpg"):
        picture(folder / "train2017" / name)
    write(folder / "annotations" / "instances_train2017.json", data)
    return folder


def one(**changes: Any) -> list[dict[str, Any]]:
    return [{"id": 1, "image_id": 7, "category_id": 5, "bbox": [1, 2, 3, 4], "area": 12, "iscrowd": 0} | changes]


# ----------------------------------------------------------------------------------------------------------------- COCO


def test_coco_keeps_original_ids_and_maps_gaps(tmp_path: Path) -> None:
    data = open_dataset(coco(tmp_path, content()))
    assert data.layout == "coco"
    assert "instances_train2017.json" in data.evidence
    assert data.categories.ids == (5, 18)
    assert data.categories.names == ("plane", "dog")
    assert data.ids.tolist() == [7, 3]
    assert data.labels.tolist() == [1, 0]
    assert data.boxes.tolist() == [[10, 20, 40, 60], [0, 0, 50, 50]]
    assert data.crowd.tolist() == [False, True]
    assert data.area.tolist() == [900, 2500]
    assert data.starts.tolist() == [0, 2, 2], "the empty picture stays"
    assert codes(data) == {"data.class_gap": 1, "data.crowd": 1}


@pytest.mark.parametrize("layout", ["roboflow", "bare"])
def test_other_coco_layouts(tmp_path: Path, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "valid"
    for name in ("a.jpg", "b.jpg"):
        picture(folder / name)
    file = write(folder / ("_annotations.coco.json" if layout == "roboflow" else "boxes.json"), content())
    data = open_dataset(tmp_path, "val") if layout == "roboflow" else open_dataset(file)
    assert len(data) == 2
    assert len(data.boxes) == 2
    if layout == "roboflow":
        monkeypatch.chdir(folder)
        assert list_splits(".") == ("val",)


def test_roboflow_placeholder_is_dropped_only_if_no_split_uses_it(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "things", "supercategory": "none"},
        {"id": 1, "name": "one", "supercategory": "things"},
        {"id": 2, "name": "two", "supercategory": "things"},
    ]
    for split in ("train", "valid"):
        picture(tmp_path / split / "a.jpg")
        picture(tmp_path / split / "b.jpg")
        write(
            tmp_path / split / "_annotations.coco.json",
            content(categories=categories, annotations=one(category_id=2)),
        )
    data = open_dataset(tmp_path, "train")
    assert data.categories.ids == (1, 2)
    assert "data.placeholder" in codes(data)
    write(tmp_path / "valid" / "_annotations.coco.json", content(categories=categories, annotations=one(category_id=0)))
    assert open_dataset(tmp_path, "train").categories.ids == (0, 1, 2)
    assert list_splits(tmp_path) == ("train", "val")


def test_coco_counts_what_it_does_not_read(tmp_path: Path) -> None:
    more = {"segmentation": [[1, 2, 3, 4, 5, 6]], "keypoints": [1, 2, 2], "attributes": {"wet": False}}
    rows = [one(id=1, **more)[0], one(id=2, segmentation=[], keypoints=[3, 4, 2])[0]]
    (note,) = (n for n in open_dataset(coco(tmp_path, content(annotations=rows))).notes if n.code == "data.left_out")
    assert note.message == "annotations say more than is read: keypoints of 2, segmentation of 1, attributes of 1"


def test_a_missing_area_is_width_times_height(tmp_path: Path) -> None:
    annotation = one()
    del annotation[0]["area"], annotation[0]["iscrowd"]
    assert open_dataset(coco(tmp_path, content(annotations=annotation))).area.tolist() == [12]


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        ('{"images": [1, 2,', "json", r"json:1:18"),
        ("[]", "keys", "wanted an object"),
        ({"images": [], "annotations": []}, "keys", "no list: categories"),
        (content(images=[]), "empty_split", "list of images is empty"),
        (content(images=[{"id": 1}]), "keys", r"images\[0\] \(id 1\)"),
        (content(categories=[]), "keys", "no categories"),
        (content(categories=[{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]), "duplicate_id", "category id 1"),
        (content(annotations=one(bbox=[1, 2, 3])), "box", r"annotations\[0\] \(id 1\)"),
        (content(annotations=one(bbox=[1, 2, 3, float("nan")])), "nonfinite", "annotation 1"),
        (content(annotations=one(category_id=99)), "class_range", "category_id 99"),
        (content(annotations=one(bbox=None)), "keys", "missing bbox"),
        (content(annotations=["x"]), "keys", r"annotations\[0\]"),
    ],
)
def test_faults_of_coco_files_are_named(tmp_path: Path, data: Any, code: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(coco(tmp_path, data))
    assert caught.value.code == f"data.{code}"


def test_repeated_image_ids_are_an_error(tmp_path: Path) -> None:
    twice = [{"id": 7, "file_name": name, "width": 100, "height": 80} for name in ("a.jpg", "b.jpg")]
    with pytest.raises(DataError, match="image id 7") as caught:
        open_dataset(coco(tmp_path, content(images=twice, annotations=[])))
    assert caught.value.code == "data.duplicate_id"


def test_mendable_faults_are_counted(tmp_path: Path) -> None:
    boxes = [[1, 2, 0, 5], [-20, 2, 30, 5], [99, 70, 30, 30], [1, 1, 5, 5], [1, 1, 5, 5], [200, 200, 5, 5]]
    rows = [one(id=4, bbox=box)[0] for box in boxes] + one(id=9, image_id=1000)
    data = open_dataset(coco(tmp_path, content(annotations=rows)))
    found = codes(data)
    assert found["data.degenerate"] == 2
    assert found["data.outside"] == 2
    assert found["data.duplicate_box"] == 1
    assert found["data.duplicate_id"] == 1
    assert found["data.orphan"] == 1
    assert data.boxes.tolist() == [[0, 2, 10, 7], [99, 70, 100, 80], [1, 1, 6, 6], [1, 1, 6, 6]]
    assert len(set(data.annotation_ids.tolist())) == 4


def test_a_wrong_size_is_an_error(tmp_path: Path) -> None:
    images = [{"id": 7, "file_name": "a.jpg", "width": 50, "height": 80}]
    with pytest.raises(DataError, match=r"a\.jpg is 100x80, the annotations say 50x80") as caught:
        open_dataset(coco(tmp_path, content(images=images)))
    assert caught.value.code == "data.size"


@pytest.mark.parametrize("orientation", [5, 6, 7, 8])
def test_boxes_of_an_unrotated_annotation_turn_with_the_picture(tmp_path: Path, orientation: int) -> None:
    folder = coco(tmp_path, content(annotations=one(bbox=[10, 20, 30, 40])))
    picture(folder / "train2017" / "a.jpg", orientation=orientation)
    data = open_dataset(folder)
    assert data.sizes[0].tolist() == [80, 100]
    pixels = np.zeros((80, 100), dtype=bool)
    pixels[20:60, 10:40] = True
    turned = {5: pixels.T, 6: np.rot90(pixels, -1), 7: np.rot90(pixels, 2).T, 8: np.rot90(pixels)}[orientation]
    ys, xs = np.flatnonzero(turned.any(1)), np.flatnonzero(turned.any(0))
    assert data.boxes[0].tolist() == [xs[0], ys[0], xs[-1] + 1, ys[-1] + 1]
    assert codes(data)["data.exif"] == 1


# ----------------------------------------------------------------------------------------------------------------- YOLO


def yolo(folder: Path, label: str | None, names: str = "names: [cat, dog]") -> Path:
    write(folder / "data.yaml", f"train: images/train\nval: images/val\n{names}\n")
    for split in ("train", "val"):
        picture(folder / "images" / split / "a.jpg")
        picture(folder / "images" / split / "b.jpg")
    if label is not None:
        write(folder / "labels" / "train" / "a.txt", label)
    return folder


def test_yolo_boxes_polygons_and_backgrounds(tmp_path: Path) -> None:
    data = open_dataset(yolo(tmp_path, "1 0.5 0.5 0.2 0.4\n\n0 0.1 0.1 0.4 0.2 0.3 0.5\n"))
    assert data.layout == "yolo"
    assert np.allclose(data.boxes, [[40, 24, 60, 56], [10, 8, 40, 40]])
    assert data.labels.tolist() == [1, 0]
    assert data.starts.tolist() == [0, 2, 2]
    assert codes(data) == {"data.polygons": 1}
    assert list_splits(tmp_path) == ("train", "val")


@pytest.mark.parametrize("names", ["names: {0: cat, 1: dog}", "names:\n  - cat\n  - dog", "nc: 7\nnames: [cat, dog]"])
def test_yolo_names_as_list_or_mapping(tmp_path: Path, names: str) -> None:
    assert open_dataset(yolo(tmp_path, "1 .5 .5 .1 .1", names)).categories.names == ("cat", "dog")


def test_yolo_names_are_what_is_written(tmp_path: Path) -> None:
    root = yolo(tmp_path, None, "test: null\nnames: [on, off, 007, 2024-01-01, 1.10]")
    assert open_dataset(root).categories.names == ("on", "off", "007", "2024-01-01", "1.10")
    assert list_splits(root) == ("train", "val")


def test_yolo_keypoints_are_left_out_and_counted(tmp_path: Path) -> None:
    names = "kpt_shape: [2, 3]\nnames: [cat]"
    data = open_dataset(yolo(tmp_path, "0 .5 .5 .2 .4 .45 .45 2 .55 .55 0\n0 .5 .5 .2 .4\n", names))
    assert np.allclose(data.boxes, [[40, 24, 60, 56]] * 2)
    assert codes(data) == {"data.left_out": 1, "data.duplicate_box": 1}
    with pytest.raises(DataError, match=r"a\.txt:1: wanted class cx cy w h and 6 numbers of keypoints; got 9"):
        open_dataset(yolo(tmp_path, "0 .5 .5 .2 .4 .45 .45 .55 .55", names))
    for shape in ("5", "[2]", "[2, x]"):
        with pytest.raises(DataError, match="wanted `kpt_shape`"):
            open_dataset(yolo(tmp_path, None, f"kpt_shape: {shape}\nnames: [cat]"))


@pytest.mark.parametrize("entry", ["images/train/", "[images/train]", "train.txt", "../images/train"])
def test_yolo_splits_as_folder_list_or_text(tmp_path: Path, entry: str) -> None:
    folder = yolo(tmp_path, "1 .5 .5 .1 .1")
    write(folder / "train.txt", "./images/train/b.jpg\nimages/train/a.jpg\n")
    write(folder / "data.yaml", f"path: .\ntrain: {entry}\nnames: [cat, dog]\n")
    data = open_dataset(folder / "data.yaml", "train")
    assert len(data) == 2
    assert len(data.boxes) == 1


@pytest.mark.parametrize(
    ("label", "code", "message"),
    [
        ("0 .5 .5 .1 .1\n2 .5 .5 .1 .1\n", "class_range", r"a\.txt:2: class 2 is outside the 2 names"),
        ("0.5 .5 .5 .1 .1", "class_range", r"a\.txt:1"),
        ("0 50 40 20 10", "not_normalised", r"a\.txt:1.*pixels"),
        ("0 .5 .5 .1", "labels", r"a\.txt:1: wanted class"),
        ("0 .5 .5 .1 .1 .9", "labels", "score"),
        ("0 .5 x .1 .1", "labels", r"a\.txt:1: wanted numbers"),
        ("0 .5 nan .1 .1", "nonfinite", r"a\.txt:1"),
        ("nan .5 .5 .1 .1", "class_range", r"a\.txt:1"),
    ],
)
def test_faults_of_label_files_name_file_and_line(tmp_path: Path, label: str, code: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        open_dataset(yolo(tmp_path, label))
    assert caught.value.code == f"data.{code}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a\ntrain: x", "not valid YAML"),
        ("names: 5\ntrain: images/train", "wanted `names`"),
        ("names: {'²': a}\ntrain: images/train", "wanted `names`"),
        ("names:", "names"),
        ("names: {0: a, '0': b}\ntrain: images/train", "'0' is given twice"),
        ("names: [a]\ntrain: images/train\ntrain: images/val", "'train' is given twice"),
    ],
)
def test_faults_of_the_yaml_are_named(tmp_path: Path, text: str, message: str) -> None:
    write(yolo(tmp_path, None) / "data.yaml", text)
    with pytest.raises(DataError, match=message):
        open_dataset(tmp_path)


def test_an_unknown_split_is_named_with_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="Known: train, val") as caught:
        open_dataset(yolo(tmp_path, None), "test")
    assert caught.value.code == "data.split"


# ------------------------------------------------------------------------------------------------------------------ VOC


def voc(folder: Path, objects: str, size: str = "<size><width>100</width><height>80</height></size>") -> Path:
    picture(folder / "JPEGImages" / "a.jpg")
    picture(folder / "JPEGImages" / "b.jpg")
    write(folder / "Annotations" / "a.xml", f"<annotation>{size}{objects}</annotation>")
    write(folder / "ImageSets" / "Main" / "train.txt", "a\nb\n")
    return folder


def thing(name: str = "cat", box: tuple[Any, ...] = (1, 1, 20, 10), difficult: int = 0) -> str:
    corners = "".join(f"<{k}>{v}</{k}>" for k, v in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True))
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox></object>"


def test_voc_corners_are_one_based_and_difficult_is_ignored(tmp_path: Path) -> None:
    data = open_dataset(voc(tmp_path, thing() + thing("dog", (5, 5, 5, 9)) + thing("ant", (2, 3, 4, 5), 1)))
    assert data.layout == "voc"
    assert data.categories.names == ("ant", "cat", "dog")
    assert data.boxes.tolist() == [[0, 0, 20, 10], [1, 2, 4, 5]]
    assert data.crowd.tolist() == [False, True]
    assert codes(data) == {"data.background": 1, "data.degenerate": 1, "data.crowd": 1}


@pytest.mark.parametrize(
    ("objects", "message"),
    [
        (thing(box=(1, 1, "x", 4)), r"a\.xml: object 1: wanted bndbox"),
        ("<object><name>cat</name></object>", "object 1"),
        ("<object>", r"a\.xml:1:\d+: not valid XML"),
        (thing() + thing(""), "object 2: has no name"),
    ],
)
def test_faults_of_voc_files_are_named(tmp_path: Path, objects: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_dataset(voc(tmp_path, objects))


# ------------------------------------------------------------------------------------------------------------ all alike


def test_a_folder_without_a_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    picture(tmp_path / "x.jpg")
    with pytest.raises(DataError, match=r"Looked for: data\.yaml.*Found: 1 pictures") as caught:
        open_dataset(tmp_path)
    assert caught.value.code == "data.none"
    with pytest.raises(DataError, match="does not exist"):
        open_dataset(tmp_path / "nowhere")


def test_two_layouts_in_one_folder_must_be_chosen_between(tmp_path: Path) -> None:
    coco(yolo(tmp_path, "1 .5 .5 .1 .1"), content())
    with pytest.raises(DataError, match=r"--layout coco\|yolo") as caught:
        open_dataset(tmp_path)
    assert caught.value.code == "data.ambiguous"
    assert open_dataset(tmp_path, layout="yolo").layout == "yolo"
    assert open_dataset(tmp_path, layout="coco").layout == "coco"
    with pytest.raises(DataError, match="Did you mean yolo"):
        open_dataset(tmp_path, layout="yol")


def test_few_absent_or_broken_pictures_are_left_out_and_many_are_an_error(tmp_path: Path) -> None:
    def build(absent: int) -> Callable[[], Dataset]:
        shutil.rmtree(tmp_path / "set", ignore_errors=True)
        folder = yolo(tmp_path / "set", None)
        for number in range(200):
            shutil.copy(folder / "images" / "train" / "a.jpg", folder / "images" / "train" / f"{number:03}.jpg")
        write(folder / "list.txt", "\n".join(f"images/train/{number:03}.jpg" for number in range(200 + absent)))
        (folder / "images" / "train" / "007.jpg").write_bytes(b"")
        write(folder / "data.yaml", "train: list.txt\nnames: [cat]\n")
        return lambda: open_dataset(folder)

    data = build(2)()
    assert len(data) == 199
    assert codes(data) == {"data.missing_image": 2, "data.corrupt_image": 1}
    with pytest.raises(DataError, match="10 of 210 pictures are listed but absent") as caught:
        build(10)()
    assert caught.value.code == "data.missing_image"
    assert "--skip-missing" in str(caught.value)
    assert len(open_dataset(tmp_path / "set", skip_missing=True)) == 199


@pytest.mark.parametrize(
    ("name", "split", "pictures", "boxes", "classes"),
    [
        ("dice", "train", 200, 1487, 6),
        ("dice", "validation", 50, 308, 6),
        ("bccd", "train", 205, 2804, 3),
        ("bccd", "val", 87, 1137, 3),
        ("coco128", "train", 128, 939, 80),
    ],
)
def test_real_sets_are_read(real_data: Path, name: str, split: str, pictures: int, boxes: int, classes: int) -> None:
    data = open_dataset(real_data / name, split)
    assert (len(data), len(data.boxes), len(data.categories)) == (pictures, boxes, classes)
    assert (data.boxes[:, 2:] > data.boxes[:, :2]).all()
    assert (data.boxes[:, 2:] <= np.repeat(data.sizes, np.diff(data.starts), axis=0)).all()
    if name == "bccd":
        assert codes(data)["data.degenerate"] == 1


def test_a_subset_keeps_the_rows_of_its_pictures(real_data: Path) -> None:
    data = open_dataset(real_data / "dice", "val")
    part = data.subset([7, 2])
    assert part.files == (data.files[7], data.files[2])
    assert np.array_equal(part.boxes[part.rows(1)], data.boxes[data.rows(2)])
    assert np.array_equal(part.annotation_ids[part.rows(0)], data.annotation_ids[data.rows(7)])
    assert len(data.subset([])) == 0


# -------------------------------------------------------------------------------------------------------------- hostile


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"categories": [{"id": 10**30, "name": "a"}], "annotations": []}, "data.keys"),
        ({"categories": [{"id": 10**400, "name": "a"}], "annotations": []}, "data.keys"),
        ({"categories": [{"id": "²", "name": "a"}], "annotations": []}, "data.keys"),
        ({"annotations": one(bbox=[10**400, 1, 2, 3])}, "data.box"),
        ({"annotations": one(bbox="1234")}, "data.box"),
        ({"annotations": one(bbox=[1e308, 0, 1e308, 5])}, "data.nonfinite"),
        ({"categories": [{"id": 5, "name": "\ud800"}], "annotations": one()}, "data.class_names"),
        ({"images": [{"id": 7, "file_name": "a\0.jpg"}], "annotations": one()}, "data.missing_image"),
        ({"images": [{"id": 7, "file_name": "\ud800.jpg"}], "annotations": one()}, "data.missing_image"),
        ({"images": [{"id": 7, "file_name": "a" * 6000}], "annotations": one()}, "data.missing_image"),
        ({"images": [{"id": 7, "file_name": ""}], "annotations": one()}, "data.missing_image"),
    ],
)
def test_numbers_and_names_that_no_machine_holds_are_refused(
    tmp_path: Path, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(DataError) as caught:
        open_dataset(coco(tmp_path, content(**changes)))
    assert caught.value.code == code


def test_a_number_of_thousands_of_digits_is_no_traceback(tmp_path: Path) -> None:
    text = json.dumps(content()).replace('"id": 11', '"id": ' + "1" * 5000)
    with suppress(DataError):  # Pythons from before the limit read it
        open_dataset(coco(tmp_path, text))


def test_odd_sizes_and_ids_are_as_if_they_were_not_told(tmp_path: Path) -> None:
    sizes = [("²", 80), (10**400, 80), ("9" * 5000, "80"), (100.0, "80")]
    images = [{"id": i, "file_name": "a.jpg", "width": w, "height": h} for i, (w, h) in enumerate(sizes)]
    images.append({"id": "²", "file_name": "b.jpg"})
    rows = [one(id=identity, image_id="²")[0] for identity in (3, -(10**400))]
    data = open_dataset(coco(tmp_path, content(images=images, annotations=rows)))
    assert data.sizes.tolist() == [[100, 80]] * 5
    assert data.annotation_ids.tolist() == [1, 2]
    assert {"data.image_ids", "data.duplicate_id"} <= set(codes(data))


def test_crowd_as_a_word_and_areas_that_cannot_be(tmp_path: Path) -> None:
    rows = [one(id=i, iscrowd=word, area=area)[0] for i, (word, area) in enumerate([("0", -5), (False, 7), (True, 7)])]
    rows += [one(id=9 + i, area=area)[0] for i, area in enumerate((float("inf"), 10**400, "large", [4], 1e300))]
    data = open_dataset(coco(tmp_path, content(annotations=rows)))
    assert data.crowd.tolist() == [False, False, True, *[False] * 5]
    assert data.area.tolist() == [12, 7, 7, *[12] * 5]
    assert codes(data)["data.area"] == 6


VOC = "<annotation>{}<object><name>a</name>{}<bndbox>{}</bndbox></object></annotation>"
CORNERS = "<xmin>1</xmin><ymin>1</ymin><xmax>20</xmax><ymax>20</ymax>"


def voc_of(root: Path, xml: str | bytes, names: bytes = b"a b\n") -> Path:
    picture(root / "JPEGImages" / "a b.jpg")
    write(root / "Annotations" / "a b.xml", "").write_bytes(xml if isinstance(xml, bytes) else xml.encode())
    write(root / "ImageSets" / "Main" / "train.txt", "").write_bytes(names)
    return root


def test_voc_names_with_spaces_marks_and_byte_order_marks(tmp_path: Path) -> None:
    for number, names in enumerate((b"a b\n", b"\xef\xbb\xbfa b\r\n\r\n")):
        data = open_dataset(voc_of(tmp_path / str(number), VOC.format("", "", CORNERS), names))
        assert data.boxes.tolist() == [[0, 0, 20, 20]]
    with pytest.raises(DataError, match="cannot be read"):
        open_dataset(voc_of(tmp_path / "bytes", VOC.format("", "", CORNERS), b"\xff\xfe\xfa\n"))


def test_voc_with_an_unknown_encoding_sizes_and_marks(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unknown encoding") as caught:
        open_dataset(voc_of(tmp_path / "encoding", b'<?xml version="1.0" encoding="bogus"?><annotation/>'))
    assert caught.value.code == "data.xml"
    size = "<size><width>inf</width><height>1e400</height></size>"
    data = open_dataset(voc_of(tmp_path / "size", VOC.format(size, "<difficult>Unspecified</difficult>", CORNERS)))
    assert data.sizes.tolist() == [[100, 80]]
    assert data.crowd.tolist() == [False], "a word that is not yes is no mark"


def test_voc_pictures_in_folders_and_with_spaces(tmp_path: Path) -> None:
    root = voc_of(tmp_path, VOC.format("", "", CORNERS), b"a b\nsub/c\nd 0\n")
    write(root / "Annotations" / "sub" / "c.xml", VOC.format("", "", CORNERS).replace("<name>a<", "<name>z<"))
    for name in ("sub/c.png", "d.png", "d 0.png"):
        picture(root / "JPEGImages" / name)
    data = open_dataset(root)
    assert [Path(file).name for file in data.files] == ["a b.jpg", "c.png", "d 0.png"]
    assert data.categories.names == ("a", "z")
    assert data.labels.tolist() == [0, 1]


def test_voc_names_may_stand_in_a_namespace(tmp_path: Path) -> None:
    xml = VOC.format("", "", CORNERS).replace("<annotation>", '<annotation xmlns="http://a.b/c">')
    assert len(open_dataset(voc_of(tmp_path, xml)).boxes) == 1


def yolo_of(root: Path, yaml: bytes = b"train: images\nnames: [a, b]\n", label: bytes = b"0 .5 .5 .2 .2\n") -> Path:
    picture(root / "images" / "a.jpg")
    write(root / "labels" / "a.txt", "").write_bytes(label)
    write(root / "data.yaml", "").write_bytes(yaml)
    return root


def test_yolo_files_with_byte_order_marks_and_windows_line_ends(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    root = yolo_of(tmp_path, mark + b"names: [a, b]\r\ntrain: list.txt\r\n", mark + b"0 .5 .5 .2 .2\r\n")
    write(root / "list.txt", "").write_bytes(mark + b"./images/a.jpg\r\n")
    assert len(open_dataset(root).labels) == 1
    (root / "list.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"list\.txt: cannot be read"):
        open_dataset(root)


def test_yolo_links_that_lead_back_are_walked_once(tmp_path: Path) -> None:
    root = yolo_of(tmp_path)
    (root / "images" / "again").symlink_to(root / "images")
    picture(tmp_path / "elsewhere" / "b.jpg")
    (root / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "images" / "nowhere").symlink_to(tmp_path / "absent")
    assert [Path(file).name for file in open_dataset(root).files] == ["a.jpg", "b.jpg"]


def test_yolo_names_that_are_none_or_twice(tmp_path: Path) -> None:
    for number, names in enumerate((b"[[a], b]", b"{0: a, 1: {b: 1}}", b"[a, null]")):
        with pytest.raises(DataError, match="a word for each name"):
            open_dataset(yolo_of(tmp_path / str(number), b"train: images\nnames: " + names))
    data = open_dataset(yolo_of(tmp_path / "twice", b"train: images\nnames: [a, a]"))
    assert codes(data) == {"data.class_names": 1}
    with pytest.raises(DataError, match=r"outside 0\.\.1 \(-0\.2\)"):
        open_dataset(yolo_of(tmp_path / "negative", label=b"0 .5 .5 -.2 .2\n"))


@pytest.mark.parametrize("name", ["data.yaml", "train.json", "train.csv"])
def test_a_file_that_must_not_be_read_is_named(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "image,xmin,ymin,xmax,ymax,label\na.jpg,1,2,30,40,dog\n"
    texts = {"data.yaml": "train: images\nnames: [a]\n", "train.json": content(), "train.csv": rows}
    file = write(tmp_path / name, texts[name])
    opened = io.open

    def refuse(path: Any, *more: Any, **options: Any) -> Any:
        if str(path) == str(file):  # as root, whom permissions do not stop, the tests could not see it otherwise
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **options)

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("io.open", refuse)
    monkeypatch.setattr(Path, "open", refuse)  # Python 3.10's keeps an io.open of its own
    with pytest.raises(DataError, match=f"{name}: cannot be read"):
        open_dataset(tmp_path)


def test_the_commands_go_on_without_missing_pictures_when_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = coco(tmp_path / "set", content())
    (root / "train2017" / "b.jpg").unlink()
    for words in (["check", str(root)], ["convert", str(root), str(tmp_path / "out"), "--to", "yolo"]):
        assert main(["data", *words]) == 3
        assert "data.missing_image: 1 of 2 pictures are listed but absent" in capsys.readouterr().err
        assert main(["data", *words, "--skip-missing"]) == 0
        assert "train: 1 pictures" in capsys.readouterr().out


def test_a_yaml_without_splits_is_told_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = write(tmp_path / "data.yaml", "names: [hen]\n").parent
    for words in (["check"], ["check", "--json"], ["convert", str(tmp_path / "out"), "--to", "coco"]):
        assert main(["data", words[0], str(root), *words[1:]]) == 3
        said = capsys.readouterr()
        assert "names no split" in said.err + said.out
        assert "data.yaml needs train: and val:" in said.err + said.out


@pytest.mark.parametrize("word", ["training", "Train", "train"])
def test_a_split_may_be_spelled_in_any_way_in_every_layout(word: str, tmp_path: Path) -> None:
    roots = [voc_of(tmp_path / "voc", VOC.format("", "", CORNERS))]
    (roots[0] / "ImageSets" / "Main" / "train.txt").rename(roots[0] / "ImageSets" / "Main" / f"{word}.txt")
    for layout in ("coco", "yolo", "csv"):
        roots.append(tmp_path / layout)
        for name in ("a.jpg", "b.jpg"):
            picture(roots[-1] / "images" / word / name)
    write(roots[1] / "annotations" / f"instances_{word}.json", content())
    write(roots[2] / "data.yaml", f"{word}: images/{word}\nnames: [hen]\n")
    write(roots[3] / f"{word}.csv", "image,xmin,ymin,xmax,ymax,label\na.jpg,1,2,30,40,hen\n")
    for root in roots:
        assert list_splits(root) == ("train",)
        for asked in ("train", word):
            data = open_dataset(root, asked)
            assert data.split == "train"
            assert Path(data.files[0]).is_file()


def test_the_plain_word_goes_before_its_synonyms(tmp_path: Path) -> None:
    for name in ("val", "valid"):
        picture(tmp_path / name / f"{name}.jpg")
    write(tmp_path / "data.yaml", "val: val\nvalid: valid\nnames: [hen]\n")
    assert [Path(file).stem for file in open_dataset(tmp_path, "valid").files] == ["val"]
