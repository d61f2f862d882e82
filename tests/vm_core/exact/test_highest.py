"""The highest products so far against a full sort."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core.exact._highest import Highest, capacity
from vm_core.shard_rows import DTYPES

ORDERS = {
    "random": lambda products: products,
    "ascending": lambda products: np.sort(products, axis=1),
    "descending": lambda products: -np.sort(-products, axis=1),
    "the highest in the middle": lambda products: np.sort(products, axis=1)[
        :, np.argsort(-np.abs(np.arange(products.shape[1]) - products.shape[1] // 2))
    ],
    "all the same": lambda products: np.full_like(products, 0.5),
}


def run(products: np.ndarray, count: int, width: int, guess: bool):
    best = Highest(len(products), count, products.shape[1], guess)
    for start in range(0, products.shape[1], width):
        best.add(np.ascontiguousarray(products[:, start : start + width]), start)
    return best.result()


@pytest.mark.parametrize("order", ORDERS)
@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 3_000),
    count=st.integers(1, 60),
    width=st.integers(1, 400),
    values=st.sampled_from([3, 100, 10**6]),
    guess=st.booleans(),
    lowest=st.sampled_from([-1, 0, 0.5]),
    dtype=st.sampled_from(["float32", "bfloat16"]),
)
def test_what_is_not_reported_as_missed_is_the_highest(
    order, seed, rows, count, width, values, guess, lowest, dtype
):
    count = min(count, rows)
    products = np.random.default_rng(seed).integers(lowest * values, values, (5, rows)) / values
    products = ORDERS[order](products.astype(np.float32)).astype(DTYPES[dtype])
    found, found_products, missed = run(products, count, width, guess)
    assert found.shape == found_products.shape == (5, count)
    assert guess or not missed.any()
    products = products.astype(np.float32)
    expected = np.sort(products, axis=1)[:, rows - count :]
    for i in np.flatnonzero(~missed):
        assert len(set(found[i])) == count
        np.testing.assert_array_equal(products[i, found[i]], found_products[i])
        np.testing.assert_array_equal(np.sort(found_products[i]), expected[i])


def test_guesses_keep_little_and_seldom_miss():
    products = np.random.default_rng(1).standard_normal((200, 100_000), dtype=np.float32)
    best = Highest(200, 100, 100_000, guess=True)
    for start in range(0, 100_000, 1_000):
        best.add(np.ascontiguousarray(products[:, start : start + 1_000]), start)
    assert not best.result()[2].any()
    # Without the guesses a query would take in 100 ln(1000) + 100 products, one by one.
    assert np.isfinite(best._products).sum(axis=1).mean() < 320 < capacity(100)


def test_a_guess_that_was_too_high_is_reported():
    products = ORDERS["descending"](
        np.random.default_rng(2).standard_normal((20, 10_000), dtype=np.float32)
    )
    products[10:] = products[10:, ::-1]  # half of the queries have their highest last
    missed = run(products, 50, 500, guess=True)[2]
    np.testing.assert_array_equal(missed, np.arange(20) < 10)


def test_equal_products_are_not_missed():
    assert not run(np.full((3, 10_000), 0.25, np.float32), 50, 500, guess=True)[2].any()
