"""Exact search: the oracle that every other index is measured against.

A search is a matrix product and little else. It runs at the speed of the product because
each thread owns its queries, looks at a block of products while it is in the cache, and keeps
only those over its query's threshold. As the products only pick candidates, whose distances
are then computed in float64, they may be coarse: where a CPU multiplies bfloat16 faster, they
are computed so.
"""

from __future__ import annotations

import glob
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import pairwise
from typing import Generic, Literal, TypeVar

import numpy as np
from threadpoolctl import ThreadpoolController

from vm_core.errors import DamagedError, VisualMemoryError
from vm_core.exact._highest import Highest, capacity, highest
from vm_core.exact._products import (
    BFLOAT16,
    FLOAT32,
    Precision,
    float32,
    multiplies_bfloat16,
    slices,
    tensorflow,
)

Backend = Literal["auto", "numpy", "bfloat16", "tensorflow"]

_QUERIES = 1024  # of a block: enough for a product at full speed
_FEW_QUERIES = 64  # for one thread; with fewer the rows are shared out instead
_LARGEST_PRODUCT = 1.01
_KEPT = 2**22  # values that are kept for a block of queries
_PAIRS = 2**17  # values compared at a time in float64: 1 MB, which stays in the cache
_SMALL = 2**25  # multiplications that are not worth starting threads for
_LARGE = 2**31  # multiplications that are worth asking for more than NumPy
_MANY_QUERIES = 512  # of a block of rows that is worth converting to bfloat16
_WORTH_IMPORTING = 2**28  # values of vectors that are worth the import of TensorFlow
_DEVICE_QUERIES = 2**14  # of a block on a device, so that its rows are seldom sent again
_DEVICE_VALUES = 2**26  # of products, and of vectors, on a device: 256 MB each


