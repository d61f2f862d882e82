"""Exact search: the oracle that every other index is measured against."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from vm_core.index import Index, Partition, read_rows
from vm_core.records import EmbeddingBlock

_QUERY_ROWS = 256
_BASE_ROWS = 16_384
_SLACK = 28


class Plugin(Index):
    """Reads the embedding shards themselves; it has no files of its own."""

    kind: Literal["exact"] = "exact"

    def build(self, read: Callable[[], EmbeddingBlock], folder: str) -> None:
        pass

    def open(self, shards: Sequence[str], folder: str) -> Partition:
        block = read_rows(shards)
        vectors = block.vectors
        return Partition(block.ids, block.labels, lambda queries, k: top_k(queries, vectors, k))


def top_k(queries: np.ndarray, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest rows of each query by cosine distance.

    queries: (Q, D) and vectors: (N, D), float32, unit length. Returns rows (Q, k) int64
    and distances (Q, k) float32 in [0, 2], ascending, ties broken by the lower row;
    -1 and +inf where N < k.

    The answer depends on the query and the rows alone, to the last bit, not on what is
    searched beside them: a matrix product, whose rounding changes with its shape, only
    picks candidates, with some to spare; their distances are then computed one dot
    product at a time in float64. Where the spare candidates might not suffice, as among
    thousands of identical images, the query is compared with every row that way.
    """
    rows = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, np.float32)
    found = min(k, len(vectors))
    if found == 0:
        return rows, distances
    # The rounding error of a float32 dot product of unit vectors grows with the square
    # root of its length (Higham & Mary 2019); four times that is out of its reach.
    tolerance = 4 * np.sqrt(vectors.shape[1]) * 2.0**-24
    for start in range(0, len(queries), _QUERY_ROWS):
        part = queries[start : start + _QUERY_ROWS]
        candidates, lowest = _candidates(part, vectors, min(found + _SLACK, len(vectors)))
        for i, query in enumerate(part):
            chosen, exact = _rank(query, vectors, np.sort(candidates[i]), found)
            worst = 1.0 - float(exact[-1])
            if len(vectors) > candidates.shape[1] and lowest[i] > worst - tolerance:
                chosen, exact = _rank(query, vectors, np.arange(len(vectors)), found)
            rows[start + i, :found] = chosen
            distances[start + i, :found] = exact
    return rows, distances


def _rank(
    query: np.ndarray, vectors: np.ndarray, candidates: np.ndarray, k: int
) -> tuple[np.ndarray, np.ndarray]:
    """The k nearest of some candidate rows (ascending), with distances as float32."""
    # vecdot runs one dot product a pair, so a pair's result does not know its neighbours.
    products = np.vecdot(query.astype(np.float64), vectors[candidates].astype(np.float64))
    distances = np.maximum(1.0 - products, 0.0).astype(np.float32)
    order = np.argsort(distances, kind="stable")[:k]
    return candidates[order], distances[order]


def _candidates(
    queries: np.ndarray, vectors: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (Q, count) of the highest products, unordered, and the lowest product kept (Q,)."""
    best = np.full((len(queries), count), -np.inf, np.float32)
    rows = np.zeros((len(queries), count), np.int64)
    for start in range(0, len(vectors), _BASE_ROWS):
        products = queries @ vectors[start : start + _BASE_ROWS].T
        new, new_rows = _above(products, best.min(axis=1), count)
        best = np.concatenate([best, new], axis=1)
        rows = np.concatenate([rows, new_rows + start], axis=1)
        keep = np.argpartition(-best, count - 1, axis=1)[:, :count]
        best = np.take_along_axis(best, keep, axis=1)
        rows = np.take_along_axis(rows, keep, axis=1)
    return rows, best.min(axis=1)


def _above(
    products: np.ndarray, thresholds: np.ndarray, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """The products over each query's threshold, packed to the left, and their columns."""
    above = products > thresholds[:, None]
    hits = above.sum(axis=1)
    width = int(hits.max())
    if width > count:
        columns = np.argpartition(-products, count - 1, axis=1)[:, :count]
        return np.take_along_axis(products, columns, axis=1), columns
    which, column = np.nonzero(above)
    place = np.arange(len(which)) - np.repeat(np.cumsum(hits) - hits, hits)
    packed = np.full((len(products), width), -np.inf, np.float32)
    columns = np.zeros((len(products), width), np.int64)
    packed[which, place] = products[which, column]
    columns[which, place] = column
    return packed, columns
