"""The steps of an evaluation, as plain functions of a plan. Beam only strings them together.

splits -> embed_split, by_shard -> gather_queries -> route -> search_part -> evaluate_shard
-> merge_outcomes -> (vm_core.results)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field, SerializeAsAny, field_validator, model_validator

from vm_core import measure, plugins, sealed, sources, storage
from vm_core.classes import ClassTable
from vm_core.embedding import EmbedPlan, ImageSettings, gather
from vm_core.encoders import Encoder
from vm_core.errors import VisualMemoryError
from vm_core.failures import count_reasons, quarantine_table
from vm_core.gallery import Gallery
from vm_core.memory import Memory
from vm_core.metrics import EvaluationMetrics
from vm_core.neighbors import NEIGHBORS_SCHEMA, Neighbors, from_arrow, to_arrow, write_json
from vm_core.partitions import Partition
from vm_core.predictions import PREDICTIONS_SCHEMA, predictions_table
from vm_core.progress import report
from vm_core.pruning import with_self
from vm_core.records import (
    UNKNOWN,
    Embedded,
    EmbeddingBlock,
    Rejected,
    count_images,
    unit_interval,
)
from vm_core.search import assemble, search_partition
from vm_core.shards import check_rows, read_blocks
from vm_core.sources import Source
from vm_core.tables import table_writer, write_table
from vm_core.voting import VOTERS, VoteParameters

_QUERY_ROWS = 1024
_ROUTED_ROWS = 16_384

LEAKS_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("item_id", pa.string()),
        ("distance", pa.float32()),
        ("same_label", pa.bool_()),
    ]
)


class EvaluationConfig(plugins.Settings):
    """One evaluation of a memory on labelled queries.

    memory, version: what is evaluated; the current version if none is named.
    queries: sources of images; or embeddings: a glob pattern of embedding shards of the
    same encoder; or leave_one_out: every item of the memory against all the others,
    except items that a pruning has removed.
    output: a folder for the results. k: neighbours per query. tuning_share: share of
    the queries that choose k and are not part of the reported accuracy. fixed_k: the
    k reported besides. probes: cells of the index that a query visits, the memory's own
    number if None. duplicate_distance: a query with a neighbour nearer than this is
    reported as a leak. headline_voter, headline_k: of the tables per class, the
    confusion and the calibration. encoder_path: the encoder, if it has moved.
    trust_files: opens the memory's partitions without comparing them with their SHA-256.
    """

    memory: str
    version: str | None = None
    queries: tuple[SerializeAsAny[Source], ...] = ()
    embeddings: str | None = None
    leave_one_out: bool = False
    output: str
    k: int = Field(100, ge=1, le=10_000)
    probes: int | None = Field(None, ge=1)
    duplicate_distance: float = Field(0.01, ge=0, le=2)
    tuning_share: float = Field(0.2, ge=0, lt=1)
    fixed_k: tuple[int, ...] = (1, 10, 50, 100)
    temperature: float = 0.07
    rank_offset: float = 2.0
    headline_voter: str = "rank"
    headline_k: int = Field(10, ge=1)
    encoder_path: str | None = None
    trust_files: bool = False
    images: ImageSettings = ImageSettings()
    query_shards: int = Field(4, ge=1, le=99_999)
    max_failure_share: float = Field(0.01, ge=0, le=1)

    @field_validator("queries", mode="before")
    @classmethod
    def _queries(cls, value: Any) -> tuple[Source, ...]:
        return sources.parse_all(value)

    @model_validator(mode="after")
    def _check(self) -> EvaluationConfig:
        if bool(self.queries) + bool(self.embeddings) + self.leave_one_out != 1:
            raise ValueError("give one of queries, embeddings and leave_one_out")
        if self.headline_voter not in VOTERS:
            raise ValueError(f"headline_voter must be one of {', '.join(VOTERS)}")
        try:
            _ = self.vote_parameters
        except VisualMemoryError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def vote_parameters(self) -> VoteParameters:
        return VoteParameters(self.temperature, self.rank_offset)


@dataclass(frozen=True)
class EvaluationPlan:
    """An evaluation with everything known that can be known before reading a query.

    ``fingerprint`` covers the memory, the queries and all settings, ``embedding_fingerprint``
    what the queries' embeddings depend on: with other settings they are not made again.
    checkpoints: a folder that keeps the embeddings for another evaluation of the same
    queries; None if they are removed at the end.
    """

    config: EvaluationConfig
    memory: Memory
    encoder: Encoder
    output: str
    fingerprint: str
    embedding_fingerprint: str
    checkpoints: str | None = None

    @property
    def embedding(self) -> EmbedPlan:
        return EmbedPlan(
            self.config.queries,
            self.memory.classes,
            self.encoder,
            self.config.images,
            storage.join(self.checkpoints or self.path("work"), self.embedding_fingerprint),
        )

    def path(self, name: str) -> str:
        return storage.join(self.output, name)

    def shard_file(self, kind: str, shard: int) -> str:
        return self.path(f"{kind}-{shard:05d}-of-{self.config.query_shards:05d}.parquet")


TABLES = ("neighbors", "predictions", "quarantine", "leaks")


class Gathered(NamedTuple):
    """A shard's queries, and what else was read."""

    block: EmbeddingBlock
    rejected: tuple[Rejected, ...]
    duplicates: int


