"""Recipes as JSON and back. A misspelled key or a value of the wrong type is an error that says where."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from finedetr.distill.matching import TeacherVotes
from finedetr.distill.queries import AuxiliaryQueries, PredictionQueries, QueryPrior, QuerySource
from finedetr.distill.terms import (
    ContrastiveDistillation,
    EncoderDistillation,
    FeatureDistillation,
    LogitsDistillation,
    PredictionDistillation,
    SecondBox,
)
from finedetr.errors import ConfigError, UsageError, did_you_mean
from finedetr.supervise.matching import Cost, FocalCost, MatchingPolicy, PerStage, QualityCost, UnionOfStages
from finedetr.supervise.terms import (
    BoxGIoU,
    BoxL1,
    FineGrainedLocalization,
    Focal,
    LocalizationDistillation,
    MatchabilityAware,
    QualityFocal,
    TaskAligned,
    Term,
    Varifocal,
)
from finedetr.train.recipe import Recipe

__all__ = ["check_changes", "checked", "flatten", "from_dict", "merge", "to_dict"]

KINDS: dict[type, tuple[type, ...]] = {
    Term: (
        Focal,
        Varifocal,
        MatchabilityAware,
        BoxL1,
        BoxGIoU,
        FineGrainedLocalization,
        LocalizationDistillation,
        QualityFocal,
        TaskAligned,
        LogitsDistillation,
        FeatureDistillation,
        PredictionDistillation,
        SecondBox,
        EncoderDistillation,
        ContrastiveDistillation,
    ),
    MatchingPolicy: (PerStage, UnionOfStages, TeacherVotes),
    QuerySource: (QueryPrior, PredictionQueries, AuxiliaryQueries),
    Cost: (FocalCost, QualityCost),
}
"""Abstract classes that a field may be annotated with, and their final ones. In JSON, `kind` names which it is."""

FREE = (
    "epochs",
    "accumulate",
    "workers",
    "patience",
    "diverged_after",
    "max_time",
    "log_every",
    "evaluating.",
    "saving.",
)
"""What a resumed run may change: nothing of it touches the weights of a step that is done."""

Plain = Any  # what JSON knows


def to_dict(recipe: Recipe) -> dict[str, Plain]:
    """The recipe as plain dicts, lists, strings and numbers."""
    encoded = _encode(recipe)
    assert isinstance(encoded, dict)
    return encoded


def from_dict(document: Mapping[str, Plain], where: str = "config.json") -> Recipe:
    """The recipe of a document that `to_dict` made; fields that it lacks keep their defaults.

    Raises:
        ConfigError: A key is unknown or a value has the wrong type; names the field and suggests the nearest one.
    """
    recipe = _decode(Recipe, document, where)
    assert isinstance(recipe, Recipe)
    return recipe


def merge(recipe: Recipe, document: Mapping[str, Plain], where: str) -> Recipe:
    """The recipe with the values of a document in the place of its own; a list takes the place of a whole list.

    Raises:
        ConfigError: As `from_dict`.
    """
    merged = _merge(recipe, document, where)
    assert isinstance(merged, Recipe)
    return merged


def checked(kind: Any, value: Any, where: str) -> Any:
    """A plain value as an annotation wants it: whole numbers become floats, lists tuples. Objects are let through.

    Raises:
        ConfigError: It has another type; names it.
    """
    items = value if isinstance(value, (list, tuple)) else (value,)
    return value if any(is_dataclass(item) for item in items) else _decode(kind, value, where)


def flatten(document: Mapping[str, Plain], prefix: str = "") -> dict[str, Plain]:
    """Nested keys joined by dots, as flags are: {"optimizer.lr": 0.0002, "objective.BoxL1.weight": 5.0, ...}."""
    flat: dict[str, Plain] = {}
    for key, value in document.items():
        if isinstance(value, list) and value and all(isinstance(item, Mapping) and "kind" in item for item in value):
            for item in value:
                place = item["kind"] if key == "terms" else f"{key}.{item['kind']}"
                flat |= flatten({k: v for k, v in item.items() if k != "kind"}, f"{prefix}{place}.")
            continue
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def check_changes(saved: Recipe, wanted: Recipe) -> None:
    """Refuses to go on with a recipe that differs in more than may change.

    Raises:
        UsageError: Lists what differs.
    """
    before, after = flatten(to_dict(saved)), flatten(to_dict(wanted))
    differing = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    fixed = [key for key in differing if not key.startswith(FREE)]
    if fixed:
        changes = ", ".join(f"{key} {before.get(key)} -> {after.get(key)}" for key in fixed[:5])
        raise UsageError(
            f"a resumed run keeps its recipe; these differ: {changes}",
            code="conflict",
            hint=f"Free to change: {', '.join(name.rstrip('.') for name in FREE)}. Or start anew with --weights.",
        )


def _encode(value: object) -> Plain:
    if is_dataclass(value):
        encoded = {field.name: _encode(getattr(value, field.name)) for field in fields(value)}
        return {"kind": type(value).__name__, **encoded} if _is_named(value) else encoded
    if isinstance(value, (tuple, list)):
        return [_encode(item) for item in value]
    return value


def _is_named(value: object) -> bool:
    return any(type(value) in finals for finals in KINDS.values())


def _merge(value: Any, document: Mapping[str, Plain], where: str) -> Any:
    kind = type(value)
    if _is_named(value):
        if document.get("kind", kind.__name__) != kind.__name__:
            base = next(base for base, finals in KINDS.items() if kind in finals)
            return _decode(base, document, where)
        document = {key: item for key, item in document.items() if key != "kind"}
    hints, changes = get_type_hints(kind), {}
    _check_keys(kind, document, where)
    for key, item in document.items():
        current, place = getattr(value, key), f"{where}: {key}"
        inside = is_dataclass(current) and isinstance(item, Mapping)
        changes[key] = _merge(current, item, place) if inside else _decode(hints[key], item, place)
    return replace(value, **changes)


def _decode(kind: Any, value: Plain, where: str) -> Any:
    if kind in KINDS:
        kind, value = _choose(kind, value, where)
    if is_dataclass(kind):
        return _decode_dataclass(kind, value, where)
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        return _decode(next(option for option in inner if option is not type(None)), value, where)
    if origin is Literal:
        if value not in inner:
            raise ConfigError(
                f"{where}: one of {', '.join(map(str, inner))} is wanted, {value!r} came",
                hint=did_you_mean(str(value), map(str, inner)),
            )
        return value
    if origin is tuple:
        return _decode_tuple(inner, value, where)
    return _decode_plain(kind, value, where)


def _decode_tuple(inner: tuple[Any, ...], value: Plain, where: str) -> tuple[Any, ...]:
    any_length = len(inner) == 2 and inner[1] is Ellipsis
    if not isinstance(value, (list, tuple)) or not (any_length or len(value) == len(inner)):
        wanted = "a list" if any_length else f"a list of {len(inner)}"
        raise ConfigError(f"{where}: {wanted} is wanted, {value!r} came")
    kinds = [inner[0]] * len(value) if any_length else inner
    return tuple(_decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(kinds, value, strict=True)))


def _decode_plain(kind: Any, value: Plain, where: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
        raise ConfigError(f"{where}: {kind.__name__} is wanted, {value!r} came")
    return value


def _choose(kind: type, value: Plain, where: str) -> tuple[type, Plain]:
    finals = {final.__name__: final for final in KINDS[kind]}
    name = value.get("kind") if isinstance(value, Mapping) else None
    if not isinstance(name, str) or name not in finals:
        raise ConfigError(
            f"{where}: the kind of a {kind.__name__} is wanted, {name!r} came", hint=did_you_mean(str(name), finals)
        )
    return finals[name], {key: item for key, item in value.items() if key != "kind"}


def _decode_dataclass(kind: Any, value: Plain, where: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: a table of {kind.__name__} is wanted, {value!r} came")
    hints = get_type_hints(kind)
    _check_keys(kind, value, where)
    try:
        return kind(**{key: _decode(hints[key], item, f"{where}: {key}") for key, item in value.items()})
    except TypeError as error:  # a required field is absent
        raise ConfigError(f"{where}: {error}") from error


def _check_keys(kind: Any, document: Mapping[str, Plain], where: str) -> None:
    known = {field.name for field in fields(kind)}
    for key in document:
        if key not in known:
            raise ConfigError(f"{where}: unknown key {key!r}", code="unknown_key", hint=did_you_mean(str(key), known))
