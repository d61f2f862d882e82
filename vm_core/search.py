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
    """The nearest K of two answers to the same queries; ties by id, duplicates once.

    Associative and commutative, so partitions can be merged in any order and grouping.
    """
    ids = np.concatenate([left.ids, right.ids], axis=1)
    labels = np.concatenate([left.labels, right.labels], axis=1)
    distances = np.concatenate([left.distances, right.distances], axis=1)
    _, rank = np.unique(ids.ravel(), return_inverse=True)
    order = np.lexsort((rank.reshape(ids.shape), distances), axis=1)
    both = replace(
        left,
        ids=np.take_along_axis(ids, order, axis=1),
        labels=np.take_along_axis(labels, order, axis=1),
        distances=np.take_along_axis(distances, order, axis=1),
    )
    repeated = np.zeros(both.ids.shape, bool)
    repeated[:, 1:] = (both.ids[:, 1:] == both.ids[:, :-1]) & (both.labels[:, 1:] != PADDING)
    return both.remove(repeated).first(left.k)


def _search(partition: Partition, queries: EmbeddingBlock, k: int) -> Neighbors:
    rows, distances = partition.search(queries.vectors, k)
    missing = rows < 0
    return Neighbors(
        query_ids=queries.ids,
        query_labels=queries.labels,
        ids=np.where(missing, "", partition.ids[rows]),
        labels=np.where(missing, PADDING, partition.labels[rows]),
        distances=distances,
    )
