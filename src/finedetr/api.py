"""The front door in Python: load and ask, train, resume. What the command line does, as three functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, cast, get_type_hints

from finedetr.data.formats import open_dataset
from finedetr.detections import Detections
from finedetr.errors import UsageError, did_you_mean
from finedetr.evaluate.diagnosis import diagnose
from finedetr.evaluate.evaluation import Evaluation
from finedetr.evaluate.inference import Precision
from finedetr.evaluate.predictor import Predictor, evaluate_detector
from finedetr.evaluate.sources import Source
from finedetr.model.detector import Detector
from finedetr.model.publish import push
from finedetr.model.weights import Card, load_weights
from finedetr.recipes import recipe_for
from finedetr.train.callbacks import Callback, Callbacks
from finedetr.train.config import checked
from finedetr.train.distributed import choose_device
from finedetr.train.folder import RunFolder, find_weights
from finedetr.train.loop import Result
from finedetr.train.recipe import Recipe
from finedetr.train.session import Request, begin, default_folder, saved_recipe, teacher_and_pictures
from finedetr.train.session import resume as resume_run
from finedetr.train.template import read_template

__all__ = ["Model", "TrainedRun", "load", "resume", "train"]


class Model:
    """A detector with its weights, its class names and its preprocessing.

    >>> model = load("runs/a")  # doctest: +SKIP
    >>> found = model("street.jpg", threshold=0.4)  # doctest: +SKIP
    >>> found.xyxy, found.score, found.label, found.names  # doctest: +SKIP
    """

    def __init__(self, predictor: Predictor) -> None:
        self._predictor = predictor

    @property
    def names(self) -> tuple[str, ...]:
        """The class names, by index."""
        return self._predictor.names

    @property
    def card(self) -> Card:
        """Everything that travels with the weights."""
        return self._predictor.card

    def __call__(
        self,
        source: Source | Iterable[Source],
        threshold: float | None = None,
        batch: int | None = None,
        *,
        nms: float | None = None,
        tile: int | None = None,
    ) -> Detections | list[Detections] | Iterator[Detections]:
        """Detects in a picture (one `Detections`), in a folder, a glob or a list (a list), in a video (an iterator).

        `threshold` None: the weights' own, or 0.4. `tile`: the side of the tiles that larger pictures are cut into.
        """
        return self._predictor(source, threshold, batch, nms=nms, tile=tile)

    predict = __call__

    def stream(
        self,
        source: Source | Iterable[Source],
        threshold: float | None = None,
        batch: int | None = None,
        *,
        nms: float | None = None,
        tile: int | None = None,
    ) -> Iterator[Detections]:
        """The same one after the other, in little memory."""
        return self._predictor.stream(source, threshold, batch, nms=nms, tile=tile)

    def evaluate(
        self,
        data: str | Path,
        split: str = "val",
        *,
        batch: int = 8,
        workers: int = 2,
        layout: str | None = None,
        errors: bool = False,
    ) -> Evaluation:
        """COCO's numbers on a split of a data set; classes are matched by name. `errors`: and what goes wrong."""
        card = self.card
        evaluation, evaluator = evaluate_detector(
            self._predictor.detector,
            open_dataset(data, split, layout=layout),
            card.size,
            self._predictor.inference,
            batch=batch,
            workers=workers,
            names=card.names,
        )
        return replace(evaluation, diagnosis=diagnose(evaluator)) if errors else evaluation

    def push_to_hub(self, repository: str, *, license: str, private: bool = False, dataset: str | None = None) -> str:
        """Uploads weights and model card to the Hugging Face Hub; `load("hf://owner/name")` reads them again.

        Args:
            repository: owner/name; made where it is absent.
            license: Of these weights, as the Hub spells it, such as apache-2.0.
            private: Whether a new repository is private.
            dataset: What the numbers in the card were measured on.

        Returns:
            The address of the repository.

        Raises:
            UsageError: See `finedetr.model.publish.push`.
            RunError: The Hub refuses, or cannot be reached.
        """
        detector = self._predictor.detector
        assert isinstance(detector, Detector)
        return push(repository, detector, self.card, license=license, private=private, dataset=dataset)


