"""The steps of a build, as plain functions of a plan. Beam only strings them together.

split -> embed_split -> by_shard -> write_shard_files -> build_partition -> publish
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, SerializeAsAny, field_validator

from vm_core import encoders, index, memory, plugins, sources, storage
from vm_core.classes import ClassTable
from vm_core.embedding import EmbedPlan, ImageSettings, gather
from vm_core.encoders import Encoder
from vm_core.errors import VisualMemoryError
from vm_core.failures import check_failures, count_reasons, quarantine_table
from vm_core.index import Index
from vm_core.memory import Manifest, PartitionEntry, ShardEntry
from vm_core.progress import report
from vm_core.recall import measure_recall
from vm_core.records import Embedded, EmbeddingBlock
from vm_core.shards import write_shard
from vm_core.sources import Source, Split
from vm_core.tables import write_table


class BuildConfig(plugins.Settings):
    """One build of a memory.

    memory: where it goes, a folder or a bucket's prefix. shards: into how many files
    the embeddings are spread; about 50,000 rows each. dtype: how they are stored.
    max_failure_share: share of the images that may be unusable before the build fails.
    minimum_recall: recall at 10, against exact search on held-out queries, under which an
    approximate index is not published.
    """

    memory: str
    sources: tuple[SerializeAsAny[Source], ...] = Field(min_length=1)
    encoder: SerializeAsAny[Encoder]
    images: ImageSettings = ImageSettings()
    shards: int = Field(4, ge=1, le=99_999)
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    index: SerializeAsAny[Index] = Field(default_factory=lambda: index.parse({"kind": "auto"}))
    max_failure_share: float = Field(0.01, ge=0, le=1)
    minimum_recall: float = Field(0.9, ge=0, le=1)

    @field_validator("sources", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> tuple[Source, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError("must be a list of sources, each with kind and path")
        return tuple(sources.parse(each) for each in value)

    @field_validator("encoder", mode="before")
    @classmethod
    def _encoder(cls, value: Any) -> Encoder:
        return encoders.parse(value)

    @field_validator("index", mode="before")
    @classmethod
    def _index(cls, value: Any) -> Index:
        return index.parse(value)


@dataclass(frozen=True)
class BuildPlan:
    """A configuration with everything known that can be known before reading an image.

    ``fingerprint`` covers the inputs and all that shapes the shards: the same one means
    the same shards, and a shard that is complete under it is not made again.
    """

    root: str
    config: BuildConfig
    encoder_fingerprint: str
    classes: ClassTable
    fingerprint: str

    @property
    def embedding(self) -> EmbedPlan:
        return EmbedPlan(
            self.config.sources,
            self.classes,
            self.config.encoder,
            self.config.images,
            self.path(f"work/{self.fingerprint}"),
        )

    @property
    def folder(self) -> str:
        return f"builds/{self.fingerprint}"

    def path(self, relative: str) -> str:
        return storage.join(self.root, relative)

    def shard_file(self, kind: str, shard: int, suffix: str) -> str:
        """Relative path of one of a shard's files."""
        return f"{self.folder}/{kind}-{shard:05d}-of-{self.config.shards:05d}.{suffix}"


