"""Weights on disk: safetensors with a card that says all that is needed to use them. Loading runs no code.

Official checkpoints and folders of transformers are read, too (`foreign.py`); their card is made up from what they say.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from finedetr._version import __version__
from finedetr.errors import ModelError, did_you_mean
from finedetr.files import write_atomically
from finedetr.model.classes import match_names
from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.foreign import is_foreign, read_foreign
from finedetr.model.layers import focal_bias
from finedetr.model.zoo import published_input

__all__ = ["Card", "Transfer", "load_weights", "read_card", "save_weights", "transfer_weights"]

SCHEMA = 1


@dataclass(frozen=True)
class Card:
    """What travels with the weights: everything that a user of them must not have to guess.

    Sizes are (height, width) in pixels; `mean` and `std` are per channel on the 0..1 scale, or None where pictures are
    only divided by 255.
    """

    config: ModelConfig
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    size: tuple[int, int] = (640, 640)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    thresholds: tuple[float, ...] = ()  # of scores, one a class, where `finedetr eval --thresholds` has found them

    def __post_init__(self) -> None:
        if len(self.names) != len(self.category_ids):
            raise ModelError(
                f"a card needs one category id for each class name, got {len(self.names)} names and "
                f"{len(self.category_ids)} ids",
                code="schema",
            )
        if self.thresholds and len(self.thresholds) != len(self.names):
            raise ModelError(
                f"a card needs one threshold for each class, got {len(self.thresholds)} for {len(self.names)} classes",
                code="schema",
            )

    def to_json(self) -> str:
        """The card as one line of JSON."""
        return json.dumps({"schema": SCHEMA, "finedetr": __version__, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str = "card") -> Card:
        """Reads a card.

        Raises:
            ModelError: It is no JSON, of a newer schema, or lacks a field; `where` says which file.
        """
        try:
            document = json.loads(text)
            schema = document.pop("schema")
            document.pop("finedetr", None)
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{where}: the card is unreadable ({error})", code="schema") from error
        if not isinstance(schema, int) or schema > SCHEMA:
            raise ModelError(
                f"{where}: the card has schema {schema}, this finedetr {__version__} reads up to {SCHEMA}",
                code="schema",
                hint="Install a newer finedetr.",
            )
        card: Card = _build(cls, document, where)
        return card


def _build(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as an instance of a (nested) dataclass, tuple or plain type."""
    if is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ModelError(f"{where}: a table was expected, got {value!r}", code="schema")
        hints = typing.get_type_hints(kind)
        unknown = set(value) - set(hints)
        if unknown:
            name = sorted(unknown)[0]
            raise ModelError(f"{where}: unknown field {name!r}", code="schema", hint=did_you_mean(name, hints))
        required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
        missing = sorted(required - set(value))
        if missing:
            raise ModelError(f"{where}: the field {missing[0]!r} is missing", code="schema")
        return kind(**{name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()})  # type: ignore[operator]
    origin = typing.get_origin(kind)
    if origin in (typing.Union, types.UnionType):
        inner = [option for option in typing.get_args(kind) if option is not type(None)]
        return None if value is None else _build(inner[0], value, where)
    if origin is tuple:
        if not isinstance(value, list):
            raise ModelError(f"{where}: a list was expected, got {value!r}", code="schema")
        item = typing.get_args(kind)[0]
        return tuple(_build(item, element, where) for element in value)
    return value


def save_weights(path: str | Path, detector: nn.Module, card: Card) -> Path:
    """Writes weights and card to one safetensors file, atomically: a crash leaves the old file or the new one.

    Accepts a detector or any module with the same state dict (such as its moving average).
    """
    path = Path(path)
    state = {name: tensor.detach().to("cpu").contiguous() for name, tensor in detector.state_dict().items()}
    content = save(state, metadata={"finedetr": card.to_json()})
    return write_atomically(path, lambda file: file.write(content))


