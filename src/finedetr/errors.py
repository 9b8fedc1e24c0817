"""The tree of errors. Each says what was wanted, what came, and how to mend it.

```
FineDETRError           exit   code prefix
├── UsageError            2    use.*      a flag, a name, a combination that cannot be
│   └── ConfigError       2    use.*      a recipe or configuration field that cannot be
├── DataError             3    data.*     a data set, a picture, an annotation
├── ModelError            4    model.*    weights, a checkpoint, an artefact
├── ExportError           5    export.*   an export outside its budget, or unsupported
└── RunError              1    run.*      what goes wrong while it runs
    ├── DivergedError     1    run.diverged   a loss that is not finite
    └── Interrupted     130    run.interrupted  Ctrl-C (143: SIGTERM), after saving
```
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping


class FineDETRError(Exception):
    """Base of all errors that finedetr raises on purpose.

    Attributes:
        code: A stable dotted string such as `data.class_range`, for programs.
        exit: The exit status of the command line.
        hint: How to mend it, or an empty string where the message says it all.
        details: All that was found out before, for programs.
    """

    exit = 1
    prefix = "run"

    def __init__(
        self, message: str, *, code: str = "error", hint: str = "", details: Mapping[str, object] | None = None
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = f"{self.prefix}.{code}"
        self.hint = hint
        self.details = dict(details or {})

    def __str__(self) -> str:
        return f"{self.message}\n  {self.hint}" if self.hint else self.message


class UsageError(FineDETRError):
    """A flag, a name or a combination of them that cannot be."""

    exit = 2
    prefix = "use"


class ConfigError(UsageError):
    """A field of a recipe or a model configuration that cannot be."""


class DataError(FineDETRError):
    """A data set, a picture or an annotation that cannot be used."""

    exit = 3
    prefix = "data"


class ModelError(FineDETRError):
    """Weights, a checkpoint or an artefact that cannot be used."""

    exit = 4
    prefix = "model"


class ExportError(FineDETRError):
    """An export that is unsupported or outside its accuracy budget."""

    exit = 5
    prefix = "export"


class RunError(FineDETRError):
    """Something that went wrong while a run was going on."""


class DivergedError(RunError):
    """A loss or a gradient that is not finite.

    Attributes:
        losses: The losses that are not finite, by name; none where it is the gradient.
    """

    def __init__(self, message: str, *, hint: str = "", losses: Mapping[str, float] | None = None) -> None:
        super().__init__(message, code="diverged", hint=hint)
        self.losses = dict(losses or {})


class Interrupted(RunError):  # noqa: N818 - a request, not a fault
    """Ctrl-C or SIGTERM, raised once everything is saved."""

    exit = 130


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence for an unknown name: the closest known ones, or all of them where none is close.

    >>> did_you_mean("demi", ["deim", "dfine"])
    'Did you mean deim?'
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=3, cutoff=0.6)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    return f"Known: {', '.join(names)}."
