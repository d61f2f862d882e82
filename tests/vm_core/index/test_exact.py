"""Exact search against brute force in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core.index import exact
from vm_core.index.exact import top_k


def unit(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def clustered(seed: int, rows: int, dimension: int, spread: float) -> np.ndarray:
    """Unit rows around a few centres; a spread of 0 gives copies, a small one near-copies."""
    generator = np.random.default_rng(seed)
    centres = generator.normal(size=(5, dimension)) + 0.01
    noise = spread * generator.normal(size=(rows, dimension))
    return unit(centres[generator.integers(5, size=rows)] + noise)


def brute_force(queries: np.ndarray, vectors: np.ndarray, k: int):
    """All distances in float64, rounded to float32, sorted by distance and then by row."""
    rows = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, np.float32)
    found = min(k, len(vectors))
    for i, query in enumerate(queries.astype(np.float64)):
        products = np.array([np.dot(query, row) for row in vectors.astype(np.float64)])
        all_distances = np.maximum(1.0 - products, 0.0).astype(np.float32)
        order = np.lexsort((np.arange(len(vectors)), all_distances))[:found]
        rows[i, :found], distances[i, :found] = order, all_distances[order]
    return rows, distances


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 300),
    queries=st.integers(0, 6),
    k=st.integers(0, 320),
    dimension=st.sampled_from([1, 2, 3, 16, 130]),
    spread=st.sampled_from([0.0, 1e-7, 1e-4, 0.1, 1.0]),
)
def test_equals_brute_force(seed, rows, queries, k, dimension, spread):
    everything = clustered(seed, rows + queries, dimension, spread)
    vectors, wanted = everything[:rows], everything[rows:]
    found, distances = top_k(wanted, vectors, k)
    expected, expected_distances = brute_force(wanted, vectors, k)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(distances, expected_distances)
    assert found.dtype == np.int64 and distances.dtype == np.float32


@pytest.mark.parametrize("k", [1, 10, 100])
def test_thousands_of_identical_rows_are_tied_by_row(k):
    vectors = np.repeat(clustered(1, 4, 64, 1.0), 5_000, axis=0)
    vectors = vectors[np.random.default_rng(2).permutation(len(vectors))]
    wanted = clustered(1, 4, 64, 1.0)
    found, distances = top_k(wanted, vectors, k)
    for query, rows, found_distances in zip(wanted, found, distances, strict=True):
        (same,) = np.nonzero((vectors == query).all(axis=1))
        np.testing.assert_array_equal(rows, same[:k])
        assert (found_distances < 1e-6).all()


def test_a_tie_at_the_last_place_goes_to_the_lower_row_beyond_a_block_of_rows():
    vectors = clustered(3, 40_000, 8, 1.0)
    query = vectors[:1]
    vectors[[39_999, 20_000, 7]] = query  # row 0 and these: four equals in three blocks
    found, _ = top_k(query, vectors, 3)
    np.testing.assert_array_equal(found, [[0, 7, 20_000]])


def test_near_duplicates_over_several_blocks_of_rows_and_queries():
    vectors = clustered(4, 35_000, 32, 1e-5)
    wanted = clustered(5, 300, 32, 1.0)
    wanted[::50] = vectors[:6]
    found, distances = top_k(wanted, vectors, 20)
    some = np.arange(0, 300, 50)
    expected, expected_distances = brute_force(wanted[some], vectors, 20)
    np.testing.assert_array_equal(found[some], expected)
    np.testing.assert_array_equal(distances[some], expected_distances)


def test_an_answer_does_not_depend_on_what_is_searched_beside_it():
    vectors = clustered(6, 20_000, 96, 0.02)
    wanted = clustered(6, 517, 96, 0.02)
    together, together_distances = top_k(wanted, vectors, 30)
    for part in ([0], [516, 3], range(100, 231)):
        alone, alone_distances = top_k(wanted[list(part)], vectors, 30)
        np.testing.assert_array_equal(alone, together[list(part)])
        np.testing.assert_array_equal(alone_distances, together_distances[list(part)])
    # The same rows among others, in another order and place: the same bits.
    keep = np.sort(np.random.default_rng(7).permutation(20_000)[:9_000])
    some, some_distances = top_k(wanted[:50], vectors[keep], 30)
    expected, expected_distances = brute_force(wanted[:50], vectors[keep], 30)
    np.testing.assert_array_equal(some, expected)
    np.testing.assert_array_equal(some_distances, expected_distances)
    _, reordered_distances = top_k(wanted[:50], vectors[::-1], 30)
    np.testing.assert_array_equal(reordered_distances, together_distances[:50])


def test_rows_that_are_not_contiguous_in_memory():
    wide = clustered(8, 500, 64, 1.0)
    vectors = wide[::2]
    np.testing.assert_array_equal(
        top_k(wide[:9], vectors, 5)[0], brute_force(wide[:9], vectors, 5)[0]
    )


def test_distances_stay_within_bounds():
    query = unit(np.ones((1, 1000)))
    _, distances = top_k(query, np.concatenate([query, -query]), 2)
    assert 0 <= distances[0, 0] < 1e-6 and 2 - 1e-6 < distances[0, 1] <= 2 + 1e-6


def test_settings():
    assert exact.Plugin().choose(10**9).kind == "exact"
