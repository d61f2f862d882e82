"""Exact search against brute force in float64."""

import dataclasses
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from threadpoolctl import threadpool_info, threadpool_limits

from vm_core import exact
from vm_core.errors import VisualMemoryError
from vm_core.exact import _products, top_k
from vm_core.exact._products import BFLOAT16, FLOAT32
from vm_core.index import parse
from vm_core.index.exact import Plugin
from vm_core.shard_rows import DTYPES


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


WAYS = {
    "alone": {"_PRODUCTS": 500},
    "queries shared out": {"_SMALL": 0, "_FEW_QUERIES": 0, "_PRODUCTS": 70, "_QUERIES": 2},
    "rows shared out": {"_SMALL": 0, "_FEW_QUERIES": 100, "_PRODUCTS": 300},
    "few values at a time": {"_SMALL": 0, "_VALUES": 40, "_KEPT": 40, "_PAIRS": 30},
    "bfloat16": {"_PRODUCTS": 50},
    "bfloat16, queries shared out": {"_SMALL": 0, "_FEW_QUERIES": 0, "_VALUES": 400},
    "bfloat16, rows shared out": {"_SMALL": 0, "_FEW_QUERIES": 100, "_PRODUCTS": 70},
    "tensorflow": {"_DEVICE_QUERIES": 4, "_DEVICE_VALUES": 600},
}


def set_sizes(patch: pytest.MonkeyPatch, **sizes: int) -> None:
    for name, value in sizes.items():
        patch.setattr(exact if hasattr(exact, name) else _products, name, value)


@pytest.mark.parametrize("way", WAYS)
@settings(deadline=None, max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(0, 300),
    queries=st.integers(0, 9),
    k=st.sampled_from([1, 5, 50, 320]),
    dimension=st.sampled_from([1, 3, 16, 65]),
    spread=st.sampled_from([0.0, 1e-7, 1e-4, 1.0]),
    dtype=st.sampled_from(sorted(DTYPES)),
)
def test_every_way_of_searching_gives_the_same_bits(
    way, seed, rows, queries, k, dimension, spread, dtype
):
    everything = clustered(seed, rows + queries, dimension, spread)
    vectors, wanted = everything[:rows].astype(DTYPES[dtype]), everything[rows:]
    backend = next((name for name in ("bfloat16", "tensorflow") if way.startswith(name)), "numpy")
    with pytest.MonkeyPatch.context() as patch, threadpool_limits(3, "blas"):
        set_sizes(patch, **WAYS[way])
        found, distances = top_k(wanted, vectors, k, backend)
    expected, expected_distances = brute_force(wanted, vectors, k)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(distances, expected_distances)


def test_every_float16_becomes_the_same_number_in_float32():
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)].reshape(-1, 32)
    for stored in (every, every[::3], every[::-1, ::2]):
        np.testing.assert_array_equal(_products.float32(stored), stored.astype(np.float32))


def peak(search) -> int:
    """The most bytes that a search holds at a time."""
    tracemalloc.start()
    try:
        search()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_products_over_one_are_ties():
    """Stored rows are not quite of unit length; distances end at 0, and then the row counts."""
    vectors = np.repeat(clustered(19, 1, 48, 1.0), 300, axis=0)
    query = vectors[:1].copy()
    vectors *= np.random.default_rng(20).uniform(0.999, 1.001, (300, 1)).astype(np.float32)
    found, distances = top_k(query, vectors, 20)
    expected, expected_distances = brute_force(query, vectors, 20)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(distances, expected_distances)
    assert not distances.any()


def test_rows_of_ascending_similarity_that_all_pass_the_threshold():
    query = clustered(9, 1, 16, 1.0)
    vectors = clustered(10, 40_000, 16, 1.0)
    vectors = vectors[np.argsort(vectors @ query[0])]
    wanted = unit(query + 1e-3 * clustered(11, 300, 16, 1.0))
    found, distances = top_k(wanted, vectors, 50)
    expected, expected_distances = brute_force(wanted[:3], vectors, 50)
    np.testing.assert_array_equal(found[:3], expected)
    np.testing.assert_array_equal(distances[:3], expected_distances)


