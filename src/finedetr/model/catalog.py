"""What is known of the models of the table: size, cost, the numbers of their authors, weights and licenses.

A literal, one row a model. Parameters and GFLOPs are held by the tests to what is counted; AP and latency are what the
papers and repositories report (spec 1.4 - 1.6 and 5): none of them is measured here.
"""

from __future__ import annotations

from dataclasses import dataclass

from finedetr.model.hub import PUBLISHED

__all__ = ["CATALOG", "CODE_LICENSE", "Entry", "Family", "conditions", "family_of", "weights_of"]

CODE_LICENSE = "Apache-2.0"
"""Of FineDETR: all models are written here from their papers."""


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        parameters: Of the model that is trained, with COCO's 80 classes.
        gflops: 2·10^-9 times the multiplications with addition of convolutions and matrix products, of the deployed
            model as published, for one picture of its size. Unknown for the classic hosts, whose pictures vary in size.
        ap: COCO val2017 AP in points, trained on COCO only but for an ImageNet backbone; of the classic hosts at a
            shorter side of 800 pixels.
        latency: Milliseconds on a T4 with TensorRT in FP16, one picture at a time.
    """

    parameters: int
    gflops: float | None
    ap: float | None = None
    latency: float | None = None


CATALOG: dict[str, Entry] = {
    "dfine-n": Entry(3_782_693, 7.31, 42.8, 2.12),
    "dfine-s": Entry(10_321_877, 25.50, 48.5, 3.49),
    "dfine-m": Entry(19_590_064, 57.03, 52.3, 5.62),
    "dfine-l": Entry(31_244_152, 91.60, 54.0, 8.07),
    "dfine-x": Entry(62_621_560, 203.08, 55.8, 12.89),
    "rtdetrv2-r18": Entry(20_184_464, 60.5, 48.1, 4.61),  # 217 pictures a second; so for the others
    "rtdetrv2-r34": Entry(31_441_668, 92.6, 49.9, 6.21),
    "rtdetrv2-r50-m": Entry(36_593_772, 99.6, 51.9, 6.90),
    "rtdetrv2-r50": Entry(42_891_372, 133.8, 53.4, 9.26),
    "rtdetrv2-r101": Entry(76_556_268, 251.7, 54.3, 13.51),
    "rtdetrv2-hgnet-l": Entry(32_925_036, 107.7, 52.9, 8.77),
    "rtdetrv2-hgnet-x": Entry(67_374_188, 227.1, 54.7, 13.51),
    "rtdetrv2-hgnet-h": Entry(125_584_348, 476.7, 56.3, 25.0),
    "rtdetrv2-r18-dsp": Entry(20_184_464, 60.5, 47.4),
    "rtdetrv2-r34-dsp": Entry(31_441_668, 92.6, 49.2),
    "rtdetrv2-r50-m-dsp": Entry(36_593_772, 99.6, 51.4),
    "rtdetrv2-r50-dsp": Entry(42_891_372, 133.8, 52.9),
    "deim-dfine-n": Entry(3_782_693, 7.31, 43.0, 2.12),
    "deim-dfine-s": Entry(10_321_877, 25.50, 49.0, 3.49),
    "deim-dfine-m": Entry(19_590_064, 57.03, 52.7, 5.62),
    "deim-dfine-l": Entry(31_289_848, 91.6, 54.7, 8.07),
    "deim-dfine-x": Entry(62_715_480, 203.1, 56.5, 12.89),
    "deim-rtdetrv2-r18": Entry(20_183_440, 60.5, 49.0, 4.59),
    "deim-rtdetrv2-r34": Entry(31_440_644, 92.6, 50.9, 6.40),
    "deim-rtdetrv2-r50-m": Entry(33_198_864, 99.6, 53.2, 6.90),
    "deim-rtdetrv2-r50": Entry(42_943_596, 133.8, 54.3, 9.15),
    "deim-rtdetrv2-r101": Entry(76_660_716, 251.7, 55.5, 13.66),
    "deimv2-atto": Entry(508_985, 0.757, 23.8, 1.10),
    "deimv2-femto": Entry(983_945, 1.673, 31.0, 1.45),
    "deimv2-pico": Entry(1_539_539, 5.148, 38.5, 2.13),
    "deimv2-n": Entry(3_600_421, 7.017, 43.0, 2.32),
    "deimv2-s": Entry(9_779_838, 49.5, 50.9, 5.78),  # with its transformer's attention, as authors do not count
    "deimv2-m": Entry(18_357_750, 84.1, 53.0, 8.80),
    "deimv2-l": Entry(32_551_214, 144.5, 56.0, 10.47),
    "deimv2-x": Entry(51_211_736, 199.6, 57.8, 13.75),
    "deimv2-hgnet-s": Entry(10_451_413, 21.2),
    "deimv2-hgnet-m": Entry(18_866_352, 47.8),
    "deimv2-hgnet-l": Entry(31_090_936, 82.5),
    "deimv2-hgnet-x": Entry(60_291_704, 183.4),
    "conditional-detr-r50": Entry(43_415_574, None, 41.0),
    "conditional-detr-r50-dc5": Entry(43_415_574, None, 43.8),
    "conditional-detr-r101": Entry(62_355_478, None),
    "conditional-detr-r101-dc5": Entry(62_355_478, None),
    "dab-detr-r50": Entry(43_689_426, None, 42.2),
    "dab-detr-r50-dc5": Entry(43_689_426, None),
    "deformable-detr-r50": Entry(40_066_838, None, 44.5),
    "deformable-detr-r50-refine": Entry(40_832_698, None, 46.2),
    "deformable-detr-r50-two-stage": Entry(41_161_740, None, 46.9),
    "deformable-detr-r50-single": Entry(34_063_766, None, 39.4),
    "deformable-detr-r50-single-dc5": Entry(34_063_766, None, 41.5),
    "dino-r50": Entry(46_884_712, None, 49.0),
    "dino-r50-5scale": Entry(47_247_336, None, 49.4),
}

PRETRAINED_AP: dict[str, float] = {  # COCO AP of weights that saw Objects365 first
    "dfine-s-obj2coco": 50.7,
    "dfine-m-obj2coco": 55.1,
    "dfine-l-obj2coco": 57.3,
    "dfine-x-obj2coco": 59.3,
}


@dataclass(frozen=True)
class Family:
    """Models of one repository.

    Attributes:
        paper: Authors, title, venue.
        repository: Of the authors, on GitHub.
        weights_license: What the authors say of their weights, or "undeclared".
        elsewhere: Where the official .pth files are.
    """

    paper: str
    repository: str
    weights_license: str
    elsewhere: str


FAMILIES: dict[str, Family] = {  # by the beginning of a model's name, the first that fits
    "dfine-": Family(
        "Peng et al., D-FINE, ICLR 2025",
        "Peterande/D-FINE",
        "Apache-2.0",
        "github.com/Peterande/storage, release dfinev1.0",
    ),
    "rtdetrv2-": Family(
        "Lv et al., RT-DETRv2, 2024",
        "lyuwenyu/RT-DETR",
        "Apache-2.0",
        "github.com/lyuwenyu/storage, releases v0.1 and v0.2",
    ),
    "deim-": Family(
        "Huang et al., DEIM, CVPR 2025",
        "Intellindust-AI-Lab/DEIM",
        "Apache-2.0",
        "Google Drive, linked in the README of Intellindust-AI-Lab/DEIM",
    ),
    "conditional-detr-": Family(
        "Meng et al., Conditional DETR, ICCV 2021",
        "Atten4Vis/ConditionalDETR",
        "Apache-2.0",
        "README of Atten4Vis/ConditionalDETR",
    ),
    "dab-detr-": Family(
        "Liu et al., DAB-DETR, ICLR 2022", "IDEA-Research/DAB-DETR", "Apache-2.0", "README of IDEA-Research/DAB-DETR"
    ),
    "deformable-detr-": Family(
        "Zhu et al., Deformable DETR, ICLR 2021",
        "fundamentalvision/Deformable-DETR",
        "Apache-2.0",
        "README of fundamentalvision/Deformable-DETR",
    ),
    "dino-": Family(
        "Zhang et al., DINO, ICLR 2023", "IDEA-Research/DINO", "Apache-2.0", "README of IDEA-Research/DINO"
    ),
    "deimv2-hgnet-": Family(
        "Huang et al., DEIMv2, 2025", "Intellindust-AI-Lab/DEIMv2", "none", "none published: configurations only"
    ),
    "deimv2-": Family(
        "Huang et al., DEIMv2, 2025",
        "Intellindust-AI-Lab/DEIMv2",
        "undeclared",
        "Google Drive, linked in the README of Intellindust-AI-Lab/DEIMv2",
    ),
}

OBJECTS365 = "The images of Objects365, on which obj365 and obj2coco weights were trained, have terms of their own."
DINOV3 = "The backbone began with DINOv3, whose weights are under Meta's DINOv3 License."


def family_of(model: str) -> Family | None:
    """The family of a model; None where its name is nobody's."""
    return next((family for prefix, family in FAMILIES.items() if model.startswith(prefix)), None)


def conditions(model: str) -> tuple[str, ...]:
    """What else the published weights of a model depend on, a sentence each."""
    found = [OBJECTS365] if any(not name.endswith("-coco") for name in weights_of(model)) else []
    return (*found, DINOV3) if model in ("deimv2-l", "deimv2-x") else tuple(found)


def weights_of(model: str) -> dict[str, str]:
    """Names of published weights of a model -> repository on the Hugging Face Hub."""
    return {name: place for name, place in PUBLISHED.items() if name.rpartition("-")[0] == model}
