"""Recall against its definition, over any division of the rows."""

import numpy as np
import pyarrow as pa
import pytest

from vm_core import recall
from vm_core.errors import VisualMemoryError
from vm_core.index.exact import top_k
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
    queries, of = recall.held_out(members, {0: 2_970, 1: 30}, 40)
    assert 15 < (of == 1).sum() < 30 and 10 < (of == 0).sum() < 35
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
    _, distances = top_k(queries, vectors, 2)
    assert (distances[:, 0] > 1e-6).all() and (distances[:, 0] < distances[:, 1]).all()
    again, _ = recall.held_out(members.take(np.arange(3_000)[::-1]), {0: 2_970, 1: 30}, 40)
    np.testing.assert_array_equal(np.sort(again, axis=0), np.sort(queries, axis=0))
    assert recall.held_out(members, {0: 10**9}, 1)[0].shape == (0, 8)


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
    assert recall.fewest_probes(merged, 4, 1.0) == 4
    by_hand = [(owner[whole.rows] < probes).mean() for probes in (1, 2, 3, 4)]
    summary = recall.summarise(merged, np.zeros(50, int), 2, 4, None)
    np.testing.assert_allclose(list(summary.by_probes.values()), by_hand)
    assert summary.at[100] == summary.by_probes[2] and summary.new_classes is None
    assert recall.fewest_probes(merged, 4, by_hand[1]) == 2


def test_recall_per_class_and_the_gate(vectors):
    partition = forgetful(members_of(vectors, np.arange(3_000)), 0.3)
    hits = recall.exact_and_found(partition, vectors[:200], np.zeros(200, int))
    labels = np.arange(200) % 3
    hits.ranks[labels == 2] = np.iinfo(np.int32).max  # of class 2 nothing is found
    summary = recall.summarise(hits, labels, 1, 1, before=[0, 1])
    assert summary.worst_class.labels == [2] and summary.worst_class.recall == 0
    assert summary.new_classes.labels == [2] and summary.new_classes.queries == 66
    assert 0.4 < summary.at[10] < 0.53
    with pytest.raises(VisualMemoryError, match=r"the index: recall@10 is 0\.4.*minimum_recall"):
        recall.check(summary, 0.9)
    with pytest.raises(VisualMemoryError, match=r"the 1 new classes: recall@10 is 0\.000"):
        recall.check(summary, 0.1)
    recall.check(summary, 0.0)
    few = recall.summarise(hits, np.arange(200), 1, 1, before=None)
    assert few.worst_class is None
