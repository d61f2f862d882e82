"""Exact search against faiss IndexFlatIP and against the plain matrix product.

    python -m benchmarks.exact [--rows 200000] [--queries 2000] [--dimension 768] [--k 100]

Rows and queries are unit vectors in 1,000 clusters, made up from a fixed seed. Every peer
runs in a process of its own, as one's waiting threads would slow another down, on the same
file of vectors. The processes are started once each and take turns, ROUNDS times; those
that wait are stopped. Medians count. The OpenBLAS inside faiss may not know a new CPU and
then falls back to kernels at a fraction of the speed, so all are told to use the kernels
that NumPy's OpenBLAS has chosen.

exact: what a search takes by itself on this CPU in a process that has TensorFlow loaded, as
one that encodes has: bfloat16 products where the CPU has instructions for them. numpy: float32
products, as without. float16: exact, of vectors that are stored so. sgemm: NumPy's product
alone, in blocks of 8,192 rows, with as many threads.

ratio: our queries per second / faiss's; ratio_NAME: the same of another of ours. ratio_sgemm:
our rate / sgemm's. ratio_cpu...: by the CPU's time, which says more on a shared machine, and
with --threads 1, as waiting threads of a BLAS count too. same_rows: the share of faiss's
neighbours that are ours too; the rest are ties but for rounding, as faiss ranks by float32
products.

Expected: twice sgemm's rate less a quarter, for rounding rows to bfloat16, filtering twice as
many products a second, and ranking in float64. Came, on 2 cores (AMD EPYC with AVX512-BF16)
with little else running: 1.58 of faiss and of sgemm (312, 198 and 198 GFLOP/s), in float32 0.97
of faiss; by the CPU's time 1.62 and 0.99. An earlier run had 1.67, 1.48 and 1.12.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from statistics import median

import numpy as np
from threadpoolctl import threadpool_info

from vm_core.exact import top_k

ROUNDS = 5
PEERS = ("exact", "faiss", "sgemm", "numpy", "float16")
KERNELS = "OPENBLAS_CORETYPE"
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def clustered(rng: np.random.Generator, centres: np.ndarray, rows: int) -> np.ndarray:
    """(rows, D) float32 unit vectors; cosine similarity inside a cluster about 0.6."""
    vectors = rng.standard_normal((rows, centres.shape[1]), dtype=np.float32)
    vectors *= np.float32(0.8)
    for start in range(0, rows, 8_192):
        part = vectors[start : start + 8_192]
        part += centres[rng.integers(len(centres), size=len(part))]
        part /= np.linalg.norm(part, axis=1, keepdims=True)
    return vectors


def searcher(peer: str, vectors: np.ndarray, queries: np.ndarray, k: int) -> Callable:
    """A function that searches all queries and returns rows (Q, k), or None from sgemm."""
    if peer == "faiss":
        import faiss

        index = faiss.IndexFlatIP(vectors.shape[1])
        index.add(vectors)
        return lambda: index.search(queries, k)[1]
    if peer == "sgemm":
        out = np.empty((len(queries), 8_192), np.float32)

        def multiply() -> None:
            for start in range(0, len(vectors), 8_192):
                part = vectors[start : start + 8_192]
                np.matmul(queries, part.T, out=out[:, : len(part)])

        return multiply
    if peer == "numpy":
        return lambda: top_k(queries, vectors, k, "numpy")[0]
    import tensorflow as tf

    tf.config.set_visible_devices([], "GPU")  # of the peers, none has it
    stored = vectors.astype(np.float16) if peer == "float16" else vectors
    return lambda: top_k(queries, stored, k)[0]


def serve(peer: str, folder: str, k: int) -> None:
    """Runs one search for each line of input and answers with its seconds, and the CPU's."""
    vectors, queries = (np.load(os.path.join(folder, name)) for name in ("x.npy", "q.npy"))
    search = searcher(peer, vectors, queries, k)
    rows = search()  # warms up: threads, pages
    if rows is not None:
        np.save(os.path.join(folder, f"{peer}.npy"), rows)
    print("ready", flush=True)
    for _ in sys.stdin:
        start, start_cpu = time.perf_counter(), time.process_time()
        search()
        print(time.perf_counter() - start, time.process_time() - start_cpu, flush=True)