def plan_build(config: BuildConfig) -> tuple[BuildPlan, list[tuple[int, Split]]]:
    """Lists the sources. Returns the plan and the splits to read, each with its source's number."""
    root = storage.absolute(config.memory)
    encoder_fingerprint = config.encoder.fingerprint()
    listings = [source.listing() for source in config.sources]
    names: dict[str, str] = {}
    for listing in listings:
        names.update(listing.class_names)
    classes = ClassTable.from_keys([listing.class_keys for listing in listings], names)
    splits = [(i, split) for i, listing in enumerate(listings) for split in listing.splits]
    identity = {
        "format": memory.FORMAT,
        "encoder": encoder_fingerprint,
        "batch_size": config.encoder.batch_size,
        "images": config.images.model_dump(),
        "shards": config.shards,
        "dtype": config.dtype,
        "classes": [classes.keys, classes.names],
        "sources": [source.model_dump(mode="json") for source in config.sources],
        "splits": [(i, split.version) for i, split in splits],
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return BuildPlan(root, config, encoder_fingerprint, classes, fingerprint), splits


def finished_shards(plan: BuildPlan) -> dict[int, ShardEntry]:
    """The shards that are complete under this plan's fingerprint."""
    finished = {}
    for shard in range(plan.config.shards):
        marker = plan.path(plan.shard_file("shard", shard, "json"))
        if storage.exists(marker):
            entry = ShardEntry.model_validate_json(storage.read_bytes(marker))
            if all(storage.exists(plan.path(name)) for name in entry.files):
                finished[shard] = entry
    return finished


def is_published(plan: BuildPlan) -> bool:
    """Whether the current version of the memory is the result of this very plan, and all there."""
    if memory.current_version(plan.root) is None:
        return False
    manifest = memory.Memory(plan.root).manifest
    return (
        manifest.build == plan.fingerprint
        and len(finished_shards(plan)) == plan.config.shards
        and all(
            partition.index == plan.config.index.choose(partition.count)
            and storage.exists(plan.path(f"{partition.folder}/partition.json"))
            for partition in manifest.partitions
        )
    )


def write_shard_files(plan: BuildPlan, shard: int, parts: Iterable[Embedded]) -> ShardEntry:
    """Writes one shard and its side tables; the marker that says so comes last.

    Rows are sorted by id; ``gather`` says which of several rows with one id stays.
    """
    gathered, duplicates = gather(parts)
    block, rejected = gathered.block, gathered.rejected
    files: dict[str, str] = {}
    embeddings = plan.shard_file("embeddings", shard, "tfrecord")
    summary = write_shard(plan.path(embeddings), block, plan.encoder_fingerprint, plan.config.dtype)
    files[embeddings] = summary.sha256
    thumbnails = None
    if plan.config.images.thumbnail_pixels:
        thumbnails = plan.shard_file("thumbnails", shard, "parquet")
        columns = {"id": list(block.ids), "jpeg": list(block.thumbnails)}  # type: ignore[arg-type]
        schema = pa.schema([("id", pa.string()), ("jpeg", pa.binary())])
        files[thumbnails] = write_table(plan.path(thumbnails), pa.table(columns, schema))
    quarantine = plan.shard_file("quarantine", shard, "parquet")
    files[quarantine] = write_table(plan.path(quarantine), quarantine_table(rejected))
    entry = ShardEntry(
        embeddings=embeddings,
        files=files,
        thumbnails=thumbnails,
        quarantine=quarantine,
        bytes=summary.bytes,
        dimension=summary.dimension,
        read=len(block) + len(rejected) + duplicates,
        embedded=len(block),
        quarantined=len(rejected),
        duplicates=duplicates,
        class_counts=dict(sorted(Counter(block.labels.tolist()).items())),
        source_counts=dict(sorted(Counter(block.sources).items())),
        reasons=count_reasons(rejected),
    )
    marker = plan.path(plan.shard_file("shard", shard, "json"))
    storage.write_bytes(marker, entry.model_dump_json(indent=1).encode())
    report("write", 1)
    return entry


def plan_partitions(
    plan: BuildPlan, entries: Sequence[ShardEntry]
) -> list[tuple[int, list[ShardEntry]]]:
    """The numbered partitions of the index, each with its shards: one partition has them all.

    Raises VisualMemoryError if more images failed than the configuration allows.
    """
    reasons: Counter[str] = Counter()
    for entry in entries:
        reasons.update(entry.reasons)
    check_failures(
        sum(entry.read for entry in entries),
        sum(entry.quarantined for entry in entries),
        reasons,
        plan.config.max_failure_share,
        plan.path(f"{plan.folder}/quarantine-*.parquet"),
    )
    return [(0, sorted(entries, key=lambda entry: entry.embeddings))]


def build_partition(plan: BuildPlan, number: int, entries: Sequence[ShardEntry]) -> PartitionEntry:
    """Builds the index of one partition from its shards, or finds it built."""
    rows = sum(entry.embedded for entry in entries)
    chosen = plan.config.index.choose(rows)
    recipe = _digest((chosen.model_dump(mode="json"), [entry.files for entry in entries]))
    folder = f"{plan.folder}/index-{recipe[:12]}/partition-{number:05d}"
    marker = plan.path(f"{folder}/partition.json")
    if storage.exists(marker):
        return PartitionEntry.model_validate_json(storage.read_bytes(marker))
    shards = [entry.embeddings for entry in entries if entry.embedded]

    @cache
    def read() -> EmbeddingBlock:
        return index.read_rows([plan.path(shard) for shard in shards])

    with storage.write_directory_atomic(plan.path(folder)) as local:
        chosen.build(read, local)
        files = index.checksums(local)
    partition = PartitionEntry(
        folder=folder, shards=shards, count=rows, index=chosen, files=files, recall=None
    )
    if chosen.kind != "exact":
        opened = chosen.open([plan.path(shard) for shard in shards], plan.path(folder))
        partition.recall = measure_recall(opened.search, read())
    storage.write_bytes(marker, partition.model_dump_json(indent=1).encode())
    report("index", 1)
    return partition


def publish(
    plan: BuildPlan, partitions: Iterable[PartitionEntry], entries: Iterable[ShardEntry]
) -> Manifest:
    """Publishes the finished build as the memory's next version; removes its checkpoints.

    Raises VisualMemoryError if an index finds too little of the exact answer.
    """
    entries = sorted(entries, key=lambda entry: entry.embeddings)
    partitions = sorted(partitions, key=lambda entry: entry.folder)
    for partition in partitions:
        _check_recall(partition, plan.config.minimum_recall)
    classes = f"{plan.folder}/classes.parquet"
    class_bytes = plan.classes.to_parquet()
    storage.write_bytes(plan.path(classes), class_bytes)
    manifest = Manifest(
        format=memory.FORMAT,
        version="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        content_digest=_digest(
            {
                "encoder": plan.encoder_fingerprint,
                "files": [sorted(entry.files.values()) for entry in entries],
                "classes": hashlib.sha256(class_bytes).hexdigest(),
                "index": [
                    [partition.index.model_dump(mode="json"), partition.count]
                    for partition in partitions
                ],
            }
        ),
        build=plan.fingerprint,
        encoder=plan.config.encoder.model_copy(
            update={"path": _portable_path(plan.config.encoder.path)}
        ),
        encoder_fingerprint=plan.encoder_fingerprint,
        dimension=max(entry.dimension for entry in entries),
        dtype=plan.config.dtype,
        classes=classes,
        shards=list(entries),
        partitions=list(partitions),
        config=plan.config.model_dump(mode="json"),
    )
    published = memory.publish(plan.root, manifest)
    storage.remove_directory(plan.path(f"work/{plan.fingerprint}"))
    _remove_leftovers(plan.path(plan.folder))
    logging.info("published version %s of %s", published.version, plan.root)
    return published


def _check_recall(partition: PartitionEntry, minimum: float) -> None:
    recall = 1.0 if partition.recall is None else partition.recall[10]
    if recall < minimum:
        raise VisualMemoryError(
            f"the {partition.index.kind} index of {partition.folder} has recall@10 {recall:.3f}; "
            f"minimum_recall is {minimum}. Search more of it (--set index.leaves_to_search=N, "
            "--set index.reorder=N), use --set index.kind=exact, or lower minimum_recall"
        )


def _remove_leftovers(folder: str) -> None:
    """Removes what attempts that were killed left under temporary names."""
    paths = (file.path[len(folder) :] for file in storage.walk(folder))
    found = (re.match(r".*?\.incomplete-[^/]*", path) for path in paths)
    for leftover in sorted({match[0] for match in found if match}):
        storage.remove_directory(folder + leftover)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _portable_path(path: str) -> str:
    """The encoder's path as other processes find it; hub handles stay as they are."""
    return storage.absolute(path) if storage.exists(path) else path
