"""Weights on disk: safetensors with a card that says all that is needed to use them. Loading runs no code.

Official checkpoints and folders of transformers are read, too (`foreign.py`); their card is made up from what they say.
"""

from __future__ import annotations

import json
import math
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
from finedetr.errors import ConfigError, ModelError, UsageError, did_you_mean
from finedetr.files import write_atomically
from finedetr.model.classes import match_names
from finedetr.model.config import ModelConfig
from finedetr.model.detector import Detector
from finedetr.model.foreign import is_foreign, read_foreign
from finedetr.model.layers import focal_bias
from finedetr.model.starts import grouped, origin_of, part_of, plain_form, why_fresh
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
        if not self.names or min(self.size) < 1:
            raise ModelError(
                f"a card needs at least one class and a size of at least 1, got {len(self.names)} classes and "
                f"{self.size}",
                code="schema",
            )
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
        except (ValueError, RecursionError) as error:
            raise ModelError(f"{where}: the card is unreadable ({error})", code="schema") from error
        if not isinstance(document, dict) or "schema" not in document:
            raise ModelError(f"{where}: the card is no table with a schema", code="schema")
        schema = document.pop("schema")
        document.pop("finedetr", None)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise ModelError(
                f"{where}: the card has schema {schema}, this finedetr {__version__} reads up to {SCHEMA}",
                code="schema",
                hint="Install a newer finedetr.",
            )
        card: Card = _build(cls, document, where)
        return card


def _build(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as an instance of a (nested) dataclass, tuple, mapping or plain type."""
    if is_dataclass(kind):
        return _build_record(kind, value, where)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(next(k for k in inner if k is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in inner:
            raise _unlike(f"one of {', '.join(map(repr, inner))}", value, where)
        return value
    if origin is tuple:
        if not isinstance(value, list):
            raise _unlike("a list", value, where)
        kinds = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if len(value) != len(kinds):
            raise _unlike(f"a list of {len(kinds)}", value, where)
        return tuple(_build(item, element, where) for item, element in zip(kinds, value, strict=True))
    if origin is Mapping:
        if not isinstance(value, dict):
            raise _unlike("a table", value, where)
        return {name: _build(inner[1], item, f"{where}.{name}") for name, item in value.items()}
    plain: Any = {bool: bool, int: int, float: (int, float), str: str}.get(kind, object)
    if not isinstance(value, plain) or (isinstance(value, bool) and kind in (int, float)):
        raise _unlike({bool: "true or false", int: "a whole number", float: "a number"}.get(kind, "text"), value, where)
    return value


def _build_record(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise _unlike("a table", value, where)
    hints = typing.get_type_hints(kind)
    unknown = set(value) - set(hints)
    if unknown:
        name = sorted(unknown)[0]
        raise ModelError(f"{where}: unknown field {name!r}", code="schema", hint=did_you_mean(name, hints))
    required = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    missing = sorted(required - set(value))
    if missing:
        raise ModelError(f"{where}: the field {missing[0]!r} is missing", code="schema")
    given = {name: _build(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    try:
        return kind(**given)
    except ConfigError as error:
        raise ModelError(f"{where}: {error.message}", code="schema", hint=error.hint) from error


def _unlike(wanted: str, value: Any, where: str) -> ModelError:
    return ModelError(f"{where}: {wanted} was expected, got {value!r}", code="schema")


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
    if path.suffix == ".onnx":
        raise ModelError(
            f"{path} is a graph, no weights",
            code="unsupported",
            hint="Give the weights that it was made from: a run, a .safetensors file, or an official .pth.",
        )
    try:
        with safe_open(str(path), framework="pt") as file:
            names = list(file.keys()) if tensors else []
            return dict(file.metadata() or {}), {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"{path} is no readable safetensors file: {error}",
            code="schema",
            hint="Is it whole? Fetch or copy it again.",
        ) from error


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
        queries: Another number of queries than it was trained with, for a model that chooses its queries.

    Raises:
        UsageError: Another number of queries is asked of a model that has learned them, one by one.
        ModelError: The file is absent, unreadable, carries no card, or does not fit its own card; every missing,
            unexpected or misshapen tensor is named.
    """
    path = Path(path)
    card, state = _read(path)
    if queries is not None:
        if card.config.decoder.queries_are_learned and queries != card.config.decoder.queries:
            raise UsageError(
                f"{path} holds {card.config.name}, whose {card.config.decoder.queries} queries are learned one by one; "
                f"{queries} came",
                code="conflict",
                hint="Leave --queries out, or use a model that chooses its queries: dfine, deim, deimv2 or rtdetrv2.",
            )
        card = replace(card, config=replace(card.config, decoder=replace(card.config.decoder, queries=queries)))
    _check_fit(card, state, path)
    detector = Detector(card.config, len(card.names))
    detector.load_state_dict(state)
    return detector.to(device).eval(), card


def _check_fit(card: Card, state: Mapping[str, Tensor], path: Path) -> None:
    """Holds the tensors of a file to its own card."""
    try:
        with torch.device("meta"):
            own = Detector(card.config, len(card.names)).state_dict()
    except ConfigError as error:
        raise ModelError(f"{path}: {error.message}", code="schema", hint=error.hint) from error
    faults = [f"missing {name}" for name in own if name not in state]
    faults += [f"unexpected {name}" for name in state if name not in own]
    faults += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    decoder = card.config.decoder
    faults += [
        f"{name} is {float(state[name]):g}, the card says {wanted:g}"
        for name, wanted in (("decoder.bin_table.reg_scale", decoder.scale), ("decoder.bin_table.up", decoder.up))
        # boxes are decoded as the card has it
        if not faults and name in own and not math.isclose(float(state[name]), wanted, rel_tol=1e-6)
    ]
    if faults:
        more = f" and {len(faults) - 5} more" if len(faults) > 5 else ""
        raise ModelError(
            f"{path} does not fit the model {card.config.name!r} of its own card: {'; '.join(faults[:5])}{more}",
            code="mismatch",
        )


@dataclass(frozen=True)
class Transfer:
    """What became of each tensor and each class when weights were carried over to another set of classes."""

    kept: tuple[str, ...]  # class names whose rows were carried over
    origins: tuple[str, ...]  # what the weights call each of them
    new: tuple[str, ...]  # class names that start at the focal prior
    dropped: tuple[str, ...]  # class names of the weights that nobody asked for
    skipped: tuple[str, ...]  # tensors that do not fit, with the reason
    copied: tuple[str, ...] = ()  # of a larger model: parts that begin as another one
    fresh: tuple[str, ...] = ()  # of a larger model: parts that the weights have not, and how they begin
    unused: tuple[str, ...] = ()  # of the weights: parts that a larger model has not

    def rows(self) -> list[tuple[str, str]]:
        """(what, class name or tensor) for a table; of what is dropped, the first ten in one row."""
        kept = [name if name == old else f"{name} <- {old}" for name, old in zip(self.kept, self.origins, strict=True)]
        rows = [("kept", name) for name in kept] + [("new", name) for name in self.new]
        if self.dropped:
            more = f" and {len(self.dropped) - 10} more" if len(self.dropped) > 10 else ""
            rows.append(("dropped", ", ".join(self.dropped[:10]) + more))
        for what in ("copied", "fresh", "unused", "skipped"):
            rows += [(what, which) for which in getattr(self, what)]
        return rows


def transfer_weights(detector: Detector, names: tuple[str, ...], path: str | Path) -> Transfer:
    """Starts a detector from the weights of another one; class heads are mapped by class name (`match_names`).

    Rows of classes that the weights do not know start at the focal prior (bias -4.595), their weights as the mean of
    the known rows and small random numbers: objects of an unknown kind. A detector that is split or has distributions
    of edges may start from a plain one: both branches begin as the layer that they come of, so that it answers the
    same. Nothing is left random in silence.

    Args:
        detector: Changed in place; its model must be the one of the weights, but for the number of queries where they
            are chosen, how the pyramid is sampled, dropout, what is frozen, and what it has beyond a plain model
            (`starts.py`).
        names: The class names of `detector`, in order.
        path: A weight file.

    Raises:
        ModelError: The weights belong to another model, or hardly anything fits.
    """
    card, state = _read(Path(path))
    _check_fit(card, state, Path(path))
    _check_same_model(card.config, detector.config, path)
    source = dict(enumerate(match_names(names, card.names)))
    here = [index for index, row in source.items() if row is not None]
    there = [row for row in source.values() if row is not None]
    larger = plain_form(detector.config, card.config) != detector.config
    skipped, copied, fresh, used = [], [], [], set()
    with torch.no_grad():
        for key, tensor in detector.state_dict().items():
            name = key
            if larger and key not in state and (origin := origin_of(key)) in state:
                name = origin or key
                copied.append((key, name))
            given = state.get(name)
            used.add(name)
            if given is None and key.endswith("num_batches_tracked"):
                continue  # a frozen norm has no such count
            if given is None and larger:
                fresh.append((key, why_fresh(key)))
            elif given is None:
                skipped.append(f"{key}: not in the file")
            elif _is_class_row(key):
                _carry_classes(key, tensor, given, here, there, ranked=detector.config.decoder.source == "proposals")
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
        tuple(
            f"{part} <- {name} ({count})" for part, name, count in grouped((k, part_of(n, depth=3)) for k, n in copied)
        ),
        tuple(f"{part} ({count}), {how}" for part, how, count in grouped(fresh)),
        tuple(f"{part} ({count})" for part, _, count in grouped((k, "") for k in state if larger and k not in used)),
    )


