"""Weights as a repository of the Hugging Face Hub: files, model card, upload. What is written there is read by name."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import yaml

from finedetr.errors import ModelError, RunError, UsageError
from finedetr.model.catalog import CODE_LICENSE, conditions, family_of
from finedetr.model.detector import Detector
from finedetr.model.hub import OURS
from finedetr.model.transformers import FILES as THEIRS
from finedetr.model.transformers import has_twin, write_transformers
from finedetr.model.weights import Card, save_weights

__all__ = ["FILES", "license_chain", "push", "write_repository"]

FILES = (OURS, "README.md", *THEIRS)
METRICS = ("AP", "AP50", "AP75", "AP_small", "AP_medium", "AP_large")


def license_chain(card: Card) -> tuple[str, ...]:
    """What the license of these weights may depend on, one line each: for whoever chooses one."""
    lines = [f"code: {CODE_LICENSE} (FineDETR)"]
    family = family_of(card.config.name)
    if family is not None:
        lines.append(f"weights that {family.repository} publishes, if these began with them: {family.weights_license}")
        lines += conditions(card.config.name)
    return (*lines, "The pictures that these weights were trained on have terms of their own.")


def write_repository(
    folder: Path, repository: str, detector: Detector, card: Card, *, license: str, dataset: str | None = None
) -> Path:
    """Writes all files of a repository; a folder like this is read by `finedetr.load`, too.

    Ours (`finedetr.safetensors`, with everything that a user must not guess), and where transformers has such a
    model, its three files, so that it loads there as well. `config.json` has our card under "finedetr" in any case.

    Args:
        folder: Made where it is absent.
        repository: owner/name of the repository for which it is written.
        detector: Trained weights.
        card: What travels with them.
        license: Of these weights, as the Hub spells it: apache-2.0, cc-by-4.0, other, ...
        dataset: What the numbers of the card were measured on.

    Raises:
        UsageError: The license is empty.
    """
    if not license.strip():
        raise UsageError(
            "weights without a license are of no use to others", code="required", hint="Such as --license apache-2.0"
        )
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(folder / OURS, detector, card)
    settings: dict[str, Any] = {
        "id2label": {str(index): name for index, name in enumerate(card.names)},
        "label2id": {name: index for index, name in enumerate(card.names)},
    }
    if has_twin(card.config) and card.mean is None:
        write_transformers(folder, detector, card.names, card.size)
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    settings["finedetr"] = json.loads(card.to_json())
    (folder / "config.json").write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    text = _readme(card, repository, license.strip().lower(), dataset)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return folder


def push(
    repository: str,
    detector: Detector,
    card: Card,
    *,
    license: str,
    private: bool = False,
    dataset: str | None = None,
) -> str:
    """Uploads weights to the Hugging Face Hub, as one commit; makes the repository where it is absent.

    Args:
        repository: owner/name.
        detector: Trained weights.
        card: What travels with them.
        license: See `write_repository`.
        private: Whether a new repository is private. One that exists and is public is refused then.
        dataset: See `write_repository`.

    Returns:
        The address of the repository.

    Raises:
        UsageError: The repository's name is malformed, or it is public and must not be.
        RunError: The Hub refuses, or cannot be reached; what to do about it.
    """
    owner, _, name = repository.partition("/")
    if not owner or not name or "/" in name:
        raise UsageError(f"{repository!r} names no repository", code="range", hint="owner/name is wanted.")
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ModelError(
            "huggingface_hub is not installed", code="not_found", hint="pip install huggingface_hub"
        ) from error
    with tempfile.TemporaryDirectory() as temporary:
        folder = write_repository(Path(temporary), repository, detector, card, license=license, dataset=dataset)
        api = HfApi()
        try:
            address = str(api.create_repo(repository, private=private, exist_ok=True))
            public = private and not api.repo_info(repository).private
            if not public:
                message = f"{card.config.name} by FineDETR"
                api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message)
        except Exception as error:  # no token, no permission, no network: the library has a class for each
            raise _refusal(repository, error) from error
    if public:
        raise UsageError(
            f"{repository} exists and is public; --private was asked for",
            code="conflict",
            hint="Choose another name, or make it private on the Hub. Nothing was uploaded.",
        )
    return address


def _refusal(repository: str, error: Exception) -> RunError:
    """What the Hub said, and what helps."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if type(error).__name__ == "LocalTokenNotFoundError" or status == 401:
        return RunError(
            f"the Hub does not know who uploads to {repository}: there is no valid token",
            code="upload",
            hint="Log in with `hf auth login`, or set HF_TOKEN to a token that may write.",
        )
    if status == 403:
        return RunError(
            f"the Hub's token may not write to {repository}",
            code="upload",
            hint="Use a token with write permission, and a repository of your own name or organization.",
        )
    reason = (str(error).strip().splitlines() or [""])[0]
    return RunError(
        f"{repository} cannot be uploaded ({type(error).__name__}: {reason})",
        code="upload",
        hint="With --folder DIR everything is written to a folder, to be uploaded by hand.",
    )


def _readme(card: Card, repository: str, license: str, dataset: str | None) -> str:
    """The model card: metadata for the Hub between two lines of dashes, then text for people."""
    title = repository.rpartition("/")[2]
    metrics = {name: card.metrics[name] for name in METRICS if card.metrics.get(name, -1) >= 0}
    front: dict[str, Any] = {
        "license": license,
        "library_name": "finedetr",
        "pipeline_tag": "object-detection",
        "tags": ["object-detection", "finedetr", card.config.name],
    }
    if metrics:
        measured = {
            "task": {"type": "object-detection", "name": "Object detection"},
            "dataset": {"name": dataset or "not named", "type": dataset or "custom"},
            "metrics": [
                {"type": f"m{name}", "name": name, "value": round(value, 4)} for name, value in metrics.items()
            ],
        }
        front["model-index"] = [{"name": title, "results": [measured]}]
    height, width = card.size
    sections = [
        f"# {title}",
        f"`{card.config.name}` for {len(card.names)} classes, trained with FineDETR"
        + (f" (recipe `{card.recipe['name']}`)." if card.recipe.get("name") else "."),
    ]
    if metrics:
        rows = "\n".join(f"| {name} | {value:.4f} |" for name, value in metrics.items())
        where = f" on {dataset}" if dataset else ""
        sections.append(f"## Numbers\n\nCOCO's metrics{where}:\n\n| metric | value |\n|---|---|\n{rows}")
    sections += [
        "## Use\n\n```python\nimport finedetr\n\n"
        f'model = finedetr.load("hf://{repository}")  # or a folder with these files\n'
        'found = model("picture.jpg", threshold=0.4)  # xyxy in pixels, score, label, names\n```',
        f"## Input\n\nRGB, resized to {height}x{width} (height x width) without keeping the aspect, values / 255"
        + (f", then mean {card.mean} and deviation {card.std}." if card.mean else "; no mean, no deviation."),
        "## Classes\n\nid: name, in the order of the answers\n\n"
        + "\n".join(
            f"- {number}: {_one_line(name)}" for number, name in zip(card.category_ids, card.names, strict=True)
        ),
        f"## License\n\nThese weights: {license}.\n\n" + "\n".join(f"- {line}" for line in license_chain(card)),
    ]
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    return f"---\n{head}---\n\n" + "\n\n".join(sections) + "\n"


def _one_line(name: str) -> str:
    return " ".join(name.split())