@dataclass
class Outcome:
    """What an evaluation has found so far; outcomes of query shards merge in any order."""

    tuning: EvaluationMetrics
    test: EvaluationMetrics
    gallery: Gallery
    read: int = 0
    leaks: int = 0
    quarantined: int = 0
    duplicates: int = 0
    reasons: dict[str, int] = field(default_factory=dict)

    def merge(self, other: Outcome) -> None:
        self.tuning.merge(other.tuning)
        self.test.merge(other.test)
        self.gallery.merge(other.gallery)
        self.read += other.read
        self.leaks += other.leaks
        self.quarantined += other.quarantined
        self.duplicates += other.duplicates
        for reason, count in other.reasons.items():
            self.reasons[reason] = self.reasons.get(reason, 0) + count


def plan_evaluation(config: EvaluationConfig) -> tuple[EvaluationPlan, list[Any]]:
    """Opens the memory and lists the queries.

    Returns the plan and the work: numbered splits of images, or paths of embedding
    shards. Raises VisualMemoryError if the queries do not go with the memory.
    """
    opened = Memory(config.memory, config.version, config.trust_files)
    encoder = opened.manifest.encoder
    work: list[Any]
    if config.queries:
        encoder = opened.encoder(config.encoder_path)
        listings = [source.listing() for source in config.queries]
        work = [(i, split) for i, listing in enumerate(listings) for split in listing.splits]
        versions = [split.version for _, split in work]
    elif config.embeddings:
        files = storage.list_files(storage.absolute(config.embeddings))
        if not files:
            raise VisualMemoryError(
                f"embeddings: no file matches {config.embeddings!r}. Give a glob pattern of "
                "embedding shards, such as MEMORY/builds/*/embeddings-*.tfrecord"
            )
        work = [file.path for file in files]
        versions = [f"{file.path} {file.size} {file.version}" for file in files]
    else:
        work = [opened.path(shard.embeddings) for shard in opened.manifest.shards if shard.embedded]
        versions = []
    inputs = [opened.manifest.content_digest, versions]
    plan = EvaluationPlan(
        config,
        opened,
        encoder,
        storage.absolute(config.output),
        _fingerprint([inputs, config.model_dump(mode="json", exclude={"trust_files"})]),
        _fingerprint([inputs, config.model_dump(mode="json", include={"queries", "images"})]),
    )
    return plan, work