def _carry_classes(key: str, tensor: Tensor, given: Tensor, here: list[int], there: list[int], *, ranked: bool) -> None:
    """Rows `there` of a class head become rows `here`; the rest starts at the focal prior and the mean of all rows.

    What all classes have in common is that they are objects. Queries are chosen by scores, and with random rows a
    trained detector would look at the wrong places until they are learned (LOG.md: after 200 steps AP .30, with means
    .52). Where an encoder ranks proposals (`ranked`), row 0 of its head stands for all classes; the last row of the
    label embedding stands for padding.
    """
    if key.endswith("bias"):
        tensor.fill_(focal_bias())
    elif "score_head" in key:
        tensor.add_(given.mean(dim=0).to(tensor))
    tensor[here] = given[there].to(tensor)
    if ranked and key.startswith("selection"):
        tensor[0] = given[0].to(tensor)
    if key.startswith("label_embedding"):
        tensor[-1] = given[-1].to(tensor)


def _check_same_model(given: ModelConfig, wanted: ModelConfig, path: str | Path) -> None:
    """Weights may start a model that differs in what no tensor depends on, or only how it is trained, or is larger.

    The first is the number of queries where they are chosen, sampling, dropout, and what is frozen; for the second see
    `plain_form`.
    """

    def essence(config: ModelConfig) -> ModelConfig:
        decoder = config.decoder
        queries = decoder.queries if decoder.queries_are_learned else 300
        return replace(
            config,
            name="",
            backbone=replace(config.backbone, freeze_stem=False, freeze_norm=False, freeze_stages=0),
            encoder=replace(config.encoder, dropout=0.0),
            decoder=replace(decoder, queries=queries, sampling="bilinear", dropout=0.0),
        )

    if essence(given) == essence(plain_form(wanted, given)):
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
