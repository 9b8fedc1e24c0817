"""Published weights by name, through the Hugging Face Hub: fetched once, kept in its cache, never executed."""

from __future__ import annotations

import re
from pathlib import Path

from finedetr.errors import ModelError, did_you_mean

__all__ = ["OURS", "PUBLISHED", "fetch", "is_name"]

OURS = "finedetr.safetensors"
"""The file that FineDETR puts into a repository: weights and their card."""
FILES = ("config.json", "model.safetensors")
"""What is read of other people's repositories."""

PUBLISHED: dict[str, str] = {  # spec 2.1; D-FINE by its authors' community, RT-DETRv2 by theirs, both Apache-2.0
    "dfine-n-coco": "ustc-community/dfine-nano-coco",
    "dfine-s-coco": "ustc-community/dfine-small-coco",
    "dfine-m-coco": "ustc-community/dfine-medium-coco",
    "dfine-l-coco": "ustc-community/dfine-large-coco",
    "dfine-x-coco": "ustc-community/dfine-xlarge-coco",
    "dfine-s-obj365": "ustc-community/dfine-small-obj365",
    "dfine-m-obj365": "ustc-community/dfine-medium-obj365",
    "dfine-l-obj365": "ustc-community/dfine-large-obj365",
    "dfine-x-obj365": "ustc-community/dfine-xlarge-obj365",
    "dfine-s-obj2coco": "ustc-community/dfine-small-obj2coco",
    "dfine-m-obj2coco": "ustc-community/dfine-medium-obj2coco",
    "dfine-l-obj2coco": "ustc-community/dfine-large-obj2coco-e25",
    "dfine-x-obj2coco": "ustc-community/dfine-xlarge-obj2coco",
    "rtdetrv2-r18-coco": "PekingU/rtdetr_v2_r18vd",
    "rtdetrv2-r34-coco": "PekingU/rtdetr_v2_r34vd",
    "rtdetrv2-r50-m-coco": "PekingU/rtdetr_v2_r50vd_m",
    "rtdetrv2-r50-coco": "PekingU/rtdetr_v2_r50vd",
    "rtdetrv2-r101-coco": "PekingU/rtdetr_v2_r101vd",
    "deimv2-atto-coco": "Intellindust/DEIMv2_HGNetv2_ATTO_COCO",
    "deimv2-femto-coco": "Intellindust/DEIMv2_HGNetv2_FEMTO_COCO",
    "deimv2-pico-coco": "Intellindust/DEIMv2_HGNetv2_PICO_COCO",
    "deimv2-n-coco": "Intellindust/DEIMv2_HGNetv2_N_COCO",
    "deimv2-s-coco": "Intellindust/DEIMv2_DINOv3_S_COCO",
    "deimv2-m-coco": "Intellindust/DEIMv2_DINOv3_M_COCO",
    "deimv2-l-coco": "Intellindust/DEIMv2_DINOv3_L_COCO",
    "deimv2-x-coco": "Intellindust/DEIMv2_DINOv3_X_COCO",
}


def is_name(target: str) -> bool:
    """Whether a word means something on the Hub: a name of the table, or `hf://owner/repository@revision`."""
    return target in PUBLISHED or target.startswith("hf://")


def fetch(target: str) -> Path:
    """The folder of published weights, from the Hub's cache or over the network.

    Args:
        target: A name of `PUBLISHED`, or `hf://owner/repository`, with `@revision` (a branch, tag or commit) if wanted.

    Raises:
        ModelError: The library is not installed, the name is malformed, or the files can neither be found nor fetched:
            which ones, from where, and how to place them by hand.
    """
    place = PUBLISHED.get(target, target.removeprefix("hf://"))
    repository, _, revision = place.partition("@")
    if repository.count("/") != 1 or not all(repository.split("/")):
        raise ModelError(
            f"{target!r} names nothing on the Hub",
            code="not_found",
            hint=did_you_mean(target, PUBLISHED) or "Such as hf://owner/repository.",
        )
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ModelError(
            f"{target} is fetched with huggingface_hub, which is not installed",
            code="not_found",
            hint="pip install huggingface_hub",
        ) from error
    try:
        folder = Path(snapshot_download(repository, revision=revision or None, allow_patterns=["config.json", OURS]))
        if (folder / OURS).is_file():
            return folder
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(FILES)))
    except Exception as error:  # no network, no such repository, no permission: the library has a class for each
        reason = re.split(r"\. |\n", str(error).strip())[0]
        raise ModelError(
            f"{target}: {' and '.join(FILES)} of the Hub's repository {repository} cannot be fetched "
            f"({type(error).__name__}: {reason})",
            code="not_found",
            hint="Without a network: put both files into one folder by hand, and give that folder instead of the name.",
        ) from error
