"""The page of a run: curves, numbers, classes and sheets in one file that needs nothing beside it."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from finedetr.errors import DataError
from finedetr.evaluate.charts import Curve, line_chart, smoothed
from finedetr.evaluate.evaluation import Evaluation
from finedetr.evaluate.findings import Diagnosis
from finedetr.files import read_records, write_text

__all__ = ["report_page", "write_report"]

STYLE = """
:root{color-scheme:light dark;--ink:#1c1f24;--paper:#fff;--faint:#7b828c;--rule:#e3e6ea;--card:#f6f7f9}
@media (prefers-color-scheme:dark){:root{--ink:#e8eaed;--paper:#16181c;--faint:#949ba5;--rule:#2c3036;--card:#1e2126}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper)}
body{max-width:1180px;margin:2em auto;padding:0 1em}
h1{font-size:1.5em;margin:0}h2{font-size:1.1em;margin:2em 0 .6em}p{color:var(--faint);margin:.2em 0}
.tiles{display:flex;flex-wrap:wrap;gap:.6em;margin:1em 0}
.tiles div{background:var(--card);border-radius:8px;padding:.6em 1em}
.tiles b{display:block;font-size:1.35em;font-variant-numeric:tabular-nums}
.tiles span{color:var(--faint);font-size:.85em}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:1em}figure{margin:0}
figure svg{background:var(--card);border-radius:8px;width:100%;height:auto}
figcaption{font-weight:600;margin-bottom:.3em}
svg text{font:11px system-ui,sans-serif;fill:var(--faint)}.grid{stroke:var(--rule)}
polyline{fill:none;stroke-width:2}.faint{stroke-width:1;opacity:.35}
.legend{font-size:.8em;color:var(--faint)}.legend span{margin-right:1em}
.legend i{display:inline-block;width:.8em;height:.8em;border-radius:2px;margin-right:.35em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{padding:.25em .9em;border-bottom:1px solid var(--rule)}
th{color:var(--faint);font-weight:600}th,td{text-align:right}th:first-child,td:first-child{text-align:left}
td.bar{width:160px}td.bar i{display:block;height:.7em;border-radius:3px;background:#3b82f6}
img{max-width:100%;border-radius:8px}
"""
MATRIX = 21  # the most rows of a confusion matrix on the page
PICTURES = {".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".png": "image/png"}


def report_page(
    title: str,
    records: Sequence[Mapping[str, Any]] = (),
    evaluation: Evaluation | None = None,
    pictures: Sequence[tuple[str, bytes, str]] = (),
    facts: Mapping[str, object] | None = None,
) -> str:
    """One HTML document without script, style sheet or picture outside itself.

    Args:
        title: The name of the run.
        records: The lines of its metrics: `kind` is `step` (loss, losses, lr) or `evaluation` (AP ...).
        evaluation: The numbers of its best weights.
        pictures: (caption, bytes, media type) of the sheets to embed.
        facts: What else to say at the top.
    """
    head = "".join(f"<p>{escape(name)}: {escape(str(value))}</p>" for name, value in (facts or {}).items())
    body = [f"<h1>{escape(title)}</h1>{head}"]
    if evaluation is not None:
        body.append(_tiles(evaluation))
    charts = "".join(_charts(records))
    if charts:
        body.append(f"<h2>Curves</h2><div class=charts>{charts}</div>")
    if evaluation is not None:
        body.append(_classes(evaluation) + _sizes(evaluation))
        if evaluation.diagnosis is not None:
            body.append(_findings(evaluation.diagnosis))
    for caption, data, kind in pictures:
        source = f"data:{kind};base64,{base64.b64encode(data).decode()}"
        body.append(f'<h2>{escape(caption)}</h2><img alt="{escape(caption)}" src="{source}">')
    return (
        '<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}</style><body>{''.join(body)}</body></html>\n"
    )


def write_report(run: str | Path) -> Path:
    """Writes `report.html` into a run's folder from what the run has left there so far.

    Reads `metrics.jsonl`, `evaluation.json` and `samples/`; what is absent is left out.

    Raises:
        DataError: Where the folder is none of a run, or its evaluation cannot be read.
        RunError: Where the page cannot be written.
    """
    run = Path(run)
    metrics, numbers = run / "metrics.jsonl", run / "evaluation.json"
    if not metrics.is_file() and not numbers.is_file():
        raise DataError(f"{run}: holds neither metrics.jsonl nor evaluation.json: is it a run?", code="none")
    evaluation, facts = None, {}
    if numbers.is_file():
        text = numbers.read_text(encoding="utf-8")
        evaluation = Evaluation.from_json(text)
        known = {"epoch": "best epoch (from 0)", "step": "best step", "train_seconds": "seconds of training until then"}
        facts = {known[name]: value for name, value in json.loads(text).items() if name in known}
    records = read_records(metrics)
    sheets = sorted(p for p in (run / "samples").glob("*") if p.suffix.lower() in PICTURES)
    pictures = [(sheet.stem.replace("_", " "), sheet.read_bytes(), PICTURES[sheet.suffix.lower()]) for sheet in sheets]
    page = report_page(run.resolve().name, records, evaluation, pictures, facts)
    return write_text(run / "report.html", page)


def _charts(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """AP over steps, the loss, its terms, the learning rate."""
    measured = [r for r in records if r.get("kind") == "evaluation"]
    steps = [r for r in records if r.get("kind") == "step"]
    at = _column(measured, "step")
    x = _column(steps, "step")
    loss = _column(steps, "loss")
    terms = _terms(steps)
    rates = _column(steps, "lr")
    return [
        line_chart(
            "Average precision",
            [Curve(name, at, _column(measured, name), marks=True) for name in ("AP", "AP50", "AP75")],
            x_name="step",
            floor=0,
        ),
        line_chart("Loss", [Curve("loss", x, loss, faint=True), Curve("mean", x, smoothed(loss))], x_name="step"),
        line_chart(
            "Terms of the loss, over all stages and groups",
            [Curve(name, x, smoothed(values)) for name, values in terms.items()],
            x_name="step",
            floor=0,
        ),
        line_chart("Learning rate", [Curve("lr", x, rates)], x_name="step", floor=0),
    ]


def _column(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """The numbers under a name; NaN where a record has none. AP of -1 (nothing to measure) is none."""
    values = []
    for record in records:
        value = record.get(name)
        usable = isinstance(value, (int, float)) and not isinstance(value, bool)
        values.append(float(value) if usable and not (name.startswith("AP") and value < 0) else float("nan"))  # type: ignore[arg-type, operator]
    return values


def _terms(steps: Sequence[Mapping[str, Any]]) -> dict[str, list[float]]:
    """The losses `group/stage/Term` summed to one series a term, the largest first."""
    series: dict[str, list[float]] = {}
    for row, record in enumerate(steps):
        for name, value in (record.get("losses") or {}).items():
            term = str(name).rsplit("/", 1)[-1]
            values = series.setdefault(term, [0.0] * len(steps))
            values[row] += float(value)
    return dict(sorted(series.items(), key=lambda item: -sum(item[1])))


def _tiles(e: Evaluation) -> str:
    shown = (("AP", e.ap), ("AP50", e.ap50), ("AP75", e.ap75), ("AR", e.ar100))
    tiles = "".join(f"<div><b>{_points(value)}</b><span>{name}</span></div>" for name, value in shown)
    counts = f"{e.pictures} pictures, {e.boxes} boxes, {e.detections} detections"
    note = (
        "" if e.max_detections == 100 else f"; at {e.max_detections} detections a picture and class, COCO's are at 100"
    )
    left = f"; {e.unanswered} pictures were not answered" if e.unanswered else ""
    left += f"; {e.unreadable} pictures could not be read" if e.unreadable else ""
    return f"<div class=tiles>{tiles}</div><p>{counts}{note}{left}</p>"


def _classes(e: Evaluation) -> str:
    rows = "".join(
        f'<tr><td>{escape(c.name)}<td>{c.id}<td>{_points(c.ap)}<td class=bar><i style="width:{max(c.ap, 0):.1%}"></i>'
        f"<td>{_points(c.ap50)}<td>{_points(c.ar)}<td>{c.boxes}"
        for c in e.per_class
    )
    return f"<h2>Classes</h2><table><tr><th>class<th>id<th>AP<th><th>AP50<th>AR<th>boxes{rows}</table>"


def _sizes(e: Evaluation) -> str:
    rows = "".join(
        f"<tr><td>{escape(name)}<td>{_points(s.ap)}<td>{_points(s.ar)}<td>{s.boxes}" for name, s in e.by_size.items()
    )
    return f"<h2>Sizes</h2><table><tr><th>size<th>AP<th>AR<th>boxes{rows}</table>"


def _findings(d: Diagnosis) -> str:
    """Kinds of error, thresholds, confusion, the worst pictures."""
    errors = "".join(f"<tr><td>{e.kind}<td>{e.count}<td>{_points(e.cost)}" for e in d.errors)
    limits = "".join(
        f"<tr><td>{escape(t.name)}<td>{t.threshold:.2f}<td>{_points(t.f1)}<td>{_points(t.precision)}"
        f"<td>{_points(t.recall)}"
        for t in d.thresholds
    )
    worst = "".join(f"<tr><td>{escape(Path(w.file).name)}<td>{w.found}<td>{w.missed}<td>{w.wrong}" for w in d.worst)
    return (
        f"<h2>Errors</h2><table><tr><th>kind<th>boxes<th>AP50 lost{errors}</table>"
        "<h2>Thresholds</h2><p>The score from which on boxes of a class are best told, measured on these pictures.</p>"
        f"<table><tr><th>class<th>score<th>F1<th>precision<th>recall{limits}</table>"
        f"<h2>Confusion</h2>{_confusion(d)}"
        f"<h2>Worst pictures</h2><table><tr><th>picture<th>found<th>missed<th>wrong{worst}</table>"
    )


def _confusion(d: Diagnosis) -> str:
    """The matrix, or where it would not fit a page, what is most confused."""
    names = [escape(t.name) for t in d.thresholds] + ["nothing"]
    if len(names) > MATRIX:
        rows = "".join(f"<tr><td>{names[c.truth]}<td>{names[c.answer]}<td>{c.count}" for c in d.confused()[:MATRIX])
        return f"<table><tr><th>truth<th>answer<th>boxes{rows}</table>"
    matrix = d.matrix()
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    rows = "".join(
        f"<tr><td>{name}"
        + "".join(f'<td style="background:rgba(59,130,246,{s:.2f})">{n or ""}' for n, s in zip(row, part, strict=True))
        for name, row, part in zip(names, matrix.tolist(), share.tolist(), strict=True)
    )
    return (
        f"<p>Rows: truth. Columns: answer.</p><table><tr><th>{''.join(f'<th>{name}' for name in names)}{rows}</table>"
    )


def _points(value: float) -> str:
    """Points with one digit; a dash where there is nothing to measure."""
    return "–" if value < 0 else f"{100 * value:.1f}"
