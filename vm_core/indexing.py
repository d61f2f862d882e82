"""From finished shards to a searchable index, as plain functions of a plan.

plan_index -> sample_shards -> train -> assign_shards -> plan_partitions -> build_partition
-> search_held_out -> (vm_core.recall)

Workers share nothing but files. The shards' rows are written once more, cell by cell, so
that the worker of a partition reads just its own, and no stage holds more than a shard
or a partition. A bundle of shards shares a file: there are few to open.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from vm_core import batch_files, measure, partitioning, partitions, sealed, storage
from vm_core.batch_files import BatchFile
from vm_core.index import Index
from vm_core.index_files import (
    PartitionEntry,
    is_complete,
    local_files,
    open_partition,
    read_centroids,
)
from vm_core.partitioning import Partitioning
from vm_core.partitions import Members
from vm_core.progress import report
from vm_core.recall import HeldOut, Hits, exact_and_found, held_out, shares
from vm_core.records import EmbeddingBlock
from vm_core.search import Router
from vm_core.shard_rows import DTYPES
from vm_core.shards import read_shard

_log = logging.getLogger(__name__)


class ShardRows(NamedTuple):
    """A shard as the index sees it: its path below the memory, its rows, its digest."""

    path: str
    rows: int
    digest: str


class Task(NamedTuple):
    """A partition to build: one of ``parts`` equal parts of a cell."""

    number: int
    cell: int
    part: int
    parts: int


@dataclass(frozen=True)
class IndexPlan:
    """What is to be indexed, and how. Paths are below ``root``.

    new_classes: labels that the version before did not have, of which there are more held-out
    queries; ascending. What takes a look at every shard is computed once: there may be tens
    of thousands.
    """

    root: str
    build_folder: str
    shards: tuple[ShardRows, ...]
    class_counts: Mapping[int, int]
    dtype: str
    index: Index
    partitioning: Partitioning
    recall_queries: int
    new_classes: tuple[int, ...] = ()

    @cached_property
    def rows(self) -> int:
        return sum(shard.rows for shard in self.shards)

    @property
    def cells(self) -> int:
        return self.partitioning.cells(self.rows)

    @cached_property
    def recipe(self) -> str:
        """A fingerprint of everything the index is made from."""
        settings = self.partitioning.model_dump(mode="json", exclude={"probes", "coverage"})
        shards = [shard.digest for shard in self.shards]
        identity = [self.index.model_dump(mode="json"), settings, shards, self.recall_queries]
        if self.new_classes:
            identity.append(self.new_classes)
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> str:
        return f"{self.build_folder}/index-{self.recipe}"

    @property
    def centroids(self) -> str | None:
        """Relative path of the centroids; None where a single cell needs none."""
        return f"{self.folder}/centroids.npy" if self.cells > 1 else None

    @property
    def work(self) -> str:
        return f"work/index-{self.recipe}"

    def path(self, relative: str) -> str:
        return storage.join(self.root, relative)

    def first_row(self, shard: int) -> int:
        """The number of a shard's first row in the memory."""
        return int(self._first_rows[shard])

    @cached_property
    def _first_rows(self) -> np.ndarray:
        return np.cumsum([0, *(shard.rows for shard in self.shards)])

    @property
    def first_shards(self) -> np.ndarray:
        """(B + 1,) int64: the first shard of each bundle, and the number of shards."""
        return batch_files.first_of_bundles(len(self.shards))

    @property
    def bundles(self) -> int:
        return len(self.first_shards) - 1

    def bundle(self, number: int) -> range:
        """The shards of a bundle."""
        return range(*self.first_shards[number : number + 2].tolist())

    def sampled(self, bundle: int) -> str:
        """Path of the rows of a bundle's shards that train the partitioner, without its suffix."""
        return self.path(f"{self.work}/sample-{bundle:05d}")

    def assigned(self, bundle: int) -> str:
        """Path of the rows of a bundle's shards by cell, without its suffix."""
        return self.path(f"{self.work}/assigned-{bundle:05d}")


def sample_shards(plan: IndexPlan, bundle: int) -> None:
    """Writes the rows of a bundle's shards that train the partitioner."""
    path = plan.sampled(bundle)
    if _is_trained(plan) or batch_files.is_complete(path):
        return
    with batch_files.writing(path) as out:
        for shard in plan.bundle(bundle):
            block = _read_shard(plan, shard)
            rows = partitioning.sample(
                block.ids, block.vectors, plan.rows, plan.cells, plan.partitioning.seed
            )
            if len(rows):
                out.write(0, {"vector": rows})


def train(plan: IndexPlan) -> None:
    """Trains the centroids from all bundles' samples and writes them."""
    if plan.centroids is None or _is_trained(plan):
        return
    files = (BatchFile(plan.sampled(bundle)) for bundle in range(plan.bundles))
    rows = np.concatenate([batch["vector"] for file in files for batch in file.read(0)])
    centroids = partitioning.train(rows, plan.cells, plan.partitioning.seed)
    path = plan.path(plan.centroids)
    with storage.write_atomic(path) as file:
        hashing = storage.HashingWriter(file)
        np.save(hashing, centroids)
    sealed.write_json(f"{path}.json", hashing.sha256.hexdigest())


