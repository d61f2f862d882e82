"""What the indexing pipeline adds to its functions."""

import itertools

import numpy as np

from pipelines import index
from vm_core.recall import Hits, nothing


def hits(seed: int) -> Hits:
    """Of three queries, each with five rows of its own."""
    generator = np.random.default_rng(seed)
    found = nothing(3)
    found.rows[:, :5] = generator.permutation(15).reshape(3, 5) + 100 * seed
    found.distances[:, :5] = np.sort(generator.random((3, 5)), axis=1)
    found.ranks[:, :5] = generator.integers(4, size=(3, 5))
    return found


def test_empty_bundles_lose_no_hits_in_whatever_order_a_runner_merges():
    assert index._merge_hits([]) is None and index._merge_hits([None, None]) is None
    parts = [hits(1), None, hits(2), None, hits(3)]
    expected = index._merge_hits([hits(1), hits(2), hits(3)])
    for order in itertools.permutations(parts):
        for cut in range(len(order) + 1):
            halves = [index._merge_hits(order[:cut]), index._merge_hits(order[cut:])]
            merged = index._merge_hits(halves)
            for name in ("rows", "distances", "ranks"):
                np.testing.assert_array_equal(getattr(merged, name), getattr(expected, name))
