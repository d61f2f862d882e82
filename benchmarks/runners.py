"""A build and an evaluation on another runner over the same in this process.

    python -m benchmarks.runners IMAGES [--runner prism] [--rows 1000000] [--rounds 3]

IMAGES is a folder per class. With the demo's encoder they are built into a memory, once with
two threads of Beam's local runner and once on the other runner, in turn, each a command of
its own from its start to its end. Then the same for ``evaluate`` with 10,000 queries on a
memory of --rows x 384 (benchmarks.mixture). ``ratio`` is the local build's seconds over the
other runner's, ``ratio_evaluate`` the same of the evaluation; ``same_digest`` says that both
builds have the same content.

--runner: prism (workers are threads of the command) or flink, a cluster of scripts/flink.

Expected: Prism as fast as the local runner in encoding, which is most of a build's work, and
a few seconds behind at the start, when its worker registers and bundles are handed out over
the network.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks import synthetic
from benchmarks.mixture import FINGERPRINT
from demo.fetch import DEFAULT_CACHE, fetch
from vm_core.memory import Memory
from vm_core.shards import write_shard

LOCAL = ("--direct_num_workers=2", "--direct_running_mode=multi_threading")
QUERIES, DIMENSION = 10_000, 384
ROOT = Path(__file__).parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.runners")
    parser.add_argument("images", help="a folder per class")
    parser.add_argument("--runner", choices=("prism", "flink"), default="prism")
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="visual-memory-runners-")
    try:
        print(json.dumps(measure(Path(folder), options)))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def measure(folder: Path, options: argparse.Namespace) -> dict:
    """Times all of it; the last line's object."""
    other = ["scripts/prism"] if options.runner == "prism" else ["scripts/flink", "submit"]
    local = [sys.executable, "-m", "pipelines.cli"]
    config = folder / "config.yaml"
    config.write_text(
        json.dumps(
            {
                "memory": str(folder / "memory"),
                "sources": [{"kind": "folder", "path": os.path.abspath(options.images)}],
                "encoder": {"kind": "saved_model", "path": fetch(DEFAULT_CACHE).encoder},
            }
        )
    )
    builds: dict[str, list[float]] = {"local": [], "other": []}
    digests, images = set(), 0
    for _ in range(options.rounds):
        for name, start, more in (("local", local, LOCAL), ("other", other, ())):
            builds[name].append(seconds([*start, "build", "--config", str(config), *more]))
            manifest = Memory(str(folder / "memory")).manifest
            digests.add(manifest.content_digest)
            images = manifest.total("embedded")
            shutil.rmtree(folder / "memory")
    queries = folder / "queries.tfrecord"
    write_shard(str(queries), synthetic.queries(QUERIES, DIMENSION), FINGERPRINT, "float32")
    synthetic.write_memory(str(folder / "large"), options.rows, DIMENSION, index={"kind": "scann"})
    evaluations: dict[str, list[float]] = {"local": [], "other": []}
    asked = ["evaluate", "--memory", str(folder / "large"), "--embeddings", str(queries)]
    asked += ["--set", "query_shards=2", "--output", str(folder / "evaluation")]
    for _ in range(options.rounds):
        for name, start, more in (("local", local, LOCAL), ("other", other, ())):
            evaluations[name].append(seconds([*start, *asked, *more]))
            shutil.rmtree(folder / "evaluation")
    medians = {
        what: {name: round(median(some), 2) for name, some in times.items()}
        for what, times in (("build", builds), ("evaluate", evaluations))
    }
    return {
        "name": "runners",
        "ratio": round(medians["build"]["local"] / medians["build"]["other"], 3),
        "peer": "Beam's local runner, two threads",
        "ratio_evaluate": round(medians["evaluate"]["local"] / medians["evaluate"]["other"], 3),
        "runner": options.runner,
        "images": images,
        "rows": options.rows,
        "queries": QUERIES,
        "seconds": medians,
        "same_digest": len(digests) == 1,
    }


def seconds(command: list[str]) -> float:
    """How long a command takes."""
    start = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "VIRTUAL_ENV": sys.prefix},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr[-2000:]}")
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
