"""Neighbours of a block of queries, over one partition or several."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from vm_core.index import Partition
from vm_core.neighbors import Neighbors
from vm_core.records import PADDING, EmbeddingBlock


def find_neighbors(
    partitions: Iterable[Partition], queries: EmbeddingBlock, k: int, exclude_self: bool = False
) -> Neighbors:
    """The k nearest rows of each query over all partitions, one after another.

    ``exclude_self`` leaves out the row that has the query's own id, wherever it stands.
    """
    wanted = k + 1 if exclude_self else k
    found = None
    for partition in partitions:
        part = _search(partition, queries, wanted)
        found = part if found is None else merge(found, part)
    if found is None:
        raise ValueError("no partitions to search")
    if exclude_self:
        found = found.remove(found.ids == found.query_ids[:, None])
    return found.first(k)


def merge(left: Neighbors, right: Neighbors) -> Neighbors:
    """The nearest K of two answers to the same queries; ties by id.

    An id that both have stands once, at its smaller distance.

    Associative and commutative, so partitions can be merged in any order and grouping.
    """
    ids = np.concatenate([left.ids, right.ids], axis=1)
    labels = np.concatenate([left.labels, right.labels], axis=1)
    distances = np.concatenate([left.distances, right.distances], axis=1)
    _, rank = np.unique(ids.ravel(), return_inverse=True)
    rank = rank.reshape(ids.shape)
    by_id = np.lexsort((distances, rank), axis=1)
    ordered = np.take_along_axis(rank, by_id, axis=1)
    repeated = np.zeros(ids.shape, bool)
    np.put_along_axis(repeated, by_id[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    ids[repeated], labels[repeated], distances[repeated] = "", PADDING, np.inf
    order = np.lexsort((rank, distances), axis=1)
    return replace(
        left,
        ids=np.take_along_axis(ids, order, axis=1),
        labels=np.take_along_axis(labels, order, axis=1),
        distances=np.take_along_axis(distances, order, axis=1),
    ).first(left.k)


def _search(partition: Partition, queries: EmbeddingBlock, k: int) -> Neighbors:
    rows, distances = partition.search(queries.vectors, k)
    found = rows >= 0
    ids = np.full(rows.shape, "", object)
    labels = np.full(rows.shape, PADDING, np.int64)
    ids[found] = partition.ids[rows[found]]
    labels[found] = partition.labels[rows[found]]
    return Neighbors(queries.ids, queries.labels, ids, labels, distances)