def _is_trained(plan: IndexPlan) -> bool:
    if plan.centroids is None:
        return True
    path = plan.path(plan.centroids)
    digest = sealed.read_json(f"{path}.json")
    return digest is not None and not storage.damaged(plan.root, {plan.centroids: digest})


def assign_shards(plan: IndexPlan, bundle: int) -> np.ndarray:
    """How many rows of a bundle's shards are in each cell, (C,) int64; writes them by cell.

    With a single cell there is nothing to write.
    """
    shards = plan.bundle(bundle)
    if plan.centroids is None:
        return np.array([sum(plan.shards[shard].rows for shard in shards)])
    path = plan.assigned(bundle)
    is_done = batch_files.is_complete(path)
    measure.count_reuse("bundles", is_done)
    if is_done:
        return np.array(BatchFile(path).facts["counts"])
    centroids = read_centroids(plan.path(plan.centroids))
    total = np.zeros(len(centroids), np.int64)
    with batch_files.writing(path) as out:
        for shard in shards:
            if plan.shards[shard].rows:
                total += _assign(plan, shard, centroids, out)
        out.facts["counts"] = total.tolist()
    return total


def _assign(
    plan: IndexPlan, shard: int, centroids: np.ndarray, out: batch_files.Writer
) -> np.ndarray:
    """Writes a batch of a shard's rows for each cell that has some; (C,) counts."""
    members = _read_members(plan, shard)
    vectors = members.vectors.astype(np.float32, copy=False)
    with measure.timed("search_ms"):
        cells = partitioning.assign(vectors, centroids, plan.partitioning.spill)
    counts = np.bincount(cells.ravel(), minlength=len(centroids))
    place = np.repeat(np.arange(len(members)), cells.shape[1])
    home = np.tile(np.arange(cells.shape[1]) == 0, len(members))
    order = np.argsort(cells.ravel(), kind="stable")
    for cell, chosen in enumerate(np.split(order, np.cumsum(counts)[:-1])):
        if len(chosen):
            part = members.take(place[chosen])
            out.write(
                cell,
                {
                    "row": part.rows,
                    "id": part.ids,
                    "label": part.labels,
                    "home": home[chosen],
                    "vector": partitions.storable(part.vectors),
                },
            )
    measure.count("done_rows", len(members))
    return counts


def plan_partitions(plan: IndexPlan, counts: Sequence[np.ndarray]) -> list[Task]:
    """The partitions to build: a cell with too many rows is dealt out to several.

    counts: of every bundle, (C,) rows by cell.
    """
    total = np.sum(np.array(counts), axis=0)
    tasks = []
    for cell, rows in enumerate(total.tolist()):
        parts = math.ceil(rows / plan.partitioning.rows)
        if plan.cells == 1:
            parts = 1  # also of no rows
        tasks += [(cell, part, parts) for part in range(parts)]
    return [Task(number, *task) for number, task in enumerate(tasks)]


def build_partition(plan: IndexPlan, task: Task) -> PartitionEntry:
    """Builds one partition from the shards' rows in its cell, or finds it built.

    Of several attempts at once, which runners start, one names its files in the marker; the
    others remove theirs and return its entry. ScaNN's files differ from attempt to attempt,
    and a mixture of them would open and find little: each attempt has a folder of its own.
    """
    name = plan.path(f"{plan.folder}/partition-{task.number:05d}")
    marker = f"{name}.json"
    written = storage.read_if_exists(marker)
    found = sealed.unseal(written or b"")
    built = None if found is None else PartitionEntry.model_validate_json(found)
    if built is not None and not is_complete(plan.root, built):
        built = None
    measure.count_reuse("partitions", built is not None)
    if built is not None:
        _log.info("found partition %d built", task.number)
        return built
    with storage.temporary_directory(name) as local:
        entry = _write_partition(plan, task, local)
        if not is_complete(plan.root, entry):  # an attempt with the same bytes
            storage.move_directory(local, plan.path(entry.folder))
    if not storage.swap(marker, written, sealed.seal(entry.model_dump_json(indent=1).encode())):
        first = PartitionEntry.model_validate_json(sealed.read(marker) or b"")
        if first.folder != entry.folder:
            storage.remove_directory(plan.path(entry.folder))
        _log.info("another attempt has built partition %d before", task.number)
        return first
    report("index", 1)
    measure.count("done_rows", entry.count)
    measure.count("written_bytes", entry.bytes)
    _log.info(
        "built partition %d (%s): %d rows, %d bytes",
        *(task.number, entry.index.kind, entry.count, entry.bytes),
    )
    return entry


