"""Indexes finished shards: the part of a build that follows the writing of its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import apache_beam as beam
import numpy as np
from apache_beam.pvalue import AsList, AsSingleton

from pipelines import hints
from pipelines.measuring import measured
from pipelines.reporting import reported
from vm_core import indexing, recall
from vm_core.index_files import PartitionEntry
from vm_core.indexing import IndexPlan, Task
from vm_core.memory import Manifest, ShardEntry
from vm_core.recall import HeldOut, Hits

Publish = Callable[[list[ShardEntry], list[PartitionEntry], Hits | None], Manifest]


def define_pipeline(
    root: beam.Pipeline,
    plan: beam.PCollection[IndexPlan],
    publish: Publish,
    entries: beam.PCollection[list[ShardEntry]],
) -> None:
    """Partitions, indexes and measures what ``plan`` (one element) says; then publishes."""
    the_plan = AsSingleton(plan)
    bundles = (
        plan
        | "Bundles" >> beam.FlatMap(lambda one: range(one.bundles))
        | "SpreadBundles" >> beam.Reshuffle()
    )
    # Samples and centroids are files; that they are there is what the next step waits for.
    trained = (
        bundles
        | "Sample" >> beam.Map(measured("sample", _sample), the_plan)
        | "Sampled" >> beam.combiners.ToList()
        | "Train" >> beam.Map(measured("train", _train), the_plan)
    )
    tasks = (
        bundles
        | "Assign" >> beam.Map(measured("assign", _assign), the_plan, AsSingleton(trained))
        | "Counts" >> beam.combiners.ToList()
        | "Partitions" >> beam.FlatMap(reported(_plan_partitions), the_plan)
    )
    built = (
        tasks
        | "SpreadPartitions" >> beam.Reshuffle()
        | "Build"
        >> beam.Map(measured("index", _build), the_plan).with_resource_hints(
            **hints.of_partitions(root)
        )
    )
    search_held_out = measured("recall", _search_held_out, lambda entry, *more: entry.folder)
    queries = (
        built
        | "Built" >> beam.combiners.ToList()
        | "HeldOut" >> beam.Map(reported(_held_out), the_plan)
    )
    hits = (
        built
        | "SpreadBuilt" >> beam.Reshuffle()
        | "SearchHeldOut"
        >> beam.FlatMap(search_held_out, the_plan, AsSingleton(queries)).with_resource_hints(
            **hints.of_partitions(root)
        )
        | "MergeHits" >> beam.CombineGlobally(_merge_hits)
    )
    _ = entries | "Publish" >> beam.Map(
        measured("publish", publish), AsList(built), AsSingleton(hits)
    )


def _sample(bundle: int, plan: IndexPlan) -> None:
    indexing.sample_shards(plan, bundle)


def _train(sampled: list[None], plan: IndexPlan) -> None:
    indexing.train(plan)


def _plan_partitions(counts: list[np.ndarray], plan: IndexPlan) -> list[Task]:
    return indexing.plan_partitions(plan, counts)


def _build(task: Task, plan: IndexPlan) -> PartitionEntry:
    return indexing.build_partition(plan, task)


def _assign(bundle: int, plan: IndexPlan, trained: None):
    return indexing.assign_shards(plan, bundle)


def _held_out(entries: list[PartitionEntry], plan: IndexPlan) -> tuple[HeldOut, list[int]] | None:
    """The held-out queries and every partition's cell; None where the search is exact."""
    if not indexing.needs_recall(plan):
        return None
    ordered = sorted(entries, key=lambda entry: entry.folder)
    return indexing.read_held_out(plan, ordered), [entry.cell for entry in ordered]


def _search_held_out(
    entry: PartitionEntry, plan: IndexPlan, queries: tuple[HeldOut, list[int]] | None
) -> Iterable[Hits]:
    if queries is not None:
        yield indexing.search_held_out(plan, *queries, entry)


def _merge_hits(some: Iterable[Hits | None]) -> Hits | None:
    """Of none, None; a runner merges such results of empty bundles with others, in any order."""
    merged = None
    for hits in some:
        if hits is not None:
            merged = hits if merged is None else recall.merge(merged, hits)
    return merged
