"""The law between pictures and detections, in one place: what `predict` and every evaluation do alike.

Bytes to floats, the detector, flat top-k over queries and classes, boxes in pixels of the original picture. Resizing is
`finedetr.data.images.resize`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import UInt8
from numpy.typing import NDArray
from torch import Tensor, nn

from finedetr.data.device import normalize
from finedetr.errors import UsageError
from finedetr.geometry import to_xyxy
from finedetr.model.postprocess import top_detections

__all__ = ["Inference", "Precision", "at_rest"]

Precision = Literal["auto", "fp32", "bf16", "fp16"]
_TYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Inference:
    """How a detector is run.

    Attributes:
        device: Where.
        precision: `fp32`, `bf16` or `fp16` (autocast), or `auto`: bf16 where a GPU computes it natively, else fp32.
        mean: Of each channel, for values in [0, 1]; None as in D-FINE and DEIM.
        std: Likewise.
        top: How many detections of a picture are kept, at most queries times classes; None: see `top_detections`.
    """

    device: torch.device | str = "cpu"
    precision: Precision = "fp32"
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    top: int | None = None

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "fp32", "bf16", "fp16"):
            raise UsageError(f"precision is auto, fp32, bf16 or fp16; got {self.precision!r}", code="type")
        if self.top is not None and self.top < 1:
            raise UsageError(f"at least 1 detection of a picture is kept; got {self.top}", code="range")

    def autocast(self) -> AbstractContextManager[Any]:
        """The context of the precision."""
        kind = torch.device(self.device).type
        precision = self.precision
        if precision == "auto":
            precision = "bf16" if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        if precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(kind, _TYPES[precision])

    @torch.inference_mode()
    def __call__(
        self, detector: nn.Module, images: UInt8[Tensor, "B 3 H W"], sizes: NDArray[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64]]:
        """Detects in a batch.

        Args:
            detector: In eval mode, on the device; its forward gives `Output`.
            images: The resized pictures as bytes.
            sizes: [B, 2], (width, height) of the originals.

        Returns:
            Corners in pixels of the originals float32 [B, K, 4] (not clipped: published AP are measured so), scores
            float32 [B, K] best first, class indices int64 [B, K].
        """
        values = images.to(self.device, non_blocking=True).float().div_(255)
        with self.autocast():
            final = detector(normalize(values, self.mean, self.std)).matching
        score, label, boxes = top_detections(final.logits[-1].float(), final.boxes[-1].float(), self.top)
        # One copy from the device: a float32 holds every class index exactly.
        rows = torch.cat((to_xyxy(boxes), score[..., None], label[..., None].float()), dim=-1).cpu().numpy()
        scale = np.tile(np.asarray(sizes, dtype=np.float32), 2)[:, None]
        return rows[..., :4] * scale, rows[..., 4], rows[..., 5].astype(np.int64)


@contextlib.contextmanager
def at_rest(detector: nn.Module) -> Iterator[nn.Module]:
    """The detector in eval mode; afterwards every module is in the mode in which it was."""
    modes = [(module, module.training) for module in detector.modules()]
    detector.eval()
    try:
        yield detector
    finally:
        for module, mode in modes:
            module.training = mode
