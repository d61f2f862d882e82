"""Scores of whole memories against brute force, however they are divided and interrupted."""

import io
import os
from collections import defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from rich.console import Console

from vm_core import batch_files, leave_one_out, partitions, plugins, score_tables, sealed, storage
from vm_core.classes import ClassTable
from vm_core.errors import VisualMemoryError
from vm_core.exact import top_k
from vm_core.index import exact
from vm_core.leave_one_out import LeaveOneOutConfig, LeaveOneOutPlan
from vm_core.partitions import Members, Partition
from vm_core.records import EmbeddingBlock, strings
from vm_core.score_tables import read_scores
from vm_core.search import Router
from vm_core.shard_rows import DTYPES
from vm_core.shards import read_shard, write_shard
from vm_core.tables import write_table

SHARDS, DIMENSION = 3, 8


COMPLETE = {"cells": 3, "probes": 3, "copies": 0.5}


@dataclass
class SmallMemory:
    """Stored rows, divided into partitions at will."""

    root: str
    block: EmbeddingBlock
    cells: int
    probes: int
    copies: float = 0.0
    removed: frozenset[str] = frozenset()
    dtype: str = "float32"
    opened: list[int] = field(default_factory=list)

    def read_shard(self, number):
        shard = self.manifest.shards[number]
        return read_shard(self.path(shard.embeddings), None, shard.embedded)

    def __post_init__(self):
        rng = np.random.default_rng(7)
        count = len(self.block)
        self.first_row = np.arange(SHARDS + 1) * count // SHARDS
        # Random unit vectors would leave the nearest cells to chance.
        self.centroids = self.block.vectors[rng.choice(count, self.cells, replace=False)]
        nearest = top_k(self.block.vectors, self.centroids, self.cells)[0]
        shards = []
        for shard in range(SHARDS):
            name = f"embeddings-{shard}.tfrecord"
            part = slice(self.first_row[shard], self.first_row[shard + 1])
            write_shard(self.path(name), self.block.take(np.arange(count)[part]), "f", "float32")
            shards.append(SimpleNamespace(embeddings=name, embedded=part.stop - part.start))
        entries = []
        for cell in range(self.cells):
            home = nearest[:, 0] == cell
            copied = ~home & (rng.random(count) < self.copies)
            rows = np.flatnonzero(home | copied)
            rows = rows[np.argsort(self.block.ids[rows])]
            folder = f"partition-{cell}"
            os.makedirs(self.path(folder), exist_ok=True)
            members = Members(
                rows,
                pa.array(self.block.ids[rows], pa.string()),
                self.block.labels[rows],
                home[rows],
                self.block.vectors[rows].astype(DTYPES[self.dtype]),
            )
            partitions.write(self.path(folder), members)
            entries.append(SimpleNamespace(folder=folder, cell=cell, count=len(rows)))
        weights = SimpleNamespace(folder="weights", removed=len(self.removed))
        self.manifest = SimpleNamespace(
            content_digest="content",
            version="000001",
            partitions=entries,
            shards=shards,
            weights=weights if self.removed else None,
        )
        self.classes = ClassTable()

    def path(self, relative: str) -> str:
        return storage.join(self.root, relative)

    def first_rows(self) -> np.ndarray:
        return self.first_row

    def router(self) -> Router:
        centroids = self.centroids if self.cells > 1 else None
        return Router(centroids, tuple(range(self.cells)), self.probes)

    def members(self, number: int) -> Members:
        return partitions.open_partition(self.path(f"partition-{number}"), exact.Plugin()).members

    def open_partition(self, number: int) -> Partition:
        self.opened.append(number)
        members = self.members(number)
        kept = np.flatnonzero(~np.isin(members.ids, list(self.removed)))

        def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            rows, distances = top_k(queries, members.vectors[kept], k)
            return np.append(kept, -1)[rows], distances

        weights = np.isin(np.arange(len(members)), kept).astype(np.float32)
        return Partition(members, search, weights if self.removed else None)


