"""Weights of a partition: what is removed is never found, and all else still is."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core import weights
from vm_core.errors import VisualMemoryError
from vm_core.exact import top_k
from vm_core.partitions import Members, Partition
from vm_core.tables import write_table
from vm_core.weights import WEIGHTS_SCHEMA, WeightsEntry, among, apply, file_name, without


def unit(generator, rows, dimension=6):
    vectors = generator.normal(size=(rows, dimension))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors.astype(np.float32)


def make_partition(vectors):
    count = len(vectors)
    members = Members(
        np.arange(count),
        pa.array([f"item {i:04d}" for i in range(count)]),
        np.arange(count) % 3,
        np.ones(count, bool),
        vectors,
    )
    return Partition(members, lambda queries, k: top_k(queries, vectors, k))


def table(ids, values):
    return pa.table([ids, np.asarray(values, np.float64)], schema=WEIGHTS_SCHEMA)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 120),
    queries=st.integers(0, 20),
    k=st.integers(0, 140),
    share=st.sampled_from([0.02, 0.3, 0.8, 0.9, 0.99, 1.0]),
    close=st.booleans(),
)
def test_the_search_is_that_of_a_memory_without_the_removed(seed, rows, queries, k, share, close):
    generator = np.random.default_rng(seed)
    vectors, asked = unit(generator, rows), unit(generator, queries)
    removed = generator.random(rows) < share
    if close and queries:
        # The worst case for a search that looks a little further: all near one query.
        removed = np.zeros(rows, bool)
        removed[np.argsort(-(vectors @ asked[0]))[: round(share * rows)]] = True
    partition = make_partition(vectors)
    ids = [id for id, gone in zip(partition.members.ids, removed, strict=True) if gone]
    kept = np.flatnonzero(~removed)
    expected, expected_distances = top_k(asked, vectors[kept], k)
    expected = np.where(expected < 0, -1, np.append(kept, -1)[expected])
    for search in (
        apply(partition, table(ids, [0] * len(ids))).search,
        without(partition.search, removed),
        among(vectors, kept),
    ):
        found, distances = search(asked, k)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(distances, expected_distances)


def test_few_queries_are_searched_twice():
    generator = np.random.default_rng(3)
    vectors, asked = unit(generator, 2000), unit(generator, 300)
    searched = []

    def search(queries, k):
        searched.append((len(queries), k))
        return top_k(queries, vectors, k)

    without(search, generator.random(2000) < 0.1)(asked, 20)
    assert searched[0][0] == 300 and searched[0][1] < 40
    assert sum(queries for queries, _ in searched[1:]) < 10


def test_a_search_that_must_look_far_looks_for_few_queries_at_a_time(monkeypatch):
    """A whole class is removed, and every query is one of it."""
    monkeypatch.setattr(weights, "_FOUND", 1000)
    generator = np.random.default_rng(4)
    vectors = unit(generator, 500)
    asked = unit(generator, 1).repeat(40, axis=0)
    removed = np.zeros(500, bool)
    removed[np.argsort(-(vectors @ asked[0]))[:400]] = True
    asked_for = []

    def search(queries, k):
        asked_for.append(len(queries) * k)
        return top_k(queries, vectors, k)

    found, distances = without(search, removed)(asked, 5)
    kept = np.flatnonzero(~removed)
    places, expected_distances = top_k(asked, vectors[kept], 5)
    np.testing.assert_array_equal(found, kept[places])
    np.testing.assert_array_equal(distances, expected_distances)
    assert max(asked_for) <= 1000


def test_where_few_rows_are_kept_the_index_is_not_asked():
    """It would be asked for nearly all of its rows, to find a few."""
    generator = np.random.default_rng(5)
    vectors, asked = unit(generator, 1000), unit(generator, 30)
    partition = make_partition(vectors)
    asked_for = []

    def search(queries, k):
        asked_for.append(k)
        return top_k(queries, vectors, k)

    def pruned(removed):
        ids = partition.members.ids[:removed]
        return apply(Partition(partition.members, search), table(ids, [0] * removed))

    found, distances = pruned(990).search(asked, 5)
    expected, expected_distances = top_k(asked, vectors[990:], 5)
    np.testing.assert_array_equal(found, expected + 990)
    np.testing.assert_array_equal(distances, expected_distances)
    assert not asked_for
    pruned(870).search(asked, 5)
    assert asked_for[0] < 20 * 5


def test_an_index_that_finds_too_little_is_not_asked_forever():
    """ScaNN's leaves may hold fewer rows than asked for; the rest is row -1."""
    calls = []

    def search(queries, k):
        calls.append(k)
        rows = np.full((len(queries), k), -1)
        distances = np.full((len(queries), k), np.inf, np.float32)
        rows[:, :5], distances[:, :5] = [7, 3, 9, 1, 4], [0, 0.1, 0.2, 0.3, 0.4]
        return rows, distances

    removed = np.zeros(1000, bool)
    removed[[7, 9, 999]] = True
    rows, distances = without(search, removed)(np.ones((2, 3), np.float32), 6)
    assert rows.tolist() == [[3, 1, 4, -1, -1, -1]] * 2
    np.testing.assert_allclose(distances[0], [0.1, 0.3, 0.4] + [np.inf] * 3)
    assert len(calls) == 1


def test_weights_by_row():
    partition = make_partition(unit(np.random.default_rng(0), 5))
    weighted = apply(partition, table(["item 0003", "item 0001"], [0.25, 1.5]))
    assert weighted.weights.dtype == np.float64
    assert weighted.weights.tolist() == [1, 1.5, 1, 0.25, 1]
    assert weighted.search is partition.search and weighted.members is partition.members
    assert apply(partition, table([], [])).weights.tolist() == [1] * 5


def test_weights_of_another_version():
    partition = make_partition(unit(np.random.default_rng(0), 5))
    with pytest.raises(VisualMemoryError, match=r"1 items .* such as 'other'.*Prune the memory"):
        apply(partition, table(["item 0003", "other"], [0, 0]))


def test_files(tmp_path):
    written = table(["a", "b"], [0, 0.5])
    name = file_name("weights/f", 3)
    path = tmp_path / name
    entry = WeightsEntry(
        folder="weights/f",
        files={name: write_table(str(path), written)},
        settings={},
        removed=1,
        weighted=1,
        base_version="000001",
        base_digest="d",
    )
    assert weights.read(str(tmp_path), entry, 3) == written
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(VisualMemoryError, match="is damaged: .*prune --undo"):
        weights.read(str(tmp_path), entry, 3)
    path.unlink()
    with pytest.raises(VisualMemoryError, match="is missing"):
        weights.read(str(tmp_path), entry, 3)
