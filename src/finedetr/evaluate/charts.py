"""Line charts as inline SVG: no script, no library, readable on light and on dark paper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

__all__ = ["Curve", "line_chart", "smoothed"]

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 14, 34
MOST = 400  # points of a curve that are drawn: more than a screen can show
COLORS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#14b8a6", "#ec4899")


@dataclass(frozen=True)
class Curve:
    """A line: its name and its points. `marks` draws the points themselves, each with its numbers to hover over."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    marks: bool = False
    faint: bool = False


def smoothed(values: Sequence[float], share: float = 0.02) -> list[float]:
    """A moving mean over about this share of the points, centred; as many points as before."""
    array = np.asarray(values, dtype=np.float64)
    half = int(len(array) * share / 2)
    if half < 1:
        return list(map(float, array))
    total = np.concatenate(([0.0], np.cumsum(np.nan_to_num(array))))
    count = np.concatenate(([0.0], np.cumsum(np.isfinite(array))))
    low = np.maximum(np.arange(len(array)) - half, 0)
    high = np.minimum(np.arange(len(array)) + half + 1, len(array))
    means: list[float] = ((total[high] - total[low]) / np.maximum(count[high] - count[low], 1)).tolist()
    return means


def line_chart(title: str, curves: Sequence[Curve], *, x_name: str = "", floor: float | None = None) -> str:
    """An SVG element with axes, a legend and the curves; an empty string where no curve has a point.

    Args:
        title: Above the chart.
        curves: What to draw; points that are not finite are left out.
        x_name: Below the chart.
        floor: The lowest value of the vertical axis; from the data where it is not given.
    """
    lines = [_finite(curve) for curve in curves]
    lines = [curve for curve in lines if curve.x]
    if not lines:
        return ""
    x_low, x_high = _range([value for curve in lines for value in curve.x])
    y_low, y_high = _range([value for curve in lines for value in curve.y])
    y_low = y_low if floor is None else min(floor, y_low)
    y_low, y_high = (y_low, y_high) if y_high > y_low else (y_low, y_low + 1)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT) + LEFT
        return round(across, 1), round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    parts = [f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">']
    for tick in _ticks(y_low, y_high):
        y = place(x_low, tick)[1]
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{_number(tick)}</text>')
    parts += [
        f'<text x="{place(tick, y_low)[0]}" y="{HEIGHT - 14}" text-anchor="middle">{_number(tick)}</text>'
        for tick in _ticks(x_low, x_high)
    ]
    if x_name:
        parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 1}" text-anchor="middle">{escape(x_name)}</text>')
    for number, curve in enumerate(lines):
        color = COLORS[number % len(COLORS)]
        points = [place(x, y) for x, y in zip(*_thinned(curve), strict=True)]
        path = " ".join(f"{x},{y}" for x, y in points)
        style = ' class="faint"' if curve.faint else ""
        parts.append(f'<polyline{style} points="{path}" stroke="{color}"/>')
        if curve.marks:
            for (x, y), value, at in zip(points, curve.y, curve.x, strict=False):
                words = escape(f"{curve.name} {value:.4f} at {_number(at)}")
                parts.append(f'<circle cx="{x}" cy="{y}" r="3" fill="{color}"><title>{words}</title></circle>')
    legend = "".join(
        f'<span><i style="background:{COLORS[n % len(COLORS)]}"></i>{escape(curve.name)}</span>'
        for n, curve in enumerate(lines)
    )
    return "".join(parts) + f"</svg><div class=legend>{legend}</div></figure>"


def _finite(curve: Curve) -> Curve:
    pairs = [(x, y) for x, y in zip(curve.x, curve.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    return Curve(curve.name, [x for x, _ in pairs], [y for _, y in pairs], curve.marks, curve.faint)


def _thinned(curve: Curve) -> tuple[list[float], list[float]]:
    """At most `MOST` points: every n-th, the last one always."""
    if curve.marks or len(curve.x) <= MOST:
        return list(curve.x), list(curve.y)
    chosen = np.unique(np.linspace(0, len(curve.x) - 1, MOST).astype(int)).tolist()
    return [curve.x[i] for i in chosen], [curve.y[i] for i in chosen]


def _range(values: Sequence[float]) -> tuple[float, float]:
    """From the least to the largest; around a constant as wide as it is large."""
    low, high = min(values), max(values)
    half = abs(low) / 2 or 0.5
    return (low, high) if high > low else (low - half, high + half)


def _ticks(low: float, high: float) -> list[float]:
    """Four to eight round numbers between."""
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _number(value: float) -> str:
    """Short: 0.25, 12, 1.5k, 2e-04."""
    size = abs(value)
    if size >= 10000:
        return f"{value / 1000:g}k"
    if 0 < size < 0.001:
        return f"{value:.1e}"
    return f"{value:.4g}"