ORDERS = {
    "as they come": lambda products: np.arange(len(products)),
    "ascending": np.argsort,
    "descending": lambda products: np.argsort(-products),
    "near ones in the middle": lambda products: np.roll(np.argsort(products), len(products) // 2),
}


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_the_rows_gives_the_same_answer(order, dtype, queries, monkeypatch):
    """Thresholds are guessed from the first rows; where these mislead it is searched again."""
    monkeypatch.setattr(_products, "_PRODUCTS", 100 * queries)
    centre = clustered(21, 1, 16, 1.0)
    vectors = clustered(22, 4_000, 16, 1.0)
    vectors[100:140] = vectors[:40]  # duplicates
    vectors = vectors[ORDERS[order](vectors @ centre[0])].astype(DTYPES[dtype])
    wanted = unit(centre + 0.05 * clustered(23, queries, 16, 1.0))
    searched = []
    candidates = exact._candidates

    def counted(queries, *rest):
        searched.append(len(queries))
        return candidates(queries, *rest)

    monkeypatch.setattr(exact, "_candidates", counted)
    for k in (1, 60):
        searched.clear()
        found, distances = top_k(wanted, vectors, k)
        expected, expected_distances = brute_force(wanted, vectors, k)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(distances, expected_distances)
        assert (len(searched) > 1) == (order == "descending")


def test_identical_rows_alone():
    vectors = np.repeat(clustered(24, 1, 24, 1.0), 40_000, axis=0)
    found, distances = top_k(clustered(25, 300, 24, 1.0), vectors, 30)
    np.testing.assert_array_equal(found, np.tile(np.arange(30), (300, 1)))
    assert (distances == distances[:, :1]).all()


@pytest.mark.parametrize("spread", [1e-3, 1.0])
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_crowds_within_the_rounding_of_bfloat16_are_searched_in_float32(dtype, spread, monkeypatch):
    vectors = clustered(26, 9_000, 96, spread).astype(DTYPES[dtype])
    wanted = clustered(27, 40, 96, spread)
    wanted[:20] = clustered(26, 20, 96, spread)
    finer = []
    blocks = FLOAT32.blocks

    def watched(queries, *rest):
        finer.append(len(queries))
        return blocks(queries, *rest)

    watching = dataclasses.replace(FLOAT32, blocks=watched)
    monkeypatch.setattr(exact, "FLOAT32", watching)
    for k in (1, 30):
        finer.clear()
        found, distances = top_k(wanted, vectors, k, "bfloat16")
        expected, expected_distances = brute_force(wanted, vectors, k)
        np.testing.assert_array_equal(found, expected)
        np.testing.assert_array_equal(distances, expected_distances)
        assert (sum(finer) >= 20) == (spread == 1e-3)


@pytest.mark.parametrize("precision", [FLOAT32, BFLOAT16], ids=lambda one: one.name)
@pytest.mark.parametrize("dtype", sorted(DTYPES))
def test_products_keep_to_their_tolerance(precision, dtype):
    for dimension in (1, 2, 3, 50, 1024):
        queries = clustered(28, 400, dimension, 0.5)
        vectors = clustered(28, 500, dimension, 0.5)
        vectors[50:450] = queries  # products of 1, where rounding is the coarsest
        vectors = vectors.astype(DTYPES[dtype])
        truth = queries.astype(np.float64) @ vectors.astype(np.float64).T
        seen = []
        for start, products in precision.blocks(queries, vectors, slice(3, 500)):
            seen += range(start, start + products.shape[1])
            error = np.abs(products.astype(np.float64) - truth[:, start:][:, : products.shape[1]])
            assert error.max() <= precision.tolerance(dimension)
        assert seen == list(range(3, 500))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("k", [10, 3_000])
def test_memory_is_bounded_whatever_the_rows(k, threads, tmp_path, monkeypatch):
    set_sizes(monkeypatch, _PRODUCTS=2**15, _VALUES=2**17, _KEPT=2**17, _SMALL=0)
    few, dimension = 24_000, 64
    vectors = clustered(12, 5 * few, dimension, 1.0)
    query = vectors[7]
    vectors = vectors[np.argsort(vectors @ query)].astype(np.float16)
    np.save(tmp_path / "vectors.npy", vectors)
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    wanted = np.repeat(query[None], 100, axis=0)
    with threadpool_limits(threads, "blas"):
        # Threads may need the most at the same time or not: in one of some runs they do.
        small = max(peak(lambda: top_k(wanted, mapped[:few], k)) for _ in range(4))
        large = peak(lambda: top_k(wanted, mapped, k))
    assert large < 1.5 * small + 2**20


def test_many_neighbours():
    vectors = clustered(13, 12_000, 24, 0.3)
    wanted = clustered(13, 40, 24, 0.3)
    found, distances = top_k(wanted, vectors, 10_000)
    expected, expected_distances = brute_force(wanted[:2], vectors, 10_000)
    np.testing.assert_array_equal(found[:2], expected)
    np.testing.assert_array_equal(distances[:2], expected_distances)


def blas_threads() -> list[int]:
    return [
        library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    ]


def test_searches_at_once_leave_blas_as_it_was(monkeypatch):
    monkeypatch.setattr(exact, "_SMALL", 0)
    vectors = clustered(14, 3_000, 32, 1.0)
    expected, _ = top_k(vectors[:200], vectors, 5)
    with threadpool_limits(2, "blas"):
        before = blas_threads()
        with ThreadPoolExecutor(4) as pool:
            for found, _ in pool.map(lambda _: top_k(vectors[:200], vectors, 5), range(12)):
                np.testing.assert_array_equal(found, expected)
        assert blas_threads() == before
    with pytest.raises(ValueError):
        top_k(vectors[:200, :7], vectors, 5)  # an error does not leave it otherwise either
    assert set(blas_threads()) != {1} or before == [1]


def test_a_process_held_to_one_thread_stays_so(monkeypatch):
    monkeypatch.setattr(exact, "_SMALL", 0)
    vectors = clustered(15, 500, 8, 1.0)
    with threadpool_limits(1, "blas"):
        with exact._blas_of_one_thread as threads:
            assert threads == 1
        top_k(vectors[:3], vectors, 5)
        assert set(blas_threads()) == {1}


def test_products_of_less_precision_than_float32_are_refused(monkeypatch):
    import ml_dtypes

    vectors = clustered(16, 400, 32, 1.0)
    honest = exact._device_candidates

    def coarse(queries, vectors, count):
        return honest(queries.astype(ml_dtypes.bfloat16).astype(np.float32), vectors, count)

    monkeypatch.setattr(exact, "_device_candidates", coarse)
    with pytest.raises(VisualMemoryError, match="off by .* allows 1.3e-06.*backend: numpy"):
        top_k(vectors[:20], vectors, 5, "tensorflow")


@pytest.mark.parametrize("backend", ["numpy", "bfloat16"])
def test_a_query_that_holds_nan_is_named_as_the_cause(backend):
    vectors = clustered(16, 400, 32, 1.0)
    queries = vectors[:3].copy()
    queries[1, 5] = np.nan
    with pytest.raises(VisualMemoryError, match="holds NaN or is not of unit length"):
        top_k(queries, vectors, 5, backend)


def test_tensorflow_keeps_its_setting_of_precision():
    import tensorflow as tf

    vectors = clustered(17, 400, 32, 1.0)
    top_k(vectors[:20], vectors, 5, "tensorflow")
    assert tf.config.experimental.tensor_float_32_execution_enabled()


@pytest.mark.parametrize("backend", ["tensorflow", "bfloat16"])
def test_a_missing_tensorflow_is_reported_when_the_index_is_opened(backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    vectors = clustered(18, 40, 4, 1.0)
    with pytest.raises(VisualMemoryError, match="Install tensorflow or write backend: numpy"):
        Plugin(backend=backend).open(vectors, "")
    found, _ = Plugin().open(vectors, "")(vectors[:3], 1)
    np.testing.assert_array_equal(found, [[0], [1], [2]])


LARGE, HUGE = (512, exact._LARGE // 512), (512, exact._WORTH_IMPORTING)


@pytest.fixture
def machine(monkeypatch):
    """Says what the machine has; returns what is chosen for queries and values of vectors."""
    import tensorflow as tf

    def choose(size, gpu=False, bfloat16=False, loaded=True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tf.config, "list_physical_devices", lambda kind: [kind] * gpu)
            patch.setattr(exact, "multiplies_bfloat16", lambda: bfloat16)
            patch.setattr(exact.glob, "glob", lambda pattern: ["/dev/nvidia0"] * gpu)
            if not loaded:
                patch.delitem(sys.modules, "tensorflow")
                patch.setattr(exact, "tensorflow", lambda: tf)
            return exact._fastest(*size)

    return choose


def test_small_searches_are_left_to_numpy(machine):
    small = (512, exact._LARGE // 512 - 1)
    assert machine(small, gpu=True, bfloat16=True) == "numpy"
    assert machine((511, exact._WORTH_IMPORTING), bfloat16=True) == "numpy"


def test_what_the_machine_has_is_chosen(machine):
    assert machine(LARGE) == "numpy"
    assert machine(LARGE, bfloat16=True) == "bfloat16"
    assert machine(LARGE, gpu=True, bfloat16=True) == "tensorflow"
    assert machine(LARGE, gpu=True, loaded=False) == "tensorflow"


def test_tensorflow_is_imported_for_bfloat16_only_where_it_pays(machine):
    assert machine(LARGE, bfloat16=True, loaded=False) == "numpy"
    assert machine(HUGE, bfloat16=True, loaded=False) == "bfloat16"


def test_settings():
    assert Plugin().choose(10**9).kind == "exact"
    with pytest.raises(VisualMemoryError, match="backend = 'jax'"):
        parse({"kind": "exact", "backend": "jax"})
