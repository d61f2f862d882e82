"""The evaluation pipeline end to end over the bare search.

    python -m benchmarks.evaluate [--rows 1000000] [--queries 10000] [--dimension 384]
        [--kinds scann exact] [--keep DIR]

A mixture's memory (benchmarks.mixture) with its ScaNN index is built once. Then, several
times in turn: the bare search (the memory opened, all queries routed, searched and merged in
one process), and ``visual-memory evaluate`` on the same queries as embedding shards with
2 workers: reading, routing, search, votes of four voters at every k, metrics, tables and
report. Both run in a process of their own, from its start to its end, imports included.
``ratio`` is the bare search's seconds over the pipeline's. ``exact`` gives the same for
exact search. ``--keep`` leaves the memories in a folder, where the next run finds them.

Expected at 1,000,000 rows with ScaNN: 0.8. Came, on 2 cores that nothing else used: 0.77 (11.5
against 14.9 s; 13.8 against 18.1 seconds of the processors). Of what the pipeline adds some
2.5 s are the import of Beam, 1 s its start and the queries' way to their shard; votes and
tables take 1.3 s and the results 0.4, partly beside the search. TensorFlow's import, for ScaNN,
is 4 to 6 s of both.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from statistics import median

from benchmarks import synthetic
from benchmarks.mixture import FINGERPRINT
from vm_core.memory import Memory, current_version
from vm_core.shards import read_shard, write_shard

K, ROUNDS, WORKERS = 100, 3, 2
KINDS = ("scann", "exact")

BARE = """
import sys
from vm_core.memory import Memory
from vm_core.shards import read_shard
root, path, k = sys.argv[1:]
found = Memory(root).searcher()(read_shard(path), int(k))
assert len(found) and (found.labels >= 0).all()
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--keep", metavar="DIR", help="where the memories stay for the next run")
    options = parser.parse_args()
    folder = options.keep or tempfile.mkdtemp(prefix="visual-memory-evaluate-")
    try:
        result = measure(folder, options)
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    print(json.dumps(result))


def measure(folder: str, options: argparse.Namespace) -> dict:
    """Builds the memories and times both ways; the last line's object."""
    queries = os.path.join(folder, "queries.tfrecord")
    write_shard(
        queries, synthetic.queries(options.queries, options.dimension), FINGERPRINT, "float32"
    )
    read_shard(queries)
    kinds = {}
    for kind in options.kinds:
        root = os.path.join(folder, f"{kind}-{options.rows}-{options.dimension}")
        if current_version(root) is None:
            synthetic.write_memory(root, options.rows, options.dimension, index={"kind": kind})
        bare, pipeline = [], []
        for _ in range(options.rounds):
            bare.append(timed(["-c", BARE, root, queries, str(K)]))
            with tempfile.TemporaryDirectory(dir=folder) as output:
                pipeline.append(
                    timed(
                        [
                            *("-m", "pipelines.evaluate", "--memory", root),
                            *("--embeddings", queries, "--output", output, "--k", str(K)),
                            *("--set", f"query_shards={WORKERS}"),
                            f"--direct_num_workers={WORKERS}",
                            "--direct_running_mode=multi_threading",
                        ]
                    )
                )
        recall = Memory(root).manifest.recall
        if not options.keep:
            shutil.rmtree(root)
        (bare_s, bare_cpu_s), (pipeline_s, pipeline_cpu_s) = (
            map(median, zip(*times, strict=True)) for times in (bare, pipeline)
        )
        kinds[kind] = {
            "ratio": bare_s / pipeline_s,
            "bare_s": bare_s,
            "pipeline_s": pipeline_s,
            "bare_cpu_s": bare_cpu_s,
            "pipeline_cpu_s": pipeline_cpu_s,
            "recall": recall.at[100] if recall else 1.0,
        }
        print(kind, kinds[kind], flush=True)
    rounded = {
        kind: {name: round(value, 3) for name, value in values.items()}
        for kind, values in kinds.items()
    }
    return {
        "name": "evaluate",
        "ratio": rounded[options.kinds[0]]["ratio"],
        "peer": "the bare search in a process of its own",
        "rows": options.rows,
        "queries": options.queries,
        "dimension": options.dimension,
        "k": K,
        "workers": WORKERS,
        **rounded,
    }


def timed(arguments: list[str]) -> tuple[float, float]:
    """Seconds that the interpreter takes with these arguments, and of the processors."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    start, used = time.perf_counter(), _children_seconds()
    subprocess.run(
        [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, env=environment
    )
    return time.perf_counter() - start, _children_seconds() - used


def _children_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
