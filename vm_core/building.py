"""The steps of a build, as plain functions of a plan. Beam only strings them together.

split -> embed_split -> by_shard -> write_shard_files -> (vm_core.indexing) -> publish
"""

from __future__ import annotations

import hashlib
import json
import logging
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, SerializeAsAny, field_validator

from vm_core import (
    encoders,
    index,
    indexing,
    measure,
    memory,
    plugins,
    recall,
    sealed,
    sources,
    storage,
)
from vm_core.classes import ClassTable, add_counts, pack_counts
from vm_core.embedding import EmbedPlan, ImageSettings, gather
from vm_core.encoders import Encoder, _trust
from vm_core.errors import DamagedError, VisualMemoryError
from vm_core.failures import check_failures, count_reasons, quarantine_table
from vm_core.index import Index
from vm_core.index_files import PartitionEntry
from vm_core.indexing import IndexPlan, ShardRows
from vm_core.memory import Manifest, ShardEntry
from vm_core.partitioning import Partitioning
from vm_core.progress import report
from vm_core.recall import Hits, Recall
from vm_core.records import Embedded, count_images
from vm_core.shards import write_shard
from vm_core.sources import Source, Split
from vm_core.tables import write_table

_log = logging.getLogger(__name__)

_HASHED_BYTES = 64 << 30  # what a launcher reads in a minute or so from a disk


class BuildConfig(plugins.Settings):
    """One build of a memory.

    memory: where it goes, a folder or a bucket's prefix. shards: into how many files
    the embeddings are spread; about 50,000 rows each. dtype: how they are stored.
    max_failure_share: share of the images that may be unusable before the build fails.
    partitioning: how the index is divided. minimum_recall: recall at 10, against exact
    search on about ``recall_queries`` held-out queries, under which an index that is not
    exact is not published. Classes that the version before does not have get some 20 more
    each, up to 2,000 in all, and are held to it by themselves as well.
    """

    memory: str
    sources: tuple[SerializeAsAny[Source], ...] = Field(min_length=1)
    encoder: SerializeAsAny[Encoder]
    images: ImageSettings = ImageSettings()
    shards: int = Field(4, ge=1, le=99_999)
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    index: SerializeAsAny[Index] = Field(default_factory=lambda: index.parse({"kind": "auto"}))
    partitioning: Partitioning = Partitioning()
    max_failure_share: float = Field(0.01, ge=0, le=1)
    minimum_recall: float = Field(0.9, ge=0, le=1)
    recall_queries: int = Field(1_000, ge=1)

    @field_validator("sources", mode="before")
    @classmethod
    def _sources(cls, value: Any) -> tuple[Source, ...]:
        return sources.parse_all(value)

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

    classes_before: the keys of the classes that the version before has; None without one.
    """

    root: str
    config: BuildConfig
    encoder_fingerprint: str
    classes: ClassTable
    fingerprint: str
    classes_before: frozenset[str] | None = None

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
    _trust.trust(encoder_fingerprint)
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
    before = classes_before(root, fingerprint, classes)
    return BuildPlan(root, config, encoder_fingerprint, classes, fingerprint, before), splits


def classes_before(root: str, fingerprint: str, classes: ClassTable) -> frozenset[str] | None:
    """The keys of the classes that the current version has, None without one.

    Where that is a version of this very build, without the classes that were new in it: they
    still are, and so the index is the same one. Then its table is ``classes``, and the file
    may have been removed to be made again.
    """
    if memory.current_version(root) is None:
        return None
    current = memory.Memory(root)
    labels = set(current.manifest.class_counts)
    if current.manifest.build != fingerprint:
        return frozenset(map(current.classes.key, labels))
    return frozenset(map(classes.key, labels - set(current.manifest.new_classes)))


def finished_shards(plan: BuildPlan) -> dict[int, ShardEntry]:
    """The shards that are complete under this plan's fingerprint: damaged ones are not."""
    finished = {}
    for shard in range(plan.config.shards):
        marker = sealed.read(_marker(plan, shard))
        if marker is not None:
            finished[shard] = ShardEntry.model_validate_json(marker)
    total = sum(entry.bytes for entry in finished.values())
    files = {name: digest for entry in finished.values() for name, digest in entry.files.items()}
    wrong = _damaged(plan.root, files, total)
    return {
        shard: entry for shard, entry in finished.items() if not wrong.keys() & entry.files.keys()
    }


