"""Which memory items mislead: leave-one-out counts, and the pruning they lead to.

Every memory item is a query against the memory it stands in. An item that often
turns up among the neighbours of items with another label is removed (hard pruning)
or loses weight (soft pruning). arXiv 2408.08172, section 4.3.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from vm_core.errors import VisualMemoryError
from vm_core.neighbors import Neighbors

HARD_THRESHOLD = 128


def without_self(block: Neighbors) -> Neighbors:
    """The (Q, K) block, whose queries are memory items, as (Q, K - 1) without the items themselves.

    The item is removed by id wherever it stands; where the search did not return it,
    the row's last neighbour goes, so that every row has as many neighbours left.
    """
    removed = block.ids == block.query_ids[:, None]
    (absent,) = np.nonzero(~removed.any(axis=1))
    lengths = (block.labels[absent] >= 0).sum(axis=1)
    removed[absent[lengths > 0], lengths[lengths > 0] - 1] = True
    return block.remove(removed).first(max(0, block.k - 1))


def with_self(block: Neighbors) -> Neighbors:
    """The (Q, K) block as (Q, K + 1), every query its own first neighbour, at distance 0."""
    return replace(
        block,
        ids=np.column_stack([block.query_ids, block.ids]),
        labels=np.column_stack([block.query_labels, block.labels]),
        distances=np.pad(block.distances, ((0, 0), (1, 0))),
    )


@dataclass
class LeaveOneOutCounts:
    """How often each item is a neighbour of another item with another, or the same, label.

    Counts by item id, over the first 10 neighbours and over all of them; an item
    never counted has no entry. ``add`` and ``merge`` in any order and grouping give
    the same counts.
    """

    wrong_at_10: Counter[str] = field(default_factory=Counter)
    correct_at_10: Counter[str] = field(default_factory=Counter)
    wrong_at_max: Counter[str] = field(default_factory=Counter)

    def add(self, block: Neighbors) -> None:
        """Counts a block of leave-one-out queries, the items themselves still among them."""
        block = without_self(block)
        correct = block.is_correct(block.labels)
        wrong = ~correct & (block.labels >= 0)
        self.wrong_at_10.update(block.ids[:, :10][wrong[:, :10]])
        self.correct_at_10.update(block.ids[:, :10][correct[:, :10]])
        self.wrong_at_max.update(block.ids[wrong])

    def merge(self, other: LeaveOneOutCounts) -> None:
        self.wrong_at_10.update(other.wrong_at_10)
        self.correct_at_10.update(other.correct_at_10)
        self.wrong_at_max.update(other.wrong_at_max)


def hard_excluded(counts: LeaveOneOutCounts, threshold: int = HARD_THRESHOLD) -> set[str]:
    """Ids of the items that were a wrong neighbour at least ``threshold`` times."""
    if threshold < 1:
        raise VisualMemoryError(
            f"hard pruning threshold {threshold} would remove every item. Use 1 or more "
            f"(the paper's is {HARD_THRESHOLD})"
        )
    return {id for id, count in counts.wrong_at_max.items() if count >= threshold}


def soft_weights(counts: LeaveOneOutCounts) -> dict[str, float]:
    """1.75 / (1 + wrong count at 10) of every item counted; any other item's weight is 1."""
    return {id: 1.75 / (1 + count) for id, count in counts.wrong_at_10.items()}


def multipliers(ids: np.ndarray, weights: Mapping[str, float]) -> np.ndarray:
    """Float64 array of the shape of ``ids``: the weight of each, 1 where it has none."""
    found = map(weights.get, ids.ravel(), itertools.repeat(1.0))
    return np.fromiter(found, dtype=np.float64, count=ids.size).reshape(ids.shape)
