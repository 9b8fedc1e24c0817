"""From a request (data, recipe, folder) to a run that has ended: what `finedetr train` and `finedetr.train` share."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finedetr._version import __version__
from finedetr.data.balance import repeat_factors
from finedetr.data.doctor import Report, check
from finedetr.data.folder import open_beside
from finedetr.data.formats import list_splits, open_dataset
from finedetr.errors import ConfigError, DataError, UsageError
from finedetr.evaluate.html import write_report
from finedetr.kernels.library import state
from finedetr.train.build import Start
from finedetr.train.callbacks import Callbacks
from finedetr.train.claim import begun, claimed, drop_earlier, replaces
from finedetr.train.config import check_changes, checked, flatten, from_dict, to_dict
from finedetr.train.distributed import World, open_world
from finedetr.train.folder import RunFolder, find_weights
from finedetr.train.log import Reporter
from finedetr.train.loop import Data, Result, Run
from finedetr.train.plan import Plan, share_of
from finedetr.train.recipe import Recipe
from finedetr.train.step import Precision

__all__ = [
    "Request",
    "balance_line",
    "begin",
    "default_folder",
    "is_detections",
    "open_data",
    "resume",
    "saved_recipe",
    "teacher_and_pictures",
    "unlabelled_line",
]


@dataclass(frozen=True)
class Request:
    """What a user asks for. `recipe` need not be resolved."""

    data: Path
    recipe: Recipe
    out: Path
    weights: Path | None = None
    backbone_weights: Path | None = None
    teacher: Path | None = None
    unlabelled: Path | None = None
    train_split: str = "train"
    val_split: str = "val"
    skip_missing: bool = False
    layout: str | None = None
    device: str = "auto"
    overwrite: bool = False
    quiet: bool = False
    derived: tuple[str, ...] = ()  # numbers of the recipe that an earlier run had derived (--config)

    def __post_init__(self) -> None:
        _ = self.start  # what cannot be is refused before anything is read or written
        if self.teacher and "frozen" not in self.recipe.teachers:
            raise UsageError(
                f"no part of the recipe {self.recipe.name} listens to a teacher, and {self.teacher} is given",
                code="conflict",
                hint="Make the recipe with --with detrdistill (in Python: extras=['detrdistill']), or give no teacher.",
            )
        speaking = any(term.weight and not term.needs_truth for term in self.recipe.objective.terms)
        if self.unlabelled and not (is_detections(self.unlabelled) or (self.recipe.teachers and speaking)):
            raise UsageError(
                f"the pictures of {self.unlabelled} have no labels, and no teacher says anything about them",
                code="conflict",
                hint="Give a teacher with --teacher, or use --with od-detr.",
            )

    @property
    def start(self) -> Start:
        """What the run begins with."""
        return Start(self.weights, self.backbone_weights)

    def open(self) -> Data:
        """See `open_data`."""
        splits = (self.train_split, self.val_split)
        return open_data(self.data, *splits, self.layout, self.unlabelled, skip_missing=self.skip_missing)


def default_folder(data: Path, recipe: Recipe) -> Path:
    """Where a run goes if nobody says it."""
    return Path("runs") / f"{data.resolve().stem}-{recipe.model.name}"


def teacher_and_pictures(teacher: Path | None, unlabelled: Path | None) -> tuple[Path | None, Path | None]:
    """The weights that teach and the pictures beside the data set: detections in a JSON bring their pictures along.

    Raises:
        UsageError: There are other pictures, too.
        ModelError: There are no weights.
    """
    if teacher is None or not is_detections(teacher):
        return find_weights(teacher) if teacher else None, unlabelled
    if unlabelled is not None:
        raise UsageError(
            f"{teacher} holds detections, which name their own pictures; {unlabelled} has no part in them",
            code="conflict",
            hint="Leave --unlabelled away, or give a detector as the teacher.",
        )
    return None, teacher


def is_detections(teacher: str | Path) -> bool:
    """Whether what is given as a teacher is no detector, but what one has found in some pictures."""
    return Path(teacher).suffix.lower() == ".json"


def open_data(
    path: Path,
    train: str = "train",
    val: str = "val",
    layout: str | None = None,
    unlabelled: Path | None = None,
    *,
    skip_missing: bool = False,
) -> Data:
    """Both splits of a data set. Without the one for evaluation a run goes on unmeasured.

    Args:
        path: The data set.
        train: Name of the split to train on.
        val: Of that to evaluate on.
        layout: None: it is sniffed.
        unlabelled: A folder of further pictures, for teachers alone, or a JSON of what a detector found in some.
        skip_missing: Go on without absent pictures, however many they are.

    Raises:
        DataError: The data cannot be used, or the splits name different classes.
    """
    training = open_dataset(path, train, layout=layout, skip_missing=skip_missing)
    if not len(training):
        raise DataError(f"{path}: the split {train!r} has no pictures", code="empty_split")
    beside = open_beside(unlabelled, training.categories) if unlabelled else None
    splits = list_splits(path, layout)
    if val not in splits and not (val == "val" and {"valid", "validation"} & set(splits)):
        if val != "val":
            raise DataError(f"{path} has no split {val!r}", code="split", hint=f"It has {', '.join(splits)}.")
        return Data(training, None, beside)
    held_out = open_dataset(path, val, layout=layout, skip_missing=skip_missing)
    if held_out.categories != training.categories:
        ours, theirs = training.categories.names, held_out.categories.names
        odd = sorted(set(ours) ^ set(theirs)) or ["their order or their ids"]
        raise DataError(
            f"{path}: {train} has the classes {', '.join(ours[:5])} ..., {val} has {', '.join(theirs[:5])} ...: "
            f"they differ in {', '.join(odd[:5])}",
            code="class_names",
            hint="Give both splits the same categories, in the same order.",
        )
    if not len(held_out.labels):
        raise DataError(f"{path}: the split {val!r} has no boxes, so AP is undefined", code="empty_split")
    return Data(training, held_out, beside)


def begin(
    request: Request, tell: Callable[[Reporter], None] | None = None, callbacks: Callbacks | None = None
) -> Result:
    """Trains from the first step.

    Args:
        request: What is asked for.
        tell: Says more at the start, such as where the numbers come from.
        callbacks: Functions of a user.
    """
    _check_sources(request)
    with open_world(request.device) as world, ExitStack() as claims:
        data = request.open()
        recipe = request.recipe.resolve(len(data.train))
        # resolved once, so that a run that is resumed on another machine goes on in the same numbers
        recipe = replace(recipe, precision=Precision.choose(recipe.precision, world.device).name)
        share_of(recipe.batch or 1, world.size, recipe.accumulate)
        report = _examine(data, recipe)
        folder = RunFolder(request.out)
        if world.main:
            claims.enter_context(claimed(folder.root))
            claims.enter_context(begun(folder.root, overwrite=request.overwrite))
            _write_config(folder, request, recipe, data, report)
        world.wait()
        with Reporter(folder.log if world.main else None, quiet=request.quiet or not world.main) as reporter:
            _introduce(reporter, data, report, world, folder)
            reporter.line(request.recipe.why_batch(recipe, len(data.train)))
            reporter.line(request.recipe.why_rate(recipe))
            for line in Plan.of(recipe, recipe.epochs, data.train).why_milder:
                reporter.line(line)
            if tell:
                tell(reporter)
            run = Run(recipe, data, folder, world, reporter, request.start, request.teacher, callbacks)
            for line in run.student.teachers.lines() if run.student.teachers else ():
                reporter.line(line)
            if recipe.balance:
                reporter.line(balance_line(recipe, data))
            if data.unlabelled:
                reporter.line(unlabelled_line(recipe, data))
            for what, which in run.student.origins:
                reporter.line(f"weights: {what:8} {which}")
            if world.main:
                drop_earlier(folder.root)
            return _through(run, reporter)


def _check_sources(request: Request) -> None:
    """Refuses to replace a run by one that begins with it, or learns from it."""
    given = (request.weights, request.backbone_weights, request.teacher, request.unlabelled)
    for path in given if request.overwrite else ():
        if path is not None and replaces(request.out, path):
            raise UsageError(
                f"{path} belongs to the run that --overwrite would replace",
                code="conflict",
                hint="Use another --out, or copy it first.",
            )


def resume(
    root: Path,
    recipe: Recipe | None = None,
    *,
    data: Path | None = None,
    device: str = "auto",
    quiet: bool = False,
    callbacks: Callbacks | None = None,
) -> Result:
    """Goes on with a run where its last state stands.

    Args:
        root: The run's folder.
        recipe: With other numbers where they are free to change; None: as it was.
        data: Where the data set is now; None: where it was.
        device: As in `begin`.
        quiet: As in `begin`.
        callbacks: As in `begin`; a run does not remember those that it was begun with.

    Raises:
        ModelError: The folder holds no run, or no state of it.
        UsageError: The run has ended, or `recipe` changes what must not change.
    """
    folder = RunFolder.existing(root)
    saved, where = saved_recipe(folder)
    recipe = recipe or saved
    check_changes(saved, recipe)
    with open_world(device) as world, claimed(folder.root) if world.main else nullcontext():
        splits = (where["train"], where["val"])
        files = folder.read_json(folder.config)
        names = [checked(str | None, files.get(key), f"{folder.config}: {key}") for key in ("teacher", "unlabelled")]
        teacher, beside = (Path(name) if name else None for name in names)
        skip = bool(where["skip_missing"])
        opened = open_data(data or Path(where["path"]), *splits, where["layout"], beside, skip_missing=skip)
        check_classes(folder, opened)
        with Reporter(folder.log if world.main else None, quiet=quiet or not world.main) as reporter:
            _introduce(reporter, opened, _examine(opened, recipe), world, folder)
            beside_now = len(opened.unlabelled) if opened.unlabelled else 0
            for kind, before, now in (
                ("for training", where["pictures"], len(opened.train)),
                ("without labels", where["unlabelled"], beside_now),
            ):
                if before not in (None, now):  # None: begun before it was noted
                    reporter.warn(
                        f"the data had {before} pictures {kind} and has {now} now: the run goes on, but not as it "
                        "would have gone on"
                    )
            run = Run(recipe, opened, folder, world, reporter, teacher=teacher, callbacks=callbacks)
            try:
                run.resume()
            except BaseException:
                run.close()
                raise
            if world.main and recipe != saved:
                folder.write_json(folder.config, {**folder.read_json(folder.config), "recipe": to_dict(recipe)})
            return _through(run, reporter)


def saved_recipe(folder: RunFolder) -> tuple[Recipe, dict[str, Any]]:
    """The recipe of a run, and where its data was."""
    document = folder.read_json(folder.config)
    if not isinstance(document, dict):
        raise ConfigError(
            f"{folder.config}: the table of a run is wanted, {type(document).__name__} came", code="schema"
        )
    try:
        recipe, data = document["recipe"], document["data"]
        wanted = {key: data[key] for key in ("path", "train", "val", "layout", "skip_missing", "pictures")}
        wanted["unlabelled"] = data.get("unlabelled")
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder.config} lacks {error}", code="schema") from error
    for key in ("path", "train", "val", "layout"):
        checked(str | None if key == "layout" else str, wanted[key], f"{folder.config}: data.{key}")
    return from_dict(recipe, str(folder.config)), wanted


def check_classes(folder: RunFolder, data: Data) -> None:
    """Refuses to go on with other classes.

    Raises:
        DataError: The data set has changed.
    """
    table = folder.read_json(folder.classes)
    now = _class_table(data)
    if table != now:
        raise DataError(
            f"the data set's classes are no longer those of {folder.classes}",
            code="class_names",
            hint="Start a new run.",
        )


def _through(run: Run, reporter: Reporter) -> Result:
    result = run.train()
    if run.world.main:
        write_report(run.folder.root)
    if result.evaluation is not None:
        reporter.line(f"best AP {result.evaluation.ap:.4f}  AP50 {result.evaluation.ap50:.4f}")
    reporter.line(f"weights: {run.folder.best_weights}")
    return replace(result, warnings=tuple(reporter.warnings))


def _introduce(reporter: Reporter, data: Data, report: Report, world: World, folder: RunFolder) -> None:
    """The data, the classes and the device, so that a mistake is seen before it costs a night."""
    train, val = data.train, data.val
    reporter.line(f"finedetr {__version__}  {world.size} process(es) on {world.device}  run {folder.root}")
    if world.device.type == "cpu":
        reporter.line(f"kernels for the CPU: {state()}")
    reporter.line(f"data: {train.evidence}")
    held_out = f"{val.split}: {len(val)} pictures, {len(val.labels)} boxes" if val else "no split for evaluation"
    reporter.line(f"data: {train.split}: {len(train)} pictures, {len(train.labels)} boxes; {held_out}")
    table = [
        f"{i} -> {n} {name}"
        for n, (i, name) in enumerate(zip(train.categories.ids, train.categories.names, strict=True))
    ]
    shown = ", ".join(table[:10]) + (f" ... ({len(table)} classes)" if len(table) > 10 else "")
    reporter.line(f"classes (id -> index name): {shown}")
    for note in {str(note): note for note in report.notes}.values():  # both splits may say the same
        (reporter.warn if note.level == "warn" else reporter.line)(str(note))
    if val is None:
        reporter.warn("there is no split for evaluation: the last weights count as the best")


def balance_line(recipe: Recipe, data: Data) -> str:
    """What balancing does to an epoch of this data."""
    factors = repeat_factors(data.train, recipe.balance)
    more = int((factors > 1).sum())
    return (
        f"balance {recipe.balance:g}: {more} of {len(factors)} pictures come more often, at most {factors.max():.1f} "
        f"times; an epoch has {int(factors.sum())} pictures"
    )


def unlabelled_line(recipe: Recipe, data: Data) -> str:
    """What the pictures without labels add to a batch."""
    assert data.unlabelled is not None
    batch = recipe.batch or 1
    whose = "a detector's labels for truth" if len(data.unlabelled.labels) else "for teachers alone"
    return (
        f"unlabelled {data.unlabelled.evidence}, {whose}: {recipe.teaching.beside(batch)} beside each batch of {batch}"
    )


def _class_table(data: Data) -> list[dict[str, Any]]:
    categories = data.train.categories
    return [
        {"id": identity, "index": index, "name": name}
        for index, (identity, name) in enumerate(zip(categories.ids, categories.names, strict=True))
    ]


def _examine(data: Data, recipe: Recipe) -> Report:
    """The doctor's quick checks, those that read no picture.

    Raises:
        DataError: Something would make the run worthless.
    """
    splits = (data.train, data.val) if data.val else (data.train,)
    report = check(*splits, size=recipe.size, queries=recipe.model.decoder.queries, bytes_too=False)
    if report.errors:
        worst = report.errors[0]
        raise DataError(worst.message, code=worst.code.removeprefix("data."))
    return report


def _write_config(folder: RunFolder, request: Request, recipe: Recipe, data: Data, report: Report) -> None:
    """All that is needed to repeat the run, before its first step."""
    asked = flatten(to_dict(request.recipe))
    document = {
        "finedetr": __version__,
        "command": sys.argv[1:],
        "data": {
            "path": str(Path(request.data).resolve()),
            "train": request.train_split,
            "val": request.val_split,
            "layout": request.layout,
            "skip_missing": request.skip_missing,
            "pictures": len(data.train),
            "unlabelled": len(data.unlabelled) if data.unlabelled else 0,
        },
        "weights": str(request.weights) if request.weights else None,
        "backbone_weights": str(request.backbone_weights) if request.backbone_weights else None,
        "teacher": str(Path(request.teacher).resolve()) if request.teacher else None,
        "unlabelled": str(Path(request.unlabelled).resolve()) if request.unlabelled else None,
        "derived": sorted({k for k, v in flatten(to_dict(recipe)).items() if asked.get(k) != v} | {*request.derived}),
        "recipe": to_dict(recipe),
    }
    folder.write_json(folder.config, document)
    folder.write_json(folder.classes, _class_table(data))
    folder.write_json(folder.root / "data_report.json", report.to_json())
