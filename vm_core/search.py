"""Neighbours of a block of queries: routed to the nearest cells, searched, merged."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from vm_core import measure
from vm_core.exact import top_k
from vm_core.neighbors import Neighbors
from vm_core.partitions import Partition
from vm_core.records import PADDING, EmbeddingBlock

CACHE_BYTES = 4 << 30
"""Of partitions that a process keeps open."""


@dataclass(frozen=True, eq=False)
class Router:
    """Sends queries to partitions.

    centroids: (C, D) float32 unit vectors, None for a single cell. cells: of each
    partition, by number. An oversized cell has several partitions, and an empty one none.
    probes: how many of the nearest cells a query visits.
    """

    centroids: np.ndarray | None
    cells: tuple[int, ...]
    probes: int

    def route(self, vectors: np.ndarray) -> np.ndarray:
        """(Q, probes) int64: the cells to visit, the nearest first."""
        if self.centroids is None:
            return np.zeros((len(vectors), 1), np.int64)
        return top_k(vectors, self.centroids, min(self.probes, len(self.centroids)))[0]

    def partitions_of(self, cell: int) -> Sequence[int]:
        """The numbers of a cell's partitions."""
        return self._partitions.get(cell, ())

    @cached_property
    def _partitions(self) -> dict[int, list[int]]:
        numbers = defaultdict(list)
        for number, cell in enumerate(self.cells):
            numbers[cell].append(number)
        return dict(numbers)

    def visits(self, vectors: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """Every partition that some of the (Q, D) queries visit, with their places, ascending."""
        routes = self.route(vectors)
        for cell in np.unique(routes).tolist():
            places = np.flatnonzero((routes == cell).any(axis=1))
            for number in self.partitions_of(cell):
                yield number, places


class PartitionCache:
    """Opens partitions and keeps the latest used ones, within a number of bytes.

    One partition is always kept, whatever its size. Safe to call from several threads: one
    of them opens a partition, those that ask for the same one wait for it, the others do not.
    """

    def __init__(
        self, open: Callable[[int], Partition], sizes: Sequence[int], limit: int = CACHE_BYTES
    ):
        self._open, self._sizes, self._limit = open, sizes, limit
        self._opened: OrderedDict[int, Future[Partition]] = OrderedDict()
        self._lock = threading.Lock()

    def __call__(self, number: int) -> Partition:
        with self._lock:
            partition = self._opened.get(number)
            measure.count_reuse("partitions", partition is not None)
            if partition is not None:
                self._opened.move_to_end(number)
            else:
                self._make_room(self._sizes[number])
                fresh = self._opened[number] = Future()
        if partition is not None:
            return partition.result()
        try:
            with measure.timed("open_ms"):
                fresh.set_result(self._open(number))
        except BaseException as error:
            # Those who wait get the error too; the next one to ask tries again.
            fresh.set_exception(error)
            with self._lock:
                if self._opened.get(number) is fresh:
                    del self._opened[number]
        return fresh.result()

    def _make_room(self, size: int) -> None:
        while self._opened and size + sum(self._sizes[n] for n in self._opened) > self._limit:
            self._opened.popitem(last=False)


def search_partition(
    partition: Partition, queries: EmbeddingBlock, k: int, exclude_self: bool = False
) -> Neighbors:
    """The k nearest members of one partition.

    ``exclude_self`` leaves out the member that has the query's own id.
    """
    with measure.timed("search_ms"):
        rows, distances = partition.search(queries.vectors, k + exclude_self)
    found = rows >= 0
    if found.all():
        ids, labels = partition.members.ids.take(rows), partition.members.labels[rows]
    else:
        ids = np.full(rows.shape, "", partition.members.ids.dtype)
        labels = np.full(rows.shape, PADDING, np.int64)
        ids[found] = partition.members.ids[rows[found]]
        labels[found] = partition.members.labels[rows[found]]
    weights = None
    if partition.weights is not None:
        weights = np.ones(rows.shape)
        weights[found] = partition.weights[rows[found]]
    neighbors = Neighbors(queries.ids, queries.labels, ids, labels, distances, weights=weights)
    if exclude_self:
        neighbors = neighbors.remove(ids == queries.ids[:, None]).first(k)
    return neighbors


def assemble(
    queries: EmbeddingBlock, k: int, parts: Iterable[tuple[np.ndarray, Neighbors]]
) -> Neighbors:
    """The k nearest of what partitions found; a part comes with the places of its queries.

    The parts may come in any order. Their arrays may become the answer's.
    """
    found: Neighbors | None = None
    fresh = np.ones(len(queries), bool)
    for places, part in parts:
        if found is None and np.array_equal(places, np.arange(len(queries))):
            found, fresh[:] = part, False
            continue
        found = _nothing(queries, k) if found is None else found
        if not fresh[places].all():
            part = merge(found.take(places), part)
        fresh[places] = False
        if part.weights is not None and found.weights is None:
            found = replace(found, weights=np.ones(found.labels.shape))
        if part.ids.dtype != found.ids.dtype:  # assignment would cut the longer ids
            wide = np.promote_types(part.ids.dtype, found.ids.dtype)
            found = replace(found, ids=found.ids.astype(wide))
        for name in ("ids", "labels", "distances", "weights"):
            values = getattr(part, name)
            if values is not None:
                getattr(found, name)[places] = values
    return _nothing(queries, k) if found is None else found


def _nothing(queries: EmbeddingBlock, k: int) -> Neighbors:
    shape = (len(queries), k)
    return Neighbors(
        queries.ids,
        queries.labels,
        np.full(shape, "", "U1"),
        np.full(shape, PADDING, np.int64),
        np.full(shape, np.inf, np.float32),
    )


class Searcher:
    """Searches a memory in this process, partition by partition."""

    def __init__(self, router: Router, partitions: Callable[[int], Partition]):
        self._router, self._partitions = router, partitions

    def __call__(self, queries: EmbeddingBlock, k: int, exclude_self: bool = False) -> Neighbors:
        """The k nearest rows of each query; fewer are padded."""

        def search(number: int, places: np.ndarray) -> tuple[np.ndarray, Neighbors]:
            some = queries if len(places) == len(queries) else queries.take(places)
            return places, search_partition(self._partitions(number), some, k, exclude_self)

        parts = (search(*visit) for visit in self._router.visits(queries.vectors))
        return assemble(queries, k, parts)


def merge(left: Neighbors, right: Neighbors) -> Neighbors:
    """The nearest K of two answers to the same queries; ties by id.

    An id that both have stands once, at its smaller distance. Associative and
    commutative, so partitions can be merged in any order and grouping.
    """
    both = replace(
        left,
        ids=np.concatenate([left.ids, right.ids], axis=1),
        labels=np.concatenate([left.labels, right.labels], axis=1),
        distances=np.concatenate([left.distances, right.distances], axis=1),
        weights=_both_weights(left, right),
    )
    repeated = _repeated(both.ids, both.distances)
    if repeated.any():
        for name, padding in (("ids", ""), ("labels", PADDING), ("distances", np.inf)):
            getattr(both, name)[repeated] = padding
    order = np.argsort(both.distances, axis=1, kind="stable")
    ordered = np.take_along_axis(both.distances, order, axis=1)
    tied = (ordered[:, 1:] == ordered[:, :-1]) & np.isfinite(ordered[:, 1:])
    for row in np.flatnonzero(tied.any(axis=1)):
        # Few queries have ties, and comparing strings is slow.
        order[row] = sorted(order[row], key=lambda i: (both.distances[row, i], both.ids[row, i]))
    order = order[:, : left.k]
    return replace(
        both,
        ids=np.take_along_axis(both.ids, order, axis=1),
        labels=np.take_along_axis(both.labels, order, axis=1),
        distances=np.take_along_axis(both.distances, order, axis=1),
        weights=None if both.weights is None else np.take_along_axis(both.weights, order, axis=1),
    )


def _both_weights(left: Neighbors, right: Neighbors) -> np.ndarray | None:
    if left.weights is None and right.weights is None:
        return None
    sides = [
        np.ones(side.labels.shape) if side.weights is None else side.weights
        for side in (left, right)
    ]
    return np.concatenate(sides, axis=1)


def _repeated(ids: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """(Q, K) bool: which ids stand in their row already, at a smaller or the same distance."""
    repeated = np.zeros(ids.shape, bool)
    # Numbers sort faster than strings; what they say is checked on the strings themselves.
    codes = _codes(ids)
    ascending = np.sort(codes, axis=1)
    suspects = ((ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] != 0)).any(axis=1)
    rows = np.flatnonzero(suspects)
    if len(rows):
        by_id = np.lexsort((distances[rows], codes[rows]), axis=1)
        sorted_ids = np.take_along_axis(ids[rows], by_id, axis=1)
        again = np.zeros(by_id.shape, bool)
        again[:, 1:] = (sorted_ids[:, 1:] == sorted_ids[:, :-1]) & (sorted_ids[:, 1:] != "")
        marked = np.zeros(by_id.shape, bool)
        np.put_along_axis(marked, by_id, again, axis=1)
        repeated[rows] = marked
    return repeated


def _codes(ids: np.ndarray) -> np.ndarray:
    """(Q, K) uint64 or int64: the same for the same ids, seldom for others; 0 for ''."""
    if ids.dtype.kind == "U":
        letters = np.ascontiguousarray(ids).view(np.uint32).reshape(*ids.shape, -1)
        odd = 2 * np.random.default_rng(0).integers(2**62, size=letters.shape[-1]) + 1
        return letters @ odd.astype(np.uint64)
    return np.fromiter(map(hash, ids.ravel()), np.int64, ids.size).reshape(ids.shape)
