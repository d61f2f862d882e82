"""Search over partitions equals search over all rows at once, however they are divided."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core.exact import top_k
from vm_core.neighbors import Neighbors
from vm_core.partitions import Members, Partition
from vm_core.records import PADDING, EmbeddingBlock, strings
from vm_core.search import PartitionCache, Router, Searcher, _repeated, merge


def block(seed: int, rows: int, copies: bool = False) -> EmbeddingBlock:
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(rows, 6))
    if copies and rows:
        vectors = vectors[generator.integers(max(1, rows // 4), size=rows)]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return EmbeddingBlock(
        strings([f"{number:04d}" for number in range(rows)]),
        generator.integers(4, size=rows),
        strings(["source"] * rows),
        vectors.astype(np.float32),
    )


def partition(rows: EmbeddingBlock) -> Partition:
    members = Members(
        np.arange(len(rows)),
        pa.array(rows.ids, pa.string()),
        rows.labels,
        np.ones(len(rows), bool),
        rows.vectors,
    )
    return Partition(members, lambda queries, k: top_k(queries, rows.vectors, k))


def find_neighbors(parts, queries, k, exclude_self=False):
    """Every query visits every partition."""
    router = Router(None, (0,) * len(parts), 1)
    return Searcher(router, parts.__getitem__)(queries, k, exclude_self)


def assert_equal(left: Neighbors, right: Neighbors) -> None:
    for name in ("query_ids", "query_labels", "ids", "labels", "distances"):
        a, b = getattr(left, name), getattr(right, name)
        np.testing.assert_array_equal(a, b)
        assert a.dtype == b.dtype


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 80),
    k=st.integers(1, 30),
    parts=st.integers(1, 6),
    copies=st.booleans(),
    exclude_self=st.booleans(),
)
def test_any_partitioning_equals_one_partition(seed, rows, k, parts, copies, exclude_self):
    memory = block(seed, rows, copies)
    queries = memory.take(np.arange(0, rows, 3))
    whole = find_neighbors([partition(memory)], queries, k, exclude_self)
    owner = np.random.default_rng(seed).integers(parts, size=rows)
    divided = [partition(memory.take(np.flatnonzero(owner == part))) for part in range(parts)]
    assert_equal(find_neighbors(divided, queries, k, exclude_self), whole)
    assert_equal(find_neighbors(divided[::-1], queries, k, exclude_self), whole)
    if exclude_self:
        assert not (whole.ids == queries.ids[:, None]).any()
    expected = min(k, rows - exclude_self)
    np.testing.assert_array_equal((whole.labels != PADDING).sum(axis=1), expected)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 2**32 - 1), k=st.integers(1, 25), data=st.data())
def test_merge_is_associative_and_commutative_and_keeps_each_id_once(seed, k, data):
    memory = block(seed, 40, copies=True)
    queries = block(seed + 1, 5)
    members = st.lists(st.integers(0, 39), unique=True, max_size=40)
    a, b, c = (
        find_neighbors(
            [partition(memory.take(np.array(sorted(data.draw(members)), np.int64)))], queries, k
        )
        for _ in range(3)
    )
    merged = merge(merge(a, b), c)
    assert_equal(merged, merge(a, merge(b, c)))
    assert_equal(merged, merge(c, merge(b, a)))
    assert_equal(merge(a, a), a)
    for row in range(len(queries)):
        known = [id for id in merged.ids[row] if id]
        assert len(known) == len(set(known))
        everything = {
            (float(distance), id)
            for part in (a, b, c)
            for id, distance in zip(part.ids[row], part.distances[row], strict=True)
            if id
        }
        expected = [id for _, id in sorted(everything)[:k]]
        assert known == expected


def test_ids_of_other_lengths_stay_whole():
    """Partitions hold their ids in arrays as wide as the longest."""
    memory = block(5, 60)
    names = [name * (1 + 2 * (i % 4)) for i, name in enumerate(memory.ids)]
    names[3::20] = ["é" * 90, "ü" * 400, "x"]  # the last partition keeps objects
    memory = EmbeddingBlock(strings(names), memory.labels, memory.sources, memory.vectors)
    parts = [partition(memory.take(np.arange(start, 60, 4))) for start in range(4)]
    assert len({part.members.ids.dtype for part in parts}) > 2
    for order in (parts, parts[::-1]):
        found = find_neighbors(order, memory, 30)
        whole = find_neighbors([partition(memory)], memory, 30)
        np.testing.assert_array_equal(found.ids, whole.ids)
        assert set(found.ids.ravel()) <= set(names)


@pytest.mark.parametrize("width", [5, 57, 58, 300])
def test_ids_are_of_fixed_width_where_that_takes_little_memory(width):
    names = [f"{number:0{width}d}" for number in range(20)]
    memory = block(6, 20)
    ids = partition(replace(memory, ids=strings(names))).members.ids
    assert ids.tolist() == names
    assert (ids.dtype == object) == (width > 57)
    assert ids.nbytes <= 2 * 20 * (57 + width)


def test_an_id_that_ends_in_nul_is_kept():
    names = ["a", "a\0", "b"]
    assert partition(replace(block(7, 3), ids=strings(names))).members.ids.tolist() == names


@pytest.mark.parametrize("dtype", [object, "U3"])
def test_repeated_ids_against_a_count(dtype):
    generator = np.random.default_rng(8)
    ids = generator.choice(["", "a", "b", "ab", "ba", "é", "aaa"], size=(300, 6)).astype(dtype)
    distances = generator.integers(3, size=ids.shape).astype(np.float32)
    repeated = _repeated(ids, distances)
    for row, marks, far in zip(ids, repeated, distances, strict=True):
        for name in set(row) - {""}:
            (kept,) = np.flatnonzero((row == name) & ~marks)
            assert far[kept] == far[row == name].min()
        assert not marks[row == ""].any()


def test_an_id_found_at_two_distances_stands_once_at_the_smaller():
    """As when an approximate index rounds otherwise than the exact one beside it."""
    queries = block(0, 1)
    near = Neighbors(
        queries.ids,
        queries.labels,
        np.array([["a", "b", "c"]], object),
        np.array([[1, 2, 3]]),
        np.array([[0.1, 0.2, 0.3]], np.float32),
    )
    far = replace(near, distances=near.distances + np.float32(0.15))
    assert_equal(merge(near, far), near)
    assert_equal(merge(far, near), near)


def test_k_above_the_number_of_rows_is_padded():
    memory = block(1, 3)
    found = find_neighbors([partition(memory)], memory, 5, exclude_self=True)
    assert found.k == 5
    assert (found.labels[:, 2:] == PADDING).all() and (found.ids[:, 2:] == "").all()
    assert np.isinf(found.distances[:, 2:]).all() and np.isfinite(found.distances[:, :2]).all()


def test_a_partition_without_rows_and_no_partition():
    memory, empty = block(2, 4), partition(block(2, 0))
    assert_equal(
        find_neighbors([empty, partition(memory)], memory, 2),
        find_neighbors([partition(memory)], memory, 2),
    )
    assert (find_neighbors([empty], memory, 2).labels == PADDING).all()
    assert (find_neighbors([], memory, 2).labels == PADDING).all()


def test_no_queries():
    memory = block(3, 4)
    found = find_neighbors([partition(memory)] * 2, memory.take(np.arange(0)), 2)
    assert found.ids.shape == (0, 2)


def test_the_cache_keeps_the_latest_within_its_bytes():
    opened: list[int] = []

    def open_one(number):
        opened.append(number)
        return partition(block(number, 2))

    cache = PartitionCache(open_one, [4, 4, 4, 99], limit=8)
    for number in (0, 1, 0, 2, 0, 1, 3, 3, 0):
        assert len(cache(number).members) == 2
    assert opened == [0, 1, 2, 1, 3, 0]


def test_who_opens_a_partition_keeps_only_those_waiting_that_want_it_too():
    started, go_on = threading.Event(), threading.Event()
    opened = []

    def open_one(number):
        opened.append(number)
        if number == 1:
            started.set()
            assert go_on.wait(10)
        return partition(block(number, 2 + number))

    cache = PartitionCache(open_one, [4, 4], limit=8)
    cache(0)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(cache, 1)
        assert started.wait(10)
        second = pool.submit(cache, 1)
        assert len(cache(0).members) == 2  # while 1 is being opened
        go_on.set()
        assert first.result(10) is second.result(10)
    assert opened == [0, 1]


def test_a_partition_that_could_not_be_opened_is_opened_again_when_asked_for():
    failures = [OSError("no network")]

    def open_one(number):
        if failures:
            raise failures.pop()
        return partition(block(number, 2))

    cache = PartitionCache(open_one, [4], limit=8)
    with pytest.raises(OSError, match="no network"):
        cache(0)
    assert len(cache(0).members) == 2


def test_a_query_visits_the_cells_nearest_to_it():
    centroids = np.eye(6, dtype=np.float32)[:4]
    router = Router(centroids, (0, 2, 2, 3), 2)  # cell 1 is empty, cell 2 has two partitions
    queries = np.array([[0.9, 0.4, 0, 0, 0, 0], [0, 0.1, 0.8, 0.6, 0, 0]], np.float32)
    np.testing.assert_array_equal(router.route(queries), [[0, 1], [2, 3]])
    visits = {number: places.tolist() for number, places in router.visits(queries)}
    assert visits == {0: [0], 1: [1], 2: [1], 3: [1]}
