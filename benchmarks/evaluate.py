"""The evaluation pipeline end to end over the bare search.

    python -m benchmarks.evaluate [--rows 1000000] [--queries 10000] [--dimension 384]
        [--kinds scann exact] [--keep DIR]

A mixture's memory (benchmarks.mixture) of one partition is built once for each kind of index.
Then, several times in turn: ``visual-memory evaluate`` on queries in an embedding shard with
2 workers (reading, routing, search, votes of four voters at every k, metrics, tables and
report), and the bare search of the same queries. Everything runs in a process of its own,
from its start to its end, imports included. There are two bare searches:

plain: the few lines that ScaNN's documentation gives: ``import scann``, ``load_searcher`` on the
    partition's own index, ``search_batched_parallel`` with the settings that the pipeline
    uses. ``import scann`` imports TensorFlow, which takes some seconds and which the pipeline
    does without. Exact search has none.
own: this package's search: the memory opened, all queries routed, searched and merged, ids and
    labels gathered. It does without TensorFlow as the pipeline does, so what remains between
    the two is Beam and the evaluation itself.

``ratio`` is the seconds of plain (of own where there is no plain) over the pipeline's;
``ratio_to_own`` is what its name says. Expected of the former: 0.8. Came, on 2 cores, in three
runs: 0.88, 1.02 and 1.06 (12.9 against 12.2 s), and 0.71, 0.51 and 0.56 of this package's search
(6.8 s). About half of what is added to that is the import of Beam, 2.5 s. Loading ScaNN's
index takes 3 to 6 s of each way, as the machine likes (``open`` in the table that the
pipeline prints). ``--keep`` leaves the memories in a folder, where the next
run finds them.
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
from collections.abc import Callable
from statistics import median

import numpy as np

from benchmarks import synthetic
from benchmarks.mixture import FINGERPRINT
from vm_core.memory import Memory, current_version
from vm_core.shards import write_shard

K, ROUNDS, WORKERS = 100, 3, 2
KINDS = ("scann", "exact")

PLAIN = """
import sys
import numpy as np
from scann import scann_ops_pybind
folder, path, k, leaves, reorder = sys.argv[1:]
searcher = scann_ops_pybind.load_searcher(folder)
rows, products = searcher.search_batched_parallel(np.load(path), int(k), int(reorder), int(leaves))
assert len(rows) and (rows >= 0).all()
"""
OWN = """
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
    """Builds the memories and times every way; the last line's object."""
    vectors = synthetic.queries(options.queries, options.dimension)
    shard, array = (os.path.join(folder, name) for name in ("queries.tfrecord", "queries.npy"))
    write_shard(shard, vectors, FINGERPRINT, "float32")
    np.save(array, vectors.vectors)
    kinds = {}
    for kind in options.kinds:
        root = os.path.join(folder, f"{kind}-{options.rows}-{options.dimension}")
        if current_version(root) is None:
            synthetic.write_memory(
                root,
                options.rows,
                options.dimension,
                index={"kind": kind},
                partitioning={"rows": options.rows},
            )
        kinds[kind] = measure_kind(root, shard, array, options.rounds)
        print(kind, kinds[kind], flush=True)
        if not options.keep:
            shutil.rmtree(root)
    first = kinds[options.kinds[0]]
    return {
        "name": "evaluate",
        "ratio": first["ratio"],
        "peer": first["peer"],
        "rows": options.rows,
        "queries": options.queries,
        "dimension": options.dimension,
        "k": K,
        "workers": WORKERS,
        **kinds,
    }


def measure_kind(root: str, shard: str, array: str, rounds: int) -> dict:
    memory = Memory(root)
    ways: dict[str, Callable[[str], list[str]]] = {}
    ways["own"] = lambda _: ["-c", OWN, root, shard, str(K)]
    ways["pipeline"] = lambda output: [
        *("-m", "pipelines.evaluate", "--memory", root),
        *("--embeddings", shard, "--output", output, "--k", str(K)),
        *("--set", f"query_shards={WORKERS}"),
        f"--direct_num_workers={WORKERS}",
        "--direct_running_mode=multi_threading",
    ]
    (partition,) = memory.manifest.partitions
    if partition.index.kind == "scann":
        index = memory.path(partition.folder)
        with open(os.path.join(index, "tuned.json")) as file:
            tuned = json.load(file)
        settings = [str(tuned[name]) for name in ("leaves_to_search", "reorder")]
        ways["plain"] = lambda _: [
            *("-c", PLAIN, os.path.join(index, "scann"), array, str(K)),
            *settings,
        ]
    times: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, arguments in ways.items():
            with tempfile.TemporaryDirectory(dir=os.path.dirname(shard)) as output:
                times[way].append(timed(arguments(output)))
    seconds: dict[str, float] = {}
    for way in ways:
        wall, cpu = map(median, zip(*times[way], strict=True))
        seconds |= {f"{way}_s": round(wall, 2), f"{way}_cpu_s": round(cpu, 2)}
    peer = "plain" if "plain" in ways else "own"
    recall = memory.manifest.recall
    return {
        "ratio": round(seconds[f"{peer}_s"] / seconds["pipeline_s"], 3),
        "ratio_to_own": round(seconds["own_s"] / seconds["pipeline_s"], 3),
        "peer": "ScaNN's load_searcher and search_batched_parallel in a script of their own"
        if peer == "plain"
        else "this package's search in a process of its own",
        **seconds,
        "recall": recall.at[100] if recall else 1.0,
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
