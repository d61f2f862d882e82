"""Evaluates a visual memory on labelled queries: neighbours, votes, metrics, report.

python -m pipelines.evaluate --memory MEMORY --queries QUERIES [Beam options]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import apache_beam as beam
import numpy as np
from apache_beam.utils.shared import Shared

from pipelines import commands, hints, running
from pipelines.embedding import embed
from pipelines.measuring import measured
from vm_core import config, evaluation, results, sources, split_files, storage, summary
from vm_core.embedding import by_shard
from vm_core.errors import VisualMemoryError
from vm_core.evaluation import EvaluationConfig, EvaluationPlan, Outcome, Part
from vm_core.neighbors import Neighbors
from vm_core.records import Embedded
from vm_core.terminal import console


class WithPartitions(beam.DoFn):
    """Base of the steps that search: partitions stay open in a bounded cache of the process."""

    def __init__(self, plan: EvaluationPlan):
        self._plan = plan
        self._search = measured("search", partial(evaluation.search_part, plan))
        self._shared = Shared()

    def setup(self) -> None:
        self._partitions = self._shared.acquire(self._plan.memory.partition_cache)


class SearchParts(WithPartitions):
    """Part -> (shard, (places, Neighbors)): searches one partition for some queries."""

    def process(self, part: Part) -> Iterator[tuple[int, tuple[np.ndarray, Neighbors]]]:
        yield self._search(part, self._partitions)


class SearchAndEvaluate(WithPartitions):
    """(shard, Gathered) -> Outcome, in one step: the neighbours, most bytes, never travel."""

    def __init__(self, plan: EvaluationPlan):
        super().__init__(plan)
        self._route = measured("route", partial(evaluation.route, plan))
        self._evaluate = measured("evaluate", partial(evaluation.evaluate_shard, plan))

    def process(self, queries: tuple[int, evaluation.Gathered]) -> Iterator[Outcome]:
        found = [self._search(part, self._partitions)[1] for part in self._route(queries)]
        yield self._evaluate(*queries, found)


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


def define_pipeline(root: beam.Pipeline, plan: EvaluationPlan, files: Sequence[str]) -> None:
    """Adds a planned evaluation to a pipeline.

    files: with the splits of the queries' images, or with their embeddings.
    """
    shards = plan.config.query_shards
    if plan.config.queries:
        embedded = embed(root, files, plan.embedding, shards)
    else:
        embedded = (
            root
            | "Files" >> beam.Create(files)  # spreads them over the workers
            | "Read"
            >> beam.FlatMap(measured("read", partial(evaluation.read_embeddings, plan), _name))
            | "ByShard" >> beam.FlatMap(by_shard, shards)
        )
    empty = root | "Shards" >> beam.Create(
        [(shard, Embedded.nothing()) for shard in range(shards)], reshuffle=False
    )
    gathered = (
        (embedded, empty)
        | "Gather" >> beam.Flatten()
        | "GroupByShard" >> beam.GroupByKey()
        | "Queries" >> beam.MapTuple(measured("gather", partial(_gather, plan)))
    )
    near_partitions = hints.of_partitions(root)
    if len(plan.memory.manifest.partitions) > 1:
        found = (
            gathered
            | "Route" >> beam.FlatMap(measured("route", partial(evaluation.route, plan)))
            | "SpreadParts" >> beam.Reshuffle()
            | "Search" >> beam.ParDo(SearchParts(plan)).with_resource_hints(**near_partitions)
        )
        outcomes = (
            {"queries": gathered, "found": found}
            | "Join" >> beam.CoGroupByKey()
            | "Evaluate" >> beam.MapTuple(measured("evaluate", partial(_evaluate, plan)))
        )
    else:  # nothing to spread or to merge
        outcomes = gathered | "SearchAndEvaluate" >> beam.ParDo(
            SearchAndEvaluate(plan)
        ).with_resource_hints(**near_partitions)
    _ = (
        outcomes
        # Every shard has an outcome: no default is needed, nor the stage that would add it.
        | "Merge" >> beam.CombineGlobally(MergeOutcomes(plan)).without_defaults()
        | "Results" >> beam.Map(measured("results", partial(results.write, plan)))
    )


def _name(path: str) -> str:
    return path.rpartition("/")[2]


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
    return plan, run(plan, work, beam_arguments)


def run(
    plan: EvaluationPlan,
    work: Sequence[Any],
    beam_arguments: Sequence[str],
    name: str = "evaluate",
) -> dict[str, Any]:
    """Runs a planned evaluation, or finds its results complete; returns the metrics.

    name: of the run, in what is told of it.
    """
    metrics = results.finished(plan)
    if metrics is not None:
        return metrics
    check_places(plan, beam_arguments)
    with storage.exclusive(plan.path(".lock"), "writing to the same folder"):
        return results.finished(plan) or _run(plan, work, beam_arguments, name)


def _run(
    plan: EvaluationPlan, work: Sequence[Any], beam_arguments: Sequence[str], name: str
) -> dict[str, Any]:
    results.remove_outdated(plan)
    queries = plan.config.queries
    known, files = 0, work
    if queries:
        known = sum(queries[i].expected(split) for i, split in work)
        files = split_files.write(plan.embedding.checkpoints, work)
    running.run(
        lambda root: define_pipeline(root, plan, files),
        beam_arguments,
        {"encode": known or None, "search": known or None},
        name,
    )
    metrics = results.finished(plan)
    if metrics is None:
        raise VisualMemoryError(f"the pipeline ended without results in {plan.output}")
    return metrics


def check_places(plan: EvaluationPlan, beam_arguments: Sequence[str]) -> None:
    """Raises VisualMemoryError where workers cannot read what they need, or nobody can write."""
    running.check_reachable(
        beam_arguments,
        plan.memory.root,
        plan.output,
        *(source.path for source in plan.config.queries),
    )
    storage.check_writable(plan.output)


def parser() -> argparse.ArgumentParser:
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
    parser.add_argument("--encoder", metavar="PATH", help="the encoder, if it has moved")
    commands.add_trust_files_option(parser)
    commands.add_set_option(parser)
    return parser


def command(arguments: Sequence[str]) -> None:
    """visual-memory evaluate"""
    options, beam_arguments = parser().parse_known_args(arguments)
    running.check_beam_arguments(beam_arguments)
    given = {
        "memory": options.memory,
        "queries": [sources.from_argument(path).model_dump() for path in options.queries or []],
        "embeddings": options.embeddings,
        "leave_one_out": options.leave_one_out,
        "output": options.output or (None if options.config else "evaluation"),
        "k": options.k,
        "encoder_path": options.encoder,
        "trust_files": options.trust_files,
    }
    overrides = {key: value for key, value in given.items() if value not in (None, [])}
    configuration = config.load(EvaluationConfig, options.config, options.set, overrides)
    plan, metrics = evaluate(configuration, beam_arguments)
    if options.export_neighbors:
        evaluation.export_neighbors(plan, options.export_neighbors)
    console().print(summary.of_evaluation(metrics, plan.output))


if __name__ == "__main__":
    sys.exit(commands.main(command))
