"""Measures what things cost on this machine, for ``visual-memory plan``.

    python -m benchmarks.calibrate [--out calibration.json] [--no-encoder]

Everything runs on one core and is measured in that core's seconds, so that other work on
the machine counts little; ``scaling`` says what all cores do together. Costs are those of
the functions that the pipelines call: plain rates from one size, costs with a fixed and a
growing part from several, solved for non-negative parts. Medians of three, of which only
ScaNN's builds are single. About a minute. ``benchmarks.plan_check`` holds plans made with the
constants against real runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import scipy.optimize
import threadpoolctl

from benchmarks.mixture import FINGERPRINT, HELD_OUT, Mixture
from vm_core import batch_files, item_scores, partitioning, partitions, storage
from vm_core.errors import VisualMemoryError
from vm_core.exact import top_k
from vm_core.index import scann
from vm_core.item_scores import Lists
from vm_core.neighbors import to_arrow
from vm_core.partitions import Members, Partition
from vm_core.planning import calibration
from vm_core.planning.calibration import Constants
from vm_core.planning.estimates import rows_scored
from vm_core.planning.worker_types import this_machine
from vm_core.records import EmbeddingBlock, strings
from vm_core.search import Router, Searcher
from vm_core.shards import read_shard, write_shard
from vm_core.voting import vote

K = 100


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """This process and what it starts run on one core."""
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if before:
        os.sched_setaffinity(0, {max(before)})
    with threadpoolctl.threadpool_limits(1):
        yield
    if before:
        os.sched_setaffinity(0, before)


def seconds(
    work: Callable[[], object],
    repetitions: int = 3,
    clock: Callable[[], float] = time.process_time,
) -> float:
    """Median time of some work: this process's on a core, whoever else uses the machine."""
    times = []
    for _ in range(repetitions):
        start = clock()
        work()
        times.append(clock() - start)
    return statistics.median(times)


def parts_of(costs: Sequence[float], *factors: Sequence[float]) -> list[float]:
    """Non-negative weights with which the factors add up to the costs, relative errors least."""
    matrix = np.array(factors, float).T / np.array(costs)[:, None]
    scale = matrix.max(axis=0)
    return (scipy.optimize.nnls(matrix / scale, np.ones(len(costs)))[0] / scale).tolist()


