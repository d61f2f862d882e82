"""Indexes over the rows of one partition, one module a kind: exact, scann, auto.

An index is derived from embedding shards and can always be made again from them. A
partition is a folder with ``partition.json`` (kind, parameters, counts, checksums) and
whatever files the kind needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from vm_core import plugins, storage
from vm_core.records import EmbeddingBlock
from vm_core.shards import read_shard

TopK = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(Q, D) float32 unit queries and k to rows (Q, k) int64 and distances (Q, k) float32.

Distances are cosine distances in [0, 2], ascending, ties by id. Where there are fewer
than k rows the rest is row -1 at distance +inf.
"""


class Partition(NamedTuple):
    """An opened partition. ids: (N,) object of str; labels: (N,) int64; search: over rows."""

    ids: np.ndarray
    labels: np.ndarray
    search: TopK


class Index(plugins.Settings):
    """Base of the indexes."""

    kind: str

    def choose(self, rows: int) -> Index:
        """The index to build for a partition of so many rows."""
        return self

    def build(self, read: Callable[[], EmbeddingBlock], folder: str) -> None:
        """Writes an index into a local folder; ``read`` gives the partition's rows."""
        raise NotImplementedError

    def open(self, shards: Sequence[str], folder: str) -> Partition:
        """Opens what ``build`` wrote. ``shards``: the paths of the partition's shards."""
        raise NotImplementedError


def parse(settings: Any) -> Index:
    """The index that settings describe. Raises VisualMemoryError."""
    return plugins.configure(__name__, settings, Index)


def read_rows(shards: Sequence[str]) -> EmbeddingBlock:
    """All rows of some embedding shards, in the order of their ids."""
    block = EmbeddingBlock.concatenate([read_shard(path) for path in shards])
    return block.take(np.argsort(block.ids, kind="stable"))


def checksums(folder: str) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path."""
    files = storage.walk(folder)
    return {file.path[len(folder) + 1 :]: storage.sha256_file(file.path) for file in files}
