"""Speed at a given recall: the routed search of a memory against other libraries.

    python -m benchmarks.ann [--rows 1000000] [--peers exact,scann,faiss,hnswlib,routed-1,...]

1,000,000 rows of 384 dimensions (benchmarks.mixture), the 100 nearest for 2,000 queries
that are no rows, on two threads. Recall is against exact search. Every library runs in a
process of its own, one after another, over a small grid of its search settings; each
setting's time is the median of three searches of all queries. Reported is the fastest
setting with a recall@100 of at least 0.95, and 0.99; the chart shows each one's frontier.

exact     vm_core.exact
scann     one ScaNN searcher over all rows, as its own builder makes it
faiss     IVF, PQ fast-scan with 4 bits for 2 dimensions, re-ranked in float32
hnswlib   M = 16, ef_construction = 100
routed-1  a memory of one partition, searched as an evaluation does, with ids and labels
routed-8  the same of eight partitions

A memory's index is built with target_recall = 0.95; what it chose by itself is reported
as ``self_tuned``. ``ratio`` is routed-1 / scann in queries a second at 0.95: what ids,
labels, exact ties and padding cost. ``ratio_8`` is routed-8 / scann.

Expected: ratio at least 0.9. Eight partitions, of which a query visits a few, cost more. Came,
on 2 cores that nothing else used, in three runs: 0.83, 0.93 and 1.00 at 0.95 (the second 23,306
against 25,022 queries a second) and 0.83, 0.98 and 1.04 at 0.99; exact search 426.
While ids were Python's strings, anywhere in memory: 0.87 and 0.89. In that run: faiss 20,410
and 15,255, hnswlib 4,522 and not reached, routed-8 15,606 and 5,985, ScaNN 26,635 and 23,818.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.exact import kernels
from benchmarks.mixture import HELD_OUT, Mixture
from vm_core.exact import top_k
from vm_core.partitions import Partition
from vm_core.records import EmbeddingBlock
from vm_core.report.plots import Scale
from vm_core.search import Searcher

K, ROUNDS = 100, 3
BOUNDS = (0.95, 0.99)
ROWS_PER_BLOCK = 50_000  # as benchmarks.synthetic has them in a shard
LEAVES = (1, 2, 3, 4, 6, 8, 16, 32, 64, 128)
REORDERS = (150, 250, 400, 800)

SELF_TUNED = "self-tuned"

Search = Callable[[], np.ndarray]
"""Searches for all queries: rows (Q, K), negative where there is none, or a memory's ids."""


class Point(NamedTuple):
    setting: str
    recall: float
    queries_per_s: float


