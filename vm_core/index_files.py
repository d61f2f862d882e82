"""The files of an index on a store: a manifest's entry of a partition, opened and checked."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from pydantic import BaseModel, NonNegativeInt, SerializeAsAny, field_validator

from vm_core import index, partitions, storage
from vm_core.errors import DamagedError, VisualMemoryError
from vm_core.index import Index, TopK
from vm_core.partitions import Members, Partition
from vm_core.relative_paths import Files, RelativePath


class PartitionEntry(BaseModel):
    """One partition of the index, as a manifest has it.

    cell: of the partitioner. count: rows, of which ``home`` belong to this cell and the
    others are copies. bytes: of all its files, whose SHA-256 ``files`` has. folder: named
    for them, so that two attempts that wrote different files are in different folders.
    """

    folder: RelativePath
    cell: NonNegativeInt
    count: NonNegativeInt
    home: NonNegativeInt
    bytes: NonNegativeInt
    index: SerializeAsAny[Index]
    files: Files

    @field_validator("index", mode="before")
    @classmethod
    def _index(cls, value: Any) -> Index:
        return index.parse(value)


def is_complete(root: str, entry: PartitionEntry) -> bool:
    """Whether a partition's files are all there and as they were written. Reads them."""
    folder = storage.join(root, entry.folder)
    return storage.is_directory(folder) and not storage.damaged(folder, entry.files)


def read_centroids(path: str) -> np.ndarray:
    """(C, D) float32: the centroids of the cells. Raises DamagedError."""
    return parse_centroids(path, storage.read_bytes(path))


def parse_centroids(path: str, data: bytes) -> np.ndarray:
    """The centroids in the bytes of a file; path: of the file. Raises DamagedError."""
    try:
        centroids = np.load(io.BytesIO(data), allow_pickle=False)
        if centroids.ndim != 2 or centroids.dtype != np.float32 or not np.isfinite(centroids).all():
            raise ValueError("it is no matrix of finite float32 numbers")
    except (ValueError, EOFError, OSError) as error:
        raise DamagedError(f"{path} is damaged: {error}. Build the memory again") from error
    return centroids


def open_partition(root: str, entry: PartitionEntry, trust_files: bool = False) -> Partition:
    """Opens a partition, its index ready to search.

    trust_files: whether files on a disk are opened without comparing them with their SHA-256.
    Raises DamagedError for files that are missing or damaged, and so does the search, for
    vectors that are not of unit length.
    """
    with local_files(root, entry, None, trust_files) as local:
        partition = partitions.open_partition(local, entry.index)
        _check_count(root, entry, partition.members)
    return replace(partition, search=_naming(partition.search, storage.join(root, entry.folder)))


def _naming(search: TopK, folder: str) -> TopK:
    """The search, whose errors name the partition."""

    def named(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        try:
            return search(queries, k)
        except DamagedError as error:
            raise DamagedError(
                f"partition {folder}: {error}. Compare the memory with its digests: visual-memory "
                "inspect MEMORY --verify"
            ) from error

    return named


_verified: set[tuple[str, str, str]] = set()  # of this process: path, stamp, SHA-256


@contextlib.contextmanager
def local_files(
    root: str,
    entry: PartitionEntry,
    names: Sequence[str] | None = None,
    trust_files: bool = False,
) -> Iterator[str]:
    """A local folder with a partition's files, or those named, to be opened inside the block.

    Raises DamagedError for files that are missing or damaged. A download is always compared
    with the checksums, a file on a disk once by each process.
    """
    folder = storage.inside(root, entry.folder)
    files = {name: entry.files[name] for name in names or entry.files}
    try:
        with storage.local_copy(folder, list(files)) as local:
            if not storage.is_local(folder):
                _check_files(folder, storage.damaged(local, files))
            elif not trust_files:
                _verify_once(folder, files)
            yield local
    except Exception as error:  # whatever Arrow, NumPy or ScaNN make of it
        if not isinstance(error, VisualMemoryError) or isinstance(error, FileNotFoundError):
            _check_files(folder, storage.damaged(folder, files), error)
        raise


def _verify_once(folder: str, files: Mapping[str, str]) -> None:
    def key(name: str) -> tuple[str, str, str]:
        path = storage.join(folder, name)
        return path, storage.stamp(path), files[name]

    fresh = {name: digest for name, digest in files.items() if key(name) not in _verified}
    _check_files(folder, storage.damaged(folder, fresh))
    _verified.update(map(key, fresh))


def _check_files(folder: str, damaged: Mapping[str, str], cause: Exception | None = None) -> None:
    if damaged:
        said = "; ".join(f"{name} {what}" for name, what in damaged.items())
        said += f" ({type(cause).__name__}: {str(cause).partition(chr(10))[0]})" if cause else ""
        raise DamagedError(
            f"partition {folder}: {said}. Restore its files, or remove the folder and start the "
            "build again"
        ) from cause


def _check_count(root: str, entry: PartitionEntry, members: Members) -> None:
    if not len(members) == len(members.vectors) == entry.count:
        raise VisualMemoryError(
            f"partition {storage.join(root, entry.folder)} has {len(members):,} rows and "
            f"{len(members.vectors):,} vectors where the manifest says {entry.count:,}: files are "
            "missing or cut off. Restore them, or remove the folder and start the build again"
        )
