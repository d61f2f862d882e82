"""What an evaluation leaves behind: metrics.json, tables and a report."""

from __future__ import annotations

import csv
import glob
import io
import logging
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

from vm_core import sealed, storage
from vm_core.evaluation import TABLES, EvaluationPlan, Outcome
from vm_core.failures import check_failures
from vm_core.gallery import KINDS
from vm_core.report import render_evaluation

_log = logging.getLogger(__name__)


def summarise(plan: EvaluationPlan, outcome: Outcome) -> dict[str, Any]:
    """What metrics.json holds. Raises VisualMemoryError if too many queries failed."""
    check_failures(
        outcome.read,
        outcome.quarantined,
        outcome.reasons,
        plan.config.max_failure_share,
        plan.path("quarantine-*.parquet"),
    )
    test, tuning = outcome.test.result(), outcome.tuning.result()
    manifest = plan.memory.manifest
    chosen = {
        voter: {"k": k, "accuracy": test["accuracy_at_k"][voter][k - 1]}
        for voter, k in tuning["best_k"].items()
    }
    return {
        "fingerprint": plan.fingerprint,
        "memory": {
            "path": plan.memory.root,
            "version": manifest.version,
            "content_digest": manifest.content_digest,
            "rows": manifest.total("embedded"),
            "classes": len(manifest.class_counts),
            "encoder": manifest.encoder.path,
            "encoder_fingerprint": manifest.encoder_fingerprint,
            "index": [partition.index.kind for partition in manifest.partitions],
        },
        "queries": {
            "read": outcome.read,
            "embedded": outcome.read - outcome.quarantined - outcome.duplicates,
            "quarantined": outcome.quarantined,
            "duplicates": outcome.duplicates,
            "leaks": outcome.leaks,
            "tuning": tuning["queries"],
            "test": test["queries"],
        },
        "leave_one_out": plan.config.leave_one_out,
        "k": plan.config.k,
        "fixed_k": [k for k in plan.config.fixed_k if k <= plan.config.k],
        # k is chosen on queries that are not among those it is reported on.
        "chosen_k": chosen if tuning["queries"] else None,
        "test": test,
        "tuning": tuning if tuning["queries"] else None,
    }


def write(plan: EvaluationPlan, outcome: Outcome) -> dict[str, Any]:
    """Writes metrics.json, accuracy.csv, per_class.csv and report.html; returns the metrics."""
    results = summarise(plan, outcome)
    storage.write_bytes(plan.path("accuracy.csv"), _accuracy_csv(results).encode())
    storage.write_bytes(plan.path("per_class.csv"), _per_class_csv(plan, outcome).encode())
    examples = {kind: outcome.gallery.examples(kind) for kind in KINDS}
    shown = {id for kind in KINDS for example in examples[kind] for id in example.neighbor_ids}
    thumbnails = plan.memory.thumbnails(shown)
    if plan.config.leave_one_out or plan.config.embeddings:
        queries = [example.query_id for kind in KINDS for example in examples[kind]]
        thumbnails.update(plan.memory.thumbnails(queries))
    page = render_evaluation(results, examples, plan.memory.classes, thumbnails)
    storage.write_bytes(plan.path("report.html"), page.encode())
    # Last, since it says that the results are complete.
    storage.write_bytes(plan.path("metrics.json"), sealed.sign(results))
    if plan.checkpoints is None:
        storage.remove_directory(plan.embedding.checkpoints)
    _log.info("wrote the results of %d queries to %s", outcome.read, plan.output)
    return results


def remove_outdated(plan: EvaluationPlan) -> None:
    """Removes what an earlier, other evaluation left in the folder and this one would not replace.

    Its metrics.json, which would stand for tables that are being replaced, and the tables of
    another number of query shards.
    """
    storage.remove_file(plan.path("metrics.json"))
    shards = range(plan.config.query_shards)
    kept = {plan.shard_file(kind, shard) for kind in TABLES for shard in shards}
    for kind in TABLES:
        pattern = f"{glob.escape(plan.output)}/{kind}-*-of-*.parquet"
        for file in storage.list_files(pattern):
            if file.path not in kept:
                storage.remove_file(file.path)


def finished(plan: EvaluationPlan) -> dict[str, Any] | None:
    """The results of an earlier run of the same evaluation, None if there are none."""
    data = storage.read_if_exists(plan.path("metrics.json"))
    try:
        results = sealed.verify(data or b"")
    except ValueError:  # missing or damaged
        return None
    return results if results["fingerprint"] == plan.fingerprint else None


def _accuracy_csv(results: dict[str, Any]) -> str:
    rows: list[Sequence[Any]] = [("queries", "voter", "k", "accuracy")]
    for queries in ("tuning", "test"):
        if results[queries]:
            for voter, accuracies in results[queries]["accuracy_at_k"].items():
                rows += [(queries, voter, k, value) for k, value in enumerate(accuracies, 1)]
    return _csv(rows)


def _per_class_csv(plan: EvaluationPlan, outcome: Outcome) -> str:
    """Accuracy of every class at every k, on the test queries."""
    metrics, classes = outcome.test, plan.memory.classes
    per_class = metrics.result()["per_class"]
    text = [_csv([("label", "class", "queries", "voter", "k", "accuracy")])]
    digits = cache(repr)  # few shares are different, and writing one takes longest
    for voter in metrics.voters:
        accuracy = metrics.class_accuracy_at_k(voter)
        for column, label in enumerate(metrics.classes.tolist()):
            if str(label) in per_class:
                queries = per_class[str(label)]["queries"]
                head = _csv([(label, classes.name(label), queries, voter)]).removesuffix("\n")
                text += [
                    f"{head},{k},{digits(value)}\n"
                    for k, value in enumerate(accuracy[:, column].tolist(), 1)
                ]
    return "".join(text)


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    safe = [[_no_formula(cell) for cell in row] for row in rows]
    csv.writer(text, lineterminator="\n").writerows(safe)
    return text.getvalue()


def _no_formula(cell: Any) -> Any:
    """Text that a spreadsheet would compute gets an apostrophe, which makes it text."""
    computed = isinstance(cell, str) and cell.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{cell}" if computed else cell