def machine() -> str:
    """Cores, processor and memory of this machine, in words."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
        flags = next((line for line in lines if line.startswith("flags")), "")
        model += ", AVX-512" * ("avx512f" in flags)
    worker = this_machine()
    memory = worker.memory_bytes / 1e9
    return f"{worker.cores} cores of {model} ({platform.machine()}), {memory:.0f} GB"


# Measurements: each gives constants by name --------------------------------------------


def measure_product() -> dict[str, float]:
    left, right = (np.ones((2048, 2048), np.float32) for _ in range(2))
    left @ right
    gflops = 2 * 2048**3 / seconds(lambda: left @ right, 5) / 1e9
    rows = Mixture(256).block(0, 80_000)[0]
    elapsed = seconds(lambda: top_k(rows[:512], rows, K, "numpy"))
    searched = 2 * 512 * len(rows) * 256 / elapsed / 1e9
    return {"gflops": gflops, "exact_efficiency": min(1.0, searched / gflops)}


def measure_scaling() -> dict[str, float]:
    """The matrix product by all cores; hyper-threads gain the least from one another in it."""
    cores = this_machine().cores
    if cores == 1:
        return {}
    left, right = (np.ones((4096, 4096), np.float32) for _ in range(2))

    def multiply() -> float:
        left @ right
        return seconds(lambda: left @ right, 3, time.perf_counter)

    together = multiply()
    with one_core():
        alone = multiply()
    return {"scaling": min(1.0, alone / together / cores)}


def mixture_block(rows: int, dimension: int, number: int = 0) -> EmbeddingBlock:
    vectors, labels = Mixture(dimension).block(number, rows)
    ids = strings([f"{number:05d}/{row:07d}" for row in range(rows)])
    return EmbeddingBlock(ids, labels, strings(["mixture"] * rows), vectors)


def measure_files(folder: str) -> dict[str, float]:
    path = os.path.join(folder, "blob")
    data = np.random.default_rng(0).bytes(1 << 28)

    def write() -> None:
        with open(path, "wb") as file:
            file.write(data)
            os.fsync(file.fileno())

    def read() -> None:
        if hasattr(os, "posix_fadvise"):
            with open(path, "rb") as file:  # forget what is in the page cache
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        Path(path).read_bytes()

    found = {
        "disk_write_bytes_per_s": len(data) / seconds(write, clock=time.perf_counter),
        "disk_read_bytes_per_s": len(data) / seconds(read, clock=time.perf_counter),
        "file_hash_bytes_per_s": len(data) / seconds(lambda: storage.sha256_file(path)),
    }
    os.remove(path)
    return found


def measure_shards(folder: str) -> dict[str, float]:
    """Shards of short and of long rows, for what a row costs and what its bytes do."""
    rows, path = 20_000, os.path.join(folder, "shard")
    writing, reading, sizes = [], [], []
    for dimension in (64, 512):
        block = mixture_block(rows, dimension)
        writing.append(seconds(partial(write_shard, path, block, FINGERPRINT, "float32")))
        reading.append(seconds(partial(read_shard, path)))
        sizes.append(os.path.getsize(path))
    os.remove(path)
    sampling = seconds(lambda: partitioning.sample(block.ids, block.vectors, rows, 1, 0))
    write_row, write_byte = parts_of(writing, [rows, rows], sizes)
    read_row, read_byte = parts_of(reading, [rows, rows], sizes)
    id_bytes = sum(map(len, block.ids)) / rows
    return {
        "shard_write_s_per_row": write_row,
        "shard_write_s_per_byte": write_byte,
        "shard_read_s_per_row": read_row,
        "shard_read_s_per_byte": read_byte,
        "record_bytes": sizes[-1] / rows - 4 * dimension - id_bytes,
        "sample_s_per_row": sampling / rows,
    }


def measure_assignment(gflops: float, efficiency: float) -> dict[str, float]:
    """What assignment costs beside the product: each row, and each cell that it looks at."""
    rows = mixture_block(8_000, 128).vectors
    costs = []
    cells = [16, 256, 2048]
    for count in cells:
        each = seconds(partial(partitioning.assign, rows, rows[:count])) / len(rows)
        costs.append(max(1e-9, each - 2e-9 * 128 * count / (gflops * efficiency)))
    per_row, per_cell = parts_of(costs, [1.0] * len(cells), [float(count) for count in cells])
    return {"assign_s_per_row": per_row, "assign_s_per_cell": per_cell}


def measure_moving(folder: str) -> dict[str, float]:
    """A byte of a row from where it is read until it is in its partition's files."""
    block = mixture_block(40_000, 256)
    members = Members(
        np.arange(len(block)),
        pa.array(block.ids, pa.string()),
        block.labels,
        np.ones(len(block), bool),
        block.vectors,
    )
    half = np.arange(0, len(block), 2), np.arange(1, len(block), 2)

    def move() -> None:
        partitions.write(folder, Members.concatenate([members.take(part) for part in half]))

    spent = seconds(move)
    written = os.path.getsize(os.path.join(folder, "rows.parquet")) / len(block)
    id_bytes = sum(map(len, block.ids)) / len(block)
    # Gathered once when assigned and once when built: half of this each, and the writing.
    return {
        "move_s_per_byte": spent / (len(block) * (4 * 256 + id_bytes)),
        "row_bytes": max(1.0, written - id_bytes),
    }


