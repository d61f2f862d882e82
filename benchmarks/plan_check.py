"""What ``visual-memory plan`` says, against real runs of three sizes.

    python -m benchmarks.plan_check [--calibration calibration.json]
        [--sizes 20000,60000,180000] [--dimension 128]

Calibrates (benchmarks.calibrate; --calibration takes constants that it wrote), then makes
memories of the sizes through the real stages: shards, sample, centroids, assignment, partitions
(ScaNN), search and votes. Each stage runs in a process of its own, on one core, so that its
peak memory is its own. Elapsed seconds, core seconds, bytes on disk and peak memory are
compared with the plan's. ``ratio`` is the median of predicted over measured elapsed seconds;
all the others are printed and listed.

Expected: bytes within some percent, core seconds within a third, since the sizes between
and beyond those measured follow the formulas. Elapsed seconds follow on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks import calibrate
from benchmarks.calibrate import K, mixture_block
from benchmarks.mixture import FINGERPRINT, HELD_OUT
from vm_core import indexing
from vm_core.index import scann
from vm_core.index_files import PartitionEntry
from vm_core.indexing import IndexPlan, ShardRows
from vm_core.neighbors import to_arrow
from vm_core.partitioning import Partitioning
from vm_core.partitions import Partition
from vm_core.planning import calibration
from vm_core.planning.calibration import Constants
from vm_core.planning.planner import plan
from vm_core.planning.worker_types import this_machine
from vm_core.planning.workload import Workload
from vm_core.records import EmbeddingBlock
from vm_core.search import Router, Searcher
from vm_core.shards import write_shard
from vm_core.voting import vote

_SHARD_ROWS, _QUERY_ROWS = 20_000, 1024


def index_plan(root: str, shards: list[tuple[str, int]], part: Partitioning) -> IndexPlan:
    rows = tuple(ShardRows(os.path.relpath(path, root), count, path) for path, count in shards)
    index = scann.Plugin()
    return IndexPlan(root, "builds", rows, {0: 1}, "float32", index, part, recall_queries=0)


class Real(NamedTuple):
    """A stage as it was. memory_bytes: its peak above what the process had before."""

    result: Any
    seconds: float
    core_seconds: float
    memory_bytes: float


def in_child(function: Callable[..., Any], *arguments: Any) -> Real:
    """Runs a stage in a process of its own, on one core."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_run, function, *arguments).result()


def _run(function: Callable[..., Any], *arguments: Any) -> Real:
    with calibrate.one_core(), tempfile.TemporaryDirectory() as folder:
        calibrate.warm(folder)  # what is loaded once a process is no part of a stage
        before = calibrate.peak_bytes()
        start, core_start = time.perf_counter(), time.process_time()
        result = function(*arguments)
        spent, core_spent = time.perf_counter() - start, time.process_time() - core_start
    return Real(result, spent, core_spent, calibrate.peak_bytes() - before)


def stage_shards(paths: list[str], blocks: list[EmbeddingBlock]) -> None:
    for path, block in zip(paths, blocks, strict=True):
        write_shard(path, block, FINGERPRINT, "float32")


def stage_sample(made: IndexPlan) -> None:
    for bundle in range(made.bundles):
        indexing.sample_shards(made, bundle)


def stage_assign(made: IndexPlan) -> list[np.ndarray]:
    return [indexing.assign_shards(made, bundle) for bundle in range(made.bundles)]


def stage_build(made: IndexPlan, tasks: list[indexing.Task]) -> list[PartitionEntry]:
    return [indexing.build_partition(made, task) for task in tasks]


def stage_search(
    made: IndexPlan, entries: list[PartitionEntry], queries: EmbeddingBlock, probes: int
) -> None:
    centroids = indexing.read_centroids(made.path(str(made.centroids))) if made.centroids else None
    router = Router(centroids, tuple(entry.cell for entry in entries), probes)
    opened: dict[int, Partition] = {}

    def partition(number: int) -> Partition:
        if number not in opened:
            opened[number] = indexing.open_partition(made.root, entries[number])
        return opened[number]

    search = Searcher(router, partition)
    for start in range(0, len(queries), _QUERY_ROWS):
        block = queries.take(np.arange(start, min(start + _QUERY_ROWS, len(queries))))
        found = search(block, K)
        to_arrow(found)
        vote(found.labels, found.distances)