def _fingerprint(identity: Any) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def read_embeddings(plan: EvaluationPlan, path: str) -> Iterator[Embedded]:
    """Queries from an embedding shard, their labels translated to those of the memory.

    The shard's own classes are in the file classes.parquet beside it; without one, its
    labels are taken to be the memory's.
    """
    classes = storage.join(path.rpartition("/")[0], "classes.parquet")
    data = storage.read_if_exists(classes)
    theirs = None if data is None else ClassTable.parse(classes, data)
    rows = 0
    for block in read_blocks(path, expected_fingerprint=plan.memory.manifest.encoder_fingerprint):
        rows += len(block)
        labels = block.labels
        if theirs is not None:
            # Where there are no keys, a label's number is its key.
            keys = dict(zip(theirs.labels, theirs.keys, strict=True))
            ours = [plan.memory.classes.label(keys.get(n, str(n))) for n in labels.tolist()]
            labels = np.array(ours, np.int64)
        report("encode", len(block))
        measure.count("done_rows", len(block))
        yield Embedded(EmbeddingBlock(block.ids, labels, block.sources, block.vectors))
    check_rows(path, rows, _expected_rows(plan, path))


def _expected_rows(plan: EvaluationPlan, path: str) -> int | None:
    """How many rows a shard was written with, None if nothing says so."""
    relative = path.removeprefix(f"{plan.memory.root}/")
    for shard in plan.memory.manifest.shards:
        if shard.embeddings == relative:
            return shard.embedded
    folder, _, name = path.rpartition("/")
    marker = name.replace("embeddings-", "shard-", 1).removesuffix(".tfrecord")
    found = sealed.read_json(storage.join(folder, f"{marker}.json"))
    return None if found is None else int(found["embedded"])


class Part(NamedTuple):
    """Some queries of a shard that visit one partition, by their places in the shard."""

    shard: int
    partition: int
    places: np.ndarray
    queries: EmbeddingBlock


def gather_queries(plan: EvaluationPlan, shard: int, parts: Iterable[Embedded]) -> Gathered:
    """The queries of a shard, each once, in the order of their ids.

    A label that the memory does not know becomes UNKNOWN. In leave-one-out an item that was
    removed from the memory is no query of it, and in none of the totals.
    """
    embedded, duplicates = gather(parts)
    block = embedded.block
    if plan.config.leave_one_out:
        ids = pa.array(block.ids, pa.large_string())
        gone = pc.is_in(ids, value_set=plan.memory.removed_ids())
        block = block.take(~gone.to_numpy(zero_copy_only=False))
    known = np.isin(block.labels, _labels(plan))
    block = replace(block, labels=np.where(known, block.labels, UNKNOWN))
    measure.count("done_queries", len(block))
    measure.count("duplicate_queries", duplicates)
    return Gathered(block, embedded.rejected, duplicates)


def route(plan: EvaluationPlan, shard_queries: tuple[int, Gathered]) -> Iterator[Part]:
    """Sends the queries of a shard to the partitions that they visit, in blocks."""
    shard, (queries, *_) = shard_queries
    bare = EmbeddingBlock(queries.ids, queries.labels, queries.sources, queries.vectors)
    if not len(bare):
        return
    for partition, places in plan.memory.router(plan.config.probes).visits(bare.vectors):
        for start in range(0, len(places), _ROUTED_ROWS):
            some = places[start : start + _ROUTED_ROWS]
            measure.observe("batch_queries", len(some))
            yield Part(shard, partition, some, bare.take(some))


def search_part(
    plan: EvaluationPlan, part: Part, partitions: Callable[[int], Partition]
) -> tuple[int, tuple[np.ndarray, Neighbors]]:
    """The shard, the places of a part's queries, and their neighbours in its partition."""
    config = plan.config
    found = search_partition(
        partitions(part.partition), part.queries, config.k, config.leave_one_out
    )
    measure.count("done_queries", len(part.queries))
    return part.shard, (part.places, found)


