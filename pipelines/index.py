"""Indexes finished shards: the part of a build that follows the writing of its shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import apache_beam as beam
from apache_beam.pvalue import AsList, AsSingleton

from pipelines import hints
from vm_core import indexing, recall
from vm_core.indexing import IndexPlan, PartitionEntry
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
    shards = (
        plan
        | "ShardNumbers" >> beam.FlatMap(lambda one: range(len(one.shards)))
        | "SpreadShards" >> beam.Reshuffle()
    )
    trained = (
        shards
        | "Sample"
        >> beam.Map(lambda shard, plan: (shard, indexing.sample_shard(plan, shard)), the_plan)
        | "Samples" >> beam.combiners.ToList()
        | "Train" >> beam.Map(lambda samples, plan: indexing.train(plan, samples), the_plan)
    )
    tasks = (
        plan
        | "Bundles" >> beam.FlatMap(lambda one: range(one.bundles))
        | "SpreadBundles" >> beam.Reshuffle()
        # The centroids are a file; that it is there is what this waits for.
        | "Assign" >> beam.Map(_assign, the_plan, AsSingleton(trained))
        | "Counts" >> beam.combiners.ToList()
        | "Partitions"
        >> beam.FlatMap(lambda counts, plan: indexing.plan_partitions(plan, counts), the_plan)
    )
    built = (
        tasks
        | "SpreadPartitions" >> beam.Reshuffle()
        | "Build"
        >> beam.Map(
            lambda task, plan: indexing.build_partition(plan, task), the_plan
        ).with_resource_hints(**hints.of_partitions(root))
    )
    queries = (
        built | "Built" >> beam.combiners.ToList() | "HeldOut" >> beam.Map(_held_out, the_plan)
    )
    hits = (
        built
        | "SpreadBuilt" >> beam.Reshuffle()
        | "SearchHeldOut"
        >> beam.FlatMap(_search_held_out, the_plan, AsSingleton(queries)).with_resource_hints(
            **hints.of_partitions(root)
        )
        | "MergeHits" >> beam.CombineGlobally(_merge_hits)
    )
    _ = entries | "Publish" >> beam.Map(publish, AsList(built), AsSingleton(hits))


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
    merged = None
    for hits in some:
        merged = hits if merged is None or hits is None else recall.merge(merged, hits)
    return merged
