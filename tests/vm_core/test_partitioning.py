"""The partitioner: reproducible, even, and no worse than its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core import partitioning
from vm_core.partitioning import Partitioning
from vm_core.records import strings


def clustered(rows: int, seed: int = 0, dimension: int = 8, centres: int = 20) -> np.ndarray:
    """Unit rows around centres of very different sizes."""
    generator = np.random.default_rng(seed)
    points = generator.normal(size=(centres, dimension))
    share = 1 / np.arange(1, centres + 1)
    owner = generator.choice(centres, rows, p=share / share.sum())
    vectors = points[owner] + 0.3 * generator.normal(size=(rows, dimension))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def test_training_is_reproducible_and_depends_on_the_seed():
    vectors = clustered(3_000)
    centroids = partitioning.train(vectors, 10, seed=1)
    assert centroids.shape == (10, 8) and centroids.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(centroids, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(partitioning.train(vectors.copy(), 10, seed=1), centroids)
    assert (partitioning.train(vectors, 10, seed=2) != centroids).any()


@pytest.mark.parametrize("cells", [8, 30])
def test_the_largest_cell_is_under_twice_the_mean_though_classes_differ_in_size(cells):
    centroids = partitioning.train(clustered(10_000), cells, seed=0)
    rows = clustered(40_000, seed=5)
    # The same centres, other rows: as the memory is to its sample.
    rows = np.concatenate([clustered(10_000), rows[:0]])
    counts = np.bincount(partitioning.assign(rows, centroids)[:, 0], minlength=cells)
    assert counts.max() < 2 * counts.mean()


def test_identical_rows_and_fewer_rows_than_cells():
    same = np.repeat(clustered(1), 50, axis=0)
    centroids = partitioning.train(same, 4, seed=0)
    np.testing.assert_allclose(centroids, same[:4], atol=1e-6)
    assert (partitioning.assign(same, centroids) == 0).all()
    assert len(partitioning.train(clustered(3), 10, seed=0)) == 3


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32 - 1), cells=st.integers(1, 12))
def test_assignment_equals_its_definition(seed, cells):
    generator = np.random.default_rng(seed)
    vectors, centroids = clustered(60, seed), clustered(cells, seed + 1)
    products = vectors.astype(np.float64) @ centroids.astype(np.float64).T
    first = products.argmax(axis=1)
    np.testing.assert_array_equal(partitioning.assign(vectors, centroids)[:, 0], first)
    for spill in ("nearest", "soar"):
        found = partitioning.assign(vectors, centroids, spill)
        assert found.shape == (60, min(2, cells))
        np.testing.assert_array_equal(found[:, 0], first)
    if cells > 1:
        second = np.argsort(-products, axis=1)[:, 1]
        np.testing.assert_array_equal(
            partitioning.assign(vectors, centroids, "nearest")[:, 1], second
        )
        soar = partitioning.assign(vectors, centroids, "soar")[:, 1]
        for row in generator.integers(60, size=5):
            # SOAR: the residual's square plus that of its part along the first residual.
            x, c = vectors[row].astype(np.float64), centroids.astype(np.float64)
            residual = (x - c[first[row]]) / np.linalg.norm(x - c[first[row]])
            near = np.argsort(-products[row])[1:8]
            loss = [((x - c[j]) ** 2).sum() + ((x - c[j]) @ residual) ** 2 for j in near]
            assert soar[row] == near[int(np.argmin(loss))]


def test_the_sample_is_chosen_by_ids_and_about_as_large_as_wanted():
    vectors = clustered(100_000)
    ids = strings([f"row-{i}" for i in range(len(vectors))])
    some = partitioning.sample(ids, vectors, 100_000, 100, seed=0)
    assert 24_000 < len(some) < 27_000  # 256 for each of 100 cells
    part = np.arange(0, 100_000, 3)
    again = partitioning.sample(ids[part], vectors[part], 100_000, 100, seed=0)
    chosen = {row.tobytes() for row in some}
    assert all(row.tobytes() in chosen for row in again)
    assert len(partitioning.sample(ids[:50], vectors[:50], 50, 2, seed=0)) == 50


def test_how_many_cells():
    assert Partitioning(rows=100).cells(100) == 1
    assert Partitioning(rows=100).cells(101) == 2
    assert Partitioning(rows=100).cells(1_000) == 15
    assert Partitioning(rows=100, spill="soar").cells(1_000) == 30
