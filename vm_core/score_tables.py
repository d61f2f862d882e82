"""The second half of leave-one-out scores: groups of near-duplicates, tables, the summary.

vm_core.leave_one_out tells of the whole.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vm_core import batch_files, item_scores, measure, sealed, storage
from vm_core.batch_files import BatchFile, Columns
from vm_core.errors import DamagedError, VisualMemoryError
from vm_core.item_scores import FIXED_POINT
from vm_core.leave_one_out import LeaveOneOutPlan
from vm_core.memory import Memory
from vm_core.progress import report
from vm_core.records import EmbeddingBlock, strings
from vm_core.tables import read_table, write_table
from vm_core.terminal import grid

WORST = 10
"""How many of the worst items the summary names."""

_log = logging.getLogger(__name__)


def group_duplicates(plan: LeaveOneOutPlan) -> None:
    """Groups the near-duplicates of all partitions: who is near to one of a group is in it."""
    if batch_files.is_complete(plan.work("groups")):
        return
    parts = [np.empty((0, 3), np.int64)]
    for number in range(plan.partitions):
        parts += [batch["pair"] for batch in BatchFile(plan.work("pairs", number)).read(0)]
    pairs = item_scores.unique_pairs(np.concatenate(parts))
    rows, heads = item_scores.groups(pairs[:, :2])
    names = _names(plan, np.unique(heads))
    ids = strings([names[head] for head in heads.tolist()])
    with batch_files.writing(plan.work("groups")) as out:
        for bundle, here in plan.by_bundle(rows):
            out.write(bundle, {"row": rows[here], "id": ids[here]})
        out.facts = {
            "groups": len(names),
            "items": len(rows),
            "pairs": len(pairs),
            "pairs_with_different_labels": int((pairs[:, 2] == 0).sum()),
        }


def _names(plan: LeaveOneOutPlan, rows: np.ndarray) -> dict[int, str]:
    """The ids of some near-duplicates."""
    names: dict[int, str] = {}
    for number in range(plan.partitions):
        for kind in ("names-home", "names-found"):
            path = plan.work(kind, number)
            if len(names) < len(rows) and batch_files.is_complete(path):
                for batch in BatchFile(path).read(0):
                    wanted = np.isin(batch["row"], rows)
                    names.update(
                        zip(batch["row"][wanted].tolist(), batch["id"][wanted], strict=True)
                    )
    return names


def write_scores(plan: LeaveOneOutPlan, bundle: int) -> int:
    """Writes the scores of the items of some shards, from what all partitions say of them."""
    marker = plan.work("written", bundle) + ".json"
    done = sealed.read_json(marker)
    is_done = done is not None and not storage.damaged(plan.path(""), done["files"])
    measure.count_reuse("bundles", is_done)
    if is_done:
        return bundle
    shards = range(plan.first_shards[bundle], plan.first_shards[bundle + 1])
    start, stop = plan.first_rows[shards.start], plan.first_rows[shards.stop]
    names = item_scores.columns(plan.config.ks)
    totals = np.zeros((stop - start, len(names)), np.int64)
    queries = 0
    for number in range(plan.partitions):
        sums = BatchFile(plan.work("sums", number))
        queries += sums.facts["queries"]
        for batch in sums.read(bundle):
            totals[batch["row"] - start] += batch["sums"]
    group = np.full(stop - start, None, object)
    for batch in BatchFile(plan.work("groups")).read(bundle):
        group[batch["row"] - start] = batch["id"]
    worst: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    for shard in shards:
        block = plan.memory.read_shard(shard)
        here = slice(plan.first_rows[shard] - start, plan.first_rows[shard + 1] - start)
        columns = dict(zip(names, totals[here].T, strict=True))
        rows = np.arange(plan.first_rows[shard], plan.first_rows[shard + 1])
        table = _table(plan, rows, block, columns, group[here], queries)
        files[plan.items(shard).rpartition("/")[2]] = write_table(plan.items(shard), table)
        worst = _worst(worst + table.take(_lowest(table, WORST)).to_pylist())
        report("write", 1)
        measure.count("done_rows", len(block))
    sealed.write_json(marker, {"worst": worst, "files": files})
    return bundle


def _table(
    plan: LeaveOneOutPlan,
    rows: np.ndarray,
    block: EmbeddingBlock,
    columns: Columns,
    group: np.ndarray,
    queries: int,
) -> pa.Table:
    """The scores of one shard's items; columns: sums over all queries."""
    correct = columns[f"correct_at_{plan.config.k}"]
    counted = correct + columns[f"wrong_at_{plan.config.k}"]
    return pa.table(
        {
            "row": rows,
            "id": pa.array(block.ids, pa.string()),
            "label": pa.array(block.labels, pa.int64()),
            **{name: values for name, values in columns.items() if name != "shapley"},
            "reliability": pa.array(correct / np.maximum(counted, 1), mask=counted == 0),
            "shapley": columns["shapley"] * (FIXED_POINT / max(1, queries)),
            "duplicate_group": pa.array(group, pa.string()),
        }
    )


def _lowest(table: pa.Table, items: int) -> np.ndarray:
    """Places of the rows of lowest Shapley value; a table is in the order of ids."""
    return np.argsort(table["shapley"].to_numpy(), kind="stable")[:items]


