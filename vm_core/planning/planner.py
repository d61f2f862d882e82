"""What a memory of some size will take: bytes, memory, hours, workers, before it is made.

``plan`` is arithmetic over a workload, the constants of a calibration and a type of worker;
the formulas are in vm_core.planning.estimates. A stage has core seconds, bytes to read and write,
files to open, and independent tasks. As many tasks run at once on a worker as it has cores
and memory for; computing, reading and writing are added, not overlapped. n > 1 cores do
``scaling`` times n the work of one alone (two hyper-threads share a core).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vm_core.errors import VisualMemoryError
from vm_core.planning.calibration import Constants
from vm_core.planning.estimates import Estimate, Sizes, Stage
from vm_core.planning.worker_types import Worker
from vm_core.planning.workload import Workload

USABLE_MEMORY = 0.85


@dataclass(frozen=True)
class StagePlan:
    """A stage on a type of worker.

    at_once: tasks that run on a worker at a time. worker_seconds: of one worker, all of its
    slots busy. task_seconds: of one task, less than which no number of workers takes.
    workers: so many finish this stage alone by the deadline, None without a deadline or
    where no number does. measured, assumed: the constants behind the time.
    """

    stage: Stage
    at_once: int
    worker_seconds: float
    task_seconds: float
    workers: int | None
    measured: tuple[str, ...]
    assumed: tuple[str, ...]

    def seconds(self, workers: int) -> float:
        """Elapsed seconds with so many workers."""
        return max(self.worker_seconds / workers, self.task_seconds)


@dataclass(frozen=True)
class Plan:
    """workers: so many finish all stages, one after another, by the deadline."""

    workload: Workload
    worker: Worker
    constants: Constants
    cells: int
    mean_rows: float
    largest_rows: int
    index_kind: str
    images_per_s: float
    sizes: Sizes
    build_memory_bytes: float
    search_memory_bytes: float
    stages: tuple[StagePlan, ...]
    workers: int | None

    def seconds(self, workers: int) -> float:
        """Elapsed seconds of all stages, one after another, with so many workers."""
        return sum(stage.seconds(workers) for stage in self.stages)


def plan(workload: Workload, constants: Constants, worker: Worker) -> Plan:
    """Plans a workload on a type of worker.

    Raises VisualMemoryError for an encoder that is not known, a task too large for the
    worker's memory, and a deadline that no number of workers meets.
    """
    estimate = Estimate(workload, constants, worker)
    stages = tuple(_placed(stage, workload, constants, worker) for stage in estimate.stages())
    return Plan(
        workload,
        worker,
        constants,
        cells=estimate.cells,
        mean_rows=estimate.mean_rows,
        largest_rows=estimate.largest_rows,
        index_kind="scann" if estimate.scann else "exact",
        images_per_s=estimate.images_per_s,
        sizes=estimate.sizes(),
        build_memory_bytes=estimate.build_memory(),
        search_memory_bytes=estimate.search_memory(),
        stages=stages,
        workers=_workers(stages, workload.deadline_hours),
    )


def _placed(stage: Stage, workload: Workload, constants: Constants, worker: Worker) -> StagePlan:
    """A stage on a worker: how many of its tasks at once, and how long it takes one."""
    room = math.floor(USABLE_MEMORY * worker.memory_bytes / stage.memory_bytes)
    if room < 1:
        raise VisualMemoryError(
            f"{stage.name} needs {stage.memory_bytes / 1e9:,.1f} GB for one task; of the "
            f"{worker.memory_bytes / 1e9:,.1f} GB of {worker.name}, {USABLE_MEMORY:.0%} are "
            f"counted on. Take a worker with more memory or {_remedy(stage)}"
        )
    at_once = 1 if stage.shares_cores else max(1, min(worker.cores, room, stage.tasks))
    cores = worker.cores if stage.shares_cores else at_once
    transfer = stage.read_bytes / (worker.read_bytes_per_s or constants.disk_read_bytes_per_s)
    transfer += stage.written_bytes / (worker.write_bytes_per_s or constants.disk_write_bytes_per_s)
    # Opening a file is waiting: tasks wait side by side.
    computing = stage.core_seconds / worker.speed / _together(cores, constants)
    computing += stage.files_opened * worker.request_s / at_once
    total = computing + transfer
    task = total * at_once / stage.tasks
    if stage.accelerator_seconds:
        # The cores decode while the accelerator encodes: the slower of the two counts.
        total = max(total, stage.accelerator_seconds / worker.accelerators)
        task = max(task, stage.accelerator_seconds / stage.tasks)
    workers = None
    if workload.deadline_hours is not None:
        deadline = 3600 * workload.deadline_hours
        workers = max(1, math.ceil(total / deadline)) if task <= deadline else None
    used = (*stage.constants, *(("scaling",) if worker.cores > 1 else ()))
    return StagePlan(
        stage,
        at_once,
        total,
        task,
        workers,
        tuple(name for name in used if name in constants.measured),
        tuple(name for name in used if name not in constants.measured),
    )


def _remedy(stage: Stage) -> str:
    """What makes a task of this stage need less memory."""
    if stage.name == "train partitioner":
        return "more rows per partition, so that there are fewer to train"
    if stage.shares_cores or stage.name == "build index":
        return "fewer rows per partition"
    return "fewer rows per shard"


def _together(cores: int, constants: Constants) -> float:
    """How many times the work of one core alone so many do."""
    return max(1.0, cores * constants.scaling)


def _workers(stages: tuple[StagePlan, ...], deadline_hours: float | None) -> int | None:
    """The fewest workers that finish all stages in turn by the deadline."""
    if deadline_hours is None:
        return None
    deadline = 3600 * deadline_hours

    def elapsed(workers: int) -> float:
        return sum(stage.seconds(workers) for stage in stages)

    shortest = sum(stage.task_seconds for stage in stages)
    if shortest > deadline:
        longest = max(stages, key=lambda stage: stage.task_seconds)
        raise VisualMemoryError(
            f"deadline_hours = {deadline_hours:g}: no number of workers makes it under "
            f"{shortest / 3600:,.2g} hours, of which one task of {longest.stage.name!r} takes "
            f"{longest.task_seconds / 3600:,.2g}. Give more time, a faster worker or fewer rows "
            "per partition"
        )
    few, many = 0, 1
    while elapsed(many) > deadline:
        if many > 1e12:  # only rounding keeps the sum above its limit
            break
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (few, middle) if elapsed(middle) <= deadline else (middle, many)
    return many
