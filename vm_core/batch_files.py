"""Files of record batches under numbered keys: a reader takes one key's and leaves the rest.

A stage writes one file for all its readers, and each reads what has its number. Beside
``NAME.arrow`` stands ``NAME.json``, written last and sealed: which batches are whose, the
SHA-256 of the file, and what else the writer had to say. Where it agrees the file is complete.
"""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import pyarrow as pa

from vm_core import sealed, storage
from vm_core.errors import DamagedError

BUNDLES = 1024
"""Into how many bundles shards are gathered at most: one writes a file, not each shard."""

Columns = dict[str, np.ndarray]
"""Column name to (N,) or (N, W) array, all of one N; text is an object array of str."""


class Writer:
    """Takes batches for a file; see ``writing``. facts: JSON values for the reader."""

    def __init__(self, file: storage.HashingWriter):
        self._file = file
        self._writer: pa.RecordBatchFileWriter | None = None
        self._written = 0
        self.batches: dict[int, list[int]] = {}
        self.facts: dict[str, Any] = {}

    def write(self, key: int, columns: Mapping[str, np.ndarray]) -> None:
        """Adds a batch under a key. All batches of a file have the same columns."""
        batch = pa.record_batch({name: _to_arrow(values) for name, values in columns.items()})
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._file, batch.schema)
        self._writer.write_batch(batch)
        self.batches.setdefault(key, []).append(self._written)
        self._written += 1

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


@contextmanager
def writing(path: str) -> Iterator[Writer]:
    """A file to be written, named without its suffix; it is complete when the block ends."""
    with storage.write_atomic(f"{path}.arrow") as file:
        hashing = storage.HashingWriter(file)
        writer = Writer(hashing)
        yield writer
        writer.close()
    marker = {
        "batches": writer.batches,
        "facts": writer.facts,
        "sha256": hashing.sha256.hexdigest(),
    }
    sealed.write_json(f"{path}.json", marker)


class BatchFile:
    """A complete file, named without its suffix."""

    def __init__(self, path: str):
        """Raises DamagedError, as the methods do, if the file is missing or damaged."""
        self._path = path
        marker = sealed.require_json(f"{path}.json")
        self._batches = {int(key): numbers for key, numbers in marker["batches"].items()}
        self.facts: dict[str, Any] = marker["facts"]

    @property
    def keys(self) -> list[int]:
        """The keys that have batches, ascending."""
        return sorted(self._batches)

    def read(self, key: int) -> Iterator[Columns]:
        """The batches under a key, in the order of writing; none for a key that has none."""
        for number in self._batches.get(key, ()):
            # Opened for each: a merge reads from a thousand of them side by side.
            path = f"{self._path}.arrow"
            with _readable(path), storage.open_read(path) as file:
                columns = _columns(pa.ipc.open_file(file).get_batch(number))
            yield columns

    def read_at_once(self, key: int) -> list[Columns]:
        """All batches under a key, for which the file is opened once."""
        numbers = self._batches.get(key, ())
        if not numbers:
            return []
        path = f"{self._path}.arrow"
        with _readable(path), storage.open_read(path) as file:
            reader = pa.ipc.open_file(file)
            return [_columns(reader.get_batch(number)) for number in numbers]


@contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.ENOENT):
            raise  # too many open files, no right to read: not the file's fault
        reason = str(error).partition("\n")[0]
        raise DamagedError(
            f"the unfinished work in {path} cannot be read: {type(error).__name__}: {reason}. "
            "Start the command again: it is made anew"
        ) from error


def first_of_bundles(shards: int) -> np.ndarray:
    """(B + 1,) int64: the first shard of each bundle of consecutive ones, and their number."""
    bundles = min(shards, BUNDLES)
    return np.arange(bundles + 1) * shards // max(1, bundles)


def is_complete(path: str) -> bool:
    """Whether a file, named without its suffix, is there and as it was written. Reads it."""
    marker = sealed.read_json(f"{path}.json")
    if marker is None:
        return False
    try:
        return bool(storage.sha256_file(f"{path}.arrow") == marker["sha256"])
    except FileNotFoundError:
        return marker["sha256"] == hashlib.sha256().hexdigest()


def _columns(batch: pa.RecordBatch) -> Columns:
    return {name: _to_numpy(batch.column(name)) for name in batch.schema.names}


def _to_arrow(values: np.ndarray) -> pa.Array:
    if values.dtype == bool:  # a byte each: Arrow's bits are slow to unpack
        values = values.view(np.uint8)
    flat = pa.array(np.ascontiguousarray(values).reshape(-1))
    return flat if values.ndim == 1 else pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def _to_numpy(column: pa.Array) -> np.ndarray:
    if pa.types.is_fixed_size_list(column.type):
        flat = _to_numpy(column.flatten())
        return flat.reshape(len(column), column.type.list_size)
    values = column.to_numpy(zero_copy_only=False)
    return values.view(bool) if values.dtype == np.uint8 else values
