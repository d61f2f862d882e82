"""A visual memory on disk: immutable files, one manifest a version, one pointer to the newest.

CURRENT                      the current version's name, swapped atomically
versions/000001.json         its manifest: everything below, by relative path
builds/FINGERPRINT/          what one build wrote; FINGERPRINT covers inputs and settings
  embeddings-00000-of-00004.tfrecord
  thumbnails-00000-of-00004.parquet
  quarantine-00000-of-00004.parquet
  shard-00000-of-00004.json  written last: this shard is complete
  classes.parquet
  index-RECIPE/centroids.npy   of the partitioner, if there is more than one cell
  index-RECIPE/partition-00000-FILES/
  index-RECIPE/partition-00000.json   written last: which folder is the partition
weights/FINGERPRINT/         weights of pruned items, see vm_core.weights
work/FINGERPRINT/            checkpoints of an unfinished build
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Sequence
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import (
    BaseModel,
    NonNegativeInt,
    PositiveInt,
    SerializeAsAny,
    field_validator,
    model_validator,
)

from vm_core import encoders, index_files, partitions, sealed, storage, weights
from vm_core.classes import ClassTable
from vm_core.encoders import Encoder, _trust
from vm_core.errors import DamagedError, VisualMemoryError
from vm_core.index_files import PartitionEntry
from vm_core.partitions import Partition
from vm_core.recall import Recall
from vm_core.records import EmbeddingBlock, shard_of
from vm_core.relative_paths import Files, RelativeName, RelativePath
from vm_core.search import PartitionCache, Router, Searcher
from vm_core.shards import read_shard
from vm_core.tables import parse_table, read_some
from vm_core.untrusted import first_error, parse_json
from vm_core.weights import WeightsEntry

FORMAT = 4

THUMBNAILS_SCHEMA = pa.schema([("id", pa.string()), ("jpeg", pa.binary())])

_POINTER = "CURRENT"
_REMEDY = "Restore it from a copy, or build the memory again"

_log = logging.getLogger(__name__)


def _is_of_shard(shard: int, shards: int, id: str) -> bool:
    return shard_of(id, shards) == shard


def _check_named(files: Files, *names: str | None) -> None:
    if missing := {name for name in names if name is not None} - files.keys():
        raise ValueError(f"there is no SHA-256 of {sorted(missing)}")


class ShardEntry(BaseModel):
    """One shard: its files, relative to the memory, with the SHA-256 of each, and counts.

    batch_size: the smallest number of images that was encoded at a time, 0 if none was.
    class_counts: of classes.pack_counts; a manifest has those of all shards together alone,
    since there may be tens of thousands of both shards and classes.
    """

    embeddings: RelativePath
    files: Files
    thumbnails: RelativePath | None
    quarantine: RelativePath
    bytes: NonNegativeInt
    dimension: NonNegativeInt
    read: NonNegativeInt
    embedded: NonNegativeInt
    quarantined: NonNegativeInt
    duplicates: NonNegativeInt
    class_counts: str
    source_counts: dict[str, NonNegativeInt]
    reasons: dict[str, NonNegativeInt]
    batch_size: NonNegativeInt = 0

    @model_validator(mode="after")
    def _check(self) -> ShardEntry:
        _check_named(self.files, self.embeddings, self.thumbnails)
        return self


class Manifest(BaseModel):
    """What a version of a memory consists of.

    class_counts: rows by label, ascending.
    probes: cells that a query visits. recall: None where the search is exact. new_classes:
    labels that the last version of another build did not have. files: the class table and the
    centroids, with the SHA-256 of each.
    """

    format: int
    version: str
    created: str
    content_digest: str
    build: RelativeName
    encoder: SerializeAsAny[Encoder]
    encoder_fingerprint: str
    dimension: NonNegativeInt
    dtype: Literal["float32", "float16", "bfloat16"]
    classes: RelativePath
    class_counts: dict[NonNegativeInt, NonNegativeInt]
    shards: list[ShardEntry]
    centroids: RelativePath | None
    probes: PositiveInt
    partitions: list[PartitionEntry]
    recall: Recall | None
    new_classes: list[NonNegativeInt]
    weights: WeightsEntry | None = None
    files: Files
    config: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        _check_named(self.files, self.classes, self.centroids)
        return self

    @field_validator("encoder", mode="before")
    @classmethod
    def _encoder(cls, value: Any) -> Encoder:
        return encoders.parse(value)

    def total(self, count: str) -> int:
        """A count (read, embedded, quarantined, duplicates, bytes) over all shards."""
        return sum(getattr(shard, count) for shard in self.shards)

    def partition_files(self) -> dict[str, str]:
        """The SHA-256 of the partitions' files, by their path below the memory."""
        return {
            f"{entry.folder}/{name}": digest
            for entry in self.partitions
            for name, digest in entry.files.items()
        }

    def source_counts(self) -> dict[str, int]:
        return _add(shard.source_counts for shard in self.shards)

    def reasons(self) -> dict[str, int]:
        return _add(shard.reasons for shard in self.shards)


