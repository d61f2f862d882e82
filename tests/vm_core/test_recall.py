"""Recall against its definition, over any division of the rows."""

import numpy as np
import pyarrow as pa
import pytest

from vm_core import recall
from vm_core.errors import VisualMemoryError
from vm_core.exact import top_k
from vm_core.partitions import Members, Partition


def members_of(vectors: np.ndarray, rows: np.ndarray, labels: np.ndarray | None = None) -> Members:
    return Members(
        rows,
        pa.array([f"{row:05d}" for row in rows]),
        rows % 7 if labels is None else labels,
        np.ones(len(rows), bool),
        vectors[rows],
    )


@pytest.fixture(scope="module")
def vectors():
    rows = np.random.default_rng(0).normal(size=(3_000, 8))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def forgetful(members: Members, share: float, seed: int = 0) -> Partition:
    """A partition whose search never finds some of its rows."""
    kept = np.flatnonzero(np.random.default_rng(seed).random(len(members)) >= share)

    def search(queries, k):
        rows, distances = top_k(queries, members.vectors[kept], k)
        return np.where(rows >= 0, kept[rows], -1), distances

    return Partition(members, search)


def test_held_out_queries_are_close_to_rows_and_are_none(vectors):
    labels = (np.arange(3_000) % 100 == 0).astype(np.int64)  # class 1 is rare
    members = members_of(vectors, np.arange(3_000), labels)
    queries, of = recall.held_out(members, recall.shares({0: 2_970, 1: 30}, 40))
    assert 15 < (of == 1).sum() < 30 and 10 < (of == 0).sum() < 35
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
    _, distances = top_k(queries, vectors, 2)
    assert (distances[:, 0] > 1e-6).all() and (distances[:, 0] < distances[:, 1]).all()
    again, _ = recall.held_out(
        members.take(np.arange(3_000)[::-1]), recall.shares({0: 2_970, 1: 30}, 40)
    )
    np.testing.assert_array_equal(np.sort(again, axis=0), np.sort(queries, axis=0))
    assert recall.held_out(members, recall.shares({0: 10**9}, 1))[0].shape == (0, 8)


def test_merged_hits_equal_those_of_one_partition(vectors):
    queries = vectors[:50]
    whole = recall.exact_and_found(
        forgetful(members_of(vectors, np.arange(3_000)), 0.0), queries, np.zeros(50, int)
    )
    owner = np.random.default_rng(1).integers(4, size=3_000)
    parts = [
        recall.exact_and_found(
            forgetful(members_of(vectors, np.flatnonzero(owner == part)), 0.0),
            queries,
            np.full(50, part),
        )
        for part in (2, 0, 3, 1)
    ]
    merged = recall.nothing(50)
    for part in parts:
        merged = recall.merge(merged, part)
    np.testing.assert_array_equal(merged.rows, whole.rows)
    np.testing.assert_array_equal(merged.ranks, owner[whole.rows])
    backwards = recall.merge(recall.merge(parts[3], parts[2]), recall.merge(parts[1], parts[0]))
    np.testing.assert_array_equal(backwards.rows, whole.rows)
    # A row that two partitions have stands once, and is found by the sooner one.
    twice = recall.merge(merged, recall.Hits(whole.rows, whole.distances, whole.ranks + 9))
    np.testing.assert_array_equal(twice.rows, merged.rows)
    np.testing.assert_array_equal(twice.ranks, merged.ranks)
    even = np.ones(50)
    assert recall.fewest_probes(merged, even, 4, 1.0) == 4
    by_hand = [(owner[whole.rows] < probes).mean() for probes in (1, 2, 3, 4)]
    summary = recall.summarise(merged, np.zeros(50, int), even, 2, 4)
    np.testing.assert_allclose(list(summary.by_probes.values()), by_hand)
    assert summary.at[100] == summary.by_probes[2] and summary.new_classes is None
    assert recall.fewest_probes(merged, even, 4, by_hand[1]) == 2


