"""ScaNN on clustered data: round trip, recall, and where its leaves run dry."""

import dataclasses
import shutil

import numpy as np
import pytest

from vm_core import index, shards
from vm_core.errors import VisualMemoryError
from vm_core.index import auto, exact, scann
from vm_core.recall import measure_recall
from vm_core.records import EmbeddingBlock, strings


def mixture(rows: int, seed: int = 0, dimension: int = 32) -> EmbeddingBlock:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(99).normal(size=(50, dimension))
    labels = generator.integers(50, size=rows)
    vectors = centres[labels] + 0.4 * generator.normal(size=(rows, dimension))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return EmbeddingBlock(
        strings([f"row/{i:06d}" for i in range(rows)]),
        labels.astype(np.int64),
        strings(["mixture"] * rows),
        vectors.astype(np.float32),
    )


@pytest.fixture(scope="module")
def rows():
    return mixture(4_000)


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory):
    """An index that was built in one place and moved to another."""
    built = tmp_path_factory.mktemp("built") / "partition"
    built.mkdir()
    scann.Plugin().build(lambda: rows, str(built))
    moved = tmp_path_factory.mktemp("moved") / "elsewhere"
    shutil.move(built, moved)
    return str(moved)


@pytest.fixture(scope="module")
def partition(folder):
    return scann.Plugin().open([], folder)


def test_a_moved_index_finds_what_exact_search_finds(partition, rows):
    np.testing.assert_array_equal(partition.ids, rows.ids)
    np.testing.assert_array_equal(partition.labels, rows.labels)
    queries = mixture(200, seed=1).vectors
    found, distances = partition.search(queries, 10)
    expected, expected_distances = exact.top_k(queries, rows.vectors, 10)
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, expected, strict=True)]
    assert np.mean(hits) / 10 > 0.95
    same = found == expected
    np.testing.assert_allclose(distances[same], expected_distances[same], atol=2e-6)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_one_query_and_no_query(partition, rows):
    found, _ = partition.search(rows.vectors[17:18], 5)
    assert found[0, 0] == 17
    assert partition.search(rows.vectors[:0], 5)[0].shape == (0, 5)


def test_measured_recall(partition, rows):
    recall = measure_recall(partition.search, rows)
    assert list(recall) == [1, 10, 100]
    assert all(0.9 < recall[depth] <= 1 for depth in (1, 10, 100))
    assert measure_recall(partition.search, rows) == recall


def test_recall_of_exact_search_is_1_and_of_nonsense_is_0(rows):
    def nonsense(queries, k):
        return np.full((len(queries), k), -1), np.full((len(queries), k), np.inf, np.float32)

    some = rows.take(np.arange(150))
    assert measure_recall(lambda q, k: exact.top_k(q, some.vectors, k), some) == {
        1: 1,
        10: 1,
        100: 1,
    }
    assert measure_recall(nonsense, some) == {1: 0, 10: 0, 100: 0}
    few = rows.take(np.arange(7))
    assert measure_recall(lambda q, k: exact.top_k(q, few.vectors, k), few) == {1: 1}


def test_leaves_that_hold_fewer_than_k_rows_give_padding_and_no_false_neighbour(rows, tmp_path):
    scann.Plugin(leaves=400, leaves_to_search=1).build(lambda: rows, str(tmp_path))
    partition = scann.Plugin(leaves=400, leaves_to_search=1).open([], str(tmp_path))
    queries = mixture(100, seed=3).vectors
    found, distances = partition.search(queries, 100)
    missing = found < 0
    assert missing.any(axis=1).mean() > 0.9
    assert np.isinf(distances[missing]).all() and np.isfinite(distances[~missing]).all()
    # Padding stands at the end, and no row comes twice, row 0 not either.
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()
    for row in found:
        real = row[row >= 0]
        assert len(set(real)) == len(real)
    exact_distances = 1 - np.einsum("qd,qkd->qk", queries, rows.vectors[found])
    np.testing.assert_allclose(distances[~missing], exact_distances[~missing], atol=2e-6)


def test_more_neighbours_than_rows(rows, tmp_path):
    few = rows.take(np.arange(1_000))
    settings = scann.Plugin(leaves=4, leaves_to_search=4)
    settings.build(lambda: few, str(tmp_path))
    found, distances = settings.open([], str(tmp_path)).search(few.vectors[:3], 1_200)
    for row in found:
        np.testing.assert_array_equal(np.sort(row[:1_000]), np.arange(1_000))
    assert (found[:, 1_000:] == -1).all() and np.isinf(distances[:, 1_000:]).all()


def test_equal_distances_are_tied_by_row(rows, tmp_path):
    twice = dataclasses.replace(rows, vectors=np.repeat(rows.vectors[::2], 2, axis=0))
    scann.Plugin().build(lambda: twice, str(tmp_path))
    found, distances = scann.Plugin().open([], str(tmp_path)).search(twice.vectors[:50], 8)
    tied = np.diff(distances, axis=1) == 0
    assert tied.any() and (np.diff(found, axis=1)[tied] > 0).all()


def test_too_few_rows(rows, tmp_path):
    with pytest.raises(VisualMemoryError, match=r"at least 1,000 rows.*partition has 999"):
        scann.Plugin().build(lambda: rows.take(np.arange(999)), str(tmp_path))


def test_auto_chooses_by_the_number_of_rows():
    assert auto.Plugin().choose(19_999).kind == "exact"
    assert auto.Plugin().choose(20_000).kind == "scann"
    assert auto.Plugin(exact_below=5).choose(5).kind == "scann"


def test_unknown_kinds_and_settings_are_named():
    with pytest.raises(VisualMemoryError, match="'hnsw' is unknown. Known: auto, exact, scann"):
        index.parse({"kind": "hnsw"})
    with pytest.raises(VisualMemoryError, match="unknown key 'leafs'.*leaves_to_search"):
        index.parse({"kind": "scann", "leafs": 3})


def test_rows_of_several_shards_come_in_the_order_of_ids(rows, tmp_path):
    some = rows.take(np.arange(100))
    paths = []
    for number, part in enumerate((np.arange(1, 100, 2), np.arange(0, 100, 2))):
        paths.append(str(tmp_path / f"{number}.tfrecord"))
        shards.write_shard(paths[-1], some.take(part), "print", "float32")
    read = index.read_rows(paths)
    np.testing.assert_array_equal(read.ids, some.ids)
    np.testing.assert_array_equal(read.vectors, some.vectors)
    partition = exact.Plugin().open(paths, "unused")
    assert partition.search(some.vectors[42:43], 1)[0] == 42


def test_checksums_are_of_the_content_and_by_relative_path(folder):
    sums = index.checksums(folder)
    assert "rows.parquet" in sums and any(name.startswith("scann/") for name in sums)
    assert not [name for name in sums if name.endswith(".pkl")]
    assert all(len(digest) == 64 for digest in sums.values())
