"""What the terminal shows of a plan, and the same as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vm_core.planning.estimates import DEFAULT_ENCODER
from vm_core.planning.planner import Plan
from vm_core.terminal import grid
from vm_core.units import duration, size


def of_plan(plan: Plan) -> RenderableType:
    """Tables of sizes, memory and stages; then what was measured and what is assumed."""
    return Group(_facts(plan), Text(), _sizes(plan), Text(), _stages(plan), Text(), _origins(plan))


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan in JSON's types: seconds and bytes."""
    workload, worker = dataclasses.asdict(plan.workload), dataclasses.asdict(plan.worker)
    workload["partitioning"] = plan.workload.partitioning.model_dump(mode="json")
    result: dict[str, Any] = {
        "workload": workload,
        "worker": worker,
        "calibrated_on": plan.constants.machine,
        "cells": plan.cells,
        "mean_rows": plan.mean_rows,
        "largest_rows": plan.largest_rows,
        "index": plan.index_kind,
        "images_per_s": plan.images_per_s,
        "bytes": dataclasses.asdict(plan.sizes),
        "build_memory_bytes": plan.build_memory_bytes,
        "search_memory_bytes": plan.search_memory_bytes,
        "stages": [],
        "one_worker_seconds": plan.seconds(1),
        "workers": plan.workers,
        "seconds": None if plan.workers is None else plan.seconds(plan.workers),
    }
    for each in plan.stages:
        stage = dataclasses.asdict(each.stage)
        del stage["constants"]
        placed = dataclasses.asdict(each)
        del placed["stage"]
        result["stages"].append({**stage, **placed})
    return result


def _facts(plan: Plan) -> RenderableType:
    workload, worker = plan.workload, plan.worker
    machine = f"{worker.name}: {worker.cores} cores, {size(worker.memory_bytes)}"
    if worker.accelerator:
        machine += f", {worker.accelerators} x {worker.accelerator.name}"
    rows = f"{plan.mean_rows:,.0f} rows on average, at most {plan.largest_rows:,}"
    return grid(
        ("memory", f"{workload.items:,} x {workload.dimension:,} {workload.dtype}"),
        ("encoder", _encoder(plan)),
        ("index", f"{plan.cells:,} partitions ({plan.index_kind}), {rows}"),
        ("worker", machine),
        (
            "memory per worker",
            f"build {size(plan.build_memory_bytes)} a task, "
            f"search {size(plan.search_memory_bytes)} a worker",
        ),
        ("workers", _workers(plan)),
    )


def _encoder(plan: Plan) -> str:
    unnamed = "as given" if plan.workload.images_per_s else f"{DEFAULT_ENCODER} (none was named)"
    name = plan.workload.encoder or unnamed
    unit = "accelerator" if plan.worker.accelerator else "core"
    return f"{name}: {plan.images_per_s:,.1f} images/s per {unit}"


def _workers(plan: Plan) -> str:
    if plan.workers is None:
        return f"no deadline; one worker takes {duration(plan.seconds(1))}"
    return (
        f"{plan.workers:,} finish everything in {duration(plan.seconds(plan.workers))} "
        f"(deadline {duration(3600 * (plan.workload.deadline_hours or 0))})"
    )


def _sizes(plan: Plan) -> RenderableType:
    sizes = plan.sizes
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Bytes", title_justify="left")
    table.add_column("what")
    for dtype in (*sizes.shards, "int8"):
        table.add_column(dtype, justify="right")
    missing = {"int8": None, "float16": None}
    for name, by_dtype in (
        ("embedding shards", sizes.shards),
        ("vectors of the partitions", sizes.vectors),
        ("ScaNN, vectors to re-rank by", sizes.reorder),
    ):
        known = {**missing, **by_dtype}
        columns = [known.get(dtype) for dtype in (*sizes.shards, "int8")]
        table.add_row(name, *("-" if value is None else size(value) for value in columns))
    fixed = Table.grid(padding=(0, 2))
    for name, value in (
        ("ScaNN, codes", sizes.codes),
        ("ScaNN, the rest", sizes.other),
        ("ids and labels", sizes.rows),
        (f"index ({plan.workload.dtype}, re-ranked by {plan.workload.reorder})", sizes.index),
        ("work files, removed at the end", sizes.work),
    ):
        fixed.add_row(name, size(value))
    fixed.columns[1].justify = "right"
    return Group(table, fixed)


def _stages(plan: Plan) -> RenderableType:
    """Hours and workers, then bytes: together they would not fit into 80 columns."""
    hours = _stage_table("Hours", "tasks", "core hours", "GPU hours", "worker hours", "workers")
    data = _stage_table("Data", "shuffled", "read", "written")
    for each in plan.stages:
        stage = each.stage
        hours.add_row(
            Text(stage.name),
            _count(stage.tasks),
            _hours(stage.core_seconds / plan.worker.speed),
            _hours(stage.accelerator_seconds),
            _hours(each.worker_seconds),
            _count(each.workers),
        )
        moved = (stage.shuffle_bytes, stage.read_bytes, stage.written_bytes)
        data.add_row(Text(stage.name), *(size(count) if count else "-" for count in moved))
    stages = [each.stage for each in plan.stages]
    hours.add_section()
    hours.add_row(
        "all",
        "",
        _hours(sum(stage.core_seconds for stage in stages) / plan.worker.speed),
        _hours(sum(stage.accelerator_seconds for stage in stages)),
        _hours(sum(each.worker_seconds for each in plan.stages)),
        _count(plan.workers),
        style="bold",
    )
    data.add_section()
    data.add_row(
        "all",
        size(sum(stage.shuffle_bytes for stage in stages)),
        size(sum(stage.read_bytes for stage in stages)),
        size(sum(stage.written_bytes for stage in stages)),
        style="bold",
    )
    note = "workers: of a stage, those that finish it alone by the deadline; of all, one after "
    note += "another. Core hours are the worker's."
    return Group(hours, Text(note, style="dim"), Text(), data)


def _stage_table(title: str, *columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left")
    table.add_column("stage")
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _origins(plan: Plan) -> RenderableType:
    measured = sorted({name for each in plan.stages for name in each.measured})
    assumed = sorted({name for each in plan.stages for name in each.assumed})
    lines = [
        ("measured", f"on {plan.constants.machine}: {', '.join(measured) or 'nothing'}"),
        ("assumed", ", ".join(assumed) or "no other constant"),
    ]
    read, write = plan.worker.read_bytes_per_s, plan.worker.write_bytes_per_s
    if read and write:
        lines.append(
            (
                "assumed",
                f"of {plan.worker.name}: a core does {plan.worker.speed:g} times the work of the "
                f"calibrated one, storage gives {size(read)}/s and takes "
                f"{size(write)}/s, a file is opened in "
                f"{1000 * plan.worker.request_s:g} ms",
            )
        )
    lines.append(("assumed", f"a query visits {plan.workload.probes} partitions"))
    return grid(*lines)


def _hours(seconds: float) -> str:
    hours = seconds / 3600
    return "-" if hours == 0 else f"{hours:,.0f}" if hours >= 100 else f"{hours:,.2g}"


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"