def measure_scann(folder: str) -> dict[str, float]:
    # The last is far beyond a processor's cache, as partitions are.
    sizes = ((20_000, 64), (20_000, 384), (60_000, 128), (240_000, 256))
    build_costs, search_costs, amounts, scored, dimensions = [], [], [], [], []
    for rows, dimension in sizes:
        vectors = mixture_block(rows, dimension).vectors
        queries = mixture_block(2048, dimension, HELD_OUT).vectors
        with tempfile.TemporaryDirectory(dir=folder) as target:
            index = scann.Plugin()
            build_costs.append(seconds(partial(index.build, vectors, target), 1))
            search = index.open(vectors, target)
            size = sum(file.stat().st_size for file in (Path(target) / "scann").iterdir())
            opened = seconds(partial(index.open, vectors, target)) / size
        search(queries[:256], K)
        search_costs.append(seconds(partial(search, queries, K)) / len(queries))
        amounts.append(float(rows * dimension))
        scored.append(dimension * rows_scored(rows))
        dimensions.append(float(dimension))
        print(f"  ScaNN {rows} x {dimension}: built in {build_costs[-1]:.2f} s, searched at "
              f"{1 / search_costs[-1]:,.0f} queries/s", flush=True)  # fmt: skip
    samples = [min(20_000, rows) * dimension for rows, dimension in sizes]
    build, per_sample, per_row = parts_of(build_costs, [1.0] * len(sizes), samples, amounts)
    search_s, per_dim, per_scored = parts_of(search_costs, [1.0] * len(sizes), dimensions, scored)
    return {
        "build_s": build,
        "build_s_per_sample_dim": per_sample,
        "build_s_per_row_dim": per_row,
        "open_s_per_byte": opened,
        "search_s": search_s,
        "search_s_per_dim": per_dim,
        "search_s_per_row_dim": per_scored,
    }


def measure_answers() -> dict[str, float]:
    """What is done with what partitions find, and the votes."""
    block = mixture_block(20_000, 16)
    queries = mixture_block(2048, 16, HELD_OUT)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 10_000, (len(queries), K))
    distances = np.sort(rng.random((len(queries), K), np.float32), axis=1)
    everywhere = np.ones(10_000, bool)

    def opened(number: int) -> Partition:
        part = block.take(np.arange(number * 10_000, (number + 1) * 10_000))
        members = Members(
            np.arange(10_000), pa.array(part.ids, pa.string()), part.labels, everywhere,
            part.vectors,
        )  # fmt: skip
        _ = members.ids
        return Partition(members, lambda some, k: (rows[: len(some)], distances[: len(some)]))

    both = [opened(0), opened(1)]
    search = Searcher(Router(block.vectors[:2], (0, 1), 2), both.__getitem__)
    gathering = seconds(lambda: to_arrow(search(queries, K)))
    labels = block.labels[rows]
    voting = seconds(lambda: vote(labels, distances))
    return {
        "gather_s_per_neighbor": gathering / (2 * K * len(queries)),
        "vote_s": voting / len(queries),
    }


def measure_scores(folder: str) -> dict[str, float]:
    """What leave-one-out does with what items find at home and in another partition."""
    shape, population = (8192, K), 400_000
    rng = np.random.default_rng(0)

    def found() -> Lists:
        rows = rng.integers(0, population, shape)
        distances = np.sort(rng.random(shape, np.float32), axis=1)
        return Lists(rows, distances, rng.random(shape) < 0.5)

    home, abroad = found(), found()
    own = rng.random(shape) < 1 / K
    places = np.repeat(np.arange(shape[0]), K)
    path = os.path.join(folder, "found")

    def score() -> None:
        with batch_files.writing(path) as out:
            for key, lists in enumerate((home, abroad)):
                kept = lists.without(own)
                out.write(key, {"rows": kept.rows, "distances": kept.distances,
                                "correct": kept.correct})  # fmt: skip
        read = [next(batch_files.BatchFile(path).read(key)) for key in (0, 1)]
        first, second = (Lists(one["rows"], one["distances"], one["correct"]) for one in read)
        packed = Lists.packed(
            places, shape[0], second.rows.ravel(), second.distances.ravel(), second.correct.ravel()
        )
        merged = item_scores.nearest(first.beside(packed), K)
        complete = np.zeros(shape[0], bool)
        values = item_scores.shapley(merged.correct, merged.lengths, complete, 10)
        item_scores.tally(merged, values, (10, K))

    return {"score_s_per_neighbor": seconds(score) / (2 * home.rows.size)}