def top_k(
    queries: np.ndarray, vectors: np.ndarray, k: int, backend: Backend = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each query by cosine distance.

    queries: (Q, D) float32 and vectors: (N, D) float32, float16 or bfloat16, possibly
    mapped from a file; unit length. Returns rows (Q, k) int64 and distances (Q, k) float32
    in [0, 2], ascending, ties broken by the lower row; -1 and +inf where N < k.

    The answer depends on the query and the rows alone, to the last bit, not on what is
    searched beside them, where or how: a matrix product, whose rounding changes with its
    shape, only picks candidates, with some to spare; their distances are then computed one
    dot product at a time in float64. Where the spare candidates might not suffice, as among
    thousands of near-duplicates, the products are computed again in more precision, and in
    the end every row that could belong to them is compared so.

    Uses as many threads as BLAS would, and some 100 MB for each. While it runs, BLAS has
    one thread, in the whole process. Raises VisualMemoryError if the backend is missing
    or its products are less precise than they should be.
    """
    rows = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, np.float32)
    found = min(k, len(vectors))
    if found and len(queries):
        vectors = np.asarray(vectors)  # of a np.memmap, whose slices are slow to make
        if backend == "auto":
            backend = _fastest(len(queries), vectors.size)
        precision = BFLOAT16 if backend == "bfloat16" else FLOAT32
        answer = rows[:, :found], distances[:, :found]
        search = _Search(queries, vectors, found, *answer, precision)
        if backend == "tensorflow":
            search.on_device()
        elif len(queries) * vectors.size < _SMALL:
            search.alone()
        else:
            search.in_threads()
    return rows, distances


def check_backend(backend: Backend) -> None:
    """Raises VisualMemoryError if the backend is missing here."""
    if backend in ("tensorflow", "bfloat16"):
        tensorflow()


def _fastest(queries: int, values: int) -> Backend:
    """For so many queries and values of vectors. Imports TensorFlow only where it pays."""
    if queries * values < _LARGE:
        return "numpy"
    loaded = "tensorflow" in sys.modules
    try:
        might_have_gpu = loaded or glob.glob("/dev/nvidia[0-9]*")
        if might_have_gpu and tensorflow().config.list_physical_devices("GPU"):
            return "tensorflow"
        worthwhile = queries >= _MANY_QUERIES and (loaded or values >= _WORTH_IMPORTING)
        if worthwhile and multiplies_bfloat16():
            tensorflow()
            return "bfloat16"
    except VisualMemoryError:
        pass
    return "numpy"


@dataclass(frozen=True, eq=False)
class _Search:
    """One search, and the ways to run it. rows and distances (Q, k) are filled in."""

    queries: np.ndarray
    vectors: np.ndarray
    k: int
    rows: np.ndarray
    distances: np.ndarray
    precision: Precision

    @property
    def count(self) -> int:
        """How many candidates are kept for each query."""
        return min(self.k + self.precision.spare(self.k), len(self.vectors))

    def alone(self) -> None:
        for part in slices(0, len(self.queries), self._block()):
            self._part(part)

    def in_threads(self) -> None:
        with _threads() as (pool, threads):
            if len(self.queries) < threads * _FEW_QUERIES and threads > 1:
                spans = _shares(len(self.vectors), threads)
                for part in slices(0, len(self.queries), self._block()):
                    found = list(pool.map(partial(self._candidates, part), spans))
                    rows = np.concatenate([rows for rows, _ in found], axis=1)
                    products = np.concatenate([products for _, products in found], axis=1)
                    rows, products = highest(rows, products, self.count)
                    self._rank_in(pool, threads, part, rows, products)
            else:
                rounds = -(-len(self.queries) // (threads * self._block()))
                list(pool.map(self._part, _shares(len(self.queries), threads * rounds)))

    def on_device(self) -> None:
        with _threads() as (pool, threads):
            size = max(1, min(_DEVICE_QUERIES, _KEPT // self.count))
            for part in slices(0, len(self.queries), size):
                rows, products = _device_candidates(self.queries[part], self.vectors, self.count)
                self._rank_in(pool, threads, part, rows, products)

    def _block(self) -> int:
        """How many queries to search at a time."""
        return max(1, min(_QUERIES, _KEPT // capacity(self.count)))

    def _part(self, part: slice) -> None:
        self._rank(part, *self._candidates(part, slice(0, len(self.vectors))))

    def _candidates(self, part: slice, span: slice) -> tuple[np.ndarray, np.ndarray]:
        return _candidates(self.queries[part], self.vectors, self.count, span, self.precision)

    def _rank(self, part: slice, candidates: np.ndarray, products: np.ndarray) -> None:
        """Fills in the answers of some queries from their candidates."""
        queries, tolerance = self.queries[part], self.precision.tolerance(self.vectors.shape[1])
        rows, distances = _rank(queries, self.vectors, candidates, products, self.k, self.precision)
        if candidates.shape[1] < len(self.vectors):
            bounds = 1.0 - distances[:, -1].astype(np.float64) - tolerance
            (unsure,) = np.nonzero(products.min(axis=1) > bounds)
            if len(unsure):
                again = rows[unsure], distances[unsure]
                if self.precision is FLOAT32:
                    again = _rank_all(queries[unsure], self.vectors, bounds[unsure], self.k)
                else:
                    finer = replace(
                        self,
                        queries=queries[unsure],
                        rows=again[0],
                        distances=again[1],
                        precision=FLOAT32,
                    )
                    finer.alone()
                rows[unsure], distances[unsure] = again
        self.rows[part], self.distances[part] = rows, distances

    def _rank_in(
        self, pool: Executor, threads: int, part: slice, rows: np.ndarray, products: np.ndarray
    ) -> None:
        shares = _shares(len(rows), threads)
        parts = [slice(part.start + one.start, part.start + one.stop) for one in shares]
        some = [rows[one] for one in shares], [products[one] for one in shares]
        list(pool.map(self._rank, parts, *some))


@contextmanager
def _threads() -> Iterator[tuple[Executor, int]]:
    with _blas_of_one_thread as threads, ThreadPoolExecutor(threads) as pool:
        yield pool, threads


def _shares(length: int, number: int) -> list[slice]:
    """Slices as equal as can be; fewer than asked for where there is less to share."""
    edges = sorted({length * i // number for i in range(number + 1)})
    return [slice(a, b) for a, b in pairwise(edges)]


def _candidates(
    queries: np.ndarray,
    vectors: np.ndarray,
    count: int,
    span: slice,
    precision: Precision,
    guess: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (Q, count) of the highest products, unordered, and the products float32.

    guess: whether thresholds may be guessed; where they were too high, it is done again
    without.
    """
    length = span.stop - span.start
    blocks = precision.blocks(queries, vectors, span)
    if length <= capacity(count):  # nothing to filter: a router's cells
        products = np.empty((len(queries), length), np.float32)
        for start, some in blocks:
            products[:, start - span.start :][:, : some.shape[1]] = some
        rows = np.broadcast_to(np.arange(span.start, span.stop), products.shape)
        return highest(rows, products, min(count, length))
    best = Highest(len(queries), min(count, length), length, guess)
    for start, products in blocks:
        best.add(products, start)
    rows, products, missed = best.result()
    if missed.any():
        rows[missed], products[missed] = _candidates(
            queries[missed], vectors, count, span, precision, False
        )
    return rows, products


def _rank(
    queries: np.ndarray,
    vectors: np.ndarray,
    candidates: np.ndarray,
    products: np.ndarray,
    k: int,
    precision: Precision,
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows (Q, k) of the candidates (Q, count >= k), and their distances.

    products: (Q, count) float32 of the candidates. Raises VisualMemoryError if they are
    further from the truth than their precision allows.
    """
    tolerance = precision.tolerance(vectors.shape[1])
    order = np.argsort(-products, axis=1)
    rows = np.take_along_axis(candidates, order, axis=1)
    products = np.take_along_axis(products, order, axis=1)
    distances = np.full(rows.shape, np.inf, np.float32)
    distances[:, :k] = _distances(queries, vectors, rows[:, :k])
    error = np.abs(np.maximum(1.0 - products[:, :k].astype(np.float64), 0.0) - distances[:, :k])
    if not error.max() <= tolerance:
        raise VisualMemoryError(
            f"index (exact): products are off by {error.max():.1e}, where {precision.name} allows "
            f"{tolerance:.1e}: a query or a row holds NaN or is not of unit length, or "
            "TensorFlow's device computes with less. Check the vectors, or write backend: numpy"
        )
    # The nearest may be among those of lower products, but only within the rounding.
    bounds = 1.0 - distances[:, :k].max(axis=1).astype(np.float64) - tolerance
    within = products[:, k:] >= bounds[:, None]
    query, place = np.nonzero(within)
    place += k
    for some in slices(0, len(query), max(1, _PAIRS // vectors.shape[1])):
        pairs = query[some], place[some]
        distances[pairs] = _distances(queries[pairs[0]], vectors, rows[pairs][:, None])[:, 0]
    width = k + within.sum(axis=1).max(initial=0)
    order = np.argsort(rows[:, :width], axis=1)
    ascending = np.take_along_axis(rows, order, axis=1)
    return _nearest(ascending, np.take_along_axis(distances, order, axis=1), k)


def _rank_all(
    queries: np.ndarray, vectors: np.ndarray, bounds: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of all rows whose product reaches the query's bound (at least k)."""
    rows = [np.empty((1, 0), np.int64) for _ in queries]
    distances = [np.empty((1, 0), np.float32) for _ in queries]
    for start, products in FLOAT32.blocks(queries, vectors, slice(0, len(vectors))):
        for i in range(len(queries)):
            reached = start + np.flatnonzero(products[i] >= bounds[i])[None]
            if reached.size:
                more = _distances(queries[i : i + 1], vectors, reached)
                rows[i], distances[i] = _nearest(
                    np.concatenate([rows[i], reached], axis=1),
                    np.concatenate([distances[i], more], axis=1),
                    k,
                )
    return np.concatenate(rows), np.concatenate(distances)


def _distances(queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Distances (Q, R) float32 of each query to its rows (Q, R), computed in float64."""
    products = np.empty(rows.shape)
    dimension = vectors.shape[1]
    width = min(rows.shape[1], max(1, _PAIRS // dimension))
    height = min(len(rows), max(1, _PAIRS // (width * dimension)))
    compared = np.empty((height, width, dimension))
    wide = queries.astype(np.float64)[:, None]
    for some in slices(0, len(rows), height):
        for columns in slices(0, rows.shape[1], width):
            chosen = rows[some, columns]
            out = compared[: chosen.shape[0], : chosen.shape[1]]
            out[...] = float32(vectors[chosen])
            # vecdot runs one dot product a pair, so a pair's result does not know its
            # neighbours.
            np.vecdot(wide[some], out, out=products[some, columns])
    check_products(products)
    return np.maximum(1.0 - products, 0.0).astype(np.float32)


def check_products(products: np.ndarray) -> None:
    """Raises DamagedError for products that vectors of unit length cannot have, and NaN.

    Stored lengths are within 0.1% and the rounding of bfloat16, 0.4%.
    """
    if products.size and not products.max() <= _LARGEST_PRODUCT:
        raise DamagedError(
            f"a product of {products.max():.4g} was found, and unit vectors have 1 at most: a "
            "query or a row holds NaN or is not of unit length"
        )


def _nearest(rows: np.ndarray, distances: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of (Q, R) rows, which are in ascending order where they tie."""
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(distances, order, axis=1)


def _device_candidates(
    queries: np.ndarray, vectors: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """What ``_candidates`` returns, from whatever device TensorFlow computes on."""
    tf = tensorflow()
    size = max(1, min(_DEVICE_VALUES // len(queries), _DEVICE_VALUES // vectors.shape[1]))
    with _full_precision:
        wanted = tf.constant(queries)
        products = tf.zeros((len(queries), 0), tf.float32)
        rows = tf.zeros((len(queries), 0), tf.int64)
        for part in slices(0, len(vectors), size):
            block = tf.cast(tf.constant(vectors[part]), tf.float32)
            every = tf.matmul(wanted, block, transpose_b=True)
            new, columns = tf.math.top_k(every, min(count, len(block)), sorted=False)
            products = tf.concat([products, new], 1)
            rows = tf.concat([rows, tf.cast(columns, tf.int64) + part.start], 1)
            products, kept = tf.math.top_k(products, min(count, part.stop), sorted=False)
            rows = tf.gather(rows, kept, batch_dims=1)
        return rows.numpy(), products.numpy()


T = TypeVar("T")


class _Shared(Generic[T]):
    """A setting of the whole process: the first who needs it makes it, the last undoes it."""

    def __init__(self, make: Callable[[], AbstractContextManager[T]]):
        self._make = make
        self._lock = threading.Lock()
        self._users = 0

    def __enter__(self) -> T:
        with self._lock:
            if self._users == 0:
                self._setting = self._make()
                self._value = self._setting.__enter__()
            self._users += 1
            return self._value

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._setting.__exit__(None, None, None)


@_Shared
@contextmanager
def _blas_of_one_thread() -> Iterator[int]:
    """Gives the number of threads that BLAS has otherwise."""
    threads = max((library["num_threads"] for library in _blas().info()), default=os.cpu_count())
    with _blas().limit(limits=1):
        yield threads or 1


@cache
def _blas() -> ThreadpoolController:
    # Made once, as looking through the process's libraries takes a millisecond. NumPy's is
    # there by now.
    return ThreadpoolController().select(user_api="blas")


@_Shared
@contextmanager
def _full_precision() -> Iterator[None]:
    """Without TF32, which TensorFlow takes for float32 on GPUs, and which has 10 bits."""
    config = tensorflow().config.experimental
    before = config.tensor_float_32_execution_enabled()
    config.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        config.enable_tensor_float_32_execution(before)
