"""What a user gets: boxes in pixels of the original picture, scores, labels, class names. Needs numpy only.

PIL is imported when something is drawn, supervision when it is asked for; nothing here knows torch.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from finedetr.errors import DataError, UsageError

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

__all__ = ["THRESHOLD", "Detection", "Detections", "annotate", "class_color"]

THRESHOLD = 0.4  # of scores, where nobody names another

Color = tuple[int, int, int]


class Detection(NamedTuple):
    """One box, as it comes out of a loop over `Detections`."""

    xyxy: tuple[float, float, float, float]
    score: float
    label: int
    name: str


@dataclass(frozen=True, eq=False)
class Detections:
    """The boxes found in one picture.

    Attributes:
        xyxy: float32 [n, 4], (left, top, right, bottom) in pixels of the original picture.
        score: float32 [n], in [0, 1].
        label: int64 [n], class indices into `names`.
        names: Class names.
        size: (width, height) of the original picture in pixels, after its EXIF orientation.
        path: Where the picture came from, if from a file.
        image: uint8 [H, W, 3] RGB, if the picture is kept for drawing.
        frame: Number of the frame, from 0, if `path` is a video.
        seconds: When that frame is shown.

    Raises:
        UsageError: Where the shapes do not fit one another or a label has no name.
    """

    xyxy: NDArray[np.float32]
    score: NDArray[np.float32]
    label: NDArray[np.int64]
    names: tuple[str, ...]
    size: tuple[int, int]
    path: str | None = None
    image: NDArray[np.uint8] | None = None
    frame: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        xyxy = np.asarray(self.xyxy, dtype=np.float32)
        xyxy = xyxy.reshape(0, 4) if xyxy.size == 0 else xyxy
        score = np.asarray(self.score, dtype=np.float32)
        label = np.asarray(self.label)
        if xyxy.ndim != 2 or xyxy.shape[1] != 4 or score.shape != xyxy.shape[:1] or label.shape != xyxy.shape[:1]:
            raise UsageError(
                f"detections need xyxy [n, 4], score [n] and label [n]; "
                f"got {list(xyxy.shape)}, {list(score.shape)} and {list(label.shape)}",
                code="shape",
            )
        if label.size and not np.issubdtype(label.dtype, np.integer):
            raise UsageError(f"labels are class indices (integers); got {label.dtype}", code="type")
        if label.size and not (label.min() >= 0 and label.max() < len(self.names)):
            wrong = label.min() if label.min() < 0 else label.max()
            raise UsageError(
                f"label {wrong} has no name: there are {len(self.names)} class names (0..{len(self.names) - 1})",
                code="range",
            )
        values = {"xyxy": xyxy, "score": score, "label": label.astype(np.int64), "names": tuple(self.names)}
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def empty(cls, names: Sequence[str], size: tuple[int, int], path: str | None = None) -> Detections:
        """No box at all."""
        return cls(
            np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64), tuple(names), size, path
        )

    # ---- a sequence ---------------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.score)

    def __iter__(self) -> Iterator[Detection]:
        for box, score, label in zip(self.xyxy.tolist(), self.score.tolist(), self.label.tolist(), strict=True):
            yield Detection(tuple(box), score, label, self.names[label])

    @overload
    def __getitem__(self, index: int) -> Detection: ...
    @overload
    def __getitem__(self, index: slice | Sequence[int] | NDArray[Any]) -> Detections: ...
    def __getitem__(self, index: int | slice | Sequence[int] | NDArray[Any]) -> Detection | Detections:
        """One `Detection` for an integer; the chosen `Detections` for a slice, a mask or an array of indices."""
        if isinstance(index, (int, np.integer)):
            label = int(self.label[index])
            return Detection(tuple(self.xyxy[index].tolist()), float(self.score[index]), label, self.names[label])
        if not isinstance(index, slice):
            index = np.asarray(index)
            index = index.astype(np.int64) if index.size == 0 else index
        return replace(self, xyxy=self.xyxy[index], score=self.score[index], label=self.label[index])

    def __repr__(self) -> str:
        found = ", ".join(f"{count} {name}" for name, count in self.counts().items()) or "nothing"
        where = f" in {self.path}" if self.path else ""
        return f"<Detections: {found}{where}, {self.size[0]}×{self.size[1]}>"

    def counts(self) -> dict[str, int]:
        """How many boxes of each class there are, classes without any left out.

        Classes that share a name are counted together.
        """
        found: dict[str, int] = {}
        for label, count in zip(*(v.tolist() for v in np.unique(self.label, return_counts=True)), strict=True):
            found[self.names[label]] = found.get(self.names[label], 0) + count
        return found

    # ---- fewer boxes --------------------------------------------------------------------------------------------

    def above(self, threshold: float) -> Detections:
        """The boxes whose score is at least the threshold."""
        return self[self.score >= threshold]

    def nms(self, iou: float = 0.7) -> Detections:
        """Greedy non-maximum suppression, class by class, best score first.

        The detectors here do not need it; it is for crowded scenes in which two queries answer for one object.

        Args:
            iou: Boxes of the same class that overlap a better one by more than this are dropped.
        """
        order = np.argsort(-self.score, kind="stable")
        boxes, label = self.xyxy[order].astype(np.float64), self.label[order]
        area = np.prod(np.clip(boxes[:, 2:] - boxes[:, :2], 0, None), axis=1)
        keep = np.ones(len(order), dtype=bool)
        for i in range(len(order)):
            if not keep[i]:
                continue
            rest = slice(i + 1, None)
            low, high = np.maximum(boxes[i, :2], boxes[rest, :2]), np.minimum(boxes[i, 2:], boxes[rest, 2:])
            shared = np.prod(np.clip(high - low, 0, None), axis=1)
            union = area[i] + area[rest] - shared
            keep[rest] &= ~((shared > iou * union) & (label[rest] == label[i]))
        return self[order[keep]]

    # ---- other people's formats ---------------------------------------------------------------------------------

    def to_supervision(self) -> Any:
        """The same boxes as `supervision.Detections`, an empty result included.

        Raises:
            UsageError: Where the package supervision is not installed.
        """
        try:
            import supervision as sv
        except ImportError as error:
            raise UsageError(
                f"to_supervision() needs the package supervision ({error})",
                code="extra",
                hint='Install it with: pip install "finedetr[viz]"',
            ) from error
        names = np.array([self.names[i] for i in self.label], dtype=str)
        return sv.Detections(
            xyxy=self.xyxy.copy(),
            confidence=self.score.copy(),
            class_id=self.label.astype(int),
            data={"class_name": names},
        )

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """COCO results: `{"image_id", "category_id", "bbox": [x, y, width, height], "score"}`.

        Args:
            image_id: The id of the picture in the data set.
            category_ids: The data set's id of each class index; without it the index is the id.

        Raises:
            UsageError: Where there is not one category id for each class name.
        """
        if category_ids is not None and len(category_ids) != len(self.names):
            raise UsageError(
                f"to_coco() needs one category id for each of the {len(self.names)} classes; got {len(category_ids)}",
                code="shape",
            )
        boxes = self.xyxy.astype(np.float64)
        boxes[:, 2:] -= boxes[:, :2]
        return [
            {
                "image_id": int(image_id),
                "category_id": int(category_ids[label]) if category_ids is not None else label,
                "bbox": [round(value, 3) for value in box],
                "score": round(score, 6),
            }
            for box, score, label in zip(boxes.tolist(), self.score.tolist(), self.label.tolist(), strict=True)
        ]

    def to_yolo(self, *, scores: bool = True) -> list[str]:
        """Lines of a YOLO label file: `class cx cy width height score`, all in fractions of the picture.

        Args:
            scores: False leaves the score out: a label to train on has none.
        """
        scale = np.array([*self.size, *self.size], dtype=np.float64)
        boxes = self.xyxy / scale
        center, extent = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
        rows = np.concatenate((center, extent, self.score[:, None]), axis=1)[:, : 5 if scores else 4].tolist()
        return [
            f"{label} " + " ".join(f"{value:.6f}" for value in row)
            for label, row in zip(self.label.tolist(), rows, strict=True)
        ]

    def to_records(self) -> list[dict[str, Any]]:
        """One JSON-able dict for each box: label, name, score and the corners in pixels."""
        return [
            {
                "label": box.label,
                "name": box.name,
                "score": round(box.score, 6),
                "xyxy": [round(value, 3) for value in box.xyxy],
            }
            for box in self
        ]

    # ---- pictures -----------------------------------------------------------------------------------------------

    def draw(self, image: Image.Image | NDArray[np.uint8] | None = None) -> Image.Image:
        """The picture with the boxes, class names and scores drawn over it. The original is not touched.

        Args:
            image: The picture; without it the kept one, or the file at `path` is read.

        Raises:
            UsageError: Where there is no picture to draw on, or its size is not the one of the boxes.
            DataError: Where the file at `path` cannot be read.
        """
        canvas = _canvas(image if image is not None else self.image, self.path)
        if canvas.size != tuple(self.size):
            raise UsageError(
                f"the boxes are in pixels of a {self.size[0]}×{self.size[1]} picture; "
                f"the picture to draw on is {canvas.size[0]}×{canvas.size[1]}",
                code="shape",
            )
        order = np.argsort(self.score, kind="stable")  # the surest boxes lie on top
        captions = [f"{self.names[self.label[i]]} {self.score[i]:.2f}" for i in order]
        return annotate(canvas, self.xyxy[order], captions, [class_color(int(self.label[i])) for i in order])


def class_color(index: int) -> Color:
    """A saturated RGB color for a class index: hues by the golden ratio, in three shades, so that neighbors differ."""
    hue = (0.02 + index * 0.618033988749895) % 1.0
    saturation, value = ((0.85, 1.0), (0.95, 0.78), (0.55, 1.0))[index // 7 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def annotate(
    image: Image.Image,
    xyxy: ArrayLike,
    captions: Sequence[str],
    colors: Sequence[Color],
    *,
    dashed: bool = False,
    line: int | None = None,
) -> Image.Image:
    """A copy of an RGB picture with boxes drawn over it: the last box on top, captions above all boxes.

    Every colored line has a rim that contrasts with it and every caption stands on a filled box, so that both can be
    read on any background.

    Args:
        image: The picture.
        xyxy: [n, 4], corners in its pixels.
        captions: n texts; an empty one draws no caption.
        colors: n RGB colors.
        dashed: Dashed instead of solid lines.
        line: Width of the colored line in pixels; from the size of the picture where it is not given.
    """
    from PIL import ImageDraw, ImageFont

    canvas = image.convert("RGB") if image.mode != "RGB" else image.copy()
    short = min(canvas.size)
    line = line or (1 if short < 120 else max(2, round(short / 320)))
    font = ImageFont.load_default(size=max(10, round(short / 42)))
    draw = ImageDraw.Draw(canvas)
    boxes = [_inside(box, canvas.size) for box in np.asarray(xyxy, dtype=np.float64).reshape(-1, 4).tolist()]
    for box, color in zip(boxes, colors, strict=True):
        if dashed:
            _dashed_box(draw, box, color, line)
        else:
            _solid_box(draw, box, color, line)
    for box, text, color in zip(boxes, captions, colors, strict=True):
        if text:
            _caption(draw, box, " ".join(text.split()), color, font, canvas.size)
    return canvas


def _inside(box: list[float], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """Whole pixels inside the picture, in order, whatever the numbers were."""
    width, height = size
    values = np.nan_to_num(np.array(box), posinf=max(size), neginf=0)
    left, right = sorted(np.clip(values[[0, 2]], 0, width - 1).round().astype(int).tolist())
    top, bottom = sorted(np.clip(values[[1, 3]], 0, height - 1).round().astype(int).tolist())
    return left, top, right, bottom


def _solid_box(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: Color, line: int) -> None:
    left, top, right, bottom = box
    draw.rectangle((left - 1, top - 1, right + 1, bottom + 1), outline=_contrast(color))
    draw.rectangle(box, outline=color, width=line)


def _dashed_box(draw: ImageDraw.ImageDraw, box: tuple[int, int, int, int], color: Color, line: int) -> None:
    """Dashes of color over a line that contrasts with it: one of the two is seen on any ground."""
    left, top, right, bottom = box
    draw.rectangle(box, outline=_contrast(color), width=line)
    dash = 4 * line + 2
    for start in range(left, right + 1, 2 * dash):
        end = min(start + dash, right)
        draw.rectangle((start, top, end, top + line - 1), fill=color)
        draw.rectangle((start, bottom - line + 1, end, bottom), fill=color)
    for start in range(top, bottom + 1, 2 * dash):
        end = min(start + dash, bottom)
        draw.rectangle((left, start, left + line - 1, end), fill=color)
        draw.rectangle((right - line + 1, start, right, end), fill=color)


def _caption(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    text: str,
    color: Color,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    size: tuple[int, int],
) -> None:
    """Text on a filled box: above the box where there is room, else inside its upper edge; never cut off."""
    _, _, width, height = draw.textbbox((0, 0), text, font=font)
    width, height = round(width) + 4, round(height) + 3
    left = max(0, min(box[0], size[0] - width))
    top = box[1] - height if box[1] >= height else min(box[1], size[1] - height)
    draw.rectangle((left, top, left + width - 1, top + height - 1), fill=color)
    draw.text((left + 2, top + 1), text, fill=_contrast(color), font=font)


def _contrast(color: Color) -> Color:
    """Black on a light color, white on a dark one."""
    light = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if light > 140 else (255, 255, 255)


def _canvas(image: Image.Image | NDArray[np.uint8] | None, path: str | None) -> Image.Image:
    """An RGB picture to draw on, from what there is."""
    from PIL import Image, ImageOps

    if isinstance(image, Image.Image):
        return (ImageOps.exif_transpose(image) or image).convert("RGB")
    if image is not None:
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
            raise UsageError(
                f"a picture to draw on is uint8 [H, W, 3] (RGB); got {array.dtype} {list(array.shape)}", code="shape"
            )
        return Image.fromarray(array)
    if path is None:
        raise UsageError("there is no picture to draw on: give one, as in detections.draw(image)", code="picture")
    try:
        with Image.open(Path(path)) as opened:
            picture = ImageOps.exif_transpose(opened) or opened
            if picture.mode.startswith("I;16"):  # PIL would cut off everything above 255
                return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8)).convert("RGB")
            return picture.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: the picture cannot be read to draw on it ({error})", code="corrupt_image") from error