def _worst(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(items, key=lambda item: (item["shapley"], item["id"]))[:WORST]


def finish(plan: LeaveOneOutPlan) -> dict[str, Any]:
    """Adds everything up, writes the marker, and removes the work files.

    Once more it changes nothing: a runner repeats a step whose result was lost.
    """
    done = finished_scores(plan)
    if done is not None:
        storage.remove_directory(plan.work(""))
        return done
    config = plan.config
    facts = [BatchFile(plan.work("sums", n)).facts for n in range(plan.partitions)]
    queries = sum(fact["queries"] for fact in facts)
    correct = np.sum([fact["correct"] for fact in facts], axis=0)
    found = np.sum([fact["found"] for fact in facts], axis=0)
    worst: list[dict[str, Any]] = []
    files: dict[str, str] = {}
    for bundle in range(plan.bundles):
        written = sealed.require_json(plan.work("written", bundle) + ".json")
        worst = _worst(worst + written["worst"])
        files |= written["files"]
    for item in worst:
        item["class"] = plan.memory.classes.name(item["label"])
    results = {
        "memory": plan.memory.root,
        "version": plan.memory.manifest.version,
        "fingerprint": plan.fingerprint,
        "folder": plan.folder,
        "settings": config.model_dump(mode="json", exclude={"memory", "version", "trust_files"}),
        "probes": plan.probes,
        "items": int(plan.first_rows[-1]),
        "queries": queries,
        "accuracy_of_nearest": int(correct[0]) / max(1, queries),
        "reliability_at_rank": [
            int(c) / int(n) if n else None for c, n in zip(correct, found, strict=True)
        ],
        "duplicates": BatchFile(plan.work("groups")).facts,
        "worst": worst,
        "files": files,
    }
    storage.remove_leftovers(plan.path(""))
    storage.write_bytes(plan.path("scores.json"), sealed.sign(results))
    storage.remove_directory(plan.work(""))
    _log.info("wrote the scores of %d items to %s", results["items"], plan.path(""))
    return results


def finished_scores(plan: LeaveOneOutPlan) -> dict[str, Any] | None:
    """What ``finish`` returned, where these very scores are made already and undamaged."""
    results = _read_results(plan.path("scores.json"))
    if results is None or storage.damaged(plan.path(""), results["files"]):
        return None
    return results


def _read_results(path: str) -> dict[str, Any] | None:
    """What scores.json holds, None if it is missing or damaged."""
    data = storage.read_if_exists(path)
    try:
        return None if data is None else sealed.verify(data)
    except ValueError:
        return None


def read_scores(memory: Memory, fingerprint: str) -> Iterator[pa.Table]:
    """The scores of a memory's items, a table a shard, in the order of the shards.

    Columns: row (the number of the item's row in the memory, as the partitions have it), id,
    label, wrong_at_K and correct_at_K for each K of the settings,
    reliability (null where the item is nobody's neighbour), shapley, duplicate_group (the
    first item's id, null where there is none). fingerprint: or the folder of the scores.
    Raises DamagedError for a table that is not as it was written.
    """
    folder = fingerprint if "/" in fingerprint else f"scores/{fingerprint}"
    results = _read_results(storage.join(memory.path(folder), "scores.json"))
    remedy = f"Make the scores with visual-memory score --memory {memory.root}"
    if results is None:
        raise VisualMemoryError(
            f"{memory.path(folder)} has no complete scores: its scores.json is missing or damaged. "
            f"{remedy}"
        )
    shards = len(memory.manifest.shards)
    for shard in range(shards):
        name = f"items-{shard:05d}-of-{shards:05d}.parquet"
        path = memory.path(f"{folder}/{name}")
        table = read_table(path, results["files"].get(name, ""), remedy)
        rows = memory.manifest.shards[shard].embedded
        if len(table) != rows:
            raise DamagedError(
                f"{path} has {len(table):,} items, and its shard {rows:,}: it is damaged, or of "
                f"another memory. {remedy}"
            )
        yield table


def of_scores(results: dict[str, Any]) -> RenderableType:
    """For the terminal: the accuracy, the near-duplicates and the ten worst items."""
    k = max(results["settings"]["ks"])
    duplicates = results["duplicates"]
    facts = grid(
        ("memory", f"{results['memory']}, version {results['version']}"),
        ("items", f"{results['items']:,}"),
        ("accuracy", f"{results['accuracy_of_nearest']:.2%} by the nearest other item"),
        (
            "duplicates",
            f"{duplicates['items']:,} items in {duplicates['groups']:,} groups; "
            f"{duplicates['pairs_with_different_labels']:,} of {duplicates['pairs']:,} pairs "
            "have different labels",
        ),
        ("scores", f"{results['memory']}/{results['folder']}"),
    )
    table = Table(box=box.SIMPLE_HEAD, title="Worst items", title_justify="left", pad_edge=False)
    table.add_column("Shapley", justify="right")
    for name in ("wrong", "correct"):
        table.add_column(f"{name}@{k}", justify="right")
    table.add_column("class")
    table.add_column("item", overflow="fold")
    for item in results["worst"]:
        table.add_row(
            f"{item['shapley']:.1e}",
            f"{item[f'wrong_at_{k}']:,}",
            f"{item[f'correct_at_{k}']:,}",
            Text(item["class"]),
            Text(item["id"]),
        )
    return Group(facts, Text(), table)