@dataclass(frozen=True)
class TrainedRun:
    """A run that has ended."""

    result: Result

    @property
    def folder(self) -> Path:
        """Where everything is."""
        return self.result.folder

    @property
    def best(self) -> Evaluation | None:
        """The numbers of the best weights; None where there was nothing to evaluate on."""
        return self.result.evaluation

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """All lines of `metrics.jsonl`."""
        return RunFolder(self.folder).records()

    def model(self, device: str = "auto") -> Model:
        """The best weights, ready to be asked."""
        return load(self.folder, device=device)


def load(
    path: str | Path,
    *,
    device: str = "auto",
    batch: int = 8,
    precision: str = "fp32",
    size: tuple[int, int] | None = None,
    queries: int | None = None,
    top: int | None = None,
) -> Model:
    """A detector from a run's folder (its best weights), a weight file, or a name such as dfine-s-coco.

    Args:
        path: Where the weights are.
        device: auto, cpu, cuda, cuda:N or mps.
        batch: Pictures that go through the detector together.
        precision: fp32, bf16, fp16 or auto.
        size: (height, width) of the input, rectangles included; None: what the weights were trained at.
        queries: Another number of queries; None: that of the weights.
        top: Detections kept of each picture; None: 300, or one for each query where there are more.

    Raises:
        ModelError: There are no weights, or they do not fit their own card.
        UsageError: The device or precision cannot be.
        ConfigError: A number has another type than it should.
    """
    size = checked(tuple[int, int] | None, size, "load(): size")
    for name, value in (("batch", batch), ("queries", queries), ("top", top)):
        checked(int | None, value, f"load(): {name}")
    chosen = choose_device(device)
    detector, card = load_weights(find_weights(path), chosen, queries=queries)
    card = replace(card, size=size or card.size)
    return Model(Predictor(detector, card, chosen, batch, precision=cast(Precision, precision), top=top))