def rows_of(count: int, seed: int = 0, copies: int = 0) -> EmbeddingBlock:
    """Rows of 4 classes, the last ``copies`` of them nearly the same as some others."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 4, count)
    centres = rng.normal(0, 1, (4, DIMENSION))
    vectors = centres[labels] + rng.normal(0, 0.8, (count, DIMENSION))
    if copies:
        of = rng.integers(0, count - copies, copies)
        vectors[-copies:] = vectors[of] + rng.normal(0, 0.01, (copies, DIMENSION))
        vectors[-copies // 2 :] = vectors[of[-copies // 2 :]]  # and some exactly
    order = rng.permutation(count)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    ids = strings([f"i{i % SHARDS}-{i:05d}" for i in range(count)])
    # Ids ascend in a shard, but not from shard to shard.
    starts = np.arange(SHARDS + 1) * count // SHARDS
    for start, stop in pairwise(starts):
        ids[start:stop] = sorted(ids[start:stop])
    return EmbeddingBlock(ids, labels[order], strings(["s"] * count), vectors[order])


def config(**settings: Any) -> LeaveOneOutConfig:
    defaults = {"memory": "m", "ks": (3, 10), "shapley_k": 4}
    return LeaveOneOutConfig.model_validate(defaults | settings)


def run(plan: LeaveOneOutPlan) -> dict[str, Any]:
    """All steps in order, without Beam."""
    sources = defaultdict(list)
    numbers = range(plan.partitions)
    visits = {number: leave_one_out.search_home(plan, number) for number in numbers}
    for number, others in visits.items():
        for other in others:
            sources[other].append(number)
    for number, some in sources.items():
        leave_one_out.search_visitors(plan, number, some)
    for number in numbers:
        leave_one_out.score_partition(plan, number, visits[number])
    score_tables.group_duplicates(plan)
    for bundle in range(plan.bundles):
        score_tables.write_scores(plan, bundle)
    return score_tables.finish(plan)


def plan_for(memory: Any, **settings: Any) -> LeaveOneOutPlan:
    return leave_one_out.plan_scores(memory, config(**settings))


def scores(memory: Any, results: dict[str, Any]) -> pa.Table:
    return pa.concat_tables(read_scores(memory, results["fingerprint"]))


def files(memory: SmallMemory) -> dict[str, bytes]:
    """The tables of scores, by name."""
    return {path.name: path.read_bytes() for path in Path(memory.root).glob("scores/*/items-*")}


def brute_force(
    block: EmbeddingBlock,
    settings: LeaveOneOutConfig,
    visible: np.ndarray | None = None,
    removed: frozenset[str] = frozenset(),
) -> tuple[list[dict], dict]:
    """The scores of a memory, from the matrix of all distances, one query after another.

    visible: (N, N) bool, whether a query visits a partition that has the row.
    """
    count = len(block)
    here = [i for i in range(count) if block.ids[i] not in removed]
    wide = block.vectors.astype(np.float64)
    products = np.array([[np.vecdot(a, b) for b in wide] for a in wide])
    distances = np.maximum(1 - products, 0).astype(np.float32)
    items = [
        {f"{kind}_at_{k}": 0 for k in settings.ks for kind in ("wrong", "correct")}
        | {"row": i, "id": block.ids[i], "label": int(block.labels[i]), "shapley": 0.0}
        for i in range(count)
    ]
    near: dict[int, set[int]] = {}
    hits = 0
    for query in here:
        others = sorted(
            (distances[query, i], i)
            for i in here
            if i != query and (visible is None or visible[query, i])
        )
        listed = others[: settings.listed]
        pairs = [i for distance, i in listed if distance < settings.duplicate_distance]
        for i in pairs:
            near.setdefault(query, {query}).add(i)
            near.setdefault(i, {i}).add(query)
        if settings.exclude_duplicates:
            listed = [(distance, i) for distance, i in listed if i not in pairs]
        complete = len(listed) <= settings.k and len(here) - 1 <= settings.listed
        listed = listed[: settings.k]
        correct = [int(block.labels[i] == block.labels[query]) for _, i in listed]
        hits += bool(correct) and correct[0]
        value = 0.0
        for place in reversed(range(len(listed))):
            row, rank = listed[place][1], place + 1
            share = min(settings.shapley_k, rank) / (settings.shapley_k * rank)
            if place < len(listed) - 1:
                value += (correct[place] - correct[place + 1]) * share
            elif complete:
                value = correct[place] * share
            items[row]["shapley"] += value / len(here)
            for k in settings.ks:
                if place < k:
                    items[row][f"{'correct' if correct[place] else 'wrong'}_at_{k}"] += 1
    for i, item in enumerate(items):
        right, wrong = item[f"correct_at_{settings.k}"], item[f"wrong_at_{settings.k}"]
        item["reliability"] = right / (right + wrong) if right + wrong else None
        group, grown = near.get(i, set()), 0
        while len(group) > grown:
            grown = len(group)
            group = set().union(*(near[j] for j in group))
        item["duplicate_group"] = block.ids[min(group)] if group else None
    return items, {"accuracy": hits / len(here), "near": near}


def assert_scores(table: pa.Table, items: list[dict]) -> None:
    assert len(table) == len(items)
    for row, item in zip(table.to_pylist(), items, strict=True):
        assert row.pop("shapley") == pytest.approx(item["shapley"], abs=1e-9)
        expected = {name: value for name, value in item.items() if name != "shapley"}
        assert row == expected


@pytest.mark.parametrize("exclude", [False, True], ids=["", "without duplicates"])
@pytest.mark.parametrize(
    ("cells", "copies", "block_rows"), [(1, 0, 8192), (3, 0, 16), (3, 0.5, 16), (5, 1.0, 7)]
)
def test_scores_are_those_of_brute_force(tmp_path, monkeypatch, cells, copies, block_rows, exclude):
    monkeypatch.setattr(leave_one_out, "_QUERY_ROWS", block_rows)
    block = rows_of(90, copies=12)
    memory = SmallMemory(str(tmp_path), block, cells, cells, copies)
    plan = plan_for(memory, exclude_duplicates=exclude)
    results = run(plan)
    items, expected = brute_force(block, plan.config)
    assert_scores(scores(memory, results), items)
    near = expected["near"]
    assert results["items"] == results["queries"] == 90
    assert results["duplicates"]["items"] == len(near) > 12
    assert results["duplicates"]["pairs"] == sum(len(group) - 1 for group in near.values()) // 2
    groups = {item["duplicate_group"] for item in items} - {None}
    assert results["duplicates"]["groups"] == len(groups)
    assert results["accuracy_of_nearest"] == expected["accuracy"]
    worst = sorted(items, key=lambda item: item["shapley"])[:10]
    assert [item["id"] for item in results["worst"]] == [item["id"] for item in worst]


def test_a_memory_of_few_rows_has_exact_shapley_values(tmp_path):
    block = rows_of(9)
    memory = SmallMemory(str(tmp_path), block, 2, 2)
    plan = plan_for(memory)
    table = scores(memory, run(plan))
    assert_scores(table, brute_force(block, plan.config)[0])
    # All items together are worth the share of right ones among the nearest four.
    rows, _ = top_k(block.vectors, block.vectors, 5)
    right = block.labels[rows[:, 1:]] == block.labels[:, None]
    assert sum(table["shapley"].to_pylist()) == pytest.approx(right.mean(), abs=1e-9)


@pytest.mark.parametrize("copies", [0, 0.5])
def test_a_query_finds_what_is_in_the_cells_it_visits(tmp_path, copies):
    block = rows_of(90, copies=12)
    memory = SmallMemory(str(tmp_path), block, 5, 2, copies)
    plan = plan_for(memory)
    table = scores(memory, run(plan))
    visible = np.zeros((90, 90), bool)
    for number, places in memory.router().visits(block.vectors):
        visible[np.ix_(places, memory.members(number).rows)] = True
    assert not visible.all()
    assert_scores(table, brute_force(block, plan.config, visible)[0])


def test_items_that_were_pruned_are_neither_queries_nor_neighbours(tmp_path):
    block = rows_of(60)
    removed = frozenset(block.ids[::5])
    memory = SmallMemory(str(tmp_path), block, removed=removed, **COMPLETE)
    plan = plan_for(memory)
    results = run(plan)
    assert (results["items"], results["queries"]) == (60, 48)
    table = scores(memory, results)
    assert_scores(table, brute_force(block, plan.config, removed=removed)[0])
    pruned = table.filter(np.isin(block.ids, list(removed)))
    assert pruned["reliability"].null_count == 12


def test_partitions_copies_and_blocks_leave_no_trace_in_the_bytes(tmp_path, monkeypatch):
    block, outcomes = rows_of(90, copies=12), []
    for cells, copies, block_rows in [(1, 0, 8192), (3, 0, 8192), (3, 1, 5), (6, 0.5, 16)]:
        monkeypatch.setattr(leave_one_out, "_QUERY_ROWS", block_rows)
        memory = SmallMemory(str(tmp_path / str(len(outcomes))), block, cells, cells, copies)
        results = run(plan_for(memory))
        for name in ("fingerprint", "folder", "memory", "probes"):
            del results[name]
        outcomes.append((files(memory), results))
    assert len(outcomes[0][0]) == SHARDS
    assert outcomes[1:] == outcomes[:1] * 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_vectors_travel_as_they_are_stored(tmp_path, dtype):
    block, outcomes = rows_of(60, copies=12), []
    for cells in (1, 3):
        memory = SmallMemory(str(tmp_path / str(cells)), block, cells, cells, dtype=dtype)
        run(plan_for(memory))
        outcomes.append(files(memory))
    assert outcomes[0] == outcomes[1]


def test_visitors_are_searched_without_the_partitions_they_come_from(tmp_path):
    memory = SmallMemory(str(tmp_path), rows_of(60, copies=12), **COMPLETE)
    plan = plan_for(memory)
    for number in range(plan.partitions):
        leave_one_out.search_home(plan, number)
    for other in (1, 2):
        storage.remove_directory(memory.path(f"partition-{other}"))
    leave_one_out.search_visitors(plan, 0, [1, 2])
    assert batch_files.BatchFile(plan.work("found", 0)).keys == [1, 2]


def test_bundles_of_shards_leave_no_trace_in_the_bytes(tmp_path, monkeypatch):
    memory = SmallMemory(str(tmp_path), rows_of(50, copies=8), **COMPLETE)
    run(plan_for(memory))
    each = files(memory)
    storage.remove_directory(memory.path("scores"))
    monkeypatch.setattr(batch_files, "BUNDLES", 2)
    plan = plan_for(memory)
    assert plan.first_shards.tolist() == [0, 1, 3]
    run(plan)
    assert files(memory) == each


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, write: int) -> list[str]:
    """Lets a run die before its numbered write is complete; a list that names all writes."""
    written: list[str] = []
    write_atomic = storage.write_atomic

    def counted(path: str) -> Any:
        if len(written) == write:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Path(f"{path}.incomplete-0123").write_bytes(b"hal")
            written.append("killed")
            raise Killed
        written.append(path)
        return write_atomic(path)

    monkeypatch.setattr(storage, "write_atomic", counted)
    return written


def test_a_killed_run_goes_on_where_it_was(tmp_path, monkeypatch):
    block = rows_of(40, copies=8)
    reference = SmallMemory(str(tmp_path / "reference"), block, **COMPLETE)
    with monkeypatch.context() as patch:
        writes = kill_at(patch, -1)
        expected = run(plan_for(reference))
    assert len(reference.opened) == 6  # each partition for its own items and for visitors
    for write in sorted({*range(0, len(writes), 5), len(writes) - 1}):
        memory = SmallMemory(str(tmp_path / str(write)), block, **COMPLETE)
        plan = plan_for(memory)
        with monkeypatch.context() as patch:
            kill_at(patch, write)
            with pytest.raises(Killed):
                run(plan)
        assert score_tables.finished_scores(plan) is None
        with monkeypatch.context() as patch:
            again = kill_at(patch, -1)
            assert run(plan) == {**expected, "memory": memory.root}
        assert files(memory) == files(reference)
        assert len(memory.opened) <= 7  # only the search that was cut off is repeated
        assert len(writes) <= write + len(again) <= len(writes) + 5  # of one step
        assert not storage.is_directory(memory.path(f"work/scores-{plan.fingerprint}"))
        assert not [name for name in os.listdir(plan.path("")) if "incomplete" in name]


def test_finished_scores_are_found_and_a_forgotten_work_folder_removed(tmp_path):
    memory = SmallMemory(str(tmp_path), rows_of(30), **COMPLETE)
    plan = plan_for(memory)
    assert score_tables.finished_scores(plan) is None
    results = run(plan)
    storage.write_bytes(plan.work("home", 0) + ".arrow", b"")
    assert score_tables.finished_scores(plan) == results
    assert score_tables.finish(plan) == results
    assert not storage.is_directory(memory.path(f"work/scores-{plan.fingerprint}"))
    assert sealed.verify(storage.read_bytes(plan.path("scores.json"))) == results
    other = plan_for(memory, shapley_k=5)
    assert score_tables.finished_scores(other) is None


def test_finishing_is_repeated_where_its_result_was_lost(tmp_path, monkeypatch):
    plan = plan_for(SmallMemory(str(tmp_path), rows_of(30), **COMPLETE))
    with monkeypatch.context() as patch:
        writes = kill_at(patch, -1)
        results = run(plan)
        count = len(writes)
        assert score_tables.finish(plan) == results and len(writes) == count


def test_near_duplicates_are_not_looked_for_at_distance_0(tmp_path):
    memory = SmallMemory(str(tmp_path), rows_of(30, copies=10), **COMPLETE)
    results = run(plan_for(memory, duplicate_distance=0))
    assert not any(results["duplicates"].values())
    assert scores(memory, results)["duplicate_group"].null_count == 30


def test_scores_that_are_not_complete_cannot_be_read(tmp_path):
    memory = SmallMemory(str(tmp_path), rows_of(30), **COMPLETE)
    plan = plan_for(memory)
    with pytest.raises(VisualMemoryError, match="no complete scores.*visual-memory score"):
        list(read_scores(memory, plan.fingerprint))
    run(plan)
    by_fingerprint = list(read_scores(memory, plan.fingerprint))
    assert [len(table) for table in by_fingerprint] == [10, 10, 10]
    assert list(read_scores(memory, plan.folder)) == by_fingerprint
    # A row's number follows from where its item stands: none may be missing.
    write_table(plan.items(1), by_fingerprint[1].slice(1))
    with pytest.raises(VisualMemoryError, match="items-00001-of-.* is damaged: .*Make the scores"):
        list(read_scores(memory, plan.fingerprint))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ks": []}, "ks = .*give one or more numbers from 1"),
        ({"ks": [0, 10]}, "ks = .0, 10.: give one or more numbers from 1"),
        ({"ks": [10, 3]}, "ks = .10, 3. must ascend"),
        ({"ks": [3, 3]}, "must ascend, each number once"),
        ({"shapley_k": 11}, "shapley_k = 11 needs as many neighbours; the largest of ks is 10"),
        ({"duplicate_distance": 0, "exclude_duplicates": True}, "needs a duplicate_distance"),
        ({"k": 5}, "unknown key 'k'. Known keys: memory, version, ks"),
    ],
)
def test_settings_that_make_no_sense(settings, message):
    given = {"memory": "m", "ks": [3, 10], **settings}
    with pytest.raises(VisualMemoryError, match=message):
        plugins.validate(LeaveOneOutConfig, given, "options")


def test_the_terminal_shows_the_worst_items(tmp_path):
    memory = SmallMemory(str(tmp_path), rows_of(60, copies=12), **COMPLETE)
    results = run(plan_for(memory))
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(score_tables.of_scores(results))
    text = console.export_text()
    for item in results["worst"]:
        assert item["id"] in text
    assert "wrong@10" in text and f"{results['accuracy_of_nearest']:.2%}" in text
    assert f"{results['duplicates']['items']} items in" in text
