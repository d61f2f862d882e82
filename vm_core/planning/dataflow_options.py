"""A plan as options of Dataflow: machines, disk, threads, workers, accelerator, memory."""

from __future__ import annotations

import math

from vm_core.errors import VisualMemoryError
from vm_core.planning.planner import USABLE_MEMORY, Plan
from vm_core.planning.worker_types import WORKERS, Worker

ACCELERATORS = {
    "t4": "nvidia-tesla-t4",
    "p100": "nvidia-tesla-p100",
    "v100": "nvidia-tesla-v100",
    "l4": "nvidia-l4",
    "a100": "nvidia-tesla-a100",
    "h100": "nvidia-h100-80gb",
}
"""What Google calls the accelerators that Dataflow has."""

_WITH_ACCELERATOR = ("g2-", "a2-", "a3-")
"""Machine types that come with an accelerator, and only with one."""

_SYSTEM_GB = 50
"""The system, and the image with CUDA's libraries, packed and unpacked."""


def of_plan(plan: Plan) -> list[str]:
    """Command-line options of a build, an evaluation or scores by this plan, the same for all.

    A worker is one process, whose threads share the model and the open partitions, and not
    one a core. Threads are as many as the fullest step leaves room for, since Dataflow gives
    all steps the same number. Only workers that encode get the accelerator. Raises
    VisualMemoryError for workers that Dataflow does not have.
    """
    if plan.worker.name not in WORKERS:
        raise VisualMemoryError(
            f"worker {plan.worker.name!r} is no machine type of Google's. Choose one with --worker"
        )
    usable = USABLE_MEMORY * plan.worker.memory_bytes
    needs = {each.stage.name: each.stage.memory_bytes for each in plan.stages}
    threads = min(plan.worker.cores, math.floor(usable / max(needs.values())))
    partition = max(plan.build_memory_bytes, plan.search_memory_bytes)
    options = {
        "machine_type": _without_accelerator(plan.worker).name,
        "disk_size_gb": _SYSTEM_GB + math.ceil(2 * threads * _largest_partition(plan) / 1e9),
        "experiments": "no_use_multiple_sdk_containers",
        "number_of_worker_harness_threads": threads,
        "encode_min_ram": _memory(threads * needs["encode"]),
        "partition_min_ram": _memory(threads * partition),
    }
    if plan.workers is not None:
        options["max_num_workers"] = plan.workers
    if plan.worker.accelerator is not None:
        options["encode_accelerator"] = _accelerator(plan.worker)
    return [f"--{name}={value}" for name, value in options.items()]


def _largest_partition(plan: Plan) -> float:
    """Bytes of its files. While it is written, or fetched to be searched, it is on disk."""
    return plan.sizes.index / plan.cells * plan.largest_rows / plan.mean_rows


def _memory(needed: float) -> str:
    return f"{math.ceil(needed / USABLE_MEMORY / 1e9)}GB"


def _without_accelerator(worker: Worker) -> Worker:
    """The worker, or one for the steps that do not encode: as many cores and as much memory."""
    if not worker.name.startswith(_WITH_ACCELERATOR):
        return worker
    large_enough = [
        other
        for other in WORKERS.values()
        if not other.name.startswith(_WITH_ACCELERATOR)
        and other.cores >= worker.cores
        and other.memory_bytes >= worker.memory_bytes
        and other.speed >= worker.speed
    ]
    if not large_enough:
        raise VisualMemoryError(
            f"worker {worker.name!r}: no machine without an accelerator is as large, for the "
            "steps that need none. Choose a smaller one with --worker"
        )
    return min(large_enough, key=lambda other: (other.cores, other.memory_bytes))


def _accelerator(worker: Worker) -> str:
    assert worker.accelerator is not None
    name = worker.accelerator.name
    if name not in ACCELERATORS:
        raise VisualMemoryError(
            f"accelerator {name!r}: Dataflow has none. It has: {', '.join(ACCELERATORS)}"
        )
    if worker.accelerators != 1:
        raise VisualMemoryError(
            f"accelerators = {worker.accelerators}: a Dataflow worker's process uses one. Plan "
            "with --accelerators 1"
        )
    hint = f"type:{ACCELERATORS[name]};count:1"
    if worker.name.startswith(_WITH_ACCELERATOR):
        hint += f";machine_type:{worker.name}"
    return f"{hint};install-nvidia-driver"