def measure_encoder(count: int = 128) -> dict[str, Any]:
    """The demo's encoder on the demo's photos; nothing where they cannot be had."""
    try:
        from demo.fetch import fetch
        from vm_core import encoders
        from vm_core.images import prepare

        assets = fetch()
        settings = encoders.parse({"kind": "saved_model", "path": assets.encoder, "batch_size": 32})
        found = Path(assets.images, "textiles").rglob("*.jp*g")
        photos = [path.read_bytes() for path in sorted(found)[:count]]
        embed = settings.load()
        images = np.stack([prepare(each, settings.preprocessing).pixels for each in photos])
    except (VisualMemoryError, OSError, ValueError) as error:
        print(f"  encoder not measured: {error}")
        return {}

    def encode() -> None:
        for start in range(0, len(images) - 31, 32):
            embed(images[start : start + 32])

    encode()
    decoding = seconds(lambda: [prepare(each, settings.preprocessing) for each in photos])
    rate = float(f"{(len(images) // 32 * 32) / seconds(encode):.4g}")
    size = sum(map(len, photos))
    print(f"  photos of {size / len(photos):,.0f} bytes decoded at {len(photos) / decoding:,.0f}/s")
    return {
        "decode_bytes_per_s": size / decoding,
        "encoder_images_per_s": {"efficientnet-lite0": rate},
    }


def calibrate(folder: str, with_encoder: bool = True) -> Constants:
    """Measures the constants, on one core, writing below a folder."""
    values: dict[str, Any] = {}

    def assignment() -> dict[str, float]:
        return measure_assignment(values["gflops"], values["exact_efficiency"])

    with one_core():
        warm(folder)
        for name, measure in (
            ("process", lambda: {"process_bytes": peak_bytes()}),
            ("matrix product", measure_product),
            ("files", lambda: measure_files(folder)),
            ("shards", lambda: measure_shards(folder)),
            ("assignment", assignment),
            ("moving rows", lambda: measure_moving(folder)),
            ("ScaNN", lambda: measure_scann(folder)),
            ("answers and votes", measure_answers),
            ("leave-one-out scores", lambda: measure_scores(folder)),
            ("encoder", measure_encoder if with_encoder else dict),
        ):
            start = time.perf_counter()
            found = measure()
            values |= found
            for key, value in found.items():
                print(f"{key:26} {value if isinstance(value, dict) else format(value, '.4g')}")
            print(f"  {name}: {time.perf_counter() - start:.1f} s", flush=True)
    found = measure_scaling()
    print(*(f"{key:26} {value:.4g}" for key, value in found.items()), flush=True)
    values |= found
    values = {key: value if isinstance(value, dict) else float(f"{value:.4g}")
              for key, value in values.items()}  # fmt: skip
    return calibration.from_measured(machine(), values, "calibration")


def peak_bytes() -> float:
    """The most memory that this process has had."""
    with contextlib.suppress(OSError, StopIteration):
        # Unlike getrusage, this does not count what the parent had before it forked.
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024.0 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return float(peak * (1 if sys.platform == "darwin" else 1024))


def warm(folder: str) -> None:
    """Loads what a process loads once."""
    with tempfile.TemporaryDirectory(dir=folder) as target:
        vectors = mixture_block(2_000, 16).vectors
        scann.Plugin().build(vectors, target)
        scann.Plugin().open(vectors, target)(vectors[:64], 10)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", help="write the constants to this file")
    parser.add_argument("--no-encoder", action="store_true", help="do not measure the encoder")
    options = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        constants = calibrate(folder, not options.no_encoder)
        if options.out:
            calibration.save(options.out, constants)
        measured = {name: getattr(constants, name) for name in sorted(constants.measured)}
        summary: dict[str, Any] = {
            "name": "calibrate",
            "ratio": None,
            "peer": None,
            "constants": measured,
        }
        summary["seconds"] = round(time.perf_counter() - start, 1)
        print(json.dumps({**summary, "machine": constants.machine}))


if __name__ == "__main__":
    main()
