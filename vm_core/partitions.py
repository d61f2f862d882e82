"""Partitions of a memory: the rows that one worker indexes and searches at a time.

A partition's folder:

rows.parquet     row, id, label, home; in the order of ids
vectors.npy      (N, D) in the memory's dtype (bfloat16 as uint16), mapped and not loaded
whatever the index adds
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from vm_core.index import Index, TopK
from vm_core.records import strings
from vm_core.shard_rows import DTYPES

ROWS, _VECTORS = "rows.parquet", "vectors.npy"

_PYTHON_STRING = 57  # bytes of an empty one and of the pointer to it

ROWS_SCHEMA = pa.schema(
    [("row", pa.int64()), ("id", pa.string()), ("label", pa.int64()), ("home", pa.bool_())]
)


@dataclass(frozen=True, eq=False)
class Members:
    """The N rows of a partition, in the order of their ids, without an index.

    rows: (N,) int64, the rows' numbers in the memory: shard after shard, in each by id.
    labels: (N,) int64. home: (N,) bool, false for a row that is here as a copy and has its
    home in another partition. vectors: (N, D) float32, float16 or bfloat16, unit length.
    """

    rows: np.ndarray
    names: pa.StringArray
    labels: np.ndarray
    home: np.ndarray
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def ids(self) -> np.ndarray:
        """(N,) array of str, of fixed width if that takes at most twice the memory of Python's.

        Of a hundred neighbours a query each id is looked up somewhere else in memory, once in
        an array and twice among Python's strings. NumPy drops NULs at an id's end, so such
        ids are left as they are.
        """
        lengths = pc.utf8_length(self.names)
        width, mean = pc.max(lengths).as_py() or 0, pc.mean(lengths).as_py() or 0
        narrow = 4 * width <= 2 * (_PYTHON_STRING + mean)
        if narrow and not pc.any(pc.ends_with(self.names, "\0")).as_py():
            return self.names.to_numpy(zero_copy_only=False).astype(str)
        return strings(self.names.to_pylist())

    def take(self, places: np.ndarray) -> Members:
        """The given rows (positions), in that order."""
        return Members(
            self.rows[places],
            self.names.take(pa.array(places)),
            self.labels[places],
            self.home[places],
            self.vectors[places],
        )

    @staticmethod
    def concatenate(parts: Sequence[Members]) -> Members:
        """All rows in the order of their ids. Needs at least one part."""
        names = pa.concat_arrays([part.names for part in parts])
        # Arrow sorts strings by their UTF-8 bytes, which is the order of Python's strings.
        order = pc.sort_indices(names).to_numpy()
        sizes = np.cumsum([0, *(len(part) for part in parts)])
        vectors = np.empty((len(names), parts[0].vectors.shape[1]), parts[0].vectors.dtype)
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        for start, part in zip(sizes, parts, strict=False):
            vectors[place[start : start + len(part)]] = part.vectors  # one copy, not two
        return Members(
            np.concatenate([part.rows for part in parts])[order],
            names.take(pa.array(order)),
            np.concatenate([part.labels for part in parts])[order],
            np.concatenate([part.home for part in parts])[order],
            vectors,
        )


@dataclass(frozen=True, eq=False)
class Partition:
    """Members that can be searched; weights: (N,) float64 in [0, 1.75], or None for all 1."""

    members: Members
    search: TopK
    weights: np.ndarray | None = None


def write(folder: str, members: Members) -> None:
    """Writes the members of a partition into a local folder."""
    table = pa.table(
        [members.rows, members.names, members.labels, members.home], schema=ROWS_SCHEMA
    )
    pq.write_table(table, os.path.join(folder, ROWS))
    np.save(os.path.join(folder, _VECTORS), storable(members.vectors))


def storable(vectors: np.ndarray) -> np.ndarray:
    """The vectors, bfloat16 as uint16: neither NumPy's file format nor Arrow has it."""
    return vectors.view(np.uint16) if vectors.dtype == DTYPES["bfloat16"] else vectors


def open_partition(folder: str, index: Index) -> Partition:
    """Opens a partition in a local folder, which may be gone afterwards, with its index."""
    members = _read_members(folder)
    return Partition(members, index.open(members.vectors, folder))


def read_rows(file: Any) -> pa.Table:
    """What ``rows.parquet`` holds, of ROWS_SCHEMA; file: a path or an open file."""
    return pq.read_table(file, schema=ROWS_SCHEMA).combine_chunks()


def _read_members(folder: str) -> Members:
    """Their vectors are mapped."""
    table = read_rows(os.path.join(folder, ROWS))
    names = table["id"]
    return Members(
        table["row"].to_numpy(),
        names.chunk(0) if names.num_chunks else pa.array([], pa.string()),
        table["label"].to_numpy(),
        table["home"].to_numpy(),
        map_vectors(folder),
    )


def map_vectors(folder: str) -> np.ndarray:
    """The (N, D) vectors of a partition in a local folder, mapped; they outlive the folder."""
    vectors = np.load(os.path.join(folder, _VECTORS), mmap_mode="r")
    return vectors.view(DTYPES["bfloat16"]) if vectors.dtype == np.uint16 else vectors
