"""Machines that the planner knows: workers of the large clouds, and accelerators.

Cores are virtual CPUs. ``speed`` is what one of them does of the work that one core of the
calibrated machine does in the same time; it and the rates to and from storage are
assumptions from the processors' generations and the providers' published limits.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from vm_core.errors import VisualMemoryError

GB = 1e9


@dataclass(frozen=True)
class Accelerator:
    """teraflops: peak, 16-bit matrix products without sparsity (what ``mixed`` encoders use)."""

    name: str
    teraflops: float
    memory_bytes: float


@dataclass(frozen=True)
class Worker:
    """One machine. Rates are bytes/s between it and the storage that holds the memory;
    None: those of the calibrated disk.

    request_s: until the first byte of a file arrives. accelerators: how many it has.
    """

    name: str
    cores: int
    memory_bytes: float
    speed: float = 1.0
    read_bytes_per_s: float | None = None
    write_bytes_per_s: float | None = None
    request_s: float = 0.03
    accelerator: Accelerator | None = None
    accelerators: int = 0


def _family(name: str, memory_per_core: float, speed: float, *cores: int) -> list[Worker]:
    # A quarter of a GB/s a core, as the clouds give, but Python reads no faster than this.
    return [
        Worker(
            f"{name}-{n}",
            n,
            n * memory_per_core * GB,
            speed,
            read_bytes_per_s=min(0.1 * n, 2) * GB,
            write_bytes_per_s=min(0.1 * n, 2) * GB,
        )
        for n in cores
    ]


WORKERS = {
    worker.name: worker
    for worker in (
        *_family("n1-standard", 3.75, 0.6, 2, 4, 8, 16, 32, 64, 96),
        *_family("n1-highmem", 6.5, 0.6, 2, 4, 8, 16, 32, 64, 96),
        *_family("n2-standard", 4.0, 0.8, 2, 4, 8, 16, 32, 64),
        *_family("n2-highmem", 8.0, 0.8, 2, 4, 8, 16, 32, 64),
        *_family("e2-standard", 4.0, 0.5, 2, 4, 8, 16, 32),
        *_family("c3-standard", 4.0, 1.0, 4, 8, 22, 44, 88),
        *_family("g2-standard", 4.0, 0.8, 4, 8, 16, 32),
        Worker("a2-highgpu-1g", 12, 85 * GB, 0.8, 1.2 * GB, 1.2 * GB),
        Worker("a3-highgpu-1g", 26, 234 * GB, 1.0, 2 * GB, 2 * GB),
    )
}

ACCELERATORS = {
    accelerator.name: accelerator
    for accelerator in (
        Accelerator("t4", 65, 16 * GB),
        Accelerator("p100", 19, 16 * GB),
        Accelerator("v100", 125, 16 * GB),
        Accelerator("l4", 121, 24 * GB),
        Accelerator("a100", 312, 40 * GB),
        Accelerator("h100", 989, 80 * GB),
        Accelerator("h200", 989, 141 * GB),
    )
}


def this_machine() -> Worker:
    """The machine at hand with the memory on its own disk; rates as calibrated."""
    return Worker(
        "local",
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        request_s=0.0002,
    )


def find(worker: str, accelerator: str | None = None, accelerators: int = 1) -> Worker:
    """A worker by name, ``local`` or a key of WORKERS, with accelerators if one is named.

    Raises VisualMemoryError for names that are not known (the known ones are listed).
    """
    found = this_machine() if worker == "local" else _named(WORKERS, worker, "worker", "local, ")
    if accelerator is None:
        return found
    if accelerators < 1:
        raise VisualMemoryError(f"accelerators = {accelerators}: a worker has at least 1 or none")
    chosen = _named(ACCELERATORS, accelerator, "accelerator")
    return replace(found, accelerator=chosen, accelerators=accelerators)


T = TypeVar("T")


def _named(table: Mapping[str, T], name: str, what: str, more: str = "") -> T:
    if name not in table:
        raise VisualMemoryError(
            f"{what} {name!r} is unknown. Known: {more}{', '.join(table)}; others go into "
            "vm_core/planning/worker_types.py"
        )
    return table[name]
