"""Held-out queries are close to their rows, and never rows themselves."""

import ml_dtypes
import numpy as np
import pytest

from vm_core.exact import top_k
from vm_core.held_out import beside


@pytest.fixture(scope="module")
def vectors():
    rows = np.random.default_rng(0).normal(size=(1_500, 32))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_queries_are_nearest_to_the_row_they_come_from(vectors):
    chosen = np.arange(0, 1_500, 3)
    queries = beside(vectors, chosen)
    assert queries.shape == (500, 32) and queries.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1, atol=1e-6)
    nearest, distances = top_k(queries, vectors, 2)
    np.testing.assert_array_equal(nearest[:, 0], chosen)
    # A third of the way to the neighbour, by the definition.
    neighbours, _ = top_k(vectors[chosen], vectors, 2)
    expected = 2 * vectors[chosen] + vectors[neighbours[:, 1]]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(queries, expected, atol=1e-6)
    assert (distances[:, 0] > 1e-4).all()
    np.testing.assert_array_equal(queries, beside(vectors, np.isin(np.arange(1_500), chosen)))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("copies", [2, 5, 300])
@pytest.mark.parametrize("noise", [0, 1e-6])
def test_queries_beside_rows_that_all_have_copies_are_no_rows(vectors, dtype, copies, noise):
    rows = np.repeat(vectors[: 1_500 // copies], copies, axis=0)
    rows += noise * np.random.default_rng(1).normal(size=rows.shape).astype(np.float32)
    chosen = np.random.default_rng(2).permutation(len(rows))[:60]
    queries = beside(rows.astype(dtype), chosen)
    distances = top_k(queries, rows, 1)[1][:, 0]
    assert (distances > 1e-4).all()  # far above the rounding of each dtype
    own = 1 - np.vecdot(queries, rows[chosen])
    assert (own < distances + 1e-3).all()  # and still nearest to their own rows


@pytest.mark.parametrize("count", [1, 2])
def test_one_vector_alone_has_a_query_too(vectors, count):
    query = beside(vectors[:1].repeat(count, axis=0), np.array([0]))
    assert 0.05 < 1 - query[0] @ vectors[0] < 0.3
    assert beside(vectors[:0], np.empty(0, int)).shape == (0, 32)
