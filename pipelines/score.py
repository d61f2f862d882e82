"""Scores every item of a memory by leave-one-out search.

python -m pipelines.score --memory MEMORY [Beam options]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import apache_beam as beam

from pipelines import commands, hints, running
from pipelines.measuring import measured
from vm_core import config, leave_one_out, score_tables, storage
from vm_core.errors import VisualMemoryError
from vm_core.leave_one_out import LeaveOneOutConfig, LeaveOneOutPlan
from vm_core.memory import Memory
from vm_core.terminal import console


def define_pipeline(root: beam.Pipeline, plan: LeaveOneOutPlan) -> None:
    """Adds planned scores to a pipeline. Only numbers of partitions and bundles travel."""
    homes = (
        root
        | "Partitions" >> beam.Create(range(plan.partitions))
        | "SearchHome"
        >> beam.Map(measured("home", partial(_search_home, plan))).with_resource_hints(
            **hints.of_partitions(root)
        )
    )
    visited = (
        homes
        | "Visits" >> beam.FlatMapTuple(lambda source, others: [(o, source) for o in others])
        | "ByVisited" >> beam.GroupByKey()
        | "SearchVisitors"
        >> beam.FlatMapTuple(
            measured("visit", partial(_search_visitors, plan))
        ).with_resource_hints(**hints.of_partitions(root))
    )
    scored = (
        (homes | "AtHome" >> beam.MapTuple(lambda number, _: (number, number)), visited)
        | "Everywhere" >> beam.Flatten()
        | "ByHome" >> beam.GroupByKey()
        | "ScorePartition"
        >> beam.MapTuple(measured("score", partial(_score_partition, plan))).with_resource_hints(
            **hints.of_partitions(root)
        )
        | "ListScored" >> beam.combiners.ToList()
    )
    _ = (
        scored
        | "GroupDuplicates"
        >> beam.Map(measured("group", lambda _: score_tables.group_duplicates(plan)))
        | "Bundles" >> beam.FlatMap(lambda _: range(plan.bundles))
        | "SpreadBundles" >> beam.Reshuffle()
        | "WriteScores" >> beam.Map(measured("items", partial(score_tables.write_scores, plan)))
        | "ListWritten" >> beam.combiners.ToList()
        | "Finish" >> beam.Map(measured("finish", lambda _: score_tables.finish(plan)))
    )


def _search_home(plan: LeaveOneOutPlan, number: int) -> tuple[int, list[int]]:
    return number, leave_one_out.search_home(plan, number)


def _search_visitors(
    plan: LeaveOneOutPlan, number: int, sources: Iterable[int]
) -> Iterator[tuple[int, int]]:
    """Searches one partition for its visitors; yields (home, visited) for each home of some."""
    sources = sorted(sources)
    leave_one_out.search_visitors(plan, number, sources)
    yield from ((source, number) for source in sources)


def _score_partition(plan: LeaveOneOutPlan, number: int, searched: Iterable[int]) -> int:
    others = [other for other in searched if other != number]
    return leave_one_out.score_partition(plan, number, others)


def run(
    configuration: LeaveOneOutConfig,
    beam_arguments: Sequence[str] = (),
    memory: Memory | None = None,
) -> dict[str, Any]:
    """Makes the scores, or finds them made; returns what scores.json holds.

    memory: the opened memory, where it is not as the configuration would open it.
    """
    memory = memory or Memory(
        configuration.memory, configuration.version, configuration.trust_files
    )
    plan = leave_one_out.plan_scores(memory, configuration)
    results = score_tables.finished_scores(plan)
    if results is None:
        running.check_reachable(beam_arguments, memory.root)
        storage.check_writable(plan.path(""))
        with storage.exclusive(plan.work("").rstrip("/") + ".lock", "making the same scores"):
            results = score_tables.finished_scores(plan) or _run(plan, beam_arguments)
    else:
        storage.remove_directory(plan.work(""))  # a run may have been stopped right before
    if results is None:
        raise VisualMemoryError(f"the pipeline ended without scores in {plan.path('')}")
    return results


def _run(plan: LeaveOneOutPlan, beam_arguments: Sequence[str]) -> dict[str, Any] | None:
    items, shards = int(plan.first_rows[-1]), len(plan.first_rows) - 1
    running.run(
        lambda root: define_pipeline(root, plan),
        beam_arguments,
        {"search": items, "visit": None, "score": items, "write": shards},
        "score",
    )
    return score_tables.finished_scores(plan)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visual-memory score",
        description="Scores every item of a memory by how it helps or misleads the others.",
        epilog=commands.EPILOG,
    )
    parser.add_argument("--config", help="YAML file; the options below override it")
    parser.add_argument("--memory", help="folder or bucket prefix of the memory")
    parser.add_argument(
        "--k", type=int, nargs="+", help="count among so many neighbours (default 10 100)"
    )
    commands.add_trust_files_option(parser)
    commands.add_set_option(parser)
    return parser


def command(arguments: Sequence[str]) -> None:
    """visual-memory score"""
    options, beam_arguments = parser().parse_known_args(arguments)
    running.check_beam_arguments(beam_arguments)
    given = {"memory": options.memory, "ks": options.k, "trust_files": options.trust_files}
    overrides = {key: value for key, value in given.items() if value is not None}
    configuration = config.load(LeaveOneOutConfig, options.config, options.set, overrides)
    console().print(score_tables.of_scores(run(configuration, beam_arguments)))


if __name__ == "__main__":
    sys.exit(commands.main(command))