def evaluate_shard(
    plan: EvaluationPlan,
    shard: int,
    gathered: Gathered,
    parts: Iterable[tuple[np.ndarray, Neighbors]],
) -> Outcome:
    """Votes for one shard of the queries, from what the partitions found; writes its tables.

    Writes neighbors, predictions and quarantine, each as a Parquet file of this shard,
    rows in the order of query ids.
    """
    outcome = _empty_outcome(plan)
    outcome.duplicates = gathered.duplicates
    outcome.quarantined = count_images(gathered.rejected)
    outcome.read = len(gathered.block) + outcome.quarantined + gathered.duplicates
    outcome.reasons = count_reasons(gathered.rejected)
    write_table(plan.shard_file("quarantine", shard), quarantine_table(gathered.rejected))
    everything = assemble(gathered.block, plan.config.k, parts)
    with (
        table_writer(plan.shard_file("neighbors", shard), NEIGHBORS_SCHEMA) as neighbors_table,
        table_writer(plan.shard_file("predictions", shard), PREDICTIONS_SCHEMA) as predictions,
    ):
        for start in range(0, len(everything), _QUERY_ROWS):
            rows = np.arange(start, min(start + _QUERY_ROWS, len(everything)))
            queries, found = gathered.block.take(rows), everything.take(rows)
            tuning = np.array(
                [unit_interval(id, "tuning") < plan.config.tuning_share for id in queries.ids]
            )
            votes = {voter: np.empty((len(found), found.k), np.int64) for voter in VOTERS}
            with measure.timed("vote_ms"):
                for metrics, chosen in ((outcome.tuning, tuning), (outcome.test, ~tuning)):
                    for voter, result in metrics.add(found.take(chosen)).items():
                        votes[voter][chosen] = result.predictions
            with measure.timed("write_ms"):
                neighbors_table.write_table(to_arrow(found))
                predictions.write_table(predictions_table(found.query_ids, votes))
            outcome.gallery.add(found.take(~tuning), queries.take(np.flatnonzero(~tuning)))
            report("search", len(queries))
            measure.count("done_queries", len(queries))
            near = found.distances < plan.config.duplicate_distance
            outcome.leaks += int(near.any(axis=1).sum())
    write_table(plan.shard_file("leaks", shard), _leaks_table(plan, everything))
    return outcome


def _leaks_table(plan: EvaluationPlan, found: Neighbors) -> pa.Table:
    """Query and memory item of every pair that is nearly the same image, or the same.

    Leave-one-out has taken the query itself out of its neighbours.
    """
    query, rank = np.nonzero(found.distances < plan.config.duplicate_distance)
    return pa.table(
        [
            pa.array(found.query_ids[query], pa.string()),
            pa.array(found.ids[query, rank], pa.string()),
            pa.array(found.distances[query, rank], pa.float32()),
            pa.array(found.is_correct(found.labels)[query, rank], pa.bool_()),
        ],
        schema=LEAKS_SCHEMA,
    )


def _labels(plan: EvaluationPlan) -> list[int]:
    counts = plan.memory.manifest.class_counts
    return sorted(counts.keys() | set(plan.memory.classes.labels))


def merge_outcomes(plan: EvaluationPlan, outcomes: Iterable[Outcome]) -> Outcome:
    """All outcomes as one, in whatever order they come."""
    total = _empty_outcome(plan)
    for outcome in outcomes:
        total.merge(outcome)
    return total


def export_neighbors(plan: EvaluationPlan, path: str) -> None:
    """Writes the neighbours of all queries as the paper's JSON.

    In a leave-one-out table every item is its own first neighbour, as in the paper's.
    """
    blocks = _read_neighbors(plan)
    if plan.config.leave_one_out:
        blocks = map(with_self, blocks)
    write_json(path, blocks, featurizer=plan.encoder.path)


def _read_neighbors(plan: EvaluationPlan) -> Iterator[Neighbors]:
    for shard in range(plan.config.query_shards):
        with storage.open_read(plan.shard_file("neighbors", shard)) as file:
            for batch in pq.ParquetFile(file).iter_batches(1024):
                yield from_arrow(batch)


def _empty_outcome(plan: EvaluationPlan) -> Outcome:
    config = plan.config
    headline = (config.headline_voter, min(config.headline_k, config.k))
    labels = _labels(plan)

    def metrics() -> EvaluationMetrics:
        return EvaluationMetrics(
            config.k, labels, headline=headline, parameters=config.vote_parameters
        )

    return Outcome(metrics(), metrics(), Gallery(*headline, config.vote_parameters))
