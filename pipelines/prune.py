"""Prunes a visual memory: a new version in which misleading items are gone or weigh less.

python -m pipelines.prune --memory MEMORY --method hard|soft [--queries QUERIES] [Beam options]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipelines import commands, evaluate, running, score
from vm_core import config, evaluation, plugins, pruning, sources, storage
from vm_core.errors import VisualMemoryError
from vm_core.evaluation import EvaluationConfig, EvaluationPlan
from vm_core.leave_one_out import LeaveOneOutConfig
from vm_core.memory import Manifest, Memory
from vm_core.pruning import PruneConfig
from vm_core.score_tables import read_scores
from vm_core.terminal import console, grid


@dataclass(frozen=True)
class Pruned:
    """What a pruning did.

    memory: as pruned. published: its version, None for a dry run and where every weight is
    1. scores: of SCORES_SCHEMA. before, after: metrics of the tuning queries, None where
    there were none.
    """

    memory: Memory
    published: str | None
    scores: pa.Table
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None


def prune(
    configuration: PruneConfig, beam_arguments: Sequence[str] = (), dry_run: bool = False
) -> Pruned:
    """Scores the items, weighs them, measures what it changes, and publishes a version.

    It starts from the items without the weights of an earlier pruning, and replaces those.
    A dry run does all but publish: its side tables stay, and no version refers to them.
    What is wrong with the evaluation's settings or its queries is told before any work.
    """
    memory = Memory(configuration.memory)
    base = memory.with_manifest(pruning.unweighted(memory.manifest))
    planned = None
    if configuration.evaluation:
        planned = _plan_evaluation(configuration.evaluation, base, beam_arguments)
    if configuration.scores:
        scores = pruning.scores_of_file(base, configuration)
    else:
        scores = _leave_one_out(configuration, base, beam_arguments)
    pruned = pruning.stage(base, configuration.weights(scores), configuration.recipe)
    weights = pruned.manifest.weights
    assert weights is not None
    changes = bool(weights.removed or weights.weighted)
    before = after = None
    if planned and changes:
        plan, queries = planned
        scratch = pruned.path(f"work/prune-{weights.folder.rpartition('/')[2]}")
        output = plan.output if configuration.evaluation.get("output") else scratch
        plan = replace(plan, checkpoints=scratch)
        before, after = (
            _measure(
                replace(plan, memory=version, output=storage.join(output, name)),
                *(queries, beam_arguments, name),
            )
            for name, version in (("before", base), ("after", pruned))
        )
        storage.remove_directory(scratch)
    version = None
    if changes and not dry_run:
        published = pruning.publish_staged(pruned, memory.manifest.version)
        pruned = pruned.with_manifest(published)
        version = pruned.manifest.version
    return Pruned(pruned, version, scores, before, after)


def _leave_one_out(
    configuration: PruneConfig, base: Memory, beam_arguments: Sequence[str]
) -> pa.Table:
    settings = {"memory": base.root, "version": base.manifest.version}
    scoring = plugins.validate(
        LeaveOneOutConfig, configuration.leave_one_out_settings | settings, "leave_one_out"
    )
    results = score.run(scoring, beam_arguments, base)
    tables = read_scores(base, results["fingerprint"])
    return pruning.scores_of(tables, configuration.column, ties=configuration.share is not None)


def _plan_evaluation(
    settings: dict[str, Any], base: Memory, beam_arguments: Sequence[str]
) -> tuple[EvaluationPlan, list[Any]]:
    """The evaluation of the memory before it is pruned, and its queries."""
    given = {**settings, "memory": base.root, "version": base.manifest.version}
    given["output"] = settings.get("output") or base.path("work")
    config = plugins.validate(EvaluationConfig, given, "evaluation")
    if not config.tuning_share:
        raise VisualMemoryError(
            "with evaluation.tuning_share = 0 none of the queries is a tuning query, and the "
            "others are not for choosing how to prune. Give a share above 0"
        )
    plan, queries = evaluation.plan_evaluation(config)
    evaluate.check_places(plan, beam_arguments)
    return plan, queries


def _measure(
    plan: EvaluationPlan, queries: Sequence[Any], beam_arguments: Sequence[str], name: str
) -> dict[str, Any]:
    """Metrics of the tuning queries alone: the test queries are not for choosing by them."""
    fingerprint = f"{plan.fingerprint}-{plan.memory.manifest.content_digest[:16]}"
    plan = replace(plan, fingerprint=fingerprint)
    results = evaluate.run(plan, queries, beam_arguments, f"evaluate-{name}")
    if results["tuning"] is None:
        raise VisualMemoryError(
            f"none of the {results['queries']['embedded']:,} queries is a tuning query, and the "
            "others are not for choosing how to prune. Give more queries, or raise "
            "evaluation.tuning_share"
        )
    return dict(results["tuning"])


def describe(pruned: Pruned, headline_k: int = 10) -> RenderableType:
    """What was pruned, and the accuracy before and after."""
    manifest = pruned.memory.manifest
    weights, items = manifest.weights, manifest.total("embedded")
    assert weights is not None
    what = ", ".join(f"{name} {value}" for name, value in weights.settings.items())
    version = f"{pruned.published}, made from {weights.base_version}"
    if pruned.published is None:
        version = f"none published, {weights.base_version} is as it was"
    facts = grid(
        ("memory", pruned.memory.root),
        ("pruning", what),
        ("items", f"{weights.removed:,} removed, {weights.weighted:,} weighted, of {items:,}"),
        ("scores", _scores(pruned.scores, items)),
        ("version", version),
    )
    if pruned.before is None or pruned.after is None:
        return Group(facts, Text(_without_accuracy(bool(weights.removed or weights.weighted))))
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        title=f"Accuracy on {pruned.before['queries']:,} tuning queries",
        title_justify="left",
    )
    table.add_column("voter")
    k = min(headline_k, len(pruned.before["reliability_at_k"]))
    for name in ("before, best", "after, best", f"before, k={k}", f"after, k={k}"):
        table.add_column(name, justify="right")
    for voter in pruned.before["accuracy_at_k"]:
        best = []
        fixed = []
        for metrics in (pruned.before, pruned.after):
            accuracies, best_k = metrics["accuracy_at_k"][voter], metrics["best_k"][voter]
            best.append(f"{accuracies[best_k - 1]:.1%} (k={best_k})")
            fixed.append(f"{accuracies[k - 1]:.1%}")
        table.add_row(voter, *best, *fixed)
    return Group(facts, Text(), table)


def _scores(scores: pa.Table, items: int) -> str:
    if not len(scores):
        return "none"
    low, high = pc.min_max(scores["score"]).as_py().values()
    text = f"{low:.4g} to {high:.4g}"
    missing = items - len(scores)
    return f"{text}; {missing:,} items have none and stay as they are" if missing else text


def _without_accuracy(changes: bool) -> str:
    if not changes:
        return "\nNo item is as bad as that. Lower the threshold, or give a --share."
    return (
        "\nNo accuracy was measured. Give labelled images with --queries PATH, or embeddings "
        "with --embeddings GLOB; add --dry-run to see it before a version is published."
    )


def _undo(path: str, dry_run: bool) -> RenderableType:
    memory = Memory(path)
    manifest: Manifest = pruning.unweighted(memory.manifest) if dry_run else pruning.undo(memory)
    version = "none published" if dry_run else f"{manifest.version}, without weights"
    return grid(("memory", memory.root), ("version", version), ("content", manifest.content_digest))


def command(arguments: Sequence[str]) -> None:
    """visual-memory prune"""
    parser = argparse.ArgumentParser(
        prog="visual-memory prune",
        description="Publishes a version in which misleading items are removed (hard) or weigh "
        "less (soft). Embeddings and indexes stay as they are; --undo takes it back.",
        epilog=commands.EPILOG,
    )
    parser.add_argument("--config", help="YAML file; the options below override it")
    parser.add_argument("--memory", help="folder or bucket prefix of the memory")
    parser.add_argument("--method", choices=("hard", "soft"))
    parser.add_argument(
        "--by",
        metavar="SCORE",
        help="leave-one-out score: wrong_at_K, correct_at_K, reliability or shapley (default: "
        "wrong_at_100 for hard, wrong_at_10 for soft)",
    )
    parser.add_argument(
        "--threshold",
        type=float,
        metavar="N",
        help=f"hard: removes items whose score reaches N (default: {pruning.HARD_THRESHOLD} for "
        "wrong_at_100)",
    )
    parser.add_argument("--share", type=float, metavar="S", help="hard: removes the worst share")
    parser.add_argument("--scores", metavar="FILE", help="CSV or Parquet with id and a score")
    parser.add_argument("--score-column", metavar="NAME", help="its column (default: score)")
    parser.add_argument(
        "--lowest", action="store_true", default=None, help="its low scores are the bad ones"
    )
    parser.add_argument(
        "--queries",
        metavar="PATH",
        action="append",
        help="labelled images that show what it changes: a folder per class, a manifest (*.csv, "
        "*.parquet) or TFRecord shards; repeatable. Only the tuning share of them is reported",
    )
    parser.add_argument("--embeddings", metavar="GLOB", help="queries as embedding shards instead")
    parser.add_argument("--output", "--out", help="keeps both evaluations in this folder")
    parser.add_argument("--undo", action="store_true", help="takes the current weights back")
    parser.add_argument("--dry-run", action="store_true", help="publishes nothing")
    commands.add_set_option(parser)
    options, beam_arguments = parser.parse_known_args(arguments)
    running.check_beam_arguments(beam_arguments)
    running.check_waits(beam_arguments)
    names = ("memory", "method", "by", "threshold", "share", "scores", "score_column", "lowest")
    given = {name: getattr(options, name) for name in names}
    queries = [sources.from_argument(path).model_dump() for path in options.queries or []]
    for_evaluation = {
        "queries": queries or None,
        "embeddings": options.embeddings,
        "output": options.output,
    }
    given["evaluation"] = {k: v for k, v in for_evaluation.items() if v is not None} or None
    if options.undo:
        if options.memory is None:
            raise VisualMemoryError("--undo needs a memory. Give --memory MEMORY")
        console().print(_undo(options.memory, options.dry_run))
        return
    overrides = {key: value for key, value in given.items() if value is not None}
    configuration = config.load(PruneConfig, options.config, options.set, overrides)
    pruned = prune(configuration, beam_arguments, options.dry_run)
    console().print(describe(pruned, configuration.evaluation.get("headline_k", 10)))


if __name__ == "__main__":
    sys.exit(commands.main(command))
