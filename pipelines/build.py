"""Builds a visual memory: read, encode, write shards, index, publish.

python -m pipelines.build --config CONFIG [--set KEY=VALUE ...] [Beam options]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import apache_beam as beam
from rich.console import Console

from pipelines import commands, index, running
from pipelines.embedding import EmbedSplits
from vm_core import building, config, storage, summary
from vm_core.building import BuildConfig, BuildPlan
from vm_core.memory import Memory
from vm_core.records import Embedded, shard_of
from vm_core.sources import Split


def define_pipeline(
    root: beam.Pipeline, plan: BuildPlan, splits: Sequence[tuple[int, Split]]
) -> None:
    """Adds a planned build to a pipeline: tests and production runs execute the same graph."""
    shards = plan.config.shards
    finished = building.finished_shards(plan)
    missing = frozenset(range(shards)) - finished.keys()
    embedded = (
        root
        | "Splits" >> beam.Create(splits if missing else [])  # spreads them over the workers
        | "Embed" >> beam.ParDo(EmbedSplits(plan.embedding, shards, _wanted(missing, shards)))
        | "Missing" >> beam.Filter(lambda part: part[0] in missing)
    )
    # A shard that no image falls into is written all the same: every one has its files.
    empty = root | "Shards" >> beam.Create(
        [(shard, Embedded.nothing()) for shard in missing], reshuffle=False
    )
    written = (
        (embedded, empty)
        | "Gather" >> beam.Flatten()
        | "GroupByShard" >> beam.GroupByKey()
        | "WriteShards" >> beam.MapTuple(partial(building.write_shard_files, plan))
    )
    done = root | "Finished" >> beam.Create(list(finished.values()), reshuffle=False)
    entries = (written, done) | "AllShards" >> beam.Flatten() | "List" >> beam.combiners.ToList()
    index.define_pipeline(
        root,
        entries | "PlanIndex" >> beam.Map(partial(building.plan_index, plan)),
        partial(building.publish, plan),
        entries,
    )


def _wanted(missing: frozenset[int], shards: int) -> partial[bool] | None:
    return None if len(missing) == shards else partial(_is_in, missing, shards)


def _is_in(missing: frozenset[int], shards: int, id: str) -> bool:
    return shard_of(id, shards) in missing


def build(configuration: BuildConfig, beam_arguments: Sequence[str] = ()) -> Memory:
    """Runs a build to its end, unless it is published already, and opens that version."""
    plan, splits = building.plan_build(configuration)
    if building.is_published(plan):
        return Memory(plan.root)
    storage.check_writable(plan.root)
    images = sum(plan.config.sources[i].expected(split) for i, split in splits)
    running.run(
        lambda root: define_pipeline(root, plan, splits),
        beam_arguments,
        {"encode": images or None, "write": plan.config.shards, "index": 1},
    )
    return Memory(plan.root)


def command(arguments: Sequence[str]) -> None:
    """visual-memory build"""
    parser = argparse.ArgumentParser(
        prog="visual-memory build",
        description="Reads images, encodes them, writes shards and an index, publishes a version.",
        epilog=commands.EPILOG,
    )
    parser.add_argument("--config", required=True, help="YAML file that describes the build")
    commands.add_set_option(parser)
    options, beam_arguments = parser.parse_known_args(arguments)
    running.check_beam_arguments(beam_arguments)
    configuration = config.load(BuildConfig, options.config, options.set)
    Console().print(summary.of_build(build(configuration, beam_arguments)))


if __name__ == "__main__":
    sys.exit(commands.main(command))
