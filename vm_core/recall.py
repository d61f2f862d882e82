"""How much of the exact answer an index finds, on queries that are no rows of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from pydantic import BaseModel

from vm_core.errors import VisualMemoryError
from vm_core.exact import top_k
from vm_core.held_out import beside
from vm_core.partitions import Members, Partition
from vm_core.records import unit_interval

DEPTHS = (1, 10, 100)
_DEPTH = DEPTHS[-1]
_NEVER = np.iinfo(np.int32).max
_PER_CLASS = 5  # with fewer queries a class's recall says little
_NEW_QUERIES, _MOST_NEW_QUERIES = 20, 2_000


class HeldOut(NamedTuple):
    """Queries: (Q, D) float32 unit vectors, and the labels (Q,) of the rows beside them."""

    vectors: np.ndarray
    labels: np.ndarray


class ClassRecall(BaseModel):
    """Recall of one class, or of several together.

    at: by depth. unmeasured: the labels, of these, that no held-out query has.
    """

    labels: list[int]
    queries: int
    at: dict[int, float]
    unmeasured: list[int] = []


class Recall(BaseModel):
    """Share of the exact nearest neighbours that the routed search finds.

    at: by depth. worst_class: the one that is worst at 10, among classes with at least 5
    queries. new_classes: of the classes that the version before did not have, None if there
    are none. by_probes: at the greatest depth, for the number of cells visited.
    """

    queries: int
    at: dict[int, float]
    worst_class: ClassRecall | None
    new_classes: ClassRecall | None
    by_probes: dict[int, float]


@dataclass(frozen=True, eq=False)
class Hits:
    """The exact nearest rows of Q queries, and how soon the index finds each.

    rows: (Q, 100) int64, -1 where there are fewer. distances: (Q, 100) float32. ranks:
    (Q, 100) int32, how many cells must be visited before the one where the row is found.
    """

    rows: np.ndarray
    distances: np.ndarray
    ranks: np.ndarray


def shares(
    class_counts: Mapping[int, int], queries: int, new: Collection[int] = ()
) -> dict[int, float]:
    """The share of each class's rows that gives a held-out query.

    Classes get equally many, whatever their size; each of the new ones some 20 at least, of
    2,000 for all of them.
    """
    each = queries / max(1, len(class_counts))
    of_new = max(each, min(_NEW_QUERIES, _MOST_NEW_QUERIES / max(1, len(new))))
    added = frozenset(new)
    return {
        label: min(1.0, (of_new if label in added else each) / count)
        for label, count in class_counts.items()
        if count
    }


def held_out(members: Members, shares: Mapping[int, float]) -> HeldOut:
    """A partition's part of the memory's held-out queries; rows are chosen by their ids."""
    chosen = np.array(
        [
            home and unit_interval(id, "recall") < shares.get(label, 0)
            for id, label, home in zip(
                members.ids, members.labels.tolist(), members.home.tolist(), strict=True
            )
        ],
        bool,
    )
    return HeldOut(beside(members.vectors, chosen), members.labels[chosen])


def weights(
    labels: np.ndarray, class_counts: Mapping[int, int], queries: int, new: Collection[int]
) -> np.ndarray:
    """(Q,) float64: what a query counts overall, so that new classes count as others do."""
    usual, taken = shares(class_counts, queries), shares(class_counts, queries, new)
    return np.array([usual[label] / taken[label] for label in labels.tolist()], np.float64)


def exact_and_found(partition: Partition, queries: np.ndarray, ranks: np.ndarray) -> Hits:
    """The exact answer over one partition, which query q visits as its ranks[q]-th cell."""
    members = partition.members
    exact, distances = top_k(queries, members.vectors, _DEPTH)
    found, _ = partition.search(queries, _DEPTH)
    is_found = np.zeros(exact.shape, bool)
    for row, (wanted, answer) in enumerate(zip(exact, found, strict=True)):
        is_found[row] = np.isin(wanted, answer)
    rows = np.where(exact >= 0, members.rows[exact] if len(members) else -1, -1)
    return Hits(rows, distances, np.where(is_found, ranks[:, None], _NEVER).astype(np.int32))


def merge(left: Hits, right: Hits) -> Hits:
    """The hits over both sides' partitions; a row that both have is found by the sooner one.

    Associative and commutative.
    """
    rows = np.concatenate([left.rows, right.rows], axis=1)
    distances = np.concatenate([left.distances, right.distances], axis=1)
    ranks = np.concatenate([left.ranks, right.ranks], axis=1)
    order = np.lexsort((ranks, rows), axis=1)
    rows, distances, ranks = (
        np.take_along_axis(each, order, axis=1) for each in (rows, distances, ranks)
    )
    again = np.zeros(rows.shape, bool)
    again[:, 1:] = rows[:, 1:] == rows[:, :-1]
    rows, distances = np.where(again, -1, rows), np.where(again, np.inf, distances)
    order = np.lexsort((rows, distances), axis=1)[:, :_DEPTH]
    return Hits(*(np.take_along_axis(each, order, axis=1) for each in (rows, distances, ranks)))


def nothing(queries: int) -> Hits:
    """Hits over no partition."""
    shape = (queries, _DEPTH)
    return Hits(
        np.full(shape, -1),
        np.full(shape, np.inf, np.float32),
        np.full(shape, _NEVER, np.int32),
    )


def fewest_probes(hits: Hits, weights: np.ndarray, cells: int, coverage: float) -> int:
    """The fewest cells to visit that find ``coverage`` of what visiting all of them finds."""
    found = [_mean(hits, weights, probes, _DEPTH) for probes in range(1, cells + 1)]
    return 1 + int(np.argmax(np.array(found) >= coverage * found[-1]))


def summarise(
    hits: Hits,
    labels: np.ndarray,
    weights: np.ndarray,
    probes: int,
    cells: int,
    new: Collection[int] = (),
) -> Recall:
    """Recall with so many probes; 0 where there is no query.

    labels: (Q,) int64. weights: (Q,) float64. new: the labels of newly added classes.
    """
    of_query = {depth: _recall(hits, probes, depth) for depth in DEPTHS}

    def of_classes(chosen: np.ndarray) -> ClassRecall:
        has_label = np.isin(labels, chosen)
        return ClassRecall(
            labels=chosen.tolist(),
            queries=int(has_label.sum()),
            at={
                depth: float(found[has_label].mean()) if has_label.any() else 0.0
                for depth, found in of_query.items()
            },
            unmeasured=np.setdiff1d(chosen, labels).tolist(),
        )

    classes, owner, counts = np.unique(labels, return_inverse=True, return_counts=True)
    means = np.bincount(owner, of_query[10], minlength=len(classes)) / np.maximum(counts, 1)
    worst = None
    if len(enough := np.flatnonzero(counts >= _PER_CLASS)):
        worst = of_classes(classes[enough[np.argmin(means[enough])]][None])
    steps = sorted({n for n in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, probes, cells) if n <= cells})
    return Recall(
        queries=len(labels),
        at={depth: _mean(hits, weights, probes, depth) for depth in DEPTHS},
        worst_class=worst,
        new_classes=of_classes(np.array(sorted(new))) if new else None,
        by_probes={n: _mean(hits, weights, n, _DEPTH) for n in steps},
    )


def check(recall: Recall, minimum: float) -> None:
    """Raises VisualMemoryError if recall at 10 is too low, overall or for the new classes, or
    could not be measured for any of these."""
    groups: dict[str, Recall | ClassRecall] = {"the index": recall}
    if recall.new_classes is not None:
        groups[f"the {len(recall.new_classes.labels)} new classes"] = recall.new_classes
    for name, group in groups.items():
        if not group.queries:
            raise VisualMemoryError(
                f"{name}: no held-out query among {recall.queries}, so recall is unknown. Take "
                "more of them (--set recall_queries=N), or use --set index.kind=exact"
            )
        if group.at[10] < minimum:
            raise VisualMemoryError(
                f"{name}: recall@10 is {group.at[10]:.3f} on {group.queries} held-out queries; "
                f"minimum_recall is {minimum}. Search more (--set partitioning.probes=N, --set "
                "index.leaves_to_search=N), use --set index.kind=exact, or lower minimum_recall"
            )


def _mean(hits: Hits, weights: np.ndarray, probes: int, depth: int) -> float:
    if not len(weights):
        return 0.0
    return float(np.average(_recall(hits, probes, depth), weights=weights))


def _recall(hits: Hits, probes: int, depth: int) -> np.ndarray:
    """(Q,) float64: share of the first ``depth`` exact neighbours that are found."""
    there = hits.rows[:, :depth] >= 0
    found = there & (hits.ranks[:, :depth] < probes)
    return found.sum(axis=1) / np.maximum(there.sum(axis=1), 1)