class Data:
    """The base (N, D) and queries (Q, D), float32, and the exact answer (Q, K), in a folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.base = np.load(folder / "base.npy", mmap_mode="r")
        self.queries = np.load(folder / "queries.npy")

    @property
    def truth(self) -> np.ndarray:
        return np.load(self.folder / "truth.npy")

    @property
    def leaves(self) -> int:
        return round(math.sqrt(len(self.base)))

    def steps(self) -> list[int]:
        """Numbers of leaves to search."""
        return sorted({min(step, self.leaves) for step in LEAVES})


def write_data(folder: Path, rows: int, dimension: int, queries: int) -> None:
    mixture = Mixture(dimension)
    shape = (rows, dimension)
    base = np.lib.format.open_memmap(folder / "base.npy", "w+", np.float32, shape)
    for number, start in enumerate(range(0, rows, ROWS_PER_BLOCK)):
        count = min(ROWS_PER_BLOCK, rows - start)
        base[start : start + count] = mixture.block(number, count)[0]
    base.flush()
    np.save(folder / "queries.npy", mixture.block(HELD_OUT, queries)[0])


# The peers. Each builds when it is called and then yields setting after setting. ------


def exact(data: Data, threads: int) -> Iterator[tuple[str, Search]]:
    yield "", lambda: top_k(data.queries, data.base, K)[0]


def scann(data: Data, threads: int) -> Iterator[tuple[str, Search]]:
    from scann import scann_ops_pybind

    searcher = (
        scann_ops_pybind.builder(np.asarray(data.base), K, "dot_product")
        .set_n_training_threads(threads)
        .tree(data.leaves, 10)
        .score_ah(2, anisotropic_quantization_threshold=0.2)
        .reorder(400)
        .build()
    )
    searcher.set_num_threads(threads)
    for leaves, reorder in product(data.steps(), REORDERS):

        def search(leaves: int = leaves, reorder: int = reorder) -> np.ndarray:
            return searcher.search_batched_parallel(data.queries, K, reorder, leaves)[0]

        yield f"leaves={leaves} reorder={reorder}", search


def faiss(data: Data, threads: int) -> Iterator[tuple[str, Search]]:
    # Its stubs do not know the parameters' arguments.
    faiss: Any = importlib.import_module("faiss")
    faiss.omp_set_num_threads(threads)
    dimension = data.base.shape[1]
    recipe = f"IVF{data.leaves},PQ{dimension // 2}x4fs,RFlat"
    index = faiss.index_factory(dimension, recipe, faiss.METRIC_INNER_PRODUCT)
    rng = np.random.default_rng(0)
    sample = rng.choice(len(data.base), min(len(data.base), 100 * data.leaves), replace=False)
    index.train(np.asarray(data.base[np.sort(sample)]))
    for start in range(0, len(data.base), ROWS_PER_BLOCK):
        index.add(np.asarray(data.base[start : start + ROWS_PER_BLOCK]))
    for leaves, reorder in product(data.steps(), REORDERS):

        def search(leaves: int = leaves, reorder: int = reorder) -> np.ndarray:
            inner = faiss.SearchParametersIVF(nprobe=leaves)
            parameters = faiss.IndexRefineSearchParameters(
                k_factor=reorder / K, base_index_params=inner
            )
            return index.search(data.queries, K, params=parameters)[1]

        yield f"nprobe={leaves} reorder={reorder}", search


def hnswlib(data: Data, threads: int) -> Iterator[tuple[str, Search]]:
    import hnswlib

    index = hnswlib.Index(space="ip", dim=data.base.shape[1])
    index.init_index(max_elements=len(data.base), M=16, ef_construction=100, random_seed=0)
    index.set_num_threads(threads)
    for start in range(0, len(data.base), ROWS_PER_BLOCK):
        part = np.asarray(data.base[start : start + ROWS_PER_BLOCK])
        index.add_items(part, np.arange(start, start + len(part)))
    for ef in (100, 150, 200, 300, 500, 800):

        def search(ef: int = ef) -> np.ndarray:
            index.set_ef(ef)
            return index.knn_query(data.queries, K)[0].astype(np.int64)

        yield f"ef={ef}", search


def routed(data: Data, threads: int, partitions: int) -> Iterator[tuple[str, Search]]:
    from benchmarks import synthetic
    from vm_core.index import scann as ours

    rows, dimension = data.base.shape
    settings: dict[str, Any] = {"target_recall": BOUNDS[0], "training_threads": threads}
    memory = synthetic.write_memory(
        str(data.folder / f"memory-{partitions}"),
        rows,
        dimension,
        index={"kind": "auto", "exact_below": 1_000, "scann": settings},
        partitioning={"rows": rows if partitions == 1 else math.ceil(1.5 * rows / partitions)},
    )
    queries = synthetic.queries(len(data.queries), dimension)

    yield SELF_TUNED, partial(_ids, memory.searcher(), queries)
    opened = [memory.open_partition(number) for number in range(len(memory.manifest.partitions))]
    loaded = [
        ours.load(memory.path(entry.folder)) if entry.index.kind == "scann" else None
        for entry in memory.manifest.partitions
    ]
    probes = [n for n in (1, 2, 4, 8) if n <= partitions]
    steps, reorders = data.steps(), list(REORDERS)
    if partitions > 1:  # a third choice instead of more of the first two
        steps, reorders = [step for step in steps if step <= 32], reorders[::2]
    for visited, leaves, reorder in product(probes, steps, reorders):

        def opened_with(number: int, leaves: int = leaves, reorder: int = reorder) -> Partition:
            pair = loaded[number]
            if pair is None:
                return opened[number]
            tuned = pair[1]._replace(leaves_to_search=leaves, reorder=reorder)
            members = opened[number].members
            return Partition(members, ours.searching(pair[0], members.vectors, tuned))

        searcher = Searcher(memory.router(visited), opened_with)
        setting = f"probes={visited} leaves={leaves} reorder={reorder}"
        yield setting, partial(_ids, searcher, queries)


def _ids(searcher: Searcher, queries: EmbeddingBlock) -> np.ndarray:
    return searcher(queries, K).ids


PEERS: dict[str, Callable[[Data, int], Iterator[tuple[str, Search]]]] = {
    "exact": exact,
    "scann": scann,
    "faiss": faiss,
    "hnswlib": hnswlib,
    "routed-1": lambda data, threads: routed(data, threads, 1),
    "routed-8": lambda data, threads: routed(data, threads, 8),
}

# Measuring, in a process for each. -----------------------------------------------------


def work(peer: str, folder: Path, threads: int) -> dict[str, Any]:
    """Builds and measures one peer; ``exact`` also writes the truth."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    data = Data(folder)
    started = time.perf_counter()
    if peer == "exact":
        np.save(folder / "truth.npy", top_k(data.queries, data.base, K)[0])
    truth = data.truth
    build_s = None
    points = []
    for setting, search in PEERS[peer](data, threads):
        if build_s is None:
            build_s = time.perf_counter() - started
        times = []
        for _ in range(ROUNDS):
            start = time.perf_counter()
            found = search()
            times.append(time.perf_counter() - start)
        points.append(Point(setting, recall(as_rows(found), truth), len(found) / median(times)))
    return {"build_s": 0.0 if peer == "exact" else build_s, "points": points}


