"""The benchmarks' made-up embeddings: reproducible, and of a known difficulty."""

import numpy as np
import pytest

from benchmarks import mixture


def test_a_block_follows_from_seed_and_number_alone():
    first = mixture.Mixture(16, classes=20)
    second = mixture.Mixture(16, classes=20)
    second.block(0, 100)
    for vectors, again in zip(first.block(3, 200), second.block(3, 200), strict=True):
        np.testing.assert_array_equal(vectors, again)
    others = [first.block(4, 200), mixture.Mixture(16, classes=20, seed=1).block(3, 200)]
    for vectors, _ in others:
        assert not np.isclose(vectors, first.block(3, 200)[0]).all(axis=1).any()


def test_rows_are_unit_vectors_nearest_to_their_own_class():
    made = mixture.Mixture(64, classes=10)
    vectors, labels = made.block(0, 500)
    assert vectors.dtype == np.float32 and labels.dtype == np.int64
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert set(labels) == set(range(10))
    assert np.mean(np.argmax(vectors @ made.centres.T, axis=1) == labels) > 0.9


@pytest.mark.parametrize("dimension", [2, 5, 8])
def test_the_intrinsic_dimension_of_a_sphere_in_a_larger_space(dimension):
    vectors = np.zeros((20_000, 40), np.float32)
    sphere = np.random.default_rng(0).normal(size=(20_000, dimension + 1))
    vectors[:, : dimension + 1] = sphere / np.linalg.norm(sphere, axis=1, keepdims=True)
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(40, 40)))[0]
    rotated = (vectors @ rotation).astype(np.float32)
    assert mixture.intrinsic_dimension(rotated) == pytest.approx(dimension, rel=0.12)
