"""A large memory on a small machine: built, searched, scored and pruned within 4 GiB.

    python -m benchmarks.scale [--rows 10000000] [--dimension 256] [--workers 2] [--root DIR]

The vectors are a mixture's (benchmarks.mixture), generated block by block and kept as
float16. Every stage runs through the pipelines that users run. ``ratio`` is 4 GiB over the
largest peak of resident memory of any process: over 1 is within the limit.

Came, on 2 shared cores, with --rows 1000000 --rows-per-partition 250000: 1.9 GiB; shards
11 s, index 67 s, leave-one-out scores 318 s, soft pruning under a second; recall@100 0.985
in 6 partitions of which a query visits 2. Ten million rows have not been run.
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

LIMIT = 4 << 30
K = 100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--dimension", type=int, default=256)
    parser.add_argument("--rows-per-partition", type=int, default=400_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
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

    plan = synthetic.plan_memory(
        root,
        options.rows,
        "float16",
        partitioning={"rows": options.rows_per_partition},
        index={"kind": "scann", "reorder_dtype": "int8"},
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
        "peaks_gib": {name: round(value / 2**30, 2) for name, value in peaks.items()},
        "search_queries_per_s": round(options.queries / stages["search"]),
        "leave_one_out_rows_per_s": round(options.rows / stages["leave_one_out"]),
        "pruned": Memory(root).manifest.weights is not None,
    }


if __name__ == "__main__":
    main()