def as_rows(found: np.ndarray) -> np.ndarray:
    """(Q, K) rows of what a peer found; a memory's ids are "shard/row of the shard"."""
    if found.dtype.kind in "iu":
        return found
    rows = [
        int(id[:5]) * ROWS_PER_BLOCK + int(id[6:]) if id else -1 for id in found.ravel().tolist()
    ]
    return np.array(rows).reshape(found.shape)


def recall(found: np.ndarray, truth: np.ndarray) -> float:
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, truth, strict=True)]
    return float(np.mean(hits)) / truth.shape[1]


def run(peer: str, folder: Path, threads: int, limit: float) -> dict[str, Any]:
    """What ``work`` returns, from a process of its own; an error where it failed."""
    command = [sys.executable, "-m", "benchmarks.ann", "--work", peer, "--folder", str(folder)]
    count = str(threads)
    threading = {"OMP_NUM_THREADS": count, "OPENBLAS_NUM_THREADS": count, "MKL_NUM_THREADS": count}
    try:
        done = subprocess.run(
            [*command, "--threads", count],
            env={**kernels(), **threading, "TF_CPP_MIN_LOG_LEVEL": "2"},
            capture_output=True,
            text=True,
            timeout=limit,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"took over {limit:.0f} s"}
    if done.returncode:
        return {"error": done.stderr.strip()[-2000:]}
    result = json.loads(done.stdout.splitlines()[-1])
    return {**result, "points": [Point(*point) for point in result["points"]]}


def fastest(points: Iterable[Point], bound: float) -> Point | None:
    """The fastest tuned by hand at a recall of at least ``bound``."""
    good = [point for point in points if point.recall >= bound and point.setting != SELF_TUNED]
    return max(good, key=lambda point: point.queries_per_s, default=None)


def frontier(points: Iterable[Point]) -> list[Point]:
    """The points that no other one beats in both, by ascending recall."""
    best: list[Point] = []
    for point in sorted(points, key=lambda point: (-point.recall, -point.queries_per_s)):
        if not best or point.queries_per_s > best[-1].queries_per_s:
            best.append(point)
    return best[::-1]


# The chart. ----------------------------------------------------------------------------

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#444444")
_RECALLS = (0.5, 0.8, 0.9, 0.95, 0.99, 0.999)
_MISSES = 5e-4  # the fewest shown
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 720, 440, 64, 600, 24, 396


def chart(points_of: dict[str, list[Point]], title: str) -> str:
    """SVG: queries a second over recall, both spread out where they matter."""
    fronts = {peer: frontier(points) for peer, points in points_of.items() if points}
    speeds = [point.queries_per_s for front in fronts.values() for point in front]
    decades = range(math.floor(math.log10(min(speeds))), math.ceil(math.log10(max(speeds))) + 1)
    # Misses rather than hits on a logarithmic scale; full recall stands at the right edge.
    x = Scale(_MISSES, 1 - _RECALLS[0], _RIGHT, _LEFT, log=True)
    y = Scale(10.0 ** decades[0], 10.0 ** decades[-1], _BOTTOM, _TOP, log=True)

    def place(point: Point) -> tuple[float, float]:
        return x(min(max(1 - point.recall, _MISSES), 1 - _RECALLS[0])), y(point.queries_per_s)

    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
        'font-family="sans-serif" font-size="12">',
        f"<title>{title}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#ffffff"/>',
    ]
    for value in _RECALLS:
        at = x(1 - value)
        lines.append(f'<path d="M{at},{_TOP}V{_BOTTOM}" stroke="#dddddd"/>')
        lines.append(f'<text x="{at}" y="{_BOTTOM + 18}" text-anchor="middle">{value}</text>')
    for decade in decades:
        at = y(10.0**decade)
        lines.append(f'<path d="M{_LEFT},{at}H{_RIGHT}" stroke="#dddddd"/>')
        said = f"{10.0**decade:,.10g}"
        lines.append(f'<text x="{_LEFT - 8}" y="{at + 4}" text-anchor="end">{said}</text>')
    lines.append(f'<text x="{_LEFT}" y="{_HEIGHT - 8}">recall@{K} (misses on a log scale)</text>')
    lines.append(f'<text x="{_LEFT}" y="{_TOP - 8}">queries a second</text>')
    labels = sorted((place(front[-1])[1], peer) for peer, front in fronts.items())
    free = -math.inf
    for peer, front in fronts.items():
        colour = _COLOURS[list(PEERS).index(peer) % len(_COLOURS)]
        spots = [place(point) for point in front]
        path = "M" + "L".join(f"{a},{b}" for a, b in spots)
        lines.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (a, b), point in zip(spots, front, strict=True):
            said = f"{peer} {point.setting}: {point.recall:.4f}, {point.queries_per_s:,.0f}/s"
            lines.append(
                f'<circle cx="{a}" cy="{b}" r="3" fill="{colour}"><title>{said}</title></circle>'
            )
    for at, peer in labels:
        free = max(at + 4, free + 15)
        colour = _COLOURS[list(PEERS).index(peer) % len(_COLOURS)]
        lines.append(f'<text x="{_RIGHT + 12}" y="{free}" fill="{colour}">{peer}</text>')
    return "\n".join([*lines, "</svg>", ""])


