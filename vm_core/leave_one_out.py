"""Scores of every item of a memory by leave-one-out search, partition by partition.

search_home -> search_visitors -> score_partition -> group_duplicates -> write_scores -> finish

Each step is a plain function of a plan and a number. It reads the files of the steps
before, writes its own and last a marker, and where the marker stands it does nothing. So
a run that was stopped goes on, and workers share nothing but the memory's storage:

work/scores-FINGERPRINT/    removed at the end
  home-00000                neighbours of a partition's own items in that partition
  visits-00000              those that visit another partition, by that partition; with
                            their vectors, so that nobody reads a partition for a few rows
  found-00000               what visitors found in a partition, by where they came from
  names-*-00000             ids of near-duplicates
  sums-00000                what a partition's items say of others, by bundle of shards
  pairs-00000               near-duplicates among a partition's items and others
  groups                    groups of near-duplicates, by bundle of shards
  written-00000.json        a bundle's shards are written
scores/FINGERPRINT/
  items-00000-of-00004.parquet    beside every shard of embeddings
  scores.json               written last
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count, pairwise

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from vm_core import batch_files, item_scores, measure, partitions, plugins, storage
from vm_core.batch_files import BatchFile, Columns
from vm_core.item_scores import Lists, Sums
from vm_core.memory import Memory
from vm_core.partitions import Members, Partition
from vm_core.progress import report
from vm_core.records import strings

FORMAT = 3

_QUERY_ROWS = 8192
_SPARE = 32
_TIES = 16

_log = logging.getLogger(__name__)


class LeaveOneOutConfig(plugins.Settings):
    """Which scores of a memory are made.

    memory, version: what is scored; the current version if none is named. ks: among how
    many neighbours an item counts as wrong or correct. shapley_k: neighbours of the
    classifier that the Shapley values are of. duplicate_distance: items nearer to each
    other than this cosine distance are near-duplicates; 0 looks for none.
    exclude_duplicates: near-duplicates of a query are no neighbours of it, up to 32 of them.
    """

    memory: str
    version: str | None = None
    ks: tuple[int, ...] = (10, 100)
    shapley_k: int = Field(10, ge=1)
    duplicate_distance: float = Field(0.02, ge=0, le=2)
    exclude_duplicates: bool = False
    trust_files: bool = False

    @model_validator(mode="after")
    def _check(self) -> LeaveOneOutConfig:
        if not self.ks or min(self.ks) < 1 or max(self.ks) > 10_000:
            raise ValueError(f"ks = {list(self.ks)}: give one or more numbers from 1 to 10000")
        if sorted(set(self.ks)) != list(self.ks):
            raise ValueError(f"ks = {list(self.ks)} must ascend, each number once")
        if self.shapley_k > max(self.ks):
            raise ValueError(
                f"shapley_k = {self.shapley_k} needs as many neighbours; the largest of ks is "
                f"{max(self.ks)}. Raise that, or lower shapley_k"
            )
        if self.exclude_duplicates and not self.duplicate_distance:
            raise ValueError("exclude_duplicates needs a duplicate_distance above 0")
        return self

    @property
    def k(self) -> int:
        """Neighbours that count."""
        return max(self.ks)

    @property
    def listed(self) -> int:
        """Neighbours that are searched for: some to spare where duplicates are dropped."""
        return self.k + _SPARE * self.exclude_duplicates


@dataclass(frozen=True)
class LeaveOneOutPlan:
    """Scores to be made. ``fingerprint`` covers the memory's rows, its index and the settings.

    probes: cells that each query visits.
    """

    config: LeaveOneOutConfig
    memory: Memory
    probes: int
    fingerprint: str

    @property
    def folder(self) -> str:
        return f"scores/{self.fingerprint}"

    @property
    def partitions(self) -> int:
        return len(self.memory.manifest.partitions)

    @cached_property
    def first_rows(self) -> np.ndarray:
        """(S + 1,) int64: the number of each shard's first row, and of all rows."""
        return self.memory.first_rows()

    @cached_property
    def first_shards(self) -> np.ndarray:
        """(B + 1,) int64: the first shard of each bundle, and the number of shards."""
        return batch_files.first_of_bundles(len(self.first_rows) - 1)

    @property
    def bundles(self) -> int:
        return len(self.first_shards) - 1

    def by_bundle(self, rows: np.ndarray) -> Iterator[tuple[int, slice]]:
        """Bundles that some of the ascending rows are in, each with the slice of those."""
        edges = np.searchsorted(rows, self.first_rows[self.first_shards]).tolist()
        for bundle, (start, stop) in enumerate(pairwise(edges)):
            if start < stop:
                yield bundle, slice(start, stop)

    def work(self, name: str, number: int | None = None) -> str:
        """Path of a work file, without its suffix."""
        name = name if number is None else f"{name}-{number:05d}"
        return storage.join(self.memory.path(f"work/scores-{self.fingerprint}"), name)

    def path(self, name: str) -> str:
        return storage.join(self.memory.path(self.folder), name)

    def items(self, shard: int) -> str:
        return self.path(f"items-{shard:05d}-of-{len(self.first_rows) - 1:05d}.parquet")


