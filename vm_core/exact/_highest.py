"""The highest products of each query, from blocks of products that come one after another."""

from __future__ import annotations

import math

import numpy as np

_FIRST = 2**10  # rows of the first block from which thresholds are guessed
_EARLY = 8  # thresholds are guessed from the first block and within an eighth of the rows


def capacity(count: int) -> int:
    """How many products are kept for a query, so that few queries run out of room."""
    return 2 * count + 256


class Highest:
    """The ``count`` highest products of each query so far, unordered, and some more.

    Each product is looked at once: it is kept if it is over its query's threshold. In the
    first blocks thresholds are guessed, so that some more than ``count`` of all rows will
    be over them. A query that runs out of room, as where the later rows are the more
    similar, is cut to the ``count`` highest, and the lowest of these is its threshold. A
    query whose guess was too high, as where the first rows are the most similar, is told
    at the end.
    """

    def __init__(self, queries: int, count: int, length: int, guess: bool):
        """length: how many rows will come, at least count."""
        self._count = count
        self._length = length
        self._seen = 0
        self._guess_at = 1 if guess else length + 1
        self._products = np.full((queries, capacity(count)), -np.inf, np.float32)
        self._rows = np.zeros(self._products.shape, np.int64)
        self._filled = np.zeros(queries, np.int64)
        self._thresholds = np.full(queries, -np.inf, np.float32)
        self._above = np.empty(0, bool)

    def add(self, products: np.ndarray, start: int) -> None:
        """Takes in the products (Q, W), float32 or bfloat16, of W rows from ``start`` on."""
        first = self._seen == 0
        self._seen += products.shape[1]
        if first:
            self._guess(products[:, :_FIRST].astype(np.float32), min(_FIRST, self._seen))
        self._keep(products, start)
        if self._seen <= self._length // _EARLY:
            self._guess(self._products[:, : self._filled.max()], self._seen)

    def _guess(self, products: np.ndarray, seen: int) -> None:
        """Raises the thresholds whenever twice as many rows were seen as the last time.

        products: (Q, any number), the highest of the rows that were seen.
        """
        if seen < self._guess_at:
            return
        # If the rows come in no particular order, so many of a query's highest are among
        # those seen, on average, and more than rank for one query in ten thousand.
        expected = self._count * seen / self._length
        rank = math.ceil(expected + 3.5 * math.sqrt(expected) + 3)
        if rank < min(self._count, products.shape[1]):
            self._guess_at = 2 * seen
            highest = np.partition(products, -rank, axis=1)[:, -rank]
            just_below = np.nextafter(highest, np.float32(-np.inf))
            np.maximum(self._thresholds, just_below, out=self._thresholds)

    def _keep(self, products: np.ndarray, start: int) -> None:
        if self._above.size < products.size:
            self._above = np.empty(products.size, bool)
        above = self._above[: products.size].reshape(products.shape)
        # With its usual buffer, which may span rows, NumPy writes each threshold into it once
        # for every column, which takes twice as long as the comparison.
        usual = np.setbufsize(16)
        try:
            if products.dtype == np.float32:
                np.greater(products, self._thresholds[:, None], out=above)
            else:
                bits, least = products.view(np.int16), _least(self._thresholds)
                np.greater_equal(bits, least[:, None], out=above)
        finally:
            np.setbufsize(usual)
        place = np.flatnonzero(above)
        query = place // products.shape[1]
        column = place - query * products.shape[1]  # three times as fast as divmod
        hits = np.bincount(query, minlength=len(products))
        full = self._filled + hits > self._products.shape[1]
        if full.any():
            self._cut(np.flatnonzero(full), products, start)
            fits = ~full[query]
            query, column = query[fits], column[fits]
            hits[full] = 0
        place = np.arange(len(query)) + np.repeat(self._filled + hits - np.cumsum(hits), hits)
        self._products[query, place] = products[query, column]
        self._rows[query, place] = start + column
        self._filled += hits

    def _cut(self, queries: np.ndarray, products: np.ndarray, start: int) -> None:
        """Keeps the ``count`` highest of what there is and of new products."""
        room = self._products.shape[1]
        both = np.concatenate(
            [self._products[queries], products[queries].astype(np.float32)], axis=1
        )
        spare = both.shape[1] - self._count
        keep = np.argpartition(both, spare, axis=1)[:, spare:]
        kept = np.take_along_axis(both, keep, axis=1)
        old = self._rows[queries[:, None], np.minimum(keep, room - 1)]
        self._rows[queries, : self._count] = np.where(keep < room, old, start + keep - room)
        self._products[queries, : self._count] = kept
        self._products[queries, self._count :] = -np.inf
        self._filled[queries] = self._count
        self._thresholds[queries] = np.maximum(self._thresholds[queries], kept.min(axis=1))

    def result(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows (Q, count), products, and whether (Q,) a row that was left out may be higher."""
        rows, products = highest(self._rows, self._products, self._count)
        return rows, products, products.min(axis=1) < self._thresholds


def _least(thresholds: np.ndarray) -> np.ndarray:
    """The bits, as int16, of the least bfloat16 that is over each float32 threshold.

    Bits of numbers that are not negative are in the numbers' order, and those of all others
    are below them. Of a negative threshold: the lowest bits, which all numbers reach.
    """
    floor = (thresholds.view(np.int32) >> 16).astype(np.int16)
    return np.where(thresholds < 0, np.iinfo(np.int16).min, floor + np.int16(1)).astype(np.int16)


def highest(rows: np.ndarray, products: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of (Q, more) rows and products the (Q, count) highest, unordered."""
    spare = products.shape[1] - count
    if spare == 0:
        return rows, products
    keep = np.argpartition(products, spare, axis=1)[:, spare:]
    return np.take_along_axis(rows, keep, axis=1), np.take_along_axis(products, keep, axis=1)
