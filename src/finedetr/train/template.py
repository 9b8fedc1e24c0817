"""What `--config` gives a run to start with: the configuration of an earlier one, or a recipe or a part of one."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finedetr.errors import ConfigError, UsageError, did_you_mean
from finedetr.train.config import from_dict, merge
from finedetr.train.recipe import Recipe

__all__ = ["Template", "read_template"]

FOLLOWS = {"lr": ("batch", "accumulate", "optimizer"), "batch": ("accumulate", "optimizer"), "precision": ("device",)}
"""What a run derives where it is not set, and the flags after which a number of an earlier run is derived anew."""

FILES = ("weights", "backbone_weights", "teacher", "unlabelled")
RUN_KEYS = ("finedetr", "command", "data", *FILES, "derived", "recipe")
"""Of the document that a run writes."""


@dataclass(frozen=True)
class Template:
    """What a configuration file gives another run to start with."""

    path: Path
    recipe: Mapping[str, Any]  # a document, or a part of one
    run: Mapping[str, Any] | None = None  # the rest of what a run wrote; None: the file is a recipe alone

    @property
    def says(self) -> tuple[str, ...]:
        """Flags that would say the same thing a second time."""
        if self.run is not None:
            return ("recipe", "with", "model")
        model = self.recipe.get("model")
        return ("model",) if isinstance(model, Mapping) and "name" in model else ()

    def files(self, given: Collection[str] = ()) -> dict[str, Path | None]:
        """What the earlier run started with, and who taught it: weights, backbone_weights, teacher, unlabelled.

        Args:
            given: Names of the flags beside it: one kind of weights takes the place of the other, too.
        """
        weights = {"weights", "backbone_weights"}
        said = {name.replace("-", "_") for name in given} & set(FILES)
        said |= weights if said & weights else set()
        found = {name: None if name in said else (self.run or {}).get(name) for name in FILES}
        return {name: Path(path) if path else None for name, path in found.items()}

    def refuse(self, given: Collection[str]) -> None:
        """Lets nobody say twice what the file says as a whole.

        Args:
            given: Names of the flags beside it.

        Raises:
            UsageError: One of them says it.
        """
        for name in self.says:
            if name in given:
                raise UsageError(
                    f"--config and --{name} exclude each other: {self.path} says it",
                    code="conflict",
                    hint="Flags may change its fields. A file with a part of a recipe goes on top of any recipe.",
                )

    def over(self, base: Recipe, changed: Collection[str] = ()) -> Recipe:
        """The recipe to start with.

        A run's configuration is the whole of it, with its numbers as they were resolved; a part of a recipe is put on
        top of `base`.

        Args:
            base: Without the file.
            changed: Names of the flags beside it: a derived number that follows from one of them is derived anew.
        """
        if self.run is None:
            return merge(base, self.recipe, str(self.path))
        recipe = from_dict(self.recipe, f"{self.path}: recipe")
        unset: dict[str, Any] = {"lr": None, "batch": None, "precision": "auto"}
        anew = set(self.run.get("derived") or ()) - set(self.derived(changed))
        return replace(recipe, **{name: unset[name] for name in FOLLOWS if name in anew})

    def derived(self, changed: Collection[str] = ()) -> tuple[str, ...]:
        """The derived numbers of the earlier run that stay as they were."""
        touched = {name.partition(".")[0] for name in changed}
        names = (self.run or {}).get("derived") or ()
        return tuple(name for name in names if not touched & {name, *FOLLOWS.get(name, ())})


def read_template(path: str | Path) -> Template:
    """Reads `--config`: the config.json of a run (or the run's folder), or a recipe or a part of one as JSON.

    Raises:
        ConfigError: The file is absent or no JSON, or a key of a run's configuration is unknown.
    """
    path = Path(path)
    file = path / "config.json" if path.is_dir() else path
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}", code="not_found") from error
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON: {error}", code="type") from error
    if not isinstance(document, Mapping):
        raise ConfigError(f"{file}: a table of a recipe is wanted, {type(document).__name__} came", code="type")
    if "recipe" not in document and "finedetr" not in document:
        return Template(file, document)
    for key in document:
        if key not in RUN_KEYS:
            raise ConfigError(f"{file}: unknown key {key!r}", code="unknown_key", hint=did_you_mean(key, RUN_KEYS))
    if not isinstance(document.get("recipe"), Mapping):
        raise ConfigError(f"{file} has no recipe", code="type", hint="A run writes one; a recipe alone is taken, too.")
    data, derived = document.get("data"), document.get("derived")
    for key, kind, fine in (
        (
            "data",
            "a table with a path",
            data is None or (isinstance(data, Mapping) and isinstance(data.get("path"), str)),
        ),
        *((name, "a path", document.get(name) is None or isinstance(document[name], str)) for name in FILES),
        ("derived", "a list of names", derived is None or isinstance(derived, list)),
    ):
        if not fine:
            raise ConfigError(f"{file}: {key}: {kind} is wanted, {document[key]!r} came", code="type")
    return Template(file, document["recipe"], {key: document[key] for key in document if key != "recipe"})
