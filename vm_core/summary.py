"""What the terminal shows of a memory and of an evaluation."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vm_core.gallery import Example
from vm_core.memory import Manifest, Memory
from vm_core.terminal import grid
from vm_core.units import size


def of_memory(memory: Memory, classes: int = 20) -> RenderableType:
    """Tables of what is in a memory; ``classes``: how many classes to list at most."""
    manifest = memory.manifest
    facts = grid(
        ("memory", memory.root),
        ("version", f"{manifest.version}, {manifest.created}"),
        ("images", _counts(manifest)),
        (
            "embeddings",
            f"{manifest.dimension} x {manifest.dtype}, {size(manifest.total('bytes'))}",
        ),
        ("encoder", f"{manifest.encoder.path} ({manifest.encoder_fingerprint})"),
        ("shards", f"{len(manifest.shards)}"),
        ("index", _index(manifest)),
        *_pruning(manifest),
        ("content", manifest.content_digest),
    )
    by_class = Table("class", "images", title="Classes", title_justify="left", box=None)
    by_class.columns[1].justify = "right"
    counts = sorted(manifest.class_counts.items(), key=lambda item: (-item[1], item[0]))
    for label, count in counts[:classes]:
        by_class.add_row(Text(memory.classes.name(label)), f"{count:,}")
    if len(counts) > classes:
        rest = sum(count for _, count in counts[classes:])
        by_class.add_row(f"({len(counts) - classes:,} more classes)", f"{rest:,}")
    by_source = Table("source", "images", title="Sources", title_justify="left", box=None)
    by_source.columns[1].justify = "right"
    for source, count in manifest.source_counts().items():
        by_source.add_row(Text(source), f"{count:,}")
    parts: list[RenderableType] = [facts, Text(), by_source, Text(), by_class]
    if reasons := manifest.reasons():
        table = Table("images", "reason", title="Quarantine", title_justify="left", box=None)
        table.columns[0].justify = "right"
        for reason, count in sorted(reasons.items(), key=lambda item: -item[1])[:10]:
            table.add_row(f"{count:,}", Text(reason))
        parts += [Text(), table]
    return Group(*parts)


def of_build(memory: Memory) -> RenderableType:
    """The few lines at the end of a build."""
    manifest = memory.manifest
    return grid(
        ("memory", f"{memory.root}, version {manifest.version}"),
        ("images", _counts(manifest)),
        ("index", _index(manifest)),
        *_pruning(manifest),
        ("content", manifest.content_digest),
    )


def of_evaluation(results: dict[str, Any], output: str) -> RenderableType:
    """The accuracy of every voter, at the k chosen on the tuning queries and at fixed k."""
    queries, test = results["queries"], results["test"]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("voter")
    table.add_column("chosen k", justify="right")
    table.add_column("accuracy", justify="right", style="bold")
    for k in results["fixed_k"]:
        table.add_column(f"k={k}", justify="right")
    for voter, accuracies in test["accuracy_at_k"].items():
        chosen = (results["chosen_k"] or {}).get(voter, {"k": None, "accuracy": None})
        table.add_row(
            voter,
            str(chosen["k"] or "-"),
            _percent(chosen["accuracy"]),
            *(_percent(accuracies[k - 1]) for k in results["fixed_k"]),
        )
    facts = grid(
        ("memory", f"{results['memory']['path']}, version {results['memory']['version']}"),
        (
            "queries",
            f"{queries['test']:,} test, {queries['tuning']:,} tuning (chose k), "
            f"{queries['quarantined']:,} quarantined"
            + (
                f"; {queries['leaks']:,} have a near-duplicate in the memory"
                if queries["leaks"]
                else ""
            ),
        ),
        ("report", f"{output}/report.html"),
    )
    return Group(table, facts)


def of_analysis(results: dict[str, Any], output: str) -> RenderableType:
    """Accuracy of every voter at some k, and what was pruned."""
    accuracies = results["accuracy_at_k"]
    deepest = len(results["reliability_at_k"])
    fixed = [k for k in (1, 5, 10, 20, 50, 100) if k < deepest] + [deepest]
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("voter")
    for name in ("best", "at k", *(f"k={k}" for k in fixed)):
        table.add_column(name, justify="right")
    for voter, values in accuracies.items():
        best = max(values)
        shown = (_percent(values[k - 1]) for k in fixed)
        table.add_row(voter, _percent(best), str(values.index(best) + 1), *shown)
    facts = [("queries", f"{len(results['entropy_base2']):,}"), ("results", output)]
    if "excluded" in results:
        pruned = f"{len(results['excluded']):,} items removed, "
        pruned += f"{len(results['soft_weights']):,} weighted"
        facts.insert(1, ("pruning", pruned))
    return Group(table, grid(*facts))


def of_answer(memory: Memory, answer: Example) -> RenderableType:
    """One classified image and the neighbours that decided."""
    title = Text.assemble(
        f"{answer.query_id}: ",
        (memory.classes.name(answer.prediction), "bold"),
        f", confidence {answer.confidence:.0%}",
    )
    table = Table(box=box.SIMPLE_HEAD)
    for name, justify in (("rank", "right"), ("class", "left"), ("distance", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("weight", justify="right")
    table.add_column("neighbour")
    for rank, id in enumerate(answer.neighbor_ids):
        table.add_row(
            str(rank),
            Text(memory.classes.name(answer.neighbor_labels[rank])),
            f"{answer.distances[rank]:.4f}",
            f"{answer.weights[rank]:.1%}",
            Text(id),
        )
    return Group(title, table)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _counts(manifest: Manifest) -> str:
    read, embedded, quarantined, duplicates = (
        f"{manifest.total(name):,}" for name in ("read", "embedded", "quarantined", "duplicates")
    )
    return (
        f"{read} read = {embedded} embedded + {quarantined} quarantined + {duplicates} duplicates"
    )


def _index(manifest: Manifest) -> str:
    kinds = Counter(partition.index.kind for partition in manifest.partitions)
    rows = [partition.count for partition in manifest.partitions]
    text = ", ".join(kinds)
    if len(rows) > 1:
        text += (
            f"; {len(rows)} partitions of {min(rows):,} to {max(rows):,} rows, "
            f"{manifest.probes} visited by a query"
        )
    if manifest.recall is not None:
        recall = manifest.recall
        text += f"; recall on {recall.queries:,} held-out queries "
        text += ", ".join(f"@{k} {value:.3f}" for k, value in recall.at.items())
        groups = {"worst class": recall.worst_class, "new classes": recall.new_classes}
        for name, group in groups.items():
            if group is not None:
                text += f"; {name} " + ", ".join(
                    f"@{k} {value:.3f}" for k, value in group.at.items()
                )
                if group.unmeasured:
                    text += f" ({len(group.unmeasured):,} of {len(group.labels):,} without a query)"
    return text


def _pruning(manifest: Manifest) -> list[tuple[str, str]]:
    weights = manifest.weights
    if weights is None:
        return []
    return [
        (
            "pruned",
            f"{weights.removed:,} items removed, {weights.weighted:,} weigh otherwise than 1; "
            f"made from version {weights.base_version}",
        )
    ]
