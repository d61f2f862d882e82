"""An index over shards, stage by stage, on local storage and on another."""

import hashlib
import os
import pickle
import re
import shutil

import fsspec
import numpy as np
import pytest

from vm_core import batch_files, index, indexing, partitioning, partitions, recall, storage
from vm_core.errors import DamagedError, VisualMemoryError
from vm_core.exact import top_k
from vm_core.index import exact
from vm_core.indexing import IndexPlan, ShardRows
from vm_core.partitioning import Partitioning
from vm_core.records import EmbeddingBlock, strings
from vm_core.search import Router, Searcher
from vm_core.shards import read_shard, write_shard
from vm_core.stores import remote

ROWS, SHARDS = 600, 3


def block(seed: int = 0, same: int = 0) -> EmbeddingBlock:
    """Rows around a few centres, the first ``same`` of them identical."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(8, 6))[generator.integers(8, size=ROWS)]
    vectors += 0.4 * generator.normal(size=vectors.shape)
    vectors[:same] = vectors[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = strings([f"{i % SHARDS}/{i:04d}" for i in range(ROWS)])
    order = np.argsort(ids, kind="stable")
    return EmbeddingBlock(
        ids, generator.integers(4, size=ROWS), strings(["x"] * ROWS), vectors.astype(np.float32)
    ).take(order)


def plan_of(root: str, block: EmbeddingBlock, dtype: str = "float32", **settings) -> IndexPlan:
    shards = []
    for shard, places in enumerate(np.split(np.arange(ROWS), SHARDS)):
        path = f"shard-{shard}"
        summary = write_shard(storage.join(root, path), block.take(places), "print", dtype)
        shards.append(ShardRows(path, summary.count, summary.sha256))
    return IndexPlan(
        root=root,
        build_folder="build",
        shards=tuple(shards),
        class_counts=dict(enumerate(np.bincount(block.labels).tolist())),
        dtype=dtype,
        index=index.parse({"kind": "exact"}),
        partitioning=Partitioning(**settings),
        recall_queries=50,
    )


def test_samples_and_centroids_once_written_are_not_made_again(tmp_path):
    plan = plan_of(str(tmp_path), block(), rows=90)
    for bundle in range(plan.bundles):
        indexing.sample_shards(plan, bundle)
    os.rename(tmp_path / plan.shards[0].path, tmp_path / "away")
    for bundle in range(plan.bundles):
        indexing.sample_shards(plan, bundle)
    indexing.train(plan)
    assert len(indexing.read_centroids(plan.path(plan.centroids))) == plan.cells
    shutil.rmtree(tmp_path / plan.work)
    indexing.sample_shards(plan, 0)
    indexing.train(plan)


def build(plan: IndexPlan) -> list[indexing.PartitionEntry]:
    for bundle in reversed(range(plan.bundles)):
        indexing.sample_shards(plan, bundle)
    indexing.train(plan)
    counts = [indexing.assign_shards(plan, bundle) for bundle in range(plan.bundles)]
    tasks = indexing.plan_partitions(plan, counts)
    return [indexing.build_partition(plan, task) for task in tasks]


def searcher(plan: IndexPlan, entries: list[indexing.PartitionEntry]) -> Searcher:
    centroids = None
    if plan.centroids is not None:
        centroids = indexing.read_centroids(plan.path(plan.centroids))
    cells = tuple(entry.cell for entry in entries)
    return Searcher(
        Router(centroids, cells, 10**6), lambda n: indexing.open_partition(plan.root, entries[n])
    )


@pytest.mark.parametrize("spill", ["none", "soar"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("limit", [ROWS, 100, 17])
def test_all_cells_visited_equal_exact_search(tmp_path, spill, dtype, limit):
    rows = block(1, same=40)
    plan = plan_of(str(tmp_path), rows, dtype, rows=limit, spill=spill)
    entries = build(plan)
    assert all(entry.count <= limit for entry in entries)
    assert sum(entry.home for entry in entries) == ROWS
    if limit < ROWS:
        assert sum(entry.count for entry in entries) == ROWS * plan.partitioning.copies
    queries = block(2).take(np.arange(0, ROWS, 9))
    found = searcher(plan, entries)(queries, 30)
    stored = rows.vectors.astype(partitions.DTYPES[dtype])
    expected, distances = top_k(queries.vectors, stored, 30)
    np.testing.assert_array_equal(found.ids, rows.ids[expected])
    np.testing.assert_array_equal(found.labels, rows.labels[expected])
    np.testing.assert_array_equal(found.distances, distances)


def test_members_know_where_they_stand_in_the_shards(tmp_path):
    rows = block(3)
    plan = plan_of(str(tmp_path), rows, rows=70)
    for entry in build(plan):
        members = indexing.open_partition(plan.root, entry).members
        assert isinstance(members.vectors, np.memmap)  # on a disk nothing is copied or hashed
        np.testing.assert_array_equal(members.ids, rows.ids[members.rows])
        np.testing.assert_array_equal(members.vectors, rows.vectors[members.rows])
        assert list(members.ids) == sorted(members.ids)


def test_what_is_there_is_not_done_again_and_a_second_build_has_the_same_bytes(
    tmp_path, monkeypatch
):
    rows = block(4)
    first = plan_of(str(tmp_path / "a"), rows, rows=90)
    entries = build(first)
    written = {file.path: file.version for file in storage.walk(first.root)}
    for name in ("train", "assign"):
        monkeypatch.setattr(partitioning, name, lambda *_: pytest.fail("done again"))
    assert build(first) == entries
    assert {file.path: file.version for file in storage.walk(first.root)} == written
    monkeypatch.undo()
    second = plan_of(str(tmp_path / "b"), rows, rows=90)
    assert build(second) == entries  # SHA-256 of every file
    assert plan_of(str(tmp_path / "c"), rows, rows=90, seed=1).recipe != first.recipe
    same_files = plan_of(str(tmp_path / "d"), rows, rows=90, probes=3, coverage=0.5)
    assert same_files.recipe == first.recipe


def test_bundles_of_shards_leave_no_trace_in_the_bytes(tmp_path, monkeypatch):
    rows = block(8)
    alone = plan_of(str(tmp_path / "a"), rows, "bfloat16", rows=90)
    assert alone.bundles == 3
    entries = build(alone)
    monkeypatch.setattr(batch_files, "BUNDLES", 2)
    bundled = plan_of(str(tmp_path / "b"), rows, "bfloat16", rows=90)
    assert bundled.first_shards.tolist() == [0, 1, 3]
    assert build(bundled) == entries


def test_on_storage_that_is_not_local():
    root = "memory://indexing"
    rows = block(5)
    plan = plan_of(root, rows, "float16", rows=120)
    try:
        entries = build(plan)
        queries = rows.take(np.arange(40))
        found = searcher(plan, entries)(queries, 5, exclude_self=True)
        expected, _ = top_k(queries.vectors, rows.vectors.astype(np.float16), 6)
        np.testing.assert_array_equal(found.ids, rows.ids[expected[:, 1:]])
    finally:
        fsspec.filesystem("memory").rm("/indexing", recursive=True)


def test_a_partition_with_missing_rows_is_refused(tmp_path):
    plan = plan_of(str(tmp_path), block(6))
    (entry,) = build(plan)
    path = os.path.join(plan.path(entry.folder), "vectors.npy")
    np.save(path, np.load(path)[1:])
    with pytest.raises(VisualMemoryError, match=r"has 600 rows and 599 vectors where .* 600"):
        indexing.open_partition(plan.root, entry, trust_files=True)
    with pytest.raises(DamagedError, match="vectors.npy is damaged"):
        indexing.open_partition(plan.root, entry)


def test_a_flipped_bit_is_found_when_the_partition_is_opened_or_searched(tmp_path):
    """The highest bit of an exponent: a component becomes huge, and attracts every query."""
    rows = block(6)
    plan = plan_of(str(tmp_path), rows)
    (entry,) = build(plan)
    path = os.path.join(plan.path(entry.folder), "vectors.npy")
    indexing.open_partition(plan.root, entry)
    vectors = np.load(path)
    wide = vectors.view({2: np.uint16, 4: np.uint32}[vectors.itemsize])
    wide[3, 2] ^= 1 << (8 * vectors.itemsize - 2)
    np.save(path, vectors)
    with pytest.raises(DamagedError, match=f"partition {plan.path(entry.folder)}: vectors.npy is"):
        indexing.open_partition(plan.root, entry)
    trusting = indexing.open_partition(plan.root, entry, trust_files=True)
    with pytest.raises(DamagedError, match=f"partition {plan.path(entry.folder)}: .*product"):
        trusting.search(rows.vectors, 5)


def test_files_are_hashed_once_by_each_process(tmp_path, monkeypatch):
    plan = plan_of(str(tmp_path), block(6))
    (entry,) = build(plan)
    hashed = []
    sha256_file = storage.sha256_file
    monkeypatch.setattr(
        storage, "sha256_file", lambda path: hashed.append(path) or sha256_file(path)
    )
    indexing.open_partition(plan.root, entry, trust_files=True)
    assert hashed == []
    indexing.open_partition(plan.root, entry)
    assert len(hashed) == len(entry.files)
    indexing.open_partition(plan.root, entry)
    assert len(hashed) == len(entry.files)
    os.utime(os.path.join(plan.path(entry.folder), "vectors.npy"), (1, 1))
    indexing.open_partition(plan.root, entry)
    assert len(hashed) == len(entry.files) + 1


@pytest.mark.parametrize("rows", [0, 70, 199])
def test_a_shard_that_was_cut_between_records_is_not_indexed(tmp_path, rows):
    plan = plan_of(str(tmp_path), block(6))
    path = plan.path(plan.shards[1].path)
    whole = read_shard(path)
    part = whole.take(np.arange(min(rows, len(whole) - 1)))
    write_shard(path, part, "print", "float32") if len(part) else storage.write_bytes(path, b"")
    with pytest.raises(DamagedError, match=rf"{path} has {len(part)} rows and was written with"):
        build(plan)


@pytest.mark.parametrize("name", ["rows.parquet", "vectors.npy"])
def test_a_damaged_partition_is_built_again(tmp_path, name):
    plan = plan_of(str(tmp_path), block(6))
    (entry,) = build(plan)
    path = storage.join(plan.path(entry.folder), name)
    before = storage.read_bytes(path)
    change(path, "reversed")
    assert not indexing.is_complete(plan.root, entry)
    assert build(plan) == [entry]
    assert storage.read_bytes(path) == before


@pytest.fixture(params=["local", "memory", "bucket"])
def root(request, tmp_path):
    if request.param == "local":
        yield str(tmp_path / "memory")
    elif request.param == "bucket":
        yield request.getfixturevalue("bucket") + "/memory"
    else:
        yield "memory://attempts"
        fsspec.filesystem("memory").rm("/attempts", recursive=True)


def differing_builds(monkeypatch, during=lambda attempt: None):
    """Every build of an index writes other bytes, as ScaNN does; ``during`` it, more happens."""
    attempts = []

    def build(_, vectors, folder):
        attempts.append(folder)
        number = len(attempts)
        for name in ("codebook", "hashed"):
            with open(os.path.join(folder, name), "w") as file:
                file.write(f"attempt {number}" * number)
        during(number)

    monkeypatch.setattr(exact.Plugin, "build", build)
    return attempts


def test_of_two_attempts_at_once_one_is_the_partition(root, monkeypatch):
    plan = plan_of(root, block(9))
    (task,) = indexing.plan_partitions(plan, [indexing.assign_shards(plan, n) for n in range(3)])
    won = []

    def overtaken(attempt):
        if attempt == 1:
            won.append(indexing.build_partition(plan, task))

    attempts = differing_builds(monkeypatch, overtaken)
    assert indexing.build_partition(plan, task) == won[0]
    assert len(attempts) == 2
    assert not storage.damaged(plan.path(won[0].folder), won[0].files)
    assert indexing.unnamed_folders(plan, won) == []
    assert indexing.build_partition(plan, task) == won[0] and len(attempts) == 2
    assert len(indexing.open_partition(root, won[0]).members) == ROWS


@pytest.mark.parametrize("root", ["memory", "bucket"], indirect=True)
def test_an_attempt_that_dies_while_it_uploads_harms_no_other(root, monkeypatch):
    plan = plan_of(root, block(9))
    (task,) = indexing.plan_partitions(plan, [indexing.assign_shards(plan, n) for n in range(3)])
    won = []
    upload = remote.in_parallel

    def overtaken(attempt):
        if attempt == 1:
            won.append(indexing.build_partition(plan, task))
            monkeypatch.setattr(remote, "in_parallel", half)

    def half(call, files, *more):
        upload(call, files[::2], *(each[::2] for each in more))
        raise KeyboardInterrupt

    differing_builds(monkeypatch, overtaken)
    with pytest.raises(KeyboardInterrupt):
        indexing.build_partition(plan, task)
    monkeypatch.setattr(remote, "in_parallel", upload)
    assert not storage.damaged(plan.path(won[0].folder), won[0].files)
    assert indexing.build_partition(plan, task) == won[0]
    assert len(indexing.unnamed_folders(plan, won)) == 1


def change(path, how):
    """Damages a file on any storage."""
    data = storage.read_bytes(path)
    if how == "removed":
        filesystem, name = fsspec.core.url_to_fs(path)
        filesystem.rm_file(name)
    elif how == "cut":
        storage.write_bytes(path, data[: len(data) // 2])
    else:
        storage.write_bytes(path, data[:-64] + data[-64:][::-1])


@pytest.mark.parametrize("root", ["local", "memory"], indirect=True)
@pytest.mark.parametrize("name", ["rows.parquet", "vectors.npy"])
@pytest.mark.parametrize("how", ["removed", "cut", "reversed"])
def test_damaged_files_are_named(root, name, how):
    plan = plan_of(root, block(6))
    (entry,) = build(plan)
    path = storage.join(plan.path(entry.folder), name)
    change(path, how)
    said = "is missing" if how == "removed" else "is damaged: its SHA-256 is "
    expected = re.escape(f"partition {plan.path(entry.folder)}: {name} {said}")
    remedy = r".*Restore its files, or remove the folder and start the build again$"
    assert list(storage.damaged(plan.path(entry.folder), entry.files)) == [name]
    with pytest.raises(VisualMemoryError, match=expected + remedy):
        indexing.open_partition(root, entry)


def test_damaged_files_of_scann_are_named(tmp_path):
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(1_200, 16)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = strings([f"{n:04d}" for n in range(1_200)])
    rows = EmbeddingBlock(ids, np.zeros(1_200, np.int64), strings(["x"] * 1_200), vectors)
    summary = write_shard(str(tmp_path / "shard"), rows, "print", "float32")
    plan = IndexPlan(
        root=str(tmp_path),
        build_folder="build",
        shards=(ShardRows("shard", summary.count, summary.sha256),),
        class_counts={0: 1_200},
        dtype="float32",
        index=index.parse({"kind": "scann"}),
        partitioning=Partitioning(),
        recall_queries=20,
    )
    (task,) = indexing.plan_partitions(plan, [indexing.assign_shards(plan, 0)])
    entry = indexing.build_partition(plan, task)
    assert indexing.open_partition(plan.root, entry).search(vectors[:5], 1)[0].shape == (5, 1)
    for name in ("tuned.json", "scann/scann_config.pb", "scann/hashed_dataset.npy"):
        path = storage.join(plan.path(entry.folder), name)
        whole = storage.read_bytes(path)
        for how in ("removed", "cut"):
            change(path, how)
            with pytest.raises(VisualMemoryError, match=re.escape(f"{entry.folder}: {name} is ")):
                indexing.open_partition(plan.root, entry)
            storage.write_bytes(path, whole)


def test_an_error_that_is_no_damage_stays_what_it_is(tmp_path, monkeypatch):
    plan = plan_of(str(tmp_path), block(6))
    (entry,) = build(plan)
    monkeypatch.setattr(partitions, "open_partition", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        indexing.open_partition(plan.root, entry)


def test_held_out_queries_are_found_where_all_cells_are_visited(tmp_path):
    plan = plan_of(str(tmp_path), block(7), rows=80)
    entries = build(plan)
    queries = indexing.read_held_out(plan, entries)
    cells = [entry.cell for entry in entries]
    hits = recall.nothing(len(queries.labels))
    for entry in entries:
        hits = recall.merge(hits, indexing.search_held_out(plan, queries, cells, entry))
    summary = recall.summarise(
        hits, queries.labels, np.ones(len(queries.labels)), plan.cells, plan.cells
    )
    assert summary.at == {1: 1.0, 10: 1.0, 100: 1.0}
    assert summary.by_probes[1] < summary.by_probes[2] < 1
    expected, _ = top_k(queries.vectors, block(7).vectors, 100)
    np.testing.assert_array_equal(hits.rows, expected)


def test_a_plan_looks_at_its_shards_once(monkeypatch):
    generator = np.random.default_rng(0)
    rows = generator.integers(0, 99, 200).tolist()
    shards = tuple(ShardRows(f"shard-{n}", count, f"{n:064x}") for n, count in enumerate(rows))
    exact = index.parse({"kind": "exact"})
    plan = IndexPlan("/m", "build", shards, {0: 1}, "float32", exact, Partitioning(), 50)
    hashed = []
    sha256 = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(data) or sha256(data))
    assert len({plan.assigned(bundle) for bundle in range(plan.bundles)}) == plan.bundles
    assert len(hashed) == 1
    arrived = pickle.loads(pickle.dumps(plan))
    assert arrived == plan and arrived.recipe == plan.recipe
    for each in (plan, arrived):
        assert [each.first_row(n) for n in range(201)] == [sum(rows[:n]) for n in range(201)]
