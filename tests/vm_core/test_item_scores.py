"""Counts, Shapley values and groups, against their definitions."""

from itertools import combinations
from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core import item_scores
from vm_core.item_scores import FIXED_POINT, Lists, Sums, nearest, shapley, tally


def shapley_by_definition(correct: list[int], k: int) -> list[float]:
    """Every coalition of the items, which stand nearest first; one query."""

    def worth(coalition: tuple[int, ...]) -> float:
        return sum(correct[i] for i in coalition[:k]) / k

    n = len(correct)
    values = [0.0] * n
    for i in range(n):
        others = [j for j in range(n) if j != i]
        for size in range(n):
            for coalition in combinations(others, size):
                gain = worth(tuple(sorted((*coalition, i)))) - worth(coalition)
                values[i] += gain / (n * comb(n - 1, size))
    return values


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 1), min_size=1, max_size=7), st.integers(1, 9))
def test_shapley_values_of_complete_lists_are_those_of_the_definition(correct, k):
    values = shapley(np.array([correct], bool), np.array([len(correct)]), np.array([True]), k)
    np.testing.assert_allclose(
        values[0] * FIXED_POINT, shapley_by_definition(correct, k), rtol=0, atol=1e-10
    )
    total = sum(correct[:k]) / k  # what all of them together are worth
    assert values.sum() * FIXED_POINT == pytest.approx(total, abs=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 1), min_size=2, max_size=7),
    st.integers(1, 9),
    st.integers(1, 6),
)
def test_shapley_values_of_cut_lists_are_off_by_no_more_than_promised(correct, k, length):
    length = min(length, len(correct) - 1)
    cut = np.array([correct[:length]], bool)
    values = shapley(cut, np.array([length]), np.array([False]), k)[0] * FIXED_POINT
    expected = np.array(shapley_by_definition(correct, k)[:length])
    off = expected - values
    assert values[-1] == 0
    np.testing.assert_allclose(off, off[-1], rtol=0, atol=1e-10)  # they differ as they should
    assert abs(off[-1]) <= 1 / max(length, k) + 1e-10


def test_shapley_values_of_lists_of_different_lengths():
    correct = np.array([[1, 0, 1], [1, 0, 0], [0, 0, 0]], bool)
    values = shapley(correct, np.array([3, 1, 0]), np.array([True, True, True]), 2)
    np.testing.assert_allclose(values[0] * FIXED_POINT, shapley_by_definition([1, 0, 1], 2))
    np.testing.assert_allclose(values[1] * FIXED_POINT, [0.5, 0, 0])
    assert not values[2].any()
    # A short list that is not complete: its last value is taken as 0, the others follow.
    cut = shapley(correct[:1], np.array([2]), np.array([False]), 2)
    np.testing.assert_allclose(cut[0] * FIXED_POINT, [0.5, 0, 0])


def test_shapley_values_do_not_depend_on_the_block():
    rng = np.random.default_rng(0)
    correct, lengths = rng.random((50, 20)) < 0.5, rng.integers(0, 21, 50)
    complete = rng.random(50) < 0.5
    whole = shapley(correct, lengths, complete, 5)
    parts = [
        shapley(correct[i : i + 7], lengths[i : i + 7], complete[i : i + 7], 5)
        for i in range(0, 50, 7)
    ]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


found_items = st.lists(
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 4), st.booleans()), max_size=40
)


@settings(deadline=None)
@given(found_items, st.integers(1, 6))
def test_nearest_merges_as_a_dictionary_would(items, length):
    places, rows, steps, correct = (
        np.array([item[i] for item in items], kind)
        for i, kind in enumerate((np.int64, np.int64, np.float32, bool))
    )
    # An item's correctness is its own; its distances may differ in the last bits.
    correct = rows % 2 == 0
    lists = Lists.packed(places, 4, rows, steps, correct)
    best = nearest(lists, length)
    for place in range(4):
        smallest: dict[int, float] = {}
        for at, row, step, _ in items:
            if at == place:
                smallest[row] = min(step, smallest.get(row, np.inf))
        expected = sorted((step, row) for row, step in smallest.items())[:length]
        count = len(expected)
        assert best.rows[place, :count].tolist() == [row for _, row in expected]
        assert best.distances[place, :count].tolist() == [step for step, _ in expected]
        assert best.correct[place, :count].tolist() == [row % 2 == 0 for _, row in expected]
        assert (best.rows[place, count:] == -1).all()
        assert np.isinf(best.distances[place, count:]).all()
        assert not best.correct[place, count:].any()


