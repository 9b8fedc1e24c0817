"""The moving average of the weights, which is what gets evaluated and kept."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from finedetr.errors import ConfigError, ModelError

__all__ = ["MovingAverage", "ramped_decay"]


def ramped_decay(decay: float, warmup: float, updates: int) -> float:
    """Decay · (1 - exp(-n / warmup)) for the n-th update, counted from 1 (spec 4.1); a warm-up of 0 is constant."""
    return decay * (1 - math.exp(-updates / warmup)) if warmup > 0 else decay


class MovingAverage:
    """An exponential moving average of all floating-point state: parameters and the statistics of norms.

    Integer state (such as the counters of batch norms) is copied. One fused `torch._foreach_lerp_` for each update
    stands in for two or three kernels for each of about a thousand tensors.

    Args:
        model: What is averaged; its parameters must stay the same objects.
        decay: The published 0.9999 remembers about 10 000 updates.
        warmup: Updates over which the decay rises from 0; 0 has no ramp.
    """

    def __init__(self, model: nn.Module, decay: float = 0.9999, warmup: float = 1000.0) -> None:
        self.updates = 0
        self.retune(decay, warmup)
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self._own_float, self._own_other = _state(self.model)
        self._float, self._other = _state(model)

    @torch.no_grad()
    def update(self) -> float:
        """Takes in the weights as they are now; gives back the decay that was used."""
        self.updates += 1
        decay = ramped_decay(self.decay, self.warmup, self.updates)
        torch._foreach_lerp_(self._own_float, self._float, 1 - decay)
        for own, other in zip(self._own_other, self._other, strict=True):
            own.copy_(other)
        return decay

    def retune(self, decay: float, warmup: float) -> None:
        """Another memory, for a run whose length has changed; the ramp goes on where it is."""
        if not 0 <= decay < 1 or warmup < 0:
            raise ConfigError(f"a moving average needs a decay in [0, 1) and a warm-up from 0, got {decay}, {warmup}")
        self.decay, self.warmup = float(decay), float(warmup)

    def restart(self, decay: float) -> None:
        """Goes on with another decay, without a ramp (the published restarts set one, but never used it; spec 4.7)."""
        self.retune(decay, 0.0)

    def state_dict(self) -> dict[str, object]:
        """Weights and counters, in plain types."""
        return {
            "decay": self.decay,
            "warmup": self.warmup,
            "updates": self.updates,
            "model": self.model.state_dict(),
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continues exactly where `state_dict` was taken.

        Raises:
            ModelError: The state is of another kind.
        """
        decay, warmup, updates, model = (state.get(key) for key in ("decay", "warmup", "updates", "model"))
        if not (
            isinstance(decay, float)
            and isinstance(warmup, float)
            and isinstance(updates, int)
            and isinstance(model, dict)
        ):
            raise ModelError("the state of the moving average lacks decay, warmup, updates or model", code="schema")
        self.model.load_state_dict(model)
        self.decay, self.warmup, self.updates = decay, warmup, updates


def _state(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The live tensors of a module's state dict, floating ones and others."""
    tensors = list(model.state_dict(keep_vars=True).values())
    return (
        [tensor.data for tensor in tensors if tensor.is_floating_point()],
        [tensor.data for tensor in tensors if not tensor.is_floating_point()],
    )