class Memory:
    """An opened version of a memory; the current one unless another is named."""

    def __init__(self, root: str, version: str | None = None, trust_files: bool = False):
        """Opens a version, the current one if it is None.

        trust_files: whether the files of a partition are opened without comparing them with
        their SHA-256, which takes a second for a few gigabytes. Each process does that once
        for each partition.
        """
        self.root = storage.absolute(root)
        self.trust_files = trust_files
        name = _checked_name(version) if version else current_version(self.root)
        if name is None:
            cause = "has no file CURRENT" if storage.exists(self.root) else "does not exist"
            raise VisualMemoryError(
                f"{root!r} is not a visual memory: it {cause}. Build one with "
                f"visual-memory build --config CONFIG --set memory={root}"
            )
        path = storage.join(self.root, "versions", f"{name}.json")
        data = storage.read_if_exists(path)
        if data is None:
            raise VisualMemoryError(f"{root!r} has no version {name!r}: {path} does not exist")
        self._file = path
        self.manifest = _parse_manifest(path, data)
        if self.manifest.version != name:
            raise DamagedError(
                f"{path} is damaged: it describes version {self.manifest.version!r}. {_REMEDY}"
            )

    def with_manifest(self, manifest: Manifest) -> Memory:
        """The memory as another manifest of the same build describes it."""
        other = object.__new__(Memory)
        other.root, other._file, other.manifest = self.root, self._file, manifest
        other.trust_files = self.trust_files
        return other

    def __getstate__(self) -> dict[str, Any]:
        # Many steps of a pipeline carry a memory, and its manifest grows with it. So the
        # lists of files stay behind, and workers read them where they are.
        bare = self.manifest.model_copy(update={"shards": [], "partitions": []})
        stamp = storage.stamp(self._file)
        return {
            "root": self.root,
            "trust_files": self.trust_files,
            "_file": self._file,
            "manifest": bare,
            "_stamp": stamp,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        lists = _manifest_of_worker(state["_file"], state.pop("_stamp"))
        update = {"shards": lists.shards, "partitions": lists.partitions}
        self.__dict__.update(state, manifest=state["manifest"].model_copy(update=update))

    @cached_property
    def classes(self) -> ClassTable:
        path = self.manifest.classes
        return ClassTable.parse(self.path(path), self._read(path, self.manifest.files[path]))

    def path(self, relative: str) -> str:
        """The path of a file of the memory. Raises VisualMemoryError if it leads outside."""
        return storage.inside(self.root, relative)

    def _read(self, relative: str, sha256: str) -> bytes:
        """A file of the memory. Raises DamagedError if it is not as it was written."""
        return storage.read_verified(self.path(relative), sha256, _REMEDY)

    def files(self) -> dict[str, str]:
        """The SHA-256 of the files that are this version, by their path below the memory."""
        files = dict(self.manifest.files)
        if self.manifest.weights is not None:
            files |= self.manifest.weights.files
        for shard in self.manifest.shards:
            files |= shard.files
        return files | self.manifest.partition_files()

    def check_files(self) -> int:
        """Reads every file of this version and returns their number.

        Raises VisualMemoryError if one is not as it was written.
        """
        files = self.files()
        damaged = storage.damaged(self.root, files)
        if damaged:
            some = "".join(f"\n  {name} {what}" for name, what in list(damaged.items())[:20])
            remedy = "Restore them from a copy, or remove them and start the build again"
            if self.manifest.weights is not None and damaged.keys() & self.manifest.weights.files:
                remedy += "; take weights back with visual-memory prune --undo"
            raise VisualMemoryError(
                f"{len(damaged):,} of {len(files):,} files of {self.root}, version "
                f"{self.manifest.version}, are missing or damaged:{some}\n{remedy}"
            )
        return len(files)

    def first_rows(self) -> np.ndarray:
        """(shards + 1,) int64: the number of each shard's first row, and of all rows."""
        return np.cumsum([0, *(shard.embedded for shard in self.manifest.shards)])

    def read_shard(self, number: int) -> EmbeddingBlock:
        """The rows of one shard. Raises DamagedError if it is not as it was written."""
        shard = self.manifest.shards[number]
        path = self.path(shard.embeddings)
        block = read_shard(path, None, shard.embedded)
        if len(block) and shard_of(block.ids[0], len(self.manifest.shards)) != number:
            raise DamagedError(f"{path} has the rows of another shard. {_REMEDY}")
        return block

    def rows(self, number: int) -> pa.Table:
        """The rows of one partition, of partitions.ROWS_SCHEMA. Raises if they are damaged."""
        entry = self.manifest.partitions[number]
        name = f"{entry.folder}/{partitions.ROWS}"
        data = self._read(name, entry.files[partitions.ROWS])
        return parse_table(self.path(name), data, _REMEDY, partitions.ROWS_SCHEMA).combine_chunks()

    def open_partition(self, number: int) -> Partition:
        """Loads one partition of the index, ready to search. Raises DamagedError."""
        entry = self.manifest.partitions[number]
        partition = index_files.open_partition(self.root, entry, self.trust_files)
        vectors = partition.members.vectors
        if entry.count and vectors.shape[1] != self.manifest.dimension:
            raise DamagedError(
                f"the vectors of {self.path(entry.folder)} have {vectors.shape[1]} dimensions, the "
                f"memory {self.manifest.dimension}. {_REMEDY}"
            )
        if self.manifest.weights is None:
            return partition
        return weights.apply(partition, weights.read(self.root, self.manifest.weights, number))

    def removed_ids(self) -> pa.ChunkedArray:
        """Ids of the items that a pruning has removed, as large_string; some more than once."""
        manifest = self.manifest
        if manifest.weights is None or not manifest.weights.removed:
            return pa.chunked_array([], pa.large_string())
        return weights.removed_ids(self.root, manifest.weights, len(manifest.partitions))

    def router(self, probes: int | None = None) -> Router:
        """What sends queries to partitions; to the manifest's number of cells if None."""
        path = self.manifest.centroids
        cells = tuple(entry.cell for entry in self.manifest.partitions)
        centroids = None
        if path is not None:
            data = self._read(path, self.manifest.files[path])
            centroids = index_files.parse_centroids(self.path(path), data)
        if max(cells, default=0) >= (1 if centroids is None else len(centroids)):
            raise DamagedError(f"{self._file} has partitions of unknown cells. {_REMEDY}")
        return Router(centroids, cells, probes or self.manifest.probes)

    def partition_cache(self) -> PartitionCache:
        """Opens partitions and keeps some of them open."""
        return PartitionCache(
            self.open_partition, [entry.bytes for entry in self.manifest.partitions]
        )

    def searcher(self, probes: int | None = None) -> Searcher:
        """Searches this memory in this process."""
        return Searcher(self.router(probes), self.partition_cache())

    def encoder(self, path: str | None = None) -> Encoder:
        """The encoder for queries, from ``path`` if the model has moved.

        Raises VisualMemoryError if it is not the encoder that the memory was built with, and
        without a path if the user has not trusted it (see vm_core.encoders._trust).
        """
        encoder = self.manifest.encoder
        if path is not None:
            encoder = encoder.model_copy(update={"path": path})
        if encoder.fingerprint() != self.manifest.encoder_fingerprint:
            raise VisualMemoryError(
                f"the encoder at {encoder.path!r} has fingerprint {encoder.fingerprint()}, the "
                f"memory {self.root!r} was built with {self.manifest.encoder_fingerprint}: their "
                "embeddings cannot be compared. Give the original model with --encoder PATH, or "
                "build the memory again"
            )
        if path is None:
            _trust.check(self.manifest.encoder_fingerprint, encoder.path, self.root)
        else:
            _trust.trust(self.manifest.encoder_fingerprint)
        return encoder

    def thumbnails(self, ids: Iterable[str]) -> dict[str, bytes]:
        """JPEG thumbnails of the given ids, as far as the memory keeps them."""
        shards = self.manifest.shards
        wanted: dict[int, list[str]] = {}
        for id in set(ids):
            wanted.setdefault(shard_of(id, len(shards)), []).append(id)
        found: dict[str, bytes] = {}
        for shard, members in wanted.items():
            name = shards[shard].thumbnails
            if name is not None:
                owns = partial(_is_of_shard, shard, len(shards))
                table = read_some(self.path(name), members, _REMEDY, THUMBNAILS_SCHEMA, owns)
                found |= dict(zip(table["id"].to_pylist(), table["jpeg"].to_pylist(), strict=True))
        return found


def _parse_manifest(path: str, data: bytes) -> Manifest:
    try:
        settings = parse_json(data)
        if not isinstance(settings, dict):
            raise ValueError("it is not a JSON object")
        if settings.get("format") != FORMAT:
            raise VisualMemoryError(
                f"{path} has format {settings.get('format')!r}, this program reads {FORMAT}. "
                "Build the memory again, in another folder, or use the release that wrote it"
            )
        return Manifest.model_validate(sealed.verify(data))
    except (ValueError, TypeError, RecursionError) as error:
        reason = first_error(error)
        raise DamagedError(f"{path} is damaged: {reason}. {_REMEDY}") from error


@lru_cache(maxsize=1)
def _manifest_of_worker(path: str, stamp: str) -> Manifest:
    """One manifest for all steps and threads of a process. stamp: of the file's content."""
    return _parse_manifest(path, storage.read_bytes(path))


def current_version(root: str) -> str | None:
    """The name of the current version, or None where no memory was published."""
    pointer = storage.read_if_exists(storage.join(root, _POINTER))
    return None if pointer is None else _name(root, pointer)


def publish(root: str, manifest: Manifest, base: str | None = None) -> Manifest:
    """Writes the manifest as the next version and swaps the pointer to it.

    Where the current version is the same, nothing is written and that version is returned:
    a repeated attempt publishes once. Every publisher's version has a number
    of its own, and the pointer only goes up: of two at the same time both are kept, and the
    higher one is current in the end.

    base: the version that this one was made from. Raises VisualMemoryError if that is not
    the current one any more, since what came between would be taken back.
    """
    claimed: Manifest | None = None
    while True:
        pointer = storage.read_if_exists(storage.join(root, _POINTER))
        current = None if pointer is None else _name(root, pointer)
        if current is not None:
            published = Memory(root, current).manifest
            if _identity(published) == _identity(manifest):
                return published
        if base is not None and current != base:
            raise VisualMemoryError(
                f"{root!r} is at version {current}, and what was to be published was made from "
                f"version {base}: somebody else has published since. Run the command again"
            )
        if claimed is None:
            claimed = _claim(root, manifest)
        elif current is not None and int(current) > int(claimed.version):
            _log.warning(
                "version %s of %s was published at the same time as %s and is the current one",
                *(current, root, claimed.version),
            )
            return claimed
        named = sealed.seal(f"{claimed.version}\n".encode())
        if storage.swap(storage.join(root, _POINTER), pointer, named):
            _log.info("published version %s of %s", claimed.version, root)
            return claimed


def _identity(manifest: Manifest) -> list[Any]:
    """What makes another version: content, how it is searched, and which files hold it."""
    folders = [entry.folder for entry in manifest.partitions]
    search = [manifest.probes, manifest.config.get("partitioning")]
    return [manifest.content_digest, manifest.build, search, folders]


def _claim(root: str, manifest: Manifest) -> Manifest:
    """Writes the manifest under the next free number; nobody else has, or overwrites, that."""
    number = max([0, *_version_numbers(root)])
    while True:
        number += 1
        named = manifest.model_copy(update={"version": f"{number:06d}"})
        path = storage.join(root, "versions", f"{named.version}.json")
        if storage.swap(path, None, sealed.sign(named.model_dump(mode="json"))):
            return named


def _name(root: str, pointer: bytes) -> str:
    """The version that a pointer names. It has the digest of the name as well."""
    name = (sealed.unseal(pointer) or b"").decode(errors="replace").strip()
    if not _is_version(name):
        raise DamagedError(
            f"{storage.join(root, _POINTER)} is damaged: it names no version. Name one with "
            f"--version, or restore the file; the versions are in {storage.join(root, 'versions')}"
        )
    return name


def _is_version(name: str) -> bool:
    return re.fullmatch("[0-9]{1,12}", name) is not None


def _checked_name(version: str) -> str:
    if not _is_version(version):
        raise VisualMemoryError(f"version {version!r} is not a number such as 000001")
    return f"{int(version):06d}"


def remove_unnamed(root: str, folders: Sequence[str]) -> None:
    """Removes those of the folders, relative to the memory, that no version names.

    A folder that the newest version lacks may be an earlier one's: a partition that had lost
    files was built again, or its folder was named in another way. Manifests are searched as
    text, since they may be of another format.
    """
    if folders:
        for file in storage.walk(storage.join(root, "versions")):
            text = storage.read_bytes(file.path)
            folders = [folder for folder in folders if f'"{folder}"'.encode() not in text]
    for folder in folders:
        storage.remove_directory(storage.join(root, folder))


def _version_numbers(root: str) -> list[int]:
    # Not a glob pattern: the memory's own path may have brackets in it.
    try:
        files = storage.walk(storage.join(root, "versions"))
    except FileNotFoundError:
        files = []
    names = [file.path.rpartition("/")[2] for file in files]
    found = [re.fullmatch(r"([0-9]{1,12})\.json", name) for name in names]
    return [int(match[1]) for match in found if match]


def _add(counts: Iterable[dict[Any, int]]) -> dict[Any, int]:
    total: dict[Any, int] = {}
    for each in counts:
        for key, count in each.items():
            total[key] = total.get(key, 0) + count
    return dict(sorted(total.items()))