def train(
    data: str | Path,
    model: str | None = None,
    *,
    out: str | Path | None = None,
    recipe: str | Recipe = "deim",
    extras: Iterable[str] = (),
    config: str | Path | None = None,
    weights: str | Path | None = None,
    backbone_weights: str | Path | None = None,
    queries: int | None = None,
    teacher: str | Path | None = None,
    unlabelled: str | Path | None = None,
    device: str = "auto",
    overwrite: bool = False,
    quiet: bool = False,
    layout: str | None = None,
    train_split: str = "train",
    val_split: str = "val",
    skip_missing: bool = False,
    callbacks: Callbacks | Mapping[str, Callback] | None = None,
    **settings: Any,
) -> TrainedRun:
    """Trains or fine-tunes a detector, as `finedetr train` does.

    >>> def watch(state):
    ...     print(state.epoch, state.evaluation.ap)
    >>> run = train("pictures/", epochs=72, callbacks={"on_eval": watch})  # doctest: +SKIP

    Args:
        data: Folder of a data set (COCO, YOLO, VOC, CSV), or its JSON, YAML or CSV.
        model: Name of a model; None: that of `weights`, else dfine-s.
        out: Folder of the run; None: runs/DATA-MODEL.
        recipe: A name, or a `Recipe` as it shall be, model and papers included.
        extras: Names for `--with`.
        config: A run that this one starts like (its folder or config.json; `recipe`, `extras` and `model` are then its
            own, and so are its weights where none are given), or a recipe or a part of one in JSON, on top of `recipe`.
            `settings` go before it.
        weights: Start from these.
        backbone_weights: Start the backbone alone from its official file.
        queries: Another number of queries than the model's own.
        teacher: Weights of a detector to learn from (`--with detrdistill` if `extras` make no use of it), or a JSON of
            what one has found, whose pictures join each batch.
        unlabelled: Folder of further pictures, about which the teacher alone speaks.
        device: auto, cpu, cuda, cuda:N or mps.
        overwrite: Replace the run that is in `out` already; it goes when the new one has begun.
        quiet: Say nothing.
        layout: coco, yolo, voc or csv, where the data could be read as several.
        train_split: Split to train on.
        val_split: Split to evaluate on.
        skip_missing: Go on without absent pictures however many they are.
        callbacks: Functions of a `State` (`finedetr.train.callbacks`): on_start, on_step, on_eval, on_save, on_end.
        **settings: Fields of the recipe: `epochs=72, batch=16, size=(384, 640)`; nested ones as mappings:
            `optimizer={"clip": 0.5}`.

    Raises:
        TypeError: A setting is unknown; the message suggests the nearest ones.
        FineDETRError: Whatever the command line would say.
    """
    file = read_template(config) if config is not None else None
    if file is not None:
        file.refuse([name for name, said in (("model", model), ("with", extras)) if said])
        given = {
            "weights": weights,
            "backbone_weights": backbone_weights,
            "teacher": teacher,
            "unlabelled": unlabelled,
        }
        before = file.files([name for name, value in given.items() if value is not None])
        weights, backbone_weights, teacher, unlabelled = (given[name] or before[name] for name in given)
    start = find_weights(weights) if weights is not None else None
    if isinstance(recipe, Recipe):
        if model is not None or extras:
            raise UsageError(
                "train(): a Recipe has its model and its papers; model and extras would change nothing",
                code="conflict",
                hint="Give the name of a recipe, or a Recipe made with finedetr.recipes.recipe_for(model, ...).",
            )
        made = recipe
    else:
        made = recipe_for(
            model,
            checked(str, recipe, "train(): recipe"),
            tuple(extras),
            weights=start,
            backbone_weights=backbone_weights is not None,
            teacher=teacher,
        )
    changed = [*settings, *(["device"] if device != "auto" else [])]
    if file is not None:
        made = file.over(made, changed)
    if queries is not None:
        made = replace(made, model=replace(made.model, decoder=replace(made.model.decoder, queries=queries)))
    made = _with_settings(made, settings, "train()")
    taught, beside = teacher_and_pictures(
        Path(teacher) if teacher is not None else None, Path(unlabelled) if unlabelled is not None else None
    )
    request = Request(
        Path(data),
        made,
        Path(out) if out is not None else default_folder(Path(data), made),
        weights=start,
        backbone_weights=Path(backbone_weights) if backbone_weights is not None else None,
        teacher=taught,
        unlabelled=beside,
        train_split=train_split,
        val_split=val_split,
        skip_missing=skip_missing,
        layout=layout,
        device=device,
        overwrite=overwrite,
        quiet=quiet,
        derived=file.derived(changed) if file else (),
    )
    return TrainedRun(begin(request, callbacks=_callbacks(callbacks)))


def resume(
    path: str | Path,
    *,
    data: str | Path | None = None,
    device: str = "auto",
    quiet: bool = False,
    callbacks: Callbacks | Mapping[str, Callback] | None = None,
    **settings: Any,
) -> TrainedRun:
    """Goes on with a run exactly where it stands; `settings` may change what is free to change, such as `epochs`."""
    saved, _ = saved_recipe(RunFolder.existing(path))
    recipe = _with_settings(saved, settings, "resume()")
    where = Path(data) if data is not None else None
    functions = _callbacks(callbacks)
    return TrainedRun(resume_run(Path(path), recipe, data=where, device=device, quiet=quiet, callbacks=functions))


def _callbacks(given: Callbacks | Mapping[str, Callback] | None) -> Callbacks | None:
    return Callbacks.of(given) if isinstance(given, Mapping) else given


def _with_settings(recipe: Any, settings: Mapping[str, Any], where: str) -> Any:
    """A dataclass with other values in some fields, nested ones given as mappings."""
    known = {field.name for field in fields(recipe)}
    changes: dict[str, Any] = {}
    for name, value in settings.items():
        if name not in known:
            raise TypeError(f"{where} has no setting {name!r}. {did_you_mean(name, known)}")
        place, current = f"{where}: {name}", getattr(recipe, name)
        if is_dataclass(current) and isinstance(value, Mapping):
            value = _with_settings(current, value, place)
        else:
            value = checked(get_type_hints(type(recipe))[name], value, place)
        changes[name] = value
    return replace(recipe, **changes)
