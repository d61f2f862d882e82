"""How much each item of a memory helps or misleads the others, from leave-one-out neighbours.

Every item is a query against all others. An item's scores: how often it is a wrong and a
right neighbour among the first k of a query, and its Shapley value for the accuracy of a
nearest-neighbour classifier (Jia et al. 2019, arXiv 1908.08619). All sums are sums of
integers, so any order and grouping of the queries gives the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

FIXED_POINT = 2.0**-40
"""The unit of a Shapley value as an integer."""

_KEEP_ROWS = 1 << 22


@dataclass(frozen=True, eq=False)
class Lists:
    """The nearest items of Q queries, at most L each, the nearest first, ties by row.

    rows: (Q, L) int64, -1 where there are fewer. distances: (Q, L) float32, +inf there.
    correct: (Q, L) bool, whether the item has the query's label; false there.
    """

    rows: np.ndarray
    distances: np.ndarray
    correct: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def lengths(self) -> np.ndarray:
        """(Q,) int64: how many items each list has."""
        return (self.rows >= 0).sum(axis=1)

    def take(self, places: np.ndarray) -> Lists:
        return Lists(self.rows[places], self.distances[places], self.correct[places])

    def replaced(self, places: np.ndarray, others: Lists) -> Lists:
        """These lists with others at some places."""
        copies = Lists(self.rows.copy(), self.distances.copy(), self.correct.copy())
        copies.rows[places], copies.distances[places] = others.rows, others.distances
        copies.correct[places] = others.correct
        return copies

    def beside(self, other: Lists) -> Lists:
        """(Q, L + M), the other's items after these, out of order; ``nearest`` sorts."""
        return Lists(
            np.concatenate([self.rows, other.rows], axis=1),
            np.concatenate([self.distances, other.distances], axis=1),
            np.concatenate([self.correct, other.correct], axis=1),
        )

    def without(self, dropped: np.ndarray) -> Lists:
        """The lists, sorted, less the items of a (Q, L) mask; the shape stays."""
        distances = np.where(dropped, np.float32(np.inf), self.distances)
        return _ordered(Lists(np.where(dropped, -1, self.rows), distances, self.correct & ~dropped))

    def first(self, length: int) -> Lists:
        return Lists(self.rows[:, :length], self.distances[:, :length], self.correct[:, :length])

    @staticmethod
    def packed(
        places: np.ndarray,
        queries: int,
        rows: np.ndarray,
        distances: np.ndarray,
        correct: np.ndarray,
    ) -> Lists:
        """(queries, L) lists of M single items, where L is the most that any query has.

        places: (M,) int, the query each item belongs to. Within a query the order stays.
        """
        order = np.argsort(places, kind="stable")
        counts = np.bincount(places, minlength=queries)
        starts = np.cumsum(counts) - counts
        column = np.arange(len(places)) - np.repeat(starts, counts)
        at = (places[order], column)
        shape = (queries, int(counts.max(initial=0)))
        lists = Lists(
            np.full(shape, -1, np.int64), np.full(shape, np.inf, np.float32), np.zeros(shape, bool)
        )
        lists.rows[at], lists.distances[at] = rows[order], distances[order]
        lists.correct[at] = correct[order]
        return lists