def _damaged(root: str, files: Mapping[str, str], size: int) -> Mapping[str, str]:
    """Files that are missing or damaged, and why.

    Those of more than _HASHED_BYTES are not read: it is only asked whether they are there.
    """
    if size <= _HASHED_BYTES:
        return storage.damaged(root, files)
    return {name: "is missing" for name in files if not storage.is_file(storage.join(root, name))}


def read_entry(plan: BuildPlan, shard: int) -> ShardEntry:
    """What the marker of a finished shard says."""
    marker = sealed.read(_marker(plan, shard))
    if marker is None:
        raise DamagedError(f"{_marker(plan, shard)} is damaged. Start the same command again")
    return ShardEntry.model_validate_json(marker)


def _marker(plan: BuildPlan, shard: int) -> str:
    return plan.path(plan.shard_file("shard", shard, "json"))


def is_published(plan: BuildPlan) -> bool:
    """Whether the current version of the memory is the result of this very plan, and all there.

    Raises VisualMemoryError if it is, and finds less than the plan's ``minimum_recall``.
    """
    if memory.current_version(plan.root) is None:
        return False
    manifest = memory.Memory(plan.root).manifest
    if manifest.build != plan.fingerprint:
        return False
    finished = finished_shards(plan)
    if len(finished) != plan.config.shards:
        return False
    folder = f"{plan_index(plan, list(finished.values())).folder}/"
    same = (
        # As they were asked for: what they came to is not known before the index is there.
        manifest.config["partitioning"] == plan.config.partitioning.model_dump(mode="json")
        and all(partition.folder.startswith(folder) for partition in manifest.partitions)
        and not _damaged(
            plan.root,
            manifest.files | manifest.partition_files(),
            sum(partition.bytes for partition in manifest.partitions),
        )
    )
    if same and manifest.recall is not None:
        recall.check(manifest.recall, plan.config.minimum_recall)
    return same


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
        read=len(block) + count_images(rejected) + duplicates,
        embedded=len(block),
        quarantined=count_images(rejected),
        duplicates=duplicates,
        class_counts=pack_counts(block.labels),
        source_counts=dict(sorted(Counter(block.sources).items())),
        reasons=count_reasons(rejected),
        batch_size=gathered.batch_size,
    )
    sealed.write(_marker(plan, shard), entry.model_dump_json(indent=1).encode())
    report("write", 1)
    measure.count("done_rows", entry.embedded)
    measure.count("duplicate_rows", entry.duplicates)
    measure.count("written_bytes", entry.bytes)
    _log.info("wrote shard %d: %d rows, %d bytes", shard, entry.embedded, entry.bytes)
    return entry


def plan_index(plan: BuildPlan, entries: Sequence[ShardEntry]) -> IndexPlan:
    """The index over the finished shards.

    Raises VisualMemoryError if more images failed than the configuration allows.
    """
    entries = sorted(entries, key=lambda entry: entry.embeddings)
    reasons: Counter[str] = Counter()
    for entry in entries:
        reasons.update(entry.reasons)
    class_counts = add_counts(entry.class_counts for entry in entries)
    check_failures(
        sum(entry.read for entry in entries),
        sum(entry.quarantined for entry in entries),
        reasons,
        plan.config.max_failure_share,
        plan.path(f"{plan.folder}/quarantine-*.parquet"),
    )
    new_classes: list[int] = []
    if plan.classes_before is not None:
        keys = {label: plan.classes.key(label) for label in class_counts}
        new_classes = [label for label, key in keys.items() if key not in plan.classes_before]
    return IndexPlan(
        root=plan.root,
        build_folder=plan.folder,
        shards=tuple(
            ShardRows(entry.embeddings, entry.embedded, entry.files[entry.embeddings])
            for entry in entries
        ),
        class_counts=class_counts,
        dtype=plan.config.dtype,
        index=plan.config.index,
        partitioning=plan.config.partitioning,
        recall_queries=plan.config.recall_queries,
        new_classes=tuple(sorted(new_classes)),
    )


