"""Side tables of a version: items of the memory that are removed, or weigh less in a vote.

weights/FINGERPRINT/partition-00000.parquet    id, weight; one file for each partition

A table names the rows of its partition whose weight is not 1, in the order of ids; weight
0 is removed. The embeddings and their indexes stay as they are.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, NonNegativeInt

from vm_core import storage
from vm_core.errors import VisualMemoryError
from vm_core.exact import top_k
from vm_core.index import TopK
from vm_core.partitions import Partition
from vm_core.relative_paths import Files, RelativePath
from vm_core.tables import read_table

_FEW = 1 / 8
"""The share of a partition's rows that is searched by itself, without the index."""

_FOUND = 2**22
"""Neighbours that are asked for at a time: 50 MB of rows and distances."""

_REMEDY = "Restore it, or take the weights back with visual-memory prune --undo"

WEIGHTS_SCHEMA = pa.schema([("id", pa.string()), ("weight", pa.float64())])


class WeightsEntry(BaseModel):
    """What a manifest says of its version's weights.

    files: those of ``folder``, relative to the memory, with the SHA-256 of each.
    settings: how the weights came about. removed, weighted: how many items have weight
    0, and how many another weight than 0 and 1. base_version, base_digest: the version
    without weights that this one is made from, and its content digest.
    """

    folder: RelativePath
    files: Files
    settings: dict[str, Any]
    removed: NonNegativeInt
    weighted: NonNegativeInt
    base_version: str
    base_digest: str

    def file(self, partition: int) -> str:
        """The table of a partition, relative to the memory."""
        return file_name(self.folder, partition)


def file_name(folder: str, partition: int) -> str:
    return f"{folder}/partition-{partition:05d}.parquet"


def read(root: str, entry: WeightsEntry, partition: int) -> pa.Table:
    """Reads the table of one partition. Raises DamagedError."""
    name = entry.file(partition)
    path = storage.inside(root, name)
    return read_table(path, entry.files.get(name, ""), _REMEDY, WEIGHTS_SCHEMA)


def removed_ids(root: str, entry: WeightsEntry, partitions: int) -> pa.ChunkedArray:
    """The ids of weight 0 of all partitions, as large_string; those with copies more than once."""
    ids = [pa.array([], pa.large_string())]
    for number in range(partitions):
        table = read(root, entry, number)
        of_partition = table["id"].filter(pc.equal(table["weight"], 0.0))
        ids += of_partition.cast(pa.large_string()).chunks
    return pa.chunked_array(ids)


def apply(partition: Partition, table: pa.Table) -> Partition:
    """The partition with weights, and without the removed rows: its search never finds them.

    table: of WEIGHTS_SCHEMA; every id is in the partition. Raises VisualMemoryError.
    """
    members = partition.members
    places = pc.index_in(table["id"], value_set=members.names)
    if places.null_count:
        strange = table["id"].filter(pc.is_null(places))[0].as_py()
        raise VisualMemoryError(
            f"the weights name {places.null_count:,} items that are not in their partition, such "
            f"as {strange!r}: they belong to another version. Prune the memory again"
        )
    weights = np.ones(len(members))
    weights[places.to_numpy()] = table["weight"].to_numpy()
    removed = weights == 0
    search = partition.search
    if removed.sum() >= (1 - _FEW) * len(removed) and removed.any():
        search = among(members.vectors, np.flatnonzero(~removed))
    elif removed.any():
        search = without(search, removed)
    return Partition(members, search, weights)


def among(vectors: np.ndarray, kept: np.ndarray) -> TopK:
    """An exact search of some rows alone; kept: (M,) int64, ascending. Copies their vectors.

    For few rows: an index would have to be asked for many times as many neighbours.
    """
    some = vectors[kept]
    # One more, where nothing was found: row -1 looks up the last.
    rows = np.append(kept, -1)

    def kept_only(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        places, distances = top_k(queries, some, k)
        return rows[places], distances

    return kept_only


def without(search: TopK, removed: np.ndarray) -> TopK:
    """A search that leaves out some rows and still finds k others where there are so many.

    removed: (N,) bool, over all rows that ``search`` knows. However far it has to look, it
    asks for a bounded number of neighbours at a time.
    """
    count, kept = len(removed), int((~removed).sum())
    # One row more, never kept: row -1, where nothing was found, looks up the last.
    usable = np.append(~removed, False)

    def kept_only(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.full((len(queries), k), -1, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        wanted = min(k, kept)
        short = np.arange(len(queries) if wanted else 0)
        # Twice what falls to the removed rows on average: few queries come short.
        width = k + 2 * math.ceil(k * (count - kept) / max(1, kept)) + 8
        while len(short):
            width = min(width, count)
            left = []
            for start in range(0, len(short), max(1, _FOUND // width)):
                some = short[start : start + max(1, _FOUND // width)]
                found, found_distances = search(queries[some], width)
                keep = usable[found]
                enough = keep.sum(axis=1) >= wanted
                # Nothing more comes of a wider search that has seen all it can.
                done = enough | (found[:, -1] < 0) | (width == count)
                order = np.argsort(~keep[done], axis=1, kind="stable")[:, :k]
                keep = np.take_along_axis(keep[done], order, axis=1)
                columns = slice(0, order.shape[1])
                rows[some[done], columns] = np.where(
                    keep, np.take_along_axis(found[done], order, axis=1), -1
                )
                distances[some[done], columns] = np.where(
                    keep, np.take_along_axis(found_distances[done], order, axis=1), np.inf
                )
                left.append(some[~done])
            short, width = np.concatenate(left), 2 * width
        return rows, distances

    return kept_only
