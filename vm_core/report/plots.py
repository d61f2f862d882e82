"""The geometry of the report's plots: from numbers to positions in an SVG picture.

Positions only: colours and fonts are the style sheet's, so that a plot follows light
and dark mode and its text is text.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Ticks = list[tuple[float, str]]

# Of a curve with thousands of k, as many as a screen can tell apart.
_MOST_POINTS = 160


@dataclass(frozen=True)
class Scale:
    """Maps [low, high] to pixels [start, end]. A single value stands in the middle."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log(value), math.log(low), math.log(high)
        share = (value - low) / (high - low) if high > low else 0.5
        return round(self.start + share * (self.end - self.start), 2)


@dataclass(frozen=True)
class Frame:
    """A plot's size, the edges of its drawing area and its ticks."""

    width: int
    height: int
    left: float
    right: float
    top: float
    bottom: float
    x_ticks: Ticks
    y_ticks: Ticks


@dataclass(frozen=True)
class Curve:
    """One line. style: its number among the voters. marks: (x, y) of the chosen k."""

    name: str
    style: int
    path: str
    points: list[tuple[float, float]]
    marks: list[tuple[float, float]]
    label: tuple[float, float] | None


@dataclass(frozen=True)
class Hover:
    """A strip of the plot and what a pointer there says."""

    x: float
    width: float
    text: str


@dataclass(frozen=True)
class LineChart:
    frame: Frame
    curves: list[Curve]
    hovers: list[Hover]


@dataclass(frozen=True)
class Bin:
    """One bin of confidences: a dot where its queries are, a bar for how many they are."""

    x: float
    y: float
    ideal: float
    radius: float
    bar_x: float
    bar_y: float
    bar_width: float
    bar_height: float
    low: float
    high: float
    count: int
    accuracy: float
    confidence: float


@dataclass(frozen=True)
class CalibrationChart:
    frame: Frame
    error: float | None
    bins: list[Bin]
    bar_top: float
    bar_bottom: float
    most: int


@dataclass(frozen=True)
class Range:
    """Distances from min to max with their mean; positions None where none were counted."""

    name: str
    y: float
    count: int
    low: float | None
    mean: float | None
    high: float | None
    values: Mapping[str, Any]


@dataclass(frozen=True)
class RangeChart:
    frame: Frame
    ranges: list[Range]


def accuracy_over_k(
    accuracy_at_k: Mapping[str, Sequence[float | None]],
    chosen: Mapping[str, Mapping[str, Any]] | None,
) -> LineChart:
    """A curve for every voter over k on a logarithmic scale: the small k differ most."""
    marks = {voter: [each["k"]] for voter, each in (chosen or {}).items()}
    return _line_chart(accuracy_at_k, marks, 480, 320, margin=74, caption="k = {}")


def reliability_by_rank(reliability: Sequence[float | None]) -> LineChart:
    return _line_chart({"reliability": reliability}, {}, 360, 270, margin=14, caption="rank {}")


def calibration(bins: Mapping[str, Any]) -> CalibrationChart:
    """Accuracy over confidence, and below it how many queries each bin has."""
    width, height, left, right, top, bottom = 360, 270, 46, 346, 10, 172
    bar_top, bar_bottom = 186, 228
    x, y = Scale(0, 1, left, right), Scale(0, 1, bottom, top)
    counts = bins["count"]
    most = max(counts, default=0)
    bars = Scale(0, max(most, 1), 0, bar_bottom - bar_top)
    shown = []
    for place, count in enumerate(counts):
        if not count:
            continue
        accuracy, confidence = bins["accuracy"][place], bins["confidence"][place]
        low, high = place / len(counts), (place + 1) / len(counts)
        tall = max(bars(count), 1.0)  # a single query among thousands is still to be seen
        shown.append(
            Bin(
                x(confidence),
                y(accuracy),
                y(confidence),
                round(2.5 + 4.5 * math.sqrt(count / most), 2),
                round(x(low) + 1, 2),
                round(bar_bottom - tall, 2),
                round(x(high) - x(low) - 2, 2),
                tall,
                low,
                high,
                count,
                accuracy,
                confidence,
            )
        )
    ticks = [0.0, 0.25, 0.5, 0.75, 1.0]
    frame = Frame(
        width,
        height,
        left,
        right,
        top,
        bottom,
        [(x(tick), f"{tick:.0%}") for tick in ticks],
        [(y(tick), f"{tick:.0%}") for tick in ticks],
    )
    return CalibrationChart(frame, bins["expected_error"], shown, bar_top, bar_bottom, most)


def first_distances(distances: Mapping[str, Mapping[str, Any]]) -> RangeChart:
    """The span of the first neighbour's distances where it is right and where it is wrong."""
    known = [each[name] for each in distances.values() for name in ("min", "max") if each["count"]]
    ticks = _ticks(0.0, max([*known, 0.01]), 4)
    x = Scale(0, ticks[-1], 20, 340)
    ranges = []
    for y, (name, each) in zip((62, 152), distances.items(), strict=True):
        low, mean, high = (
            x(each[which]) if each["count"] else None for which in ("min", "mean", "max")
        )
        ranges.append(Range(name, y, each["count"], low, mean, high, each))
    labels = [(x(tick), f"{tick:g}") for tick in ticks]
    return RangeChart(Frame(360, 270, 20, 340, 10, 228, labels, []), ranges)