def publish(
    plan: BuildPlan,
    entries: Iterable[ShardEntry],
    partitions: Iterable[PartitionEntry],
    hits: Hits | None,
) -> Manifest:
    """Publishes the finished build as the memory's next version; removes its checkpoints.

    hits: what the index finds for its held-out queries, None for an exact one. Raises
    VisualMemoryError if it finds too little of the exact answer.
    """
    entries = sorted(entries, key=lambda entry: entry.embeddings)
    partitions = sorted(partitions, key=lambda entry: entry.folder)
    index_plan = plan_index(plan, entries)
    probes, measured = _recall(plan, index_plan, partitions, hits)
    classes = f"{plan.folder}/classes.parquet"
    storage.write_bytes(plan.path(classes), plan.classes.to_parquet())
    centroids = index_plan.centroids
    files = {name: storage.sha256_file(plan.path(name)) for name in (classes, centroids) if name}
    manifest = Manifest(
        format=memory.FORMAT,
        version="",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        content_digest=_digest(
            {
                "encoder": plan.encoder_fingerprint,
                "files": [sorted(entry.files.values()) for entry in entries],
                "classes": files[classes],
                "centroids": centroids and files[centroids],
                "index": [
                    [partition.index.model_dump(mode="json"), partition.files["rows.parquet"]]
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
        class_counts=dict(index_plan.class_counts),
        shards=[entry.model_copy(update={"class_counts": ""}) for entry in entries],
        centroids=centroids,
        probes=probes,
        partitions=list(partitions),
        recall=measured,
        new_classes=list(index_plan.new_classes),
        files=files,
        config=plan.config.model_dump(mode="json"),
    )
    smallest = min((entry.batch_size for entry in entries if entry.batch_size), default=0)
    if 0 < smallest < plan.config.encoder.batch_size:
        _log.warning(
            "some images were encoded %d at a time, for lack of memory: the last bits of their "
            "embeddings may differ from those of a build with encoder.batch_size=%d",
            smallest,
            plan.config.encoder.batch_size,
        )
    published = memory.publish(plan.root, _with_weights(plan.root, manifest))
    remove_work(plan)
    storage.remove_directory(plan.path(index_plan.work))
    left = indexing.unnamed_folders(index_plan, published.partitions)
    memory.remove_unnamed(plan.root, left)
    return published


def remove_work(plan: BuildPlan) -> None:
    """Removes the checkpoints of a published build, and what killed attempts left of it."""
    storage.remove_directory(plan.embedding.checkpoints)
    storage.remove_leftovers(plan.path(plan.folder))


def _with_weights(root: str, manifest: Manifest) -> Manifest:
    """The manifest with the current version's weights, if they are of the same partitions."""
    if memory.current_version(root) is None:
        return manifest
    current = memory.Memory(root).manifest
    if current.weights is None:
        return manifest
    # The digest covers which rows are in which partition.
    if current.weights.base_digest == manifest.content_digest:
        update = {"weights": current.weights, "content_digest": current.content_digest}
        return manifest.model_copy(update=update)
    how = dict(current.weights.settings)
    if "scores" in how:
        how["score_column"] = how.pop("by", "score")
    inside = how.pop("leave_one_out", {})
    how |= {f"leave_one_out.{name}": value for name, value in inside.items()}
    options = [f"--set {shlex.quote(f'{name}={value}')}" for name, value in how.items()]
    _log.warning(
        "version %s of %s is pruned (%d items removed, %d weighted); the new version has other "
        "partitions and is not. Prune it as well: visual-memory prune --memory %s %s",
        *(current.version, root, current.weights.removed, current.weights.weighted),
        *(shlex.quote(root), " ".join(options)),
    )
    return manifest


def _recall(
    plan: BuildPlan,
    index_plan: IndexPlan,
    partitions: Sequence[PartitionEntry],
    hits: Hits | None,
) -> tuple[int, Recall | None]:
    """How many cells a query visits, and what it then finds."""
    if hits is None:
        if indexing.needs_recall(index_plan):
            raise VisualMemoryError(
                f"the index {plan.path(index_plan.folder)} may miss something, and no results of "
                "its held-out queries have arrived: its recall is unknown. Start the same command "
                "again, perhaps with another runner"
            )
        return 1, None
    settings, cells = plan.config.partitioning, index_plan.cells
    labels = indexing.read_held_out(index_plan, partitions).labels
    new = index_plan.new_classes
    weights = recall.weights(labels, index_plan.class_counts, index_plan.recall_queries, new)
    probes = min(settings.probes, cells) or recall.fewest_probes(
        hits, weights, cells, settings.coverage
    )
    measured = recall.summarise(hits, labels, weights, probes, cells, new)
    recall.check(measured, plan.config.minimum_recall)
    return probes, measured


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _portable_path(path: str) -> str:
    """The encoder's path as other processes find it; hub handles stay as they are."""
    return storage.absolute(path) if storage.exists(path) else path