def plan_scores(memory: Memory, config: LeaveOneOutConfig) -> LeaveOneOutPlan:
    """The plan for an opened memory."""
    probes = memory.router().probes
    identity = {
        "format": FORMAT,
        "content": memory.manifest.content_digest,
        "partitions": [entry.folder for entry in memory.manifest.partitions],
        "weights": memory.manifest.weights and memory.manifest.weights.folder,
        "probes": probes,
        "settings": config.model_dump(mode="json", exclude={"memory", "version", "trust_files"}),
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    return LeaveOneOutPlan(config, memory, probes, fingerprint)


def _is_done(*paths: str) -> bool:
    """Whether an earlier run has written all files of a partition's step; counts it."""
    done = all(map(batch_files.is_complete, paths))
    measure.count_reuse("partitions", done)
    if done:
        _log.info("found it done by an earlier run: %s", paths[0])
    return done


# Search -----------------------------------------------------------------------------


def search_home(plan: LeaveOneOutPlan, number: int) -> list[int]:
    """Finds the neighbours of a partition's items inside it, and where else they look.

    Returns the numbers of the other partitions that they visit. Each visitor brings
    the distance of the last neighbour it has at home: what is farther is not written down.
    """
    if _is_done(*(plan.work(name, number) for name in ("visits", "home", "names-home"))):
        return BatchFile(plan.work("visits", number)).keys
    with measure.timed("open_ms"):
        partition = plan.memory.open_partition(number)
    router = plan.memory.router()
    members = partition.members
    home = members.home
    if partition.weights is not None:
        home = home & (partition.weights > 0)
    positions = np.flatnonzero(home)
    visits: dict[int, list[Columns]] = {}
    with (
        batch_files.writing(plan.work("home", number)) as out,
        batch_files.writing(plan.work("names-home", number)) as names,
    ):
        for start in range(0, len(positions), _QUERY_ROWS):
            chosen = positions[start : start + _QUERY_ROWS]
            queries = np.asarray(members.vectors[chosen], np.float32)
            found = _search(plan, partition, members.rows[chosen], members.labels[chosen], queries)
            _name_duplicates(
                plan, names, found, members, members.rows[chosen], _ids(members, chosen)
            )
            out.write(
                start // _QUERY_ROWS,
                {
                    "query": members.rows[chosen],
                    "rows": found.rows,
                    "distances": found.distances,
                    "correct": found.correct,
                },
            )
            bounds = found.distances[:, -1]
            for other, places in router.visits(queries):
                if other != number:
                    visit = {
                        "place": start + places,
                        "position": chosen[places],
                        "bound": bounds[places],
                    }
                    visits.setdefault(other, []).append(visit)
            report("search", len(chosen))
            measure.count("done_rows", len(chosen))
    others = sorted(visits)
    with batch_files.writing(plan.work("visits", number)) as out:
        for other in others:
            visit = _concatenate(visits.pop(other))
            for start in range(0, len(visit["place"]), _QUERY_ROWS):
                some = {name: values[start : start + _QUERY_ROWS] for name, values in visit.items()}
                position = some.pop("position")
                some |= {
                    "row": members.rows[position],
                    "id": _ids(members, position),
                    "label": members.labels[position],
                    "vector": partitions.storable(members.vectors[position]),
                }
                out.write(other, some)
    return others


def search_visitors(plan: LeaveOneOutPlan, number: int, sources: Iterable[int]) -> int:
    """Finds the neighbours that items of other partitions have in this one."""
    if _is_done(plan.work("found", number), plan.work("names-found", number)):
        return number
    with measure.timed("open_ms"):
        partition = plan.memory.open_partition(number)
    with (
        batch_files.writing(plan.work("found", number)) as out,
        batch_files.writing(plan.work("names-found", number)) as names,
    ):
        for source in sorted(sources):
            for visits in BatchFile(plan.work("visits", source)).read(number):
                vectors = visits["vector"].view(partition.members.vectors.dtype)
                queries = np.asarray(vectors, np.float32)
                found = _search(plan, partition, visits["row"], visits["label"], queries)
                # Farther ones cannot be among the nearest: those at home are as many.
                beyond = found.distances > visits["bound"][:, None]
                found = replace(found, rows=np.where(beyond, -1, found.rows))
                _name_duplicates(plan, names, found, partition.members, visits["row"], visits["id"])
                query, column = np.nonzero(found.rows >= 0)
                out.write(
                    source,
                    {
                        "place": visits["place"][query],
                        "row": found.rows[query, column],
                        "distance": found.distances[query, column],
                        "correct": found.correct[query, column],
                    },
                )
                report("visit", len(queries))
                measure.count("done_rows", len(queries))
    return number


def _ids(members: Members, positions: np.ndarray) -> np.ndarray:
    """Object array of str: the ids of some members."""
    return strings(members.names.take(pa.array(positions)).to_pylist())


def _search(
    plan: LeaveOneOutPlan,
    partition: Partition,
    own_rows: np.ndarray,
    own_labels: np.ndarray,
    queries: np.ndarray,
) -> Lists:
    """The nearest items of a partition to (Q, D) items of any, themselves left out."""
    length = plan.config.listed
    # A partition breaks ties by id, these lists by row. Which of some equally distant items
    # come first must not depend on the partitions: so all of them are searched for.
    with measure.timed("search_ms"):
        places, distances = partition.search(queries, length + 1 + _TIES)
    found = places >= 0
    rows = np.where(found, partition.members.rows[places], -1)
    labels = partition.members.labels[places]
    correct = found & (labels == own_labels[:, None])
    own = rows == own_rows[:, None]
    return Lists(rows, distances, correct).without(own).first(length)


def _name_duplicates(
    plan: LeaveOneOutPlan,
    names: batch_files.Writer,
    found: Lists,
    searched: Members,
    query_rows: np.ndarray,
    query_ids: np.ndarray,
) -> None:
    """Notes the ids of near-duplicates, both sides: one of them will name their group."""
    near = (found.rows >= 0) & (found.distances < plan.config.duplicate_distance)
    if not near.any():
        return
    order = np.argsort(searched.rows)
    rows = np.unique(found.rows[near])
    places = order[np.searchsorted(searched.rows, rows, sorter=order)]
    queries = near.any(axis=1)
    names.write(
        0,
        {
            "row": np.concatenate([rows, query_rows[queries]]),
            "id": np.concatenate([_ids(searched, places), query_ids[queries]]),
        },
    )


# Scores -----------------------------------------------------------------------------


def score_partition(plan: LeaveOneOutPlan, number: int, others: Iterable[int]) -> int:
    """Merges what a partition's items found everywhere, and adds up what that says of others.

    others: the partitions that they visited.
    """
    if _is_done(plan.work("sums", number), plan.work("pairs", number)):
        return number
    config = plan.config
    population = int(plan.first_rows[-1]) - _removed(plan)
    sums = Sums(len(item_scores.columns(config.ks)))
    pairs = [np.empty((0, 3), np.int64)]
    hits, lists = np.zeros(config.k, np.int64), np.zeros(config.k, np.int64)
    queries = 0
    for query, found in _merged(plan, number, sorted(others)):
        complete = found.lengths == population - 1
        near = (found.rows >= 0) & (found.distances < config.duplicate_distance)
        pairs.append(_pairs(query, found, near))
        if config.exclude_duplicates:
            found = found.without(near)
        complete &= found.lengths <= config.k
        found = found.first(config.k)
        values = item_scores.shapley(found.correct, found.lengths, complete, config.shapley_k)
        sums.add(*item_scores.tally(found, values, config.ks))
        hits += found.correct.sum(axis=0)
        lists += (found.rows >= 0).sum(axis=0)
        queries += len(query)
        report("score", len(query))
        measure.count("done_rows", len(query))
    with batch_files.writing(plan.work("pairs", number)) as out:
        if len(found_pairs := item_scores.unique_pairs(np.concatenate(pairs))):
            out.write(0, {"pair": found_pairs})
    rows, values = sums.total()
    with batch_files.writing(plan.work("sums", number)) as out:
        for bundle, here in plan.by_bundle(rows):
            out.write(bundle, {"row": rows[here], "sums": values[here]})
        out.facts = {"queries": queries, "correct": hits.tolist(), "found": lists.tolist()}
    return number


def _merged(
    plan: LeaveOneOutPlan, number: int, others: Sequence[int]
) -> Iterator[tuple[np.ndarray, Lists]]:
    """The nearest items of a partition's own: their rows (Q,) and lists, block by block."""
    home = BatchFile(plan.work("home", number))
    found = [BatchFile(plan.work("found", other)).read(number) for other in others]
    stops = count(_QUERY_ROWS, _QUERY_ROWS)
    visitors = zip(*(_cut(batches, _QUERY_ROWS) for batches in found), strict=True)
    for block, stop in zip(home.keys, stops, strict=False):
        (batch,) = home.read(block)
        lists = Lists(batch["rows"], batch["distances"], batch["correct"])
        pieces = [piece for each in next(visitors, ()) for piece in each]
        if sum(len(piece["place"]) for piece in pieces):
            abroad = _concatenate(pieces)
            places, query = np.unique(abroad["place"], return_inverse=True)
            places -= stop - _QUERY_ROWS
            packed = Lists.packed(
                query, len(places), abroad["row"], abroad["distance"], abroad["correct"]
            )
            both = lists.take(places).beside(packed)
            lists = lists.replaced(places, item_scores.nearest(both, plan.config.listed))
        yield batch["query"], lists


def _cut(batches: Iterator[Columns], size: int) -> Iterator[list[Columns]]:
    """What has a place below ``size``, then below twice that, and so on; places ascend."""
    rest = next(batches, None)
    for stop in count(size, size):
        pieces = []
        while rest is not None:
            end = int(np.searchsorted(rest["place"], stop))
            pieces.append({name: values[:end] for name, values in rest.items()})
            if end < len(rest["place"]):
                rest = {name: values[end:] for name, values in rest.items()}
                break
            rest = next(batches, None)
        yield pieces


def _pairs(query: np.ndarray, found: Lists, near: np.ndarray) -> np.ndarray:
    left, column = np.nonzero(near)
    return np.column_stack([query[left], found.rows[left, column], found.correct[left, column]])


def _concatenate(parts: Sequence[Columns]) -> Columns:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _removed(plan: LeaveOneOutPlan) -> int:
    weights = plan.memory.manifest.weights
    return 0 if weights is None else weights.removed
