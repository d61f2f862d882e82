"""A large memory on a small machine: built, searched, scored and pruned within 4 GiB.

    python -m benchmarks.scale [--rows 10000000] [--dimension 256] [--workers 2] [--root DIR]

The vectors are a mixture's (benchmarks.mixture), generated block by block and kept as
float16. Every stage runs through the pipelines that users run, and beside its time stands
the planner's prediction (vm_core.planning.planner) from the constants of --calibration, a file of
benchmarks.calibrate, or the built-in ones. ``ratio`` is 4 GiB over the largest peak of
resident memory of any process: over 1 is within the limit. The first stage also makes the
vectors up, which no plan knows of.

Came, on 2 cores: 3.37 GiB (the search, which keeps up to 4 GiB of partitions open; 2.9 GiB
while ScaNN builds, 1.4 GiB in leave-one-out). Shards 77 s (planned 24), index 484 s (404),
10,000 queries 22 s (18), leave-one-out scores 738 s (406: 1.8 million searches more than planned,
as an oversized cell has several partitions, and more for each neighbour), soft pruning 3 s;
recall@100 0.974 in 42 partitions of which a query visits 1.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from typing import Any

from benchmarks import synthetic
from benchmarks.memory_watch import PeakMemory
from pipelines import prune, score
from vm_core.leave_one_out import LeaveOneOutConfig
from vm_core.memory import Memory
from vm_core.partitioning import Partitioning
from vm_core.planning import calibration
from vm_core.planning.calibration import Constants
from vm_core.planning.planner import Plan
from vm_core.planning.planner import plan as plan_workload
from vm_core.planning.worker_types import this_machine
from vm_core.planning.workload import Workload

LIMIT = 4 << 30
K = 100
# Of ScaNN in a partition of some 270,000 rows: recall@100 about 0.98 of the mixture's.
LEAVES, REORDER = 8, 250
PLANNED = {
    "shards": ("write shards",),
    "index": ("sample", "train partitioner", "assign", "build index", "measure recall"),
    "search": ("evaluate",),
    "leave_one_out": ("leave-one-out",),
}
"""The planner's stages that each stage here consists of."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--rows-per-partition", type=int, default=400_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--calibration", help="constants measured on this machine")
    parser.add_argument("--root", help="where the memory goes (default: a temporary folder)")
    options = parser.parse_args()
    root = options.root or tempfile.mkdtemp(prefix="visual-memory-scale-")
    try:
        print(json.dumps(run(root, options)))
    finally:
        if not options.root:
            shutil.rmtree(root, ignore_errors=True)


def run(root: str, options: argparse.Namespace) -> dict[str, Any]:
    """Runs every stage; the last line's object."""
    workers = [
        f"--direct_num_workers={options.workers}",
        "--direct_running_mode=multi_processing",
    ]
    stages: dict[str, float] = {}
    peaks: dict[str, float] = {}

    def stage(name: str, action: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        with PeakMemory() as memory:
            result = action()
        stages[name] = time.perf_counter() - start
        peaks[name] = memory.bytes
        print(f"{name:<16}{stages[name]:>9,.0f} s{memory.bytes / 2**30:>8.2f} GiB", flush=True)
        return result

    partitioning = Partitioning(rows=options.rows_per_partition)
    plan = synthetic.plan_memory(
        root,
        options.rows,
        "float16",
        partitioning=partitioning.model_dump(),
        index={"kind": "scann", "leaves_to_search": LEAVES, "reorder": REORDER},
    )
    stage("shards", lambda: synthetic.write_shards(plan, options.rows, options.dimension, workers))
    memory: Memory = stage("index", lambda: synthetic.write_index(plan, workers))
    manifest = memory.manifest
    queries = synthetic.queries(options.queries, options.dimension)
    stage("search", lambda: memory.searcher()(queries, K))
    stage(
        "leave_one_out",
        lambda: score.run(LeaveOneOutConfig(memory=root), workers),
    )
    stage("prune", lambda: prune.command(["--memory", root, "--method", "soft", *workers]))
    constants = calibration.load(options.calibration) if options.calibration else None
    planned = predicted(options, partitioning, manifest.probes, constants or calibration.DEFAULT)
    for name, value in planned.items():
        print(f"{name:<16}{stages[name]:>9,.0f} s, planned {value:,.0f} s")
    peak = max(peaks.values())
    return {
        "name": "scale",
        "ratio": round(LIMIT / peak, 2),
        "peer": "a limit of 4 GiB for any process",
        "peak_gib": round(peak / 2**30, 2),
        "rows": options.rows,
        "dimension": options.dimension,
        "dtype": "float16",
        "partitions": len(manifest.partitions),
        "probes": manifest.probes,
        "recall": manifest.recall and manifest.recall.at,
        "seconds": {name: round(value, 1) for name, value in stages.items()},
        "planned_seconds": {name: round(value, 1) for name, value in planned.items()},
        "planned_on": (constants or calibration.DEFAULT).machine,
        "peaks_gib": {name: round(value / 2**30, 2) for name, value in peaks.items()},
        "search_queries_per_s": round(options.queries / stages["search"]),
        "leave_one_out_rows_per_s": round(options.rows / stages["leave_one_out"]),
        "pruned": Memory(root).manifest.weights is not None,
    }


def predicted(
    options: argparse.Namespace, partitioning: Partitioning, probes: int, constants: Constants
) -> dict[str, float]:
    """Seconds that the planner says of the stages, on this machine."""
    workload = Workload(
        options.rows,
        options.dimension,
        dtype="float16",
        images_per_s=1.0,  # nothing is encoded
        queries=options.queries,
        k=K,
        partitioning=partitioning,
        probes=probes,
        leaves_to_search=LEAVES,
        rows_per_shard=synthetic.ROWS_PER_SHARD,
    )
    made: Plan = plan_workload(workload, constants, this_machine())
    return {
        name: sum(
            each.seconds(1)
            for each in made.stages
            if each.stage.name.startswith(parts) and not each.stage.name.startswith("encode")
        )
        for name, parts in PLANNED.items()
    }


if __name__ == "__main__":
    main()