def run_stages(
    root: str, rows: int, dimension: int, part: Partitioning, queries: EmbeddingBlock, probes: int
) -> dict[str, Real]:
    """Makes a memory below ``root`` and searches it."""
    starts = range(0, rows, _SHARD_ROWS)
    blocks = [
        mixture_block(min(_SHARD_ROWS, rows - start), dimension, number)
        for number, start in enumerate(starts)
    ]
    paths = [
        os.path.join(root, f"embeddings-{number:05d}.tfrecord") for number in range(len(blocks))
    ]
    real = {"write shards": in_child(stage_shards, paths, blocks)}
    sizes = [len(block) for block in blocks]
    made = index_plan(root, list(zip(paths, sizes, strict=True)), part)
    counts = [np.array([rows])]
    if made.cells > 1:
        real["sample"] = in_child(stage_sample, made)
        real["train partitioner"] = in_child(indexing.train, made)
        real["assign"] = in_child(stage_assign, made)
        counts = real["assign"].result
    real["build index"] = in_child(stage_build, made, indexing.plan_partitions(made, counts))
    entries = real["build index"].result
    real["evaluate"] = in_child(stage_search, made, entries, queries, probes)
    return real


def check_size(constants: Constants, rows: int, dimension: int, folder: str) -> list[dict]:
    """Makes and searches one memory; predicted and measured figures by stage."""
    part = Partitioning(rows=max(30_000, rows // 2))
    probes = min(3, part.cells(rows))
    queries = mixture_block(max(2_000, rows // 10), dimension, HELD_OUT)
    root = tempfile.mkdtemp(dir=folder)
    real = run_stages(root, rows, dimension, part, queries, probes)
    # The plan of the same memory on one core; its ids are short.
    known = replace(constants, id_bytes=13.0)
    worker = replace(this_machine(), cores=1)
    workload = Workload(
        rows, dimension, queries=len(queries), k=K, partitioning=part, probes=probes,
        rows_per_shard=_SHARD_ROWS, images_per_s=1.0, recall_queries=0,
    )  # fmt: skip
    planned = plan(workload, known, worker)
    results = []
    for each in planned.stages:
        name = "evaluate" if each.stage.name.startswith("evaluate") else each.stage.name
        if name in real:
            results += [
                _compared(rows, name, "seconds", each.worker_seconds, real[name].seconds),
                _compared(
                    rows, name, "core seconds", each.stage.core_seconds, real[name].core_seconds
                ),
            ]
            if name in ("build index", "evaluate"):
                grown = each.stage.memory_bytes - known.process_bytes
                results.append(_compared(rows, name, "memory", grown, real[name].memory_bytes))
    entries = real["build index"].result
    stored = sum(file.stat().st_size for file in Path(root).glob("embeddings-*"))
    results += [
        _compared(rows, "shards", "bytes", planned.sizes.shards["float32"], stored),
        _compared(
            rows, "index", "bytes", planned.sizes.index, sum(entry.bytes for entry in entries)
        ),
    ]
    largest = max(entry.count for entry in entries)
    print(f"  {len(entries)} partitions, the largest of {largest:,} rows (planned {part.rows:,})")
    return results


def _compared(rows: int, stage: str, what: str, predicted: float, measured: float) -> dict:
    return {
        "rows": rows,
        "stage": stage,
        "what": what,
        "predicted": float(f"{predicted:.4g}"),
        "measured": float(f"{measured:.4g}"),
        "ratio": round(predicted / max(measured, 1e-9), 3),
    }


def check(constants: Constants, sizes: list[int], dimension: int, folder: str) -> None:
    """Prints predicted over measured for every stage of every size; last a line of JSON."""
    results: list[dict] = []
    for rows in sizes:
        print(f"{rows:,} x {dimension}", flush=True)
        for each in (found := check_size(constants, rows, dimension, folder)):
            print(f"  {each['stage']:18} {each['what']:12} predicted {each['predicted']:<10.4g} "
                  f"measured {each['measured']:<10.4g} ratio {each['ratio']:.2f}")  # fmt: skip
        results += found
    medians = {
        what: round(statistics.median(r["ratio"] for r in results if r["what"] == what), 3)
        for what in ("seconds", "core seconds", "bytes", "memory")
    }
    timed = [each for each in results if each["what"] == "seconds"]
    factors = sorted(max(each["ratio"], 1 / each["ratio"]) for each in timed)
    print(
        json.dumps(
            {
                "name": "plan_check",
                "ratio": medians["seconds"],
                "peer": "real runs",
                "median_ratios": medians,
                "median_factor_off": round(statistics.median(factors), 3),
                "worst_factor_off": round(factors[-1], 3),
                "by_stage": {
                    stage: round(
                        statistics.median(r["ratio"] for r in timed if r["stage"] == stage), 3
                    )
                    for stage in dict.fromkeys(each["stage"] for each in timed)
                },
                "sizes": sizes,
                "dimension": dimension,
                "machine": constants.machine,
                "results": results,
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--calibration", help="constants to use; without it they are measured")
    parser.add_argument("--sizes", default="20000,60000,180000", help="rows of the runs")
    parser.add_argument("--dimension", type=int, default=128)
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory() as folder:
        if options.calibration:
            constants = calibration.load(options.calibration)
        else:
            constants = calibrate.calibrate(folder, with_encoder=False)
        check(
            constants, [int(size) for size in options.sizes.split(",")], options.dimension, folder
        )


if __name__ == "__main__":
    main()
