"""The command line: verbs, each in its own file, loaded when it is used."""

from __future__ import annotations

import importlib
import io
import json
import sys
from collections.abc import Sequence
from contextlib import suppress

from finedetr._env import read
from finedetr._version import __version__
from finedetr.errors import FineDETRError, RunError, UsageError, did_you_mean

__all__ = ["main"]

VERBS: dict[str, str] = {
    "train": "train or fine-tune a detector, or go on with a run",
    "eval": "measure weights on a data set (also: val)",
    "predict": "detect in pictures, folders, addresses, videos",
    "demo": "the whole main job on pictures that it draws itself",
    "data": "data check PATH: what is wrong with a data set; data convert: another layout",
    "models": "models list, show NAME; pull, push, convert weights",
    "info": "what a weight file or a run holds",
    "env": "versions, devices and variables, to paste into a report",
}
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")  # of a GPU, of the CPU, of Windows
ALIASES = {"val": "eval", "test": "eval", "detect": "predict", "fit": "train"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; gives its exit status (see `finedetr.errors`)."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a file's name may hold what no encoding has
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = _run(words)
        sys.stdout.flush()  # here, and not when the interpreter ends and can only print a traceback
    except BrokenPipeError:  # the reader of stdout has had enough, as `head` has
        with suppress(OSError):
            sys.stdout.close()
        return 0
    return status


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if words[0] in ("-V", "--version", "version"):
        print(f"finedetr {__version__}")
        return 0
    verb = ALIASES.get(words[0], words[0])
    as_json = "--json" in words
    try:
        if verb not in VERBS:
            raise UsageError(f"no command is called {verb!r}", code="verb", hint=did_you_mean(verb, [*VERBS, *ALIASES]))
        run = importlib.import_module(f"finedetr.cli.{verb}").run
        result = run(words[1:])
        if as_json and result is not None:
            _print_json({"finedetr": __version__, "command": verb, "ok": True, **result})
    except FineDETRError as error:
        return _fail(verb, error, as_json)
    except KeyboardInterrupt:
        stopped = RunError("stopped by Ctrl-C", code="interrupted")
        stopped.exit = 130
        return _fail(verb, stopped, as_json)
    except BrokenPipeError:  # an OSError, too, but no failure of ours: `main` ends quietly
        raise
    except MemoryError:
        return _fail(verb, RunError("out of memory", code="oom", hint="Use a smaller --batch or --size."), as_json)
    except RuntimeError as error:
        if not any(phrase in str(error).lower() for phrase in OUT_OF_MEMORY):
            raise
        short = str(error).splitlines()[0]
        hint = "Use a smaller --batch or --size, or --accumulate."
        return _fail(verb, RunError(f"out of memory: {short}", code="oom", hint=hint), as_json)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(verb, RunError(f"{where}{error.strerror or error}", code="io"), as_json)
    return 0


def _fail(verb: str, error: FineDETRError, as_json: bool) -> int:
    if read("FINEDETR_LOG").lower() == "debug":
        import traceback

        traceback.print_exception(error)
    if as_json:
        document = {"code": error.code, "exit": error.exit, "message": error.message, "hint": error.hint}
        document |= {"report": error.details} if error.details else {}
        _print_json({"finedetr": __version__, "command": verb, "ok": False, "error": document})
    else:
        print(f"{error.code}: {error}", file=sys.stderr)
    return error.exit


def _print_json(document: dict[str, object]) -> None:
    print(json.dumps(document, ensure_ascii=False))


def _help() -> str:
    rows = "\n".join(f"  {verb:8} {meaning}" for verb, meaning in VERBS.items())
    return (
        f"finedetr {__version__}: real-time detection transformers that are yours\n\n"
        f"usage: finedetr COMMAND [flags]\n\n{rows}\n\n"
        "finedetr COMMAND --help lists the flags of a command.\n"
        "Start with: finedetr demo, or finedetr train --data PICTURES"
    )
