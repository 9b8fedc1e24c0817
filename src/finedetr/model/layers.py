"""Small parts that every floor of the model uses: convolution with norm, affine ReLU, MLP, frozen norm, kept tables."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from finedetr.errors import ConfigError
from finedetr.kernels.depthwise import depthwise
from finedetr.kernels.normalization import normalization

__all__ = [
    "ACTIVATIONS",
    "MLP",
    "Backbone",
    "ConvNorm",
    "FrozenBatchNorm2d",
    "LearnableAffine",
    "RMSNorm",
    "activation",
    "focal_bias",
    "join",
    "kept",
    "without_gradient",
]

P = ParamSpec("P")
T = TypeVar("T")

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """One of `ACTIVATIONS`, or "prelu", which learns its slope."""
    return nn.PReLU() if name == "prelu" else ACTIVATIONS[name]


def focal_bias() -> float:
    """The bias at which a sigmoid answers 0.01 (Lin et al., 2017): -log((1 - 0.01) / 0.01)."""
    return -math.log(99.0)


def kept(build: Callable[P, T]) -> Callable[P, T]:
    """Builds a table of constants once for each size and device, and keeps the last 64 for all that ask.

    As ordinary tensors even in `inference_mode`, for training may ask next.
    """

    @functools.lru_cache(maxsize=64)
    def remembered(*args: P.args, **kwargs: P.kwargs) -> T:
        with torch.inference_mode(False), torch.no_grad():
            return build(*args, **kwargs)

    @functools.wraps(build)
    def table(*args: P.args, **kwargs: P.kwargs) -> T:
        if torch.compiler.is_compiling():  # a traced graph holds it as a constant
            return build(*args, **kwargs)
        return remembered(*args, **kwargs)  # type: ignore[arg-type]

    return table


def without_gradient() -> torch.no_grad:
    """`torch.no_grad` for modules that are asked with a gradient, too, in the same forward pass.

    Autocast keeps the halves that it makes of weights until the pass ends. In torch 2.8 (not in 2.13) one made without
    a gradient serves later calls as well, and the weights never learn.
    """
    return torch.no_grad() if torch.compiler.is_compiling() else _Untracked()


class _Untracked(torch.no_grad):
    def __enter__(self) -> None:
        self._cache = torch.is_autocast_cache_enabled()
        torch.set_autocast_cache_enabled(False)
        super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_autocast_cache_enabled(self._cache)


def join(maps: Sequence[Float[Tensor, "B _ H W"]]) -> Float[Tensor, "B D H W"]:
    """Maps side by side, channel after channel."""
    if maps[0].device.type != "cpu" or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return torch.cat(tuple(maps), dim=1)
    out: Tensor = _Join.apply(*maps)  # type: ignore[no-untyped-call]
    return out


class _Join(torch.autograd.Function):
    """`torch.cat` whose gradients are tensors of their own.

    The usual ones are views that skip the other maps' channels at each pixel. Whatever reads them next on a CPU takes
    up to thirty times as long (relu's backward pass: 11 ms instead of 0.4).
    """

    @staticmethod
    def forward(ctx: Any, *maps: Tensor) -> Tensor:
        ctx.channels = [part.shape[1] for part in maps]
        return torch.cat(maps, dim=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        layout = (
            torch.channels_last if grad.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format
        )
        return tuple(part.contiguous(memory_format=layout) for part in grad.split(ctx.channels, dim=1))


class FrozenBatchNorm2d(nn.Module):
    """Batch normalization whose statistics and affine parameters never change; nothing of it is trained."""

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        """X · scale + shift, with both computed from the four buffers."""
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm in the type of its scale, as DEIMv2's; torch's own warns of mixed types, and is slow."""

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Scale · x / root(mean(x²) + eps); float32 under autocast."""
        return super().forward(x.to(self.weight.dtype))


class LearnableAffine(nn.Module):
    """HGNetv2's learnable affine block: one scale and one shift for a whole feature map."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B D H W"]:
        """Scale · x + bias."""
        return self.scale * x + self.bias


class ConvNorm(nn.Module):
    """Convolution without bias, batch normalization, activation, and optionally a learnable affine block.

    Args:
        inputs: Channels in.
        outputs: Channels out.
        kernel: Side of the square kernel; the padding keeps the size at stride 1.
        stride: Stride.
        dilation: Distance of the kernel's places.
        groups: Groups of the convolution.
        act: Name of an activation, or None.
        affine: Whether a `LearnableAffine` follows the activation (HGNetv2 with "LAB").
        padding: Zero padding on every side; dilation · (kernel - 1) // 2 where not given.
        frozen: Use a `FrozenBatchNorm2d`.
    """

    norm: nn.Module

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int = 1,
        stride: int = 1,
        *,
        dilation: int = 1,
        groups: int = 1,
        act: str | None = None,
        affine: bool = False,
        padding: int | None = None,
        frozen: bool = False,
    ) -> None:
        super().__init__()
        padding = dilation * (kernel - 1) // 2 if padding is None else padding
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, groups, bias=False)
        self.norm = FrozenBatchNorm2d(outputs) if frozen else nn.BatchNorm2d(outputs)
        self.act = act
        self.affine = LearnableAffine() if affine and act else None

    def forward(self, x: Float[Tensor, "B D H W"]) -> Float[Tensor, "B E H2 W2"]:
        """One feature map to the next."""
        x = self._convolve(x)
        if torch.is_grad_enabled() and isinstance(self.norm, nn.BatchNorm2d):
            affine = () if self.affine is None else (self.affine.scale, self.affine.bias)
            fused = normalization(x, self.norm, self.act, *affine)
            if fused is not None:
                return fused
        x = self.norm(x)
        if self.act is not None:
            x = ACTIVATIONS[self.act](x)
        return x if self.affine is None else self.affine(x)

    def _convolve(self, x: Tensor) -> Tensor:
        conv = self.conv
        slow = conv.groups > 1 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        if not slow:
            out: Tensor = conv(x)
            return out
        fast = depthwise(x, conv) if torch.is_grad_enabled() else None
        if fast is not None:
            return fast
        with torch.autocast("cpu", enabled=False):  # torch's, in bfloat16, has a slow backward pass on the CPU
            out = F.conv2d(x.float(), conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
            return out.to(torch.get_autocast_dtype("cpu"))


class Backbone(nn.Module):
    """Pictures to the maps of the chosen stages, at strides 4·2^stage. Subclasses make `stem` and `stages`."""

    stem: nn.Module
    stages: nn.ModuleList

    def __init__(self, returned: tuple[int, ...], channels: tuple[int, ...]) -> None:
        super().__init__()
        if not 0 <= min(returned) <= max(returned) < len(channels):
            raise ConfigError(
                f"backbone.stages: numbers in 0..{len(channels) - 1} are wanted, {returned} came", code="range"
            )
        self.returned = returned
        self.channels = tuple(channels[stage] for stage in returned)

    def initialize(self, freeze_stem: bool, freeze_stages: int = 0) -> None:
        """Random weights: the published detectors start from ImageNet weights; without, these help."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if freeze_stem:
            self.stem.requires_grad_(False)
        self.stages[:freeze_stages].requires_grad_(False)

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> tuple[Float[Tensor, "B D H2 W2"], ...]:
        """One map for each returned stage, finest first."""
        x = self.stem(images)
        maps = []
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index in self.returned:
                maps.append(x)
        return tuple(maps)


class MLP(nn.Module):
    """Linear layers with an activation between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int, act: str = "relu") -> None:
        super().__init__()
        sizes = [inputs] + [hidden] * (layers - 1) + [outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.act = act

    @property
    def last(self) -> nn.Linear:
        """The layer that gives the answer."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def zero_last(self) -> None:
        """Starts with the answer zero, so that boxes begin at their references."""
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N E"]:
        """Applied to the last dimension."""
        for layer in self.layers[:-1]:
            x = ACTIVATIONS[self.act](layer(x))
        answer: Tensor = self.layers[-1](x)
        return answer