def kernels() -> dict[str, str]:
    """The environment in which every OpenBLAS uses the kernels that NumPy's has chosen."""
    chosen = [one.get("architecture") for one in threadpool_info() if one["user_api"] == "blas"]
    return {KERNELS: chosen[0], **os.environ} if chosen and chosen[0] else dict(os.environ)


class Peer:
    """A process that serves; stopped while it has nothing to do."""

    def __init__(self, name: str, folder: str, k: int, threads: int):
        command = [sys.executable, "-m", "benchmarks.exact", "--serve", name, folder, "--k", str(k)]
        environment = kernels() | dict.fromkeys(THREADS, str(threads))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def seconds(self) -> tuple[float, float]:
        self._process.send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        wall, cpu = map(float, self._answer().split())
        return wall, cpu

    def _answer(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"a peer ended: {self._process.args!r}")
        self._process.send_signal(signal.SIGSTOP)
        return line

    def end(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description="Exact search against faiss and sgemm")
    for name, value in {"rows": 200_000, "queries": 2_000, "dimension": 768, "k": 100}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--serve", nargs=2, metavar=("PEER", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        peer, folder = args.serve
        serve(peer, folder, args.k)
        return
    running: dict[str, Peer] = {}
    times: dict[str, list[float]] = {name: [] for name in PEERS}
    cpu: dict[str, list[float]] = {name: [] for name in PEERS}
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        centres = rng.standard_normal((1_000, args.dimension), dtype=np.float32)
        for name, rows in (("x.npy", args.rows), ("q.npy", args.queries)):
            np.save(os.path.join(folder, name), clustered(rng, centres, rows))
        try:
            for name in PEERS:
                running[name] = Peer(name, folder, args.k, args.threads)
            for _ in range(args.rounds):
                for name in PEERS:
                    for kept, some in zip((times, cpu), running[name].seconds(), strict=True):
                        kept[name].append(some)
        finally:
            for process in running.values():
                process.end()
        ours, theirs = (np.load(os.path.join(folder, f"{name}.npy")) for name in PEERS[:2])
    same = np.mean([np.isin(a, b).mean() for a, b in zip(theirs, ours, strict=True)])
    seconds = {name: median(some) for name, some in times.items()}
    cpu_seconds = {name: median(some) for name, some in cpu.items()}
    flop = 2 * args.rows * args.queries * args.dimension
    for name in PEERS:
        print(
            f"{name:8} {seconds[name]:.3f} s ({min(times[name]):.3f} to {max(times[name]):.3f}), "
            f"{args.queries / seconds[name]:,.0f} queries/s, "
            f"{flop / seconds[name] / 1e9:.0f} GFLOP/s"
        )
    ratios = {
        f"ratio{kind}{name}": round(some[peer] / some[ours], 3)
        for kind, some in (("", seconds), ("_cpu", cpu_seconds))
        for name, peer, ours in (
            ("", "faiss", "exact"),
            ("_sgemm", "sgemm", "exact"),
            ("_numpy", "faiss", "numpy"),
            ("_float16", "faiss", "float16"),
        )
    }
    print(
        json.dumps(
            {
                "name": "exact",
                "ratio": ratios.pop("ratio"),
                "peer": "faiss IndexFlatIP",
                **ratios,
                "queries_per_s": round(args.queries / seconds["exact"]),
                "seconds": {name: round(some, 3) for name, some in seconds.items()},
                "cpu_seconds": {name: round(some, 3) for name, some in cpu_seconds.items()},
                "gflops": {name: round(flop / some / 1e9) for name, some in seconds.items()},
                "same_rows": round(float(same), 6),
                "rows": args.rows,
                "queries": args.queries,
                "dimension": args.dimension,
                "k": args.k,
                "rounds": args.rounds,
                "threads": args.threads,
            }
        )
    )


if __name__ == "__main__":
    main()