def random_lists(rng: np.random.Generator, queries: int, length: int) -> Lists:
    rows = np.array([rng.permutation(30)[:length] for _ in range(queries)])
    rows[np.arange(length) >= rng.integers(0, length + 1, queries)[:, None]] = -1
    correct = (rng.random(rows.shape) < 0.4) & (rows >= 0)
    return Lists(rows, np.zeros(rows.shape, np.float32), correct)


@pytest.mark.parametrize("ks", [(1,), (3, 8), (2, 5, 8), (3, 20)])
def test_tally_counts_as_a_loop_would(ks):
    rng = np.random.default_rng(len(ks))
    lists = random_lists(rng, 40, 8)
    values = rng.integers(-(2**40), 2**40, lists.rows.shape)
    expected: dict[int, dict[str, int]] = {}
    for row_list, correct_list, value_list in zip(lists.rows, lists.correct, values, strict=True):
        for rank, (row, correct, value) in enumerate(
            zip(row_list, correct_list, value_list, strict=True)
        ):
            if row < 0:
                continue
            item = expected.setdefault(int(row), dict.fromkeys(item_scores.columns(ks), 0))
            item["shapley"] += int(value)
            for k in ks:
                if rank < k:
                    item[f"{'correct' if correct else 'wrong'}_at_{k}"] += 1
    rows, sums = tally(lists, values, ks)
    assert rows.tolist() == sorted(expected)
    assert [dict(zip(item_scores.columns(ks), s, strict=True)) for s in sums.tolist()] == [
        expected[row] for row in rows.tolist()
    ]


def test_sums_do_not_depend_on_order_grouping_or_when_they_are_added_up(monkeypatch):
    rng = np.random.default_rng(3)
    blocks = [
        tally(lists, rng.integers(-(2**50), 2**50, lists.rows.shape), (3, 8))
        for lists in (random_lists(rng, 10, 8) for _ in range(12))
    ]
    outcomes = []
    for keep in (1, 50, 10**6):
        monkeypatch.setattr(item_scores, "_KEEP_ROWS", keep)
        sums = Sums(5)
        for i in rng.permutation(len(blocks)):
            sums.add(*blocks[i])
        outcomes.append(sums.total())
    for rows, totals in outcomes[1:]:
        np.testing.assert_array_equal(rows, outcomes[0][0])
        np.testing.assert_array_equal(totals, outcomes[0][1])
    assert sum(block[1].sum() for block in blocks) == outcomes[0][1].sum()
    assert [part.shape for part in Sums(5).total()] == [(0,), (0, 5)]


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 12)), max_size=20))
def test_groups_are_named_for_their_lowest_row(pairs):
    def reached(row: int) -> set[int]:
        seen: set[int] = set()
        waiting = [row]
        while waiting:
            at = waiting.pop()
            if at not in seen:
                seen.add(at)
                waiting += [b for a, b in pairs if a == at] + [a for a, b in pairs if b == at]
        return seen

    rows, heads = item_scores.groups(np.array(pairs, np.int64).reshape(-1, 2))
    assert rows.tolist() == sorted({row for pair in pairs for row in pair})
    assert heads.tolist() == [min(reached(row)) for row in rows.tolist()]


def test_a_pair_found_from_both_sides_counts_once():
    pairs = np.array([[5, 2, 1], [2, 5, 1], [2, 9, 0], [5, 2, 1]])
    assert item_scores.unique_pairs(pairs).tolist() == [[2, 5, 1], [2, 9, 0]]
