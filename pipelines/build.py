"""Builds a visual memory: read, encode, write shards, index, publish.

python -m pipelines.build --config CONFIG [--set KEY=VALUE ...] [Beam options]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial

import apache_beam as beam

from pipelines import commands, index, running
from pipelines.embedding import embed
from pipelines.measuring import measured
from pipelines.reporting import reported
from vm_core import building, config, split_files, storage, summary
from vm_core.building import BuildConfig, BuildPlan
from vm_core.errors import VisualMemoryError
from vm_core.memory import Memory
from vm_core.records import Embedded
from vm_core.sources import Split
from vm_core.terminal import console


def define_pipeline(root: beam.Pipeline, plan: BuildPlan, files: Sequence[str]) -> None:
    """Adds a planned build to a pipeline: tests and production runs execute the same graph.

    files: with the splits to read. Only names and numbers travel: the splits, and what is
    known of finished shards, are for the workers to read.
    """
    shards = plan.config.shards
    finished = building.finished_shards(plan).keys()
    missing = frozenset(range(shards)) - finished
    embedded = embed(
        root, files if missing else [], plan.embedding, shards, missing if finished else None
    )
    # A shard that no image falls into is written all the same: every one has its files.
    empty = root | "Shards" >> beam.Create(
        [(shard, Embedded.nothing()) for shard in missing], reshuffle=False
    )
    written = (
        (embedded, empty)
        | "Gather" >> beam.Flatten()
        | "GroupByShard" >> beam.GroupByKey()
        | "WriteShards"
        >> beam.MapTuple(measured("write", partial(building.write_shard_files, plan)))
    )
    done = (
        root
        | "Finished" >> beam.Create(sorted(finished), reshuffle=False)
        | "ReadEntries" >> beam.Map(reported(partial(building.read_entry, plan)))
    )
    entries = (written, done) | "AllShards" >> beam.Flatten() | "List" >> beam.combiners.ToList()
    index.define_pipeline(
        root,
        entries | "PlanIndex" >> beam.Map(reported(partial(building.plan_index, plan))),
        partial(building.publish, plan),
        entries,
    )


def build(configuration: BuildConfig, beam_arguments: Sequence[str] = ()) -> Memory:
    """Runs a build to its end, unless it is published already, and opens that version."""
    plan, splits = building.plan_build(configuration)
    lock = f"{plan.embedding.checkpoints}.lock"
    if building.is_published(plan):
        if storage.is_directory(plan.embedding.checkpoints):  # a run was stopped right before
            with storage.exclusive(lock, "making the same build"):
                building.remove_work(plan)
        return Memory(plan.root)
    running.check_reachable(beam_arguments, plan.root, *(s.path for s in plan.config.sources))
    storage.check_writable(plan.root)
    with storage.exclusive(lock, "making the same build"):
        try:
            if not building.is_published(plan):
                _run(plan, splits, beam_arguments)
        except VisualMemoryError:
            # On an object store another run may have finished the build, and removed what this
            # one was working with.
            if not building.is_published(plan):
                raise
    return Memory(plan.root)


def _run(
    plan: BuildPlan, splits: Sequence[tuple[int, Split]], beam_arguments: Sequence[str]
) -> None:
    images = sum(plan.config.sources[i].expected(split) for i, split in splits)
    files = split_files.write(plan.embedding.checkpoints, splits)
    running.run(
        lambda root: define_pipeline(root, plan, files),
        beam_arguments,
        {"encode": images or None, "write": plan.config.shards, "index": 1},
        "build",
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visual-memory build",
        description="Reads images, encodes them, writes shards and an index, publishes a version.",
        epilog=commands.EPILOG,
    )
    parser.add_argument("--config", required=True, help="YAML file that describes the build")
    commands.add_set_option(parser)
    return parser


def command(arguments: Sequence[str]) -> None:
    """visual-memory build"""
    options, beam_arguments = parser().parse_known_args(arguments)
    running.check_beam_arguments(beam_arguments)
    configuration = config.load(BuildConfig, options.config, options.set)
    console().print(summary.of_build(build(configuration, beam_arguments)))


if __name__ == "__main__":
    sys.exit(commands.main(command))