def nearest(lists: Lists, length: int) -> Lists:
    """Sorts each list; an item that stands twice stays once, at its smaller distance."""
    ascending = np.sort(lists.rows, axis=1)
    twice = (ascending[:, 1:] == ascending[:, :-1]) & (ascending[:, 1:] >= 0)
    (some,) = np.nonzero(twice.any(axis=1))  # few, where partitions share few items
    rows, distances = lists.rows[some], lists.distances[some]
    by_row = np.lexsort((distances, rows), axis=1)
    ordered = np.take_along_axis(rows, by_row, axis=1)
    again = np.zeros(rows.shape, bool)
    np.put_along_axis(again, by_row[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    repeated = np.zeros(lists.rows.shape, bool)
    repeated[some] = again & (rows >= 0)
    return lists.without(repeated).first(length)


def _ordered(lists: Lists) -> Lists:
    order = np.argsort(lists.distances, axis=1, kind="stable")  # fast on what is nearly sorted
    distances = np.take_along_axis(lists.distances, order, axis=1)
    rows = np.take_along_axis(lists.rows, order, axis=1)
    tied = (distances[:, 1:] == distances[:, :-1]) & (rows[:, 1:] < rows[:, :-1])
    (some,) = np.nonzero((tied & (rows[:, 1:] >= 0)).any(axis=1))
    order[some] = np.lexsort((lists.rows[some], lists.distances[some]), axis=1)
    return Lists(
        *(
            np.take_along_axis(each, order, axis=1)
            for each in (lists.rows, lists.distances, lists.correct)
        )
    )


def shapley(correct: np.ndarray, lengths: np.ndarray, complete: np.ndarray, k: int) -> np.ndarray:
    """Shapley values of the neighbours of Q queries, (Q, L) int64 in units of FIXED_POINT.

    The game: a coalition's worth is the share of its k nearest items, out of k, with the
    query's label. correct: (Q, L) bool, nearest first. lengths: (Q,), how many neighbours
    each list has; beyond them the values are 0. complete: (Q,) bool, whether the list
    holds all other items: then the values are exact, and otherwise each is off by at most
    1 / max(length, k), in that the last one of a list is taken as 0.
    """
    ranks = np.arange(1, correct.shape[1] + 1)
    step = np.rint(np.minimum(k, ranks) / (k * ranks) / FIXED_POINT).astype(np.int64)
    hits = correct.astype(np.int64)
    inside = ranks < lengths[:, None]  # those that have another neighbour behind them
    changes = np.zeros(hits.shape, np.int64)
    changes[:, :-1] = (hits[:, :-1] - hits[:, 1:]) * step[:-1]
    changes[~inside] = 0
    # The last value: c / L * min(k, L) / k, where the list is complete.
    last = complete[:, None] & (ranks == lengths[:, None])
    changes += np.where(last, hits * step, 0)
    values = np.cumsum(changes[:, ::-1], axis=1)[:, ::-1]
    return np.where(ranks <= lengths[:, None], values, 0)


def columns(ks: Sequence[int]) -> list[str]:
    """Names of the columns of ``tally``."""
    return [f"{kind}_at_{k}" for kind in ("wrong", "correct") for k in ks] + ["shapley"]


def tally(lists: Lists, values: np.ndarray, ks: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """What some queries say of their neighbours: (R,) int64 rows, (R, C) int64 sums.

    values: (Q, L) int64 Shapley values. ks: ascending. The C sums are those that
    ``columns`` names; the rows are ascending, each once.
    """
    found = lists.rows >= 0
    rows, which = np.unique(lists.rows[found], return_inverse=True)
    # Counts between one k and the next come first, of wrong and correct ones apart.
    step = np.searchsorted(ks, np.arange(1, lists.rows.shape[1] + 1))
    kinds = len(ks) + 1
    cell = (which * 2 + lists.correct[found]) * kinds
    cell += np.broadcast_to(step, lists.rows.shape)[found]
    between = np.bincount(cell, minlength=len(rows) * 2 * kinds).reshape(len(rows), 2, kinds)
    counts = between.cumsum(axis=2)[:, :, :-1]
    sums = np.zeros(len(rows), np.int64)
    np.add.at(sums, which, values[found])
    return rows, np.column_stack([counts.reshape(len(rows), -1), sums])


class Sums:
    """Adds up tallies; holds about as many rows as there are different ones."""

    def __init__(self, columns: int):
        self._rows = [np.empty(0, np.int64)]
        self._sums = [np.empty((0, columns), np.int64)]
        self._waiting = 0

    def add(self, rows: np.ndarray, sums: np.ndarray) -> None:
        self._rows.append(rows)
        self._sums.append(sums)
        self._waiting += len(rows)
        if self._waiting > max(_KEEP_ROWS, len(self._rows[0])):
            self.total()

    def total(self) -> tuple[np.ndarray, np.ndarray]:
        """(R,) int64 rows, ascending, each once, and their (R, C) int64 sums."""
        rows, sums = np.concatenate(self._rows), np.concatenate(self._sums)
        if len(self._rows) > 1 and len(rows):
            order = np.argsort(rows, kind="stable")
            rows, sums = rows[order], sums[order]
            starts = np.flatnonzero(np.concatenate([[True], rows[1:] != rows[:-1]]))
            rows, sums = rows[starts], np.add.reduceat(sums, starts, axis=0)
        self._rows, self._sums, self._waiting = [rows], [sums], 0
        return rows, sums


def unique_pairs(pairs: np.ndarray) -> np.ndarray:
    """(P, 3) int64 of row, row and whether the labels agree: the lower row first, each once."""
    ordered = np.column_stack([np.sort(pairs[:, :2], axis=1), pairs[:, 2]])
    return np.unique(ordered, axis=0)


def groups(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Connected components of (P, 2) int64 pairs of rows.

    Returns the (R,) rows that are in a pair, ascending, and for each the lowest row of its
    component.
    """
    rows, places = np.unique(pairs, return_inverse=True)
    left, right = places.reshape(-1, 2).T
    edges = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(rows), len(rows)))
    _, component = connected_components(edges, directed=False)
    _, first = np.unique(component, return_index=True)  # rows ascend: the first is the lowest
    return rows, rows[first[component]]