def test_recall_per_class_and_the_gate(vectors):
    partition = forgetful(members_of(vectors, np.arange(3_000)), 0.3)
    hits = recall.exact_and_found(partition, vectors[:200], np.zeros(200, int))
    labels = np.arange(200) % 3
    hits.ranks[labels == 2] = np.iinfo(np.int32).max  # of class 2 nothing is found
    even = np.ones(200)
    summary = recall.summarise(hits, labels, even, 1, 1, new=[2, 9])
    assert summary.worst_class.labels == [2]
    assert summary.worst_class.at == {1: 0.0, 10: 0.0, 100: 0.0}
    assert summary.new_classes.labels == [2, 9] and summary.new_classes.queries == 66
    assert summary.new_classes.unmeasured == [9]
    assert 0.4 < summary.at[10] < 0.53
    with pytest.raises(VisualMemoryError, match=r"the index: recall@10 is 0\.4.*minimum_recall"):
        recall.check(summary, 0.9)
    with pytest.raises(VisualMemoryError, match=r"the 2 new classes: .* 0\.000 on 66 held-out"):
        recall.check(summary, 0.1)
    recall.check(summary, 0.0)
    few = recall.summarise(hits, np.arange(200), even, 1, 1)
    assert few.worst_class is None
    of_one = recall.summarise(hits, labels, even, 1, 1, new=[1]).new_classes
    for depth, found in of_one.at.items():
        assert found == pytest.approx((hits.ranks[labels == 1, :depth] == 0).mean())


def test_what_was_not_measured_does_not_pass_the_gate():
    nothing, none = recall.nothing(0), np.empty(0)
    with pytest.raises(VisualMemoryError, match="the index: no held-out query among 0, so recall"):
        recall.check(recall.summarise(nothing, none.astype(int), none, 1, 1), 0.0)
    found = recall.nothing(5)
    found.rows[:, 0] = found.ranks[:, 0] = 0
    summary = recall.summarise(found, np.zeros(5, int), np.ones(5), 1, 1, new=[3])
    with pytest.raises(VisualMemoryError, match=r"the 1 new classes: .*--set recall_queries=N"):
        recall.check(summary, 0.0)


@pytest.mark.parametrize("new", [1, 30, 100, 101, 1_900])
def test_each_new_class_has_its_queries_and_counts_as_others_do(new):
    generator = np.random.default_rng(new)
    counts = dict(enumerate(generator.integers(1, 300, size=2_000).tolist()))
    added = range(100, 100 + new)
    shares = recall.shares(counts, 500, added)
    expected = {label: share * counts[label] for label, share in shares.items()}
    each = min(20, 2_000 / new)
    for label in added:
        assert expected[label] == pytest.approx(min(counts[label], each))
    assert sum(expected[label] for label in added) <= 2_000 + 1e-6
    plain = recall.shares(counts, 500)
    assert all(shares[label] == plain[label] for label in counts if label not in added)
    weights = recall.weights(np.arange(2_000), counts, 500, added)
    np.testing.assert_allclose(weights * list(expected.values()), [0.25] * 2_000)


def test_a_new_class_leaves_the_recall_of_all_where_it_is(vectors):
    """Of a class nothing is found: more queries of it say so, and change nothing else."""
    labels = np.arange(3_000) % 50
    members = members_of(vectors, np.arange(3_000), labels)
    counts = dict(enumerate(np.bincount(labels).tolist()))
    found = {}
    for new in ((), (7,)):
        queries = recall.held_out(members, recall.shares(counts, 200, new))
        hits = recall.exact_and_found(
            forgetful(members, 0.0), queries.vectors, np.zeros(len(queries.labels), int)
        )
        hits.ranks[queries.labels == 7] = np.iinfo(np.int32).max
        weights = recall.weights(queries.labels, counts, 200, new)
        found[new] = recall.summarise(hits, queries.labels, weights, 1, 1, new)
    assert found[()].new_classes is None and found[7,].new_classes.queries > 10
    assert found[7,].queries > found[()].queries
    assert found[7,].at[10] == pytest.approx(0.98, abs=0.01)
    with pytest.raises(VisualMemoryError, match="the 1 new classes"):
        recall.check(found[7,], 0.9)
