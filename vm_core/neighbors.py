"""Blocks of queries with their neighbours, and the two files that hold them.

JSON is the paper's exchange format (arXiv 2408.08172): one object, keyed by query
id, of ``{featurizer, image_id, image_class, neighbor_image_ids, neighbor_classes,
neighbor_distances}``. Parquet is ours. Both are read and written block by block.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import ijson
import numpy as np
import pyarrow as pa

from vm_core import storage
from vm_core.errors import VisualMemoryError
from vm_core.records import PADDING, UNKNOWN, strings

NEIGHBORS_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("label", pa.int64()),
        ("neighbor_ids", pa.list_(pa.string())),
        ("neighbor_labels", pa.list_(pa.int64())),
        ("neighbor_distances", pa.list_(pa.float32())),
        ("neighbor_weights", pa.list_(pa.float64())),  # null: all 1
    ]
)


@dataclass(frozen=True, eq=False)
class Neighbors:
    """Q queries, each with K neighbours, the nearest first.

    query_ids: (Q,) object array of str. query_labels: (Q,) int64, the true label or
    UNKNOWN. ids: (Q, K) array of str, objects or of fixed width. labels: (Q, K) int64.
    distances: (Q, K) float32 or float64, cosine distances in [0, 2], ascending. A row with
    fewer than K neighbours ends in padding: id '', label PADDING, distance +inf.

    query_label_sets: None, or (Q, L) int64 when a query may have several true
    labels (ImageNet ReaL), each row filled up with UNKNOWN; a row of nothing but
    UNKNOWN is a query that the annotators left without a label. ``query_labels``
    is then the first column.

    weights: None, all 1, or (Q, K) float64 >= 0, what each neighbour's vote is multiplied
    by where the memory is pruned; any value at padding.
    """

    query_ids: np.ndarray
    query_labels: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    distances: np.ndarray
    query_label_sets: np.ndarray | None = None
    weights: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.query_ids)

    @property
    def k(self) -> int:
        """K, the number of columns."""
        return self.labels.shape[1]

    @property
    def scored(self) -> np.ndarray:
        """(Q,) bool, false for a query whose set of true labels is empty."""
        if self.query_label_sets is None:
            return np.ones(len(self), dtype=bool)
        return (self.query_label_sets != UNKNOWN).any(axis=1)

    def is_correct(self, labels: np.ndarray) -> np.ndarray:
        """(Q, M) bool: which of the (Q, M) given labels are true labels of their query."""
        sets = self.query_labels[:, None]
        if self.query_label_sets is not None:
            sets = self.query_label_sets
        correct = labels == sets[:, :1]
        for column in range(1, sets.shape[1]):
            correct |= labels == sets[:, column : column + 1]
        return correct & (labels >= 0)

    def take(self, rows: np.ndarray | slice) -> Neighbors:
        """The block of the given queries (indices, a mask or a slice), in that order."""
        sets = self.query_label_sets
        return Neighbors(
            self.query_ids[rows],
            self.query_labels[rows],
            self.ids[rows],
            self.labels[rows],
            self.distances[rows],
            None if sets is None else sets[rows],
            None if self.weights is None else self.weights[rows],
        )

    def first(self, k: int) -> Neighbors:
        """The same queries with their first k neighbours, filled up with padding if need be."""
        missing = ((0, 0), (0, max(0, k - self.k)))
        weights = self.weights
        if weights is not None:
            weights = np.pad(weights[:, :k], missing, constant_values=1)
        return replace(
            self,
            ids=np.pad(self.ids[:, :k], missing, constant_values=""),
            labels=np.pad(self.labels[:, :k], missing, constant_values=PADDING),
            distances=np.pad(self.distances[:, :k], missing, constant_values=np.inf),
            weights=weights,
        )

    def without(self, excluded: Collection[str]) -> Neighbors:
        """The block without the neighbours of the given ids: ranks closed, padded at the end.

        Give a set or a dict: every neighbour is looked up once.
        """
        return self.remove(is_in(self.ids, excluded))

    def remove(self, removed: np.ndarray) -> Neighbors:
        """The block without the neighbours marked in a (Q, K) mask, still K columns wide."""
        order = np.argsort(removed, axis=1, kind="stable")
        gone = np.take_along_axis(removed, order, axis=1)
        weights = self.weights
        if weights is not None:
            weights = np.take_along_axis(weights, order, axis=1)
        return replace(
            self,
            ids=np.where(gone, "", np.take_along_axis(self.ids, order, axis=1)),
            labels=np.where(gone, PADDING, np.take_along_axis(self.labels, order, axis=1)),
            distances=np.where(
                gone,
                self.distances.dtype.type(np.inf),
                np.take_along_axis(self.distances, order, 1),
            ),
            weights=weights,
        )

    @staticmethod
    def concatenate(blocks: Sequence[Neighbors]) -> Neighbors:
        """One block of all queries, in order, as wide as the widest. Needs at least one block."""
        k = max(block.k for block in blocks)
        blocks = [block if block.k == k else block.first(k) for block in blocks]
        sets = None
        if any(block.query_label_sets is not None for block in blocks):
            rows = [block.query_labels[:, None] for block in blocks]
            rows = [
                row if block.query_label_sets is None else block.query_label_sets
                for row, block in zip(rows, blocks, strict=True)
            ]
            widest = max(row.shape[1] for row in rows)
            sets = np.concatenate(
                [
                    np.pad(row, ((0, 0), (0, widest - row.shape[1])), constant_values=UNKNOWN)
                    for row in rows
                ]
            )
        weights = None
        if any(block.weights is not None for block in blocks):
            weights = np.concatenate(
                [
                    np.ones(block.labels.shape) if block.weights is None else block.weights
                    for block in blocks
                ]
            )
        return Neighbors(
            np.concatenate([block.query_ids for block in blocks]),
            np.concatenate([block.query_labels for block in blocks]),
            np.concatenate([block.ids for block in blocks]),
            np.concatenate([block.labels for block in blocks]),
            np.concatenate([block.distances for block in blocks]),
            sets,
            weights,
        )


def is_in(ids: np.ndarray, wanted: Collection[str]) -> np.ndarray:
    """Bool array of the shape of ``ids`` (array of str): which are in ``wanted``."""
    found = np.fromiter(map(wanted.__contains__, ids.ravel().tolist()), bool, count=ids.size)
    return found.reshape(ids.shape)


def read_json(path: str, block_rows: int = 1024) -> Iterator[Neighbors]:
    """Reads the paper's JSON table as blocks of at most ``block_rows`` queries.

    Memory is bounded by a block, whatever the file's size. A block is as wide as
    its longest row, shorter rows are padded; distances are float64 as written.
    Raises VisualMemoryError for a file that is not such a table, naming the query.
    """
    with storage.open_read(path) as file:
        rows = _parse(path, file)
        while batch := list(itertools.islice(rows, block_rows)):
            yield _block(batch)


def _parse(path: str, file: Any) -> Iterator[tuple]:
    """Yields (query id, true labels, ids, labels, distances), the last three of one length."""
    query_id = None
    try:
        if file.read(64).lstrip()[:1] != b"{":
            raise VisualMemoryError(
                f"{path!r} is not a neighbour table: it does not begin with '{{'. "
                "Give a JSON object with one entry per query id"
            )
        file.seek(0)
        for query_id, row in ijson.kvitems(file, "", use_float=True):
            yield (query_id, *_parse_row(row))
    except (ijson.JSONError, UnicodeDecodeError) as error:
        place = "at its first query" if query_id is None else f"after query {query_id!r}"
        reason = str(error).partition("\n")[0]  # yajl adds lines that quote the input
        raise VisualMemoryError(
            f"{path!r} is not valid JSON {place}: {reason}. The file may be cut short; "
            "copy or export it again"
        ) from error
    except _BadRow as error:
        raise VisualMemoryError(
            f"query {query_id!r} of {path!r}: {error}. Correct this entry or export the table again"
        ) from error


class _BadRow(Exception):
    """Why a row cannot be used; the query and the file are added where they are known."""


def _parse_row(row: Any) -> tuple:
    if not isinstance(row, dict):
        raise _BadRow(f"expected an object, found {type(row).__name__}")
    names = ("image_class", "neighbor_image_ids", "neighbor_classes", "neighbor_distances")
    for name in names:
        if name not in row:
            raise _BadRow(f"the key {name!r} is missing")
    truth, ids, labels, distances = (row[name] for name in names)
    if not isinstance(ids, list) or not all(isinstance(id, str) for id in ids):
        raise _BadRow("'neighbor_image_ids' must be a list of strings")
    label_array = _numbers(labels, "neighbor_classes", "integers", "i")
    distance_array = _numbers(distances, "neighbor_distances", "numbers", "if")
    if not len(ids) == len(label_array) == len(distance_array):
        raise _BadRow(
            f"{len(ids)} neighbor_image_ids, {len(label_array)} neighbor_classes and "
            f"{len(distance_array)} neighbor_distances: the three lists must be equally long"
        )
    if (label_array < 0).any():
        raise _BadRow(f"class {label_array.min()} in 'neighbor_classes' is negative")
    if not np.isfinite(distance_array).all():
        raise _BadRow("'neighbor_distances' must be finite")
    # A list stays a list: a query with one of several labels is told from one with one label.
    _numbers(truth if isinstance(truth, list) else [truth], "image_class", "integers", "i")
    return truth, ids, label_array, distance_array


def _numbers(values: Any, name: str, what: str, kinds: str) -> np.ndarray:
    try:
        array = np.asarray(values if isinstance(values, list) else None)
    except ValueError:  # nested lists of different lengths
        array = np.asarray(None)
    if array.ndim != 1 or (array.size and array.dtype.kind not in kinds):
        raise _BadRow(f"{name!r} must hold {what}")
    return array.astype(np.int64) if "f" not in kinds else array.astype(np.float64)


def _block(rows: Sequence[tuple]) -> Neighbors:
    truths, ids, labels, distances = zip(*(row[1:] for row in rows), strict=True)
    lengths = np.array([len(row) for row in ids])
    shape = (len(rows), int(lengths.max()))
    valid = np.arange(shape[1]) < lengths[:, None]
    block_ids = np.full(shape, "", dtype=object)
    block_ids[valid] = list(itertools.chain.from_iterable(ids))
    block_labels = np.full(shape, PADDING, dtype=np.int64)
    block_labels[valid] = np.concatenate(labels)
    block_distances = np.full(shape, np.inf)
    block_distances[valid] = np.concatenate(distances)
    sets = None
    if any(isinstance(truth, list) for truth in truths):
        lists = [truth if isinstance(truth, list) else [truth] for truth in truths]
        sets = np.full((len(rows), max(1, *map(len, lists))), UNKNOWN, dtype=np.int64)
        for row, truth in zip(sets, lists, strict=True):
            row[: len(truth)] = truth
    return Neighbors(
        strings([row[0] for row in rows]),
        np.array(truths, dtype=np.int64) if sets is None else sets[:, 0].copy(),
        block_ids,
        block_labels,
        block_distances,
        sets,
    )


def write_json(path: str, blocks: Iterable[Neighbors], featurizer: str) -> None:
    """Writes blocks as the paper's JSON table, row by row; padding is left out.

    ``featurizer`` names the encoder, the same for every row.
    """
    with storage.write_atomic(path) as file:
        separator = "{\n"
        for block in blocks:
            for index, query_id in enumerate(block.query_ids):
                row = {
                    "featurizer": featurizer,
                    "image_id": query_id,
                    "image_class": _truth(block, index),
                    **_neighbor_lists(block, index),
                }
                file.write(f"{separator}{json.dumps(query_id)}: {json.dumps(row)}".encode())
                separator = ",\n"
        file.write(b"{}\n" if separator == "{\n" else b"\n}\n")


def _truth(block: Neighbors, index: int) -> int | list[int]:
    if block.query_label_sets is None:
        return int(block.query_labels[index])
    return [label for label in block.query_label_sets[index].tolist() if label != UNKNOWN]


def _neighbor_lists(block: Neighbors, index: int) -> dict[str, list]:
    valid = block.labels[index] != PADDING
    return {
        "neighbor_image_ids": block.ids[index][valid].tolist(),
        "neighbor_classes": block.labels[index][valid].tolist(),
        "neighbor_distances": block.distances[index][valid].tolist(),
    }


def to_arrow(block: Neighbors) -> pa.Table:
    """The block as a table of NEIGHBORS_SCHEMA: Q rows, every list K long, padding included.

    Distances become float32. Raises VisualMemoryError for a block with label sets.
    """
    if block.query_label_sets is not None:
        raise VisualMemoryError(
            "a neighbour table with several true labels per query has no Parquet form. "
            "Write it as JSON"
        )
    offsets = np.arange(len(block) + 1, dtype=np.int32) * block.k

    def lists(values: np.ndarray, type: pa.DataType) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, pa.array(values.ravel(), type))

    return pa.Table.from_arrays(
        [
            pa.array(block.query_ids, pa.string()),
            pa.array(block.query_labels, pa.int64()),
            lists(block.ids, pa.string()),
            lists(block.labels, pa.int64()),
            lists(block.distances.astype(np.float32), pa.float32()),
            pa.nulls(len(block), pa.list_(pa.float32()))
            if block.weights is None
            else lists(block.weights, pa.float32()),
        ],
        schema=NEIGHBORS_SCHEMA,
    )


def from_arrow(table: pa.Table | pa.RecordBatch) -> Neighbors:
    """The block that ``to_arrow`` wrote, distances as float32.

    The column of weights may be missing. Raises VisualMemoryError when the lists are not
    all equally long.
    """
    ids, labels, distances = (
        _matrix(table, name) for name in ("neighbor_ids", "neighbor_labels", "neighbor_distances")
    )
    weights = None
    if "neighbor_weights" in table.schema.names:
        column = table.column("neighbor_weights")
        if column.null_count < len(column):
            weights = _matrix(table, "neighbor_weights")
    if not ids.shape == labels.shape == distances.shape:
        raise VisualMemoryError(
            f"a neighbour table has {ids.shape[1]} ids, {labels.shape[1]} labels and "
            f"{distances.shape[1]} distances a row; they must agree. Write the table again"
        )
    return Neighbors(
        np.asarray(table.column("query_id"), dtype=object),
        np.asarray(table.column("label"), dtype=np.int64),
        ids.astype(object, copy=False),
        labels,
        distances,
        weights=weights,
    )


def _matrix(table: pa.Table | pa.RecordBatch, name: str) -> np.ndarray:
    column = table.column(name)
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    values = column.flatten().to_numpy(zero_copy_only=False)
    k = len(values) // max(1, len(column))
    lengths = column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    if not (lengths == k).all():
        raise VisualMemoryError(
            f"the lists of column {name!r} of a neighbour table differ in length "
            f"({lengths.min()} to {lengths.max()}). Pad short rows with id '', label {PADDING} "
            "and distance infinity, as to_arrow does"
        )
    return values.reshape(len(column), k)