def _open(path: Path, *, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and, where asked for, tensors of a safetensors file."""
    if not path.is_file():
        raise ModelError(f"no weights at {path}", code="not_found", hint="Give a run folder or a .safetensors file.")
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys()) if tensors else []
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is no readable safetensors file: {error}", code="schema") from error


def read_card(path: str | Path) -> Card:
    """The card of a weight file, without its weights.

    Raises:
        ModelError: The file is absent, unreadable, or carries no card.
    """
    path = Path(path)
    if is_foreign(path):
        return _read(path)[0]
    return _card(_open(path, tensors=False)[0], path)


def _read(path: Path) -> tuple[Card, dict[str, Tensor]]:
    """Card and tensors of a file of ours or of somebody else's."""
    if is_foreign(path):
        other = read_foreign(path)
        given = published_input(other.config)
        return Card(other.config, other.names, other.category_ids, given.size, given.mean, given.std), other.state
    metadata, state = _open(path)
    return _card(metadata, path), state


def _card(metadata: dict[str, str], path: Path) -> Card:
    if "finedetr" not in metadata:
        raise ModelError(
            f"{path} carries no finedetr card, so its model and class names are unknown",
            code="schema",
            hint="Weights of finedetr, official .pth files and folders of transformers (with config.json) are read.",
        )
    return Card.from_json(metadata["finedetr"], str(path))


def load_weights(
    path: str | Path, device: torch.device | str = "cpu", *, queries: int | None = None
) -> tuple[Detector, Card]:
    """A detector in eval mode with its weights, and its card.

    Args:
        path: A file of ours or of somebody else's.
        device: Where it shall be.
        queries: Another number of queries than it was trained with: no tensor depends on it.

    Raises:
        ModelError: The file is absent, unreadable, carries no card, or does not fit its own card; every missing,
            unexpected or misshapen tensor is named.
    """
    path = Path(path)
    card, state = _read(path)
    if queries is not None:
        card = replace(card, config=replace(card.config, decoder=replace(card.config.decoder, queries=queries)))
    detector = Detector(card.config, len(card.names))
    own = detector.state_dict()
    faults = [f"missing {name}" for name in own if name not in state]
    faults += [f"unexpected {name}" for name in state if name not in own]
    faults += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(
            f"{path} does not fit the model {card.config.name!r} of its own card: {'; '.join(faults[:5])}{more}",
            code="mismatch",
        )
    detector.load_state_dict(state)
    return detector.to(device).eval(), card


@dataclass(frozen=True)
class Transfer:
    """What became of each tensor and each class when weights were carried over to another set of classes."""

    kept: tuple[str, ...]  # class names whose rows were carried over
    origins: tuple[str, ...]  # what the weights call each of them
    new: tuple[str, ...]  # class names that start at the focal prior
    dropped: tuple[str, ...]  # class names of the weights that nobody asked for
    skipped: tuple[str, ...]  # tensors that do not fit, with the reason

    def rows(self) -> list[tuple[str, str]]:
        """(what, class name or tensor) for a table; of what is dropped, the first ten in one row."""
        kept = [name if name == old else f"{name} <- {old}" for name, old in zip(self.kept, self.origins, strict=True)]
        rows = [("kept", name) for name in kept] + [("new", name) for name in self.new]
        if self.dropped:
            more = f" and {len(self.dropped) - 10} more" if len(self.dropped) > 10 else ""
            rows.append(("dropped", ", ".join(self.dropped[:10]) + more))
        return rows + [("skipped", reason) for reason in self.skipped]


def transfer_weights(detector: Detector, names: tuple[str, ...], path: str | Path) -> Transfer:
    """Starts a detector from the weights of another one; class heads are mapped by class name (`match_names`).

    Rows of classes that the weights do not know start at the focal prior (bias -4.595, small random weights), so that
    nothing is left random in silence.

    Args:
        detector: Changed in place; its model must be the one of the weights, but for the number of queries, how the
            pyramid is sampled, and what is frozen.
        names: The class names of `detector`, in order.
        path: A weight file.

    Raises:
        ModelError: The weights belong to another model, or hardly anything fits.
    """
    card, state = _read(Path(path))
    _check_same_model(card.config, detector.config, path)
    source = dict(enumerate(match_names(names, card.names)))
    here = [index for index, row in source.items() if row is not None]
    there = [row for row in source.values() if row is not None]
    skipped = []
    with torch.no_grad():
        for key, tensor in detector.state_dict().items():
            given = state.get(key)
            if given is None and key.endswith("num_batches_tracked"):
                continue  # a frozen norm has no such count
            if given is None:
                skipped.append(f"{key}: not in the file")
            elif _is_class_row(key):
                if key.endswith("bias"):
                    tensor.fill_(focal_bias())
                tensor[here] = given[there].to(tensor)
                if key.startswith("label_embedding"):
                    tensor[-1] = given[-1].to(tensor)
            elif given.shape != tensor.shape:
                skipped.append(f"{key}: {tuple(given.shape)} does not fit {tuple(tensor.shape)}")
            else:
                tensor.copy_(given)
    return Transfer(
        tuple(names[index] for index in here),
        tuple(card.names[row] for row in there),
        tuple(names[index] for index, row in source.items() if row is None),
        tuple(name for row, name in enumerate(card.names) if row not in there),
        tuple(skipped),
    )


def _check_same_model(given: ModelConfig, wanted: ModelConfig, path: str | Path) -> None:
    """Weights may start a model that differs in what no tensor depends on: queries, sampling, what is frozen."""

    def essence(config: ModelConfig) -> ModelConfig:
        return replace(
            config,
            name="",
            backbone=replace(config.backbone, freeze_stem=False, freeze_norm=False),
            decoder=replace(config.decoder, queries=300, sampling="bilinear"),
        )

    if essence(given) == essence(wanted):
        return
    differing = [
        f"{part}.{field.name} {mine} -> {theirs}"
        for part in ("backbone", "encoder", "decoder")
        for field in fields(getattr(given, part))
        if (mine := getattr(getattr(given, part), field.name)) != (theirs := getattr(getattr(wanted, part), field.name))
    ]
    raise ModelError(
        f"{path} holds a {given.name!r}, the run trains a {wanted.name!r}: {', '.join(differing[:5])}",
        code="mismatch",
        hint="Leave --model out, for the weights know their own, or use other weights.",
    )


def _is_class_row(key: str) -> bool:
    """Whether the rows of a tensor stand for classes."""
    return "score_head" in key or key.startswith("label_embedding")
