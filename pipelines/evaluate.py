"""Evaluates a visual memory on labelled queries: neighbours, votes, metrics, report.

python -m pipelines.evaluate --memory MEMORY --queries QUERIES [Beam options]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.utils.shared import Shared
from rich.console import Console

from pipelines import commands, running
from pipelines.embedding import EmbedSplits
from vm_core import config, evaluation, sources, summary
from vm_core.embedding import by_shard
from vm_core.errors import VisualMemoryError
from vm_core.evaluation import EvaluationConfig, EvaluationPlan, Outcome
from vm_core.records import Embedded


class Search(beam.DoFn):
    """Element -> step(plan, element, partitions): a step that searches the memory.

    Partitions stay open in a bounded cache, one for all threads of a process.
    """

    def __init__(self, plan: EvaluationPlan, step: Callable[..., Any]):
        self._plan, self._step = plan, step
        self._shared = Shared()

    def setup(self) -> None:
        self._partitions = self._shared.acquire(self._plan.memory.partition_cache)

    def process(self, element: Any) -> Iterator[Any]:
        yield self._step(self._plan, element, self._partitions)


class MergeOutcomes(beam.CombineFn):
    """Merges outcomes, in any order and grouping."""

    def __init__(self, plan: EvaluationPlan):
        self._plan = plan

    def create_accumulator(self) -> Outcome:
        return evaluation.merge_outcomes(self._plan, [])

    def add_input(self, accumulator: Outcome, outcome: Outcome) -> Outcome:
        accumulator.merge(outcome)
        return accumulator

    def merge_accumulators(self, accumulators: Iterable[Outcome]) -> Outcome:
        return evaluation.merge_outcomes(self._plan, accumulators)

    def extract_output(self, accumulator: Outcome) -> Outcome:
        return accumulator


def define_pipeline(root: beam.Pipeline, plan: EvaluationPlan, work: Sequence[Any]) -> None:
    """Adds a planned evaluation to a pipeline."""
    shards = plan.config.query_shards
    spread = root | "Work" >> beam.Create(work)  # spreads it over the workers
    if plan.config.queries:
        embedded = spread | "Embed" >> beam.ParDo(EmbedSplits(plan.embedding, shards))
    else:
        embedded = (
            spread
            | "Read" >> beam.FlatMap(partial(evaluation.read_embeddings, plan))
            | "ByShard" >> beam.FlatMap(by_shard, shards)
        )
    empty = root | "Shards" >> beam.Create(
        [(shard, Embedded.nothing()) for shard in range(shards)], reshuffle=False
    )
    gathered = (
        (embedded, empty)
        | "Gather" >> beam.Flatten()
        | "GroupByShard" >> beam.GroupByKey()
        | "Queries" >> beam.MapTuple(partial(_gather, plan))
    )
    if len(plan.memory.manifest.partitions) > 1:
        found = (
            gathered
            | "Route" >> beam.FlatMap(partial(evaluation.route, plan))
            | "SpreadParts" >> beam.Reshuffle()
            | "Search" >> beam.ParDo(Search(plan, evaluation.search_part))
        )
        outcomes = (
            {"queries": gathered, "found": found}
            | "Join" >> beam.CoGroupByKey()
            | "Evaluate" >> beam.MapTuple(partial(_evaluate, plan))
        )
    else:
        # Nothing to spread or to merge: the neighbours, most of the bytes, never travel.
        outcomes = gathered | "SearchAndEvaluate" >> beam.ParDo(
            Search(plan, evaluation.search_shard)
        )
    _ = (
        outcomes
        | "Merge" >> beam.CombineGlobally(MergeOutcomes(plan))
        | "Results" >> beam.Map(partial(evaluation.write_results, plan))
    )


def _gather(
    plan: EvaluationPlan, shard: int, parts: Iterable[Embedded]
) -> tuple[int, evaluation.Gathered]:
    return shard, evaluation.gather_queries(plan, shard, parts)


def _evaluate(plan: EvaluationPlan, shard: int, joined: dict[str, Iterable[Any]]) -> Outcome:
    (gathered,) = joined["queries"]
    return evaluation.evaluate_shard(plan, shard, gathered, joined["found"])


def evaluate(
    configuration: EvaluationConfig, beam_arguments: Sequence[str] = ()
) -> tuple[EvaluationPlan, dict[str, Any]]:
    """Runs an evaluation, or finds its results complete; returns the plan and the metrics."""
    plan, work = evaluation.plan_evaluation(configuration)
    results = evaluation.finished_results(plan)
    if results is None:
        known = 0
        if plan.config.queries:
            known = sum(plan.config.queries[i].expected(split) for i, split in work)
        running.run(
            lambda root: define_pipeline(root, plan, work),
            beam_arguments,
            {"encode": known or None, "search": known or None},
        )
        results = evaluation.finished_results(plan)
    if results is None:
        raise VisualMemoryError(f"the pipeline ended without results in {plan.output}")
    return plan, results


def command(arguments: Sequence[str]) -> None:
    """visual-memory evaluate"""
    parser = argparse.ArgumentParser(
        prog="visual-memory evaluate",
        description="Classifies labelled queries: neighbours, votes, metrics, report.",
        epilog=commands.EPILOG,
    )
    parser.add_argument("--config", help="YAML file; the options below override it")
    parser.add_argument("--memory", help="folder or bucket prefix of the memory")
    parser.add_argument(
        "--queries",
        metavar="PATH",
        action="append",
        help="a folder per class, a manifest (*.csv, *.parquet) or TFRecord shards; repeatable",
    )
    parser.add_argument("--embeddings", metavar="GLOB", help="queries as embedding shards instead")
    parser.add_argument(
        "--leave-one-out",
        action="store_true",
        default=None,
        help="every item of the memory against all the others instead",
    )
    parser.add_argument("--output", "--out", help="folder for the results (default: evaluation)")
    parser.add_argument("--k", type=int, help="neighbours per query (default 100)")
    parser.add_argument(
        "--export-neighbors", metavar="FILE.json", help="also write the neighbours as JSON"
    )
    commands.add_set_option(parser)
    options, beam_arguments = parser.parse_known_args(arguments)
    running.check_beam_arguments(beam_arguments)
    given = {
        "memory": options.memory,
        "queries": [sources.from_argument(path).model_dump() for path in options.queries or []],
        "embeddings": options.embeddings,
        "leave_one_out": options.leave_one_out,
        "output": options.output or (None if options.config else "evaluation"),
        "k": options.k,
    }
    overrides = {key: value for key, value in given.items() if value not in (None, [])}
    configuration = config.load(EvaluationConfig, options.config, options.set, overrides)
    plan, results = evaluate(configuration, beam_arguments)
    if options.export_neighbors:
        evaluation.export_neighbors(plan, options.export_neighbors)
    Console().print(summary.of_evaluation(results, plan.output))


if __name__ == "__main__":
    sys.exit(commands.main(command))