def _line_chart(
    series: Mapping[str, Sequence[float | None]],
    marks: Mapping[str, Sequence[int]],
    width: int,
    height: int,
    margin: float,
    caption: str,
) -> LineChart:
    """Shares over positions counted from 1; positions without a share are gaps."""
    left, right, top, bottom = 46.0, width - margin, 10.0, height - 42.0
    last = max((len(values) for values in series.values()), default=1)
    x = Scale(1, max(last, 1), left + 8, right - 4, log=True)
    values = [value for each in series.values() for value in each if value is not None]
    y_ticks = _share_ticks(values)
    y = Scale(y_ticks[0], y_ticks[-1], bottom, top)
    kept = sorted(_spread_positions(last) | {k for each in marks.values() for k in each})
    curves = [
        _curve(name, style, each, kept, marks.get(name, ()), x, y, right)
        for style, (name, each) in enumerate(series.items())
    ]
    step = y_ticks[1] - y_ticks[0]
    places = 0 if step >= 0.00999 else 1 if step >= 0.000999 else 2
    frame = Frame(
        width,
        height,
        left,
        right,
        top,
        bottom,
        [(x(tick), f"{tick:,}") for tick in _log_ticks(last)],
        [(y(tick), f"{tick:.{places}%}") for tick in y_ticks],
    )
    return LineChart(frame, _apart(curves, bottom), _hovers(series, kept, x, left, right, caption))


def _curve(
    name: str,
    style: int,
    values: Sequence[float | None],
    kept: Sequence[int],
    marks: Sequence[int],
    x: Scale,
    y: Scale,
    right: float,
) -> Curve:
    path, points, pen = [], [], "M"
    for position in kept:
        value = values[position - 1]
        if value is None:
            pen = "M"
            continue
        points.append((x(position), y(value)))
        path.append(f"{pen}{points[-1][0]:g},{points[-1][1]:g}")
        pen = "L"
    spots = [(x(k), y(value)) for k in marks if (value := values[k - 1]) is not None]
    label = (right + 2, points[-1][1]) if points else None
    return Curve(name, style, "".join(path), points, spots, label)


def _apart(curves: list[Curve], bottom: float, height: float = 16) -> list[Curve]:
    """Moves the labels at the curves' ends apart so that none covers another."""
    labelled = sorted((c for c in curves if c.label), key=lambda curve: curve.label or (0, 0))
    places = [curve.label[1] for curve in labelled if curve.label]
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + height)
    # Those pushed below the plot push the others up again.
    limit = bottom
    for i in reversed(range(len(places))):
        places[i] = min(places[i], limit)
        limit = places[i] - height
    moved = {
        curve.name: (curve.label[0], round(place, 2))
        for curve, place in zip(labelled, places, strict=True)
        if curve.label
    }
    return [Curve(c.name, c.style, c.path, c.points, c.marks, moved.get(c.name)) for c in curves]


def _hovers(
    series: Mapping[str, Sequence[float | None]],
    kept: Sequence[int],
    x: Scale,
    left: float,
    right: float,
    caption: str,
) -> list[Hover]:
    centres = [x(position) for position in kept]
    edges = [left, *((a + b) / 2 for a, b in pairwise(centres)), right]
    hovers = []
    for i, position in enumerate(kept):
        lines = [caption.format(f"{position:,}")]
        for name, values in series.items():
            value = values[position - 1]
            if value is not None:
                lines.append(f"{name} {value:.2%}")
        hovers.append(
            Hover(round(edges[i], 2), round(edges[i + 1] - edges[i], 2), "\n".join(lines))
        )
    return hovers


def _spread_positions(last: int) -> set[int]:
    """1 to ``last``, thinned evenly on the logarithmic scale where there are too many."""
    if last <= _MOST_POINTS:
        return set(range(1, last + 1))
    return {round(last ** (i / (_MOST_POINTS - 1))) for i in range(_MOST_POINTS)}


def _log_ticks(last: int) -> list[int]:
    ticks = [
        factor * 10**power
        for power in range(len(str(last)))
        for factor in ((1, 2, 5) if last <= 1000 else (1,))
        if factor * 10**power <= last
    ]
    return ticks or [1]


def _share_ticks(values: Sequence[float]) -> list[float]:
    """Ticks around the shares that occur; the axis need not start at 0."""
    if not values:
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    low, high = min(values), max(values)
    room = max((high - low) * 0.08, 0.0005) if high > low else 0.02
    ticks = _ticks(max(0.0, low - room), min(1.0, high + room), 5)
    return [tick for tick in ticks if -1e-9 <= tick <= 1 + 1e-9]


def _ticks(low: float, high: float, count: int) -> list[float]:
    """About ``count`` round steps that cover [low, high]."""
    rough = max(high - low, 1e-6) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, max(last, first + 1) + 1)]