# ----------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=384)
    parser.add_argument("--queries", type=int, default=2_000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--limit", type=float, default=900, help="seconds for one peer")
    parser.add_argument("--chart", type=Path, default=Path("out/ann.svg"))
    parser.add_argument("--work", choices=PEERS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        print(json.dumps(work(arguments.work, arguments.folder, arguments.threads)))
        return
    peers = ["exact", *(peer for peer in arguments.peers.split(",") if peer != "exact")]
    if unknown := set(peers) - set(PEERS):
        parser.error(f"unknown peers {', '.join(sorted(unknown))}: choose of {', '.join(PEERS)}")
    results = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, arguments.rows, arguments.dimension, arguments.queries)
        for peer in peers:
            results[peer] = run(peer, folder, arguments.threads, arguments.limit)
            print(summary(peer, results[peer]), flush=True)
            if peer == "exact" and "error" in results[peer]:
                sys.exit(1)  # without the truth nothing can be measured
    points_of = {peer: result.get("points", []) for peer, result in results.items()}
    title = f"{arguments.rows:,} x {arguments.dimension}, {arguments.threads} threads"
    arguments.chart.parent.mkdir(parents=True, exist_ok=True)
    arguments.chart.write_text(chart(points_of, title))
    print(f"chart: {arguments.chart}")

    def ratio(peer: str) -> float | None:
        ours, plain = (fastest(points_of.get(each, []), BOUNDS[0]) for each in (peer, "scann"))
        return round(ours.queries_per_s / plain.queries_per_s, 2) if ours and plain else None

    print(
        json.dumps(
            {
                "name": "ann",
                "ratio": ratio("routed-1"),
                "peer": f"one plain ScaNN searcher, queries a second at recall@{K} >= {BOUNDS[0]}",
                "ratio_8": ratio("routed-8"),
                "results": {peer: reported(result) for peer, result in results.items()},
                "rows": arguments.rows,
                "dimension": arguments.dimension,
                "queries": arguments.queries,
                "threads": arguments.threads,
                "k": K,
            }
        )
    )


def reported(result: dict[str, Any]) -> dict[str, Any]:
    """A peer's result as the last line has it."""
    if "error" in result:
        return result
    chosen = {str(bound): fastest(result["points"], bound) for bound in BOUNDS}
    for point in result["points"]:
        if point.setting == SELF_TUNED:
            chosen["self_tuned"] = point
    return {
        "build_s": round(result["build_s"], 1),
        **{
            name: point
            and {
                "setting": point.setting,
                "recall": round(point.recall, 4),
                "queries_per_s": round(point.queries_per_s),
            }
            for name, point in chosen.items()
        },
    }


def summary(peer: str, result: dict[str, Any]) -> str:
    if "error" in result:
        return f"{peer:9} failed: {result['error']}"
    parts = [f"{peer:9} built in {result['build_s']:.1f} s"]
    for bound in BOUNDS:
        point = fastest(result["points"], bound)
        parts.append(
            f"recall {bound}: not reached"
            if point is None
            else f"recall {bound}: {point.queries_per_s:,.0f}/s ({point.setting or 'all rows'})"
        )
    for point in result["points"]:
        if point.setting == SELF_TUNED:
            parts.append(f"self-tuned: {point.queries_per_s:,.0f}/s at {point.recall:.4f}")
    return "; ".join(parts)


if __name__ == "__main__":
    main()
