"""What a run's metrics say: a table for the terminal, JSON, and Prometheus' text format.

A metric's name is ``<stage>_<what>_<unit>``; docs/observability.md lists them all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from vm_core import storage
from vm_core.errors import VisualMemoryError
from vm_core.units import size

STAGES = (
    *("read", "embed", "write", "sample", "train", "assign", "index", "recall", "publish"),
    *("gather", "route", "search", "evaluate", "results"),
    *("home", "visit", "score", "group", "items", "finish"),
)
"""In the order in which a run goes through them."""


_SHOWN_MS = 50
"""Shorter times are no line of the table."""


@dataclass(frozen=True)
class Distribution:
    """Whole numbers, by what is kept of them."""

    count: int
    sum: int
    min: int
    max: int

    @property
    def mean(self) -> float:
        return self.sum / max(1, self.count)

    def merged(self, other: Distribution) -> Distribution:
        return Distribution(
            self.count + other.count,
            self.sum + other.sum,
            min(self.min, other.min),
            max(self.max, other.max),
        )


RunMetrics = dict[str, Any]
"""By name: a counter is an int, a distribution a Distribution."""


class _Stage:
    """The metrics of one stage, by (what, unit)."""

    def __init__(self) -> None:
        self.metrics: dict[tuple[str, str], Any] = {}

    def of_unit(self, unit: str) -> dict[str, Any]:
        return {what: value for (what, u), value in self.metrics.items() if u == unit}

    def with_prefix(self, prefix: str) -> dict[str, int]:
        return {
            what.removeprefix(prefix): value
            for (what, _), value in self.metrics.items()
            if what.startswith(prefix) and value
        }

    @property
    def work(self) -> Distribution:
        return self.metrics.get(("work", "ms"), Distribution(0, 0, 0, 0))

    @property
    def done(self) -> str:
        return ", ".join(
            f"{value:,} {unit}" for (what, unit), value in self.metrics.items() if what == "done"
        )

    @property
    def batches(self) -> str:
        for (what, unit), value in self.metrics.items():
            if what == "batch":
                if value.min == value.max:
                    return f"{value.max:,} {unit}"
                return f"{value.min:,} to {value.max:,} {unit}, mean {value.mean:,.0f}"
        return ""

    @property
    def reused(self) -> str:
        """What an earlier run or the cache had, of all."""
        shares = []
        for (what, unit), reused in self.metrics.items():
            if what == "reused":
                total = reused + self.metrics.get(("fresh", unit), 0)
                if reused:
                    shares.append(f"{reused / total:.0%} of {total:,} {unit}")
        return ", ".join(shares)

    @property
    def details(self) -> str:
        """Where the time went, what moved, and why images went to quarantine."""
        times = [
            f"{what} {value / 1e3:,.1f} s"
            for what, value in self.of_unit("ms").items()
            if what != "work" and value >= _SHOWN_MS
        ]
        moved = [f"{size(value)} {what}" for what, value in self.of_unit("bytes").items() if value]
        reasons = [
            f"{what.replace('_', ' ')} {value:,}"
            for what, value in self.with_prefix("quarantined_").items()
        ]
        notes = [
            ", ".join(times),
            ", ".join(moved),
            f"batches of {self.batches}" if self.batches else "",
            f"reused {self.reused}" if self.reused else "",
            f"quarantined: {', '.join(reasons)}" if reasons else "",
        ]
        return "; ".join(note for note in notes if note)

    @property
    def is_shown(self) -> bool:
        return bool(self.done) or self.work.sum >= _SHOWN_MS


def split_name(name: str) -> tuple[str, str, str]:
    """Stage, what and unit of a metric's name."""
    stage, _, rest = name.partition("_")
    what, _, unit = rest.rpartition("_")
    return stage, what, unit


def _by_stage(metrics: Mapping[str, Any]) -> dict[str, _Stage]:
    stages = {name: _Stage() for name in STAGES}
    for name, value in metrics.items():
        stage, what, unit = split_name(name)
        stages.setdefault(stage, _Stage()).metrics[what, unit] = value
    return {name: stage for name, stage in stages.items() if stage.metrics}


def of_run(run: str, metrics: Mapping[str, Any] | None) -> RenderableType:
    """A line a stage. Seconds are those of all workers and threads, added."""
    if metrics is None:
        return Text(f"{run}: this runner keeps no metrics, so there is no summary of the run")
    table = Table(
        box=box.SIMPLE_HEAD, pad_edge=False, title=f"What {run} did", title_justify="left"
    )
    for column in ("stage", "calls", "done", "work", "per call"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    table.add_column("of that", overflow="fold")
    for name, stage in _by_stage(metrics).items():
        if stage.is_shown:
            work = stage.work
            table.add_row(
                name,
                f"{work.count:,}",
                stage.done,
                f"{work.sum / 1e3:,.1f} s",
                f"{work.mean:,.0f} ms",
                stage.details,
            )
    return table


def as_json(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """By name: a number, or the count, sum, min and max of a distribution."""
    return {
        name: asdict(value) if isinstance(value, Distribution) else value
        for name, value in sorted(metrics.items())
    }


def as_prometheus(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """The metrics of some named runs in Prometheus' text format.

    A distribution is a summary without quantiles, and two gauges for its ends.
    """
    families: dict[tuple[str, str], list[str]] = {}

    def add(name: str, kind: str, run: str, value: int, suffix: str = "") -> None:
        line = f'visual_memory_{name}{suffix}{{run="{run}"}} {value}'
        families.setdefault((f"visual_memory_{name}", kind), []).append(line)

    for run, metrics in runs.items():
        for name, value in sorted(metrics.items()):
            if isinstance(value, Distribution):
                add(name, "summary", run, value.sum, "_sum")
                add(name, "summary", run, value.count, "_count")
                add(f"{name}_min", "gauge", run, value.min)
                add(f"{name}_max", "gauge", run, value.max)
            else:
                add(f"{name}_total", "counter", run, value)
    return "".join(
        f"# TYPE {name} {kind}\n" + "".join(f"{line}\n" for line in lines)
        for (name, kind), lines in families.items()
    )


def check_path(path: str) -> None:
    """Raises VisualMemoryError if ``write`` has no format for such a file."""
    if not path.endswith((".json", ".prom")):
        raise VisualMemoryError(
            f"--metrics-out {path}: the name says the format. End it in .json, or in .prom for "
            "Prometheus' text format"
        )


def write(path: str, runs: Mapping[str, Mapping[str, Any]]) -> None:
    """Writes the metrics of some named runs, as JSON or for Prometheus; the file's name says."""
    check_path(path)
    text = as_prometheus(runs)
    if path.endswith(".json"):
        text = json.dumps({run: as_json(metrics) for run, metrics in runs.items()}, indent=1) + "\n"
    try:
        storage.write_bytes(storage.absolute(path), text.encode())
    except OSError as error:
        raise VisualMemoryError(
            f"--metrics-out {path} cannot be written: {error}. The run itself is complete"
        ) from error