def _write_partition(plan: IndexPlan, task: Task, local: str) -> PartitionEntry:
    """Writes a partition's files into a local folder."""
    with measure.timed("gather_ms"):
        count, home = _write_members(plan, task, local)
    chosen = plan.index.choose(count)
    # Mapped from the file just written: what was read to write it is free again.
    vectors = partitions.map_vectors(local)
    with measure.timed("build_ms"):
        chosen.build(vectors, local)
    sizes = {file.path[len(local) + 1 :]: file.size for file in storage.walk(local)}
    files = {name: storage.sha256_file(os.path.join(local, name)) for name in sizes}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    return PartitionEntry(
        folder=f"{plan.folder}/partition-{task.number:05d}-{digest}",
        cell=task.cell,
        count=count,
        home=home,
        bytes=sum(sizes.values()),
        index=chosen,
        files=files,
    )


def unnamed_folders(plan: IndexPlan, entries: Sequence[PartitionEntry]) -> list[str]:
    """Relative paths of folders that attempts left and that no entry names."""
    below = f"{plan.folder}/"
    files = [file.path.rpartition(below)[2] for file in storage.walk(plan.path(plan.folder))]
    folders = {below + file.partition("/")[0] for file in files if "/" in file}
    return sorted(folders - {entry.folder for entry in entries})


def _write_members(plan: IndexPlan, task: Task, folder: str) -> tuple[int, int]:
    parts = [part for part in _members_of(plan, task) if len(part)]
    members = Members.concatenate(parts) if parts else _no_members(plan)
    partitions.write(folder, members)
    if needs_recall(plan):
        queries = held_out(
            members, shares(plan.class_counts, plan.recall_queries, plan.new_classes)
        )
        np.save(os.path.join(folder, "held_out_vectors.npy"), queries.vectors)
        np.save(os.path.join(folder, "held_out_labels.npy"), queries.labels)
    return len(members), int(members.home.sum())


def needs_recall(plan: IndexPlan) -> bool:
    """Whether a search of this index may miss something."""
    return plan.cells > 1 or plan.index.choose(plan.rows).kind != "exact"


def read_held_out(plan: IndexPlan, entries: Sequence[PartitionEntry]) -> HeldOut:
    """The held-out queries of all partitions."""
    parts: dict[str, list[np.ndarray]] = {"vectors": [], "labels": []}
    for entry in sorted(entries, key=lambda entry: entry.folder):
        names = {name: f"held_out_{name}.npy" for name in parts}
        with local_files(plan.root, entry, list(names.values())) as local:
            for name, arrays in parts.items():
                arrays.append(np.load(os.path.join(local, names[name])))
    return HeldOut(np.concatenate(parts["vectors"]), np.concatenate(parts["labels"]))


def search_held_out(
    plan: IndexPlan, queries: HeldOut, cells: Sequence[int], entry: PartitionEntry
) -> Hits:
    """What of one partition is nearest to the held-out queries, and what its index finds.

    cells: of all partitions, by number.
    """
    with measure.timed("open_ms"):
        partition = open_partition(plan.root, entry)
    centroids = None if plan.centroids is None else read_centroids(plan.path(plan.centroids))
    router = Router(centroids, tuple(cells), 1 if centroids is None else len(centroids))
    order = router.route(queries.vectors)
    ranks = np.argmax(order == entry.cell, axis=1)
    measure.count("done_queries", len(queries.vectors))
    with measure.timed("search_ms"):
        return exact_and_found(partition, queries.vectors, ranks)


# Rows on their way to a partition ----------------------------------------------------


def _read_shard(plan: IndexPlan, shard: int) -> EmbeddingBlock:
    """The rows of a shard, as many as its marker says."""
    rows = plan.shards[shard]
    return read_shard(plan.path(rows.path), expected_rows=rows.rows)


def _read_members(plan: IndexPlan, shard: int) -> Members:
    block = _read_shard(plan, shard)
    first = plan.first_row(shard)
    return Members(
        np.arange(first, first + len(block)),
        pa.array(block.ids, pa.string()),
        block.labels,
        np.ones(len(block), bool),
        block.vectors.astype(DTYPES[plan.dtype], copy=False),  # as they were stored
    )


def _members_of(plan: IndexPlan, task: Task) -> Iterator[Members]:
    seen = 0
    for members in _members_in(plan, task.cell):
        count = len(members)
        if task.parts > 1:  # dealt out row by row, so that the parts are even
            members = members.take(np.arange((task.part - seen) % task.parts, count, task.parts))
        seen += count
        yield members


def _members_in(plan: IndexPlan, cell: int) -> Iterator[Members]:
    """The rows of a cell, shard by shard."""
    if plan.centroids is None:
        yield from (_read_members(plan, n) for n, shard in enumerate(plan.shards) if shard.rows)
        return
    for bundle in range(plan.bundles):
        for columns in BatchFile(plan.assigned(bundle)).read_at_once(cell):
            yield Members(
                columns["row"],
                pa.array(columns["id"], pa.string()),
                columns["label"],
                columns["home"],
                columns["vector"].view(DTYPES[plan.dtype]),
            )


def _no_members(plan: IndexPlan) -> Members:
    none = np.empty(0, np.int64)
    vectors = np.empty((0, 1), DTYPES[plan.dtype])
    return Members(none, pa.array([], pa.string()), none, np.empty(0, bool), vectors)
