"""Votes of the nearest neighbours (arXiv 2408.08172, section 3).

Neighbour i, counted from 0, at cosine distance d has the weight

    plurality  1
    distance   exp(-d)
    softmax    exp((1 - d) / temperature)
    rank       1 / (offset + i)

and the class with the largest sum of weights wins. On a tie the class that reached
the winning score first stays the winner.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from vm_core.errors import VisualMemoryError
from vm_core.records import PADDING

VOTERS = ("plurality", "distance", "softmax", "rank")

# Blocks of queries run in parallel: NumPy lets go of Python's lock, and its calls must be
# long enough to outweigh Python's own steps between them.
_SCORES_PER_BLOCK = 8192 * 100


@dataclass(frozen=True)
class VoteParameters:
    """temperature: of softmax, at least 0.002 (below, weights overflow). offset: of rank, > 0."""

    temperature: float = 0.07
    offset: float = 2.0

    def __post_init__(self) -> None:
        if not 0.002 <= self.temperature < np.inf:
            raise VisualMemoryError(
                f"softmax temperature {self.temperature} is out of range: below 0.002 the "
                "weights overflow. Use 0.002 or more (the paper's is 0.07)"
            )
        if not 0 < self.offset < np.inf:
            raise VisualMemoryError(
                f"rank offset {self.offset} is out of range: the first weight is 1 / offset. "
                "Use a positive number (the paper's is 2)"
            )


PAPER_PARAMETERS = VoteParameters()


class Votes(NamedTuple):
    """The winner for every query and every k; column k - 1 counts the first k neighbours.

    predictions: (Q, K) int64, PADDING where no neighbour had a vote. confidences:
    (Q, K) float64 in [0, 1], the winner's share of all weight (0 without a winner),
    or None when not asked for.
    """

    predictions: np.ndarray
    confidences: np.ndarray | None = None


def vote(
    labels: np.ndarray,
    distances: np.ndarray,
    voters: Sequence[str] = VOTERS,
    parameters: VoteParameters = PAPER_PARAMETERS,
    multiplier: np.ndarray | None = None,
    confidences: bool = False,
) -> dict[str, Votes]:
    """Lets the voters predict each query's class from its first k neighbours, for every k.

    labels: (Q, K) int64, PADDING where there is no neighbour. distances: (Q, K)
    float, any value at padding. multiplier: (Q, K) float >= 0, multiplies every
    weight (soft pruning); a neighbour of weight 0 has no vote. Scores add up in
    float64, nearest neighbour first. Raises VisualMemoryError for an unknown voter.
    """
    ranks = np.arange(labels.shape[1])[None, :]
    counted = labels >= 0
    return _vote(labels, ranks, distances, counted, voters, parameters, multiplier, confidences)


def vote_paper_exact(
    labels: np.ndarray,
    distances: np.ndarray,
    voters: Sequence[str] = VOTERS,
    parameters: VoteParameters = PAPER_PARAMETERS,
    multiplier: np.ndarray | None = None,
    excluded: np.ndarray | None = None,
) -> dict[str, Votes]:
    """As ``vote``, with the faults of the published notebook, to compare figures with it.

    excluded: (Q, K) bool, the neighbours that hard pruning removes. For correct
    results remove them first (``Neighbors.without``) and call ``vote``. Here:

    1. Label 0 wins only where it is the nearest neighbour's: elsewhere the nearest
       neighbour's label is given in its place.
    2. The j-th kept neighbour is weighted by the distance of the j-th neighbour
       of the whole list.
    3. Likewise its multiplier is the j-th neighbour's.

    And by design of the notebook: k counts excluded neighbours too, the nearest
    neighbour's label stands until a kept one is met, and a query whose neighbours
    are all excluded votes as if none were.
    """
    counted = labels >= 0
    if excluded is not None:
        kept = counted & ~excluded
        counted = np.where(kept.any(axis=1, keepdims=True), kept, counted)
    places = np.maximum(np.cumsum(counted, axis=1) - 1, 0)
    distances = np.take_along_axis(distances, places, axis=1)
    if multiplier is not None:
        multiplier = np.take_along_axis(multiplier, places, axis=1)
    votes = _vote(labels, places, distances, counted, voters, parameters, multiplier, False)
    return {
        voter: Votes(np.where(predictions <= 0, labels[:, :1], predictions))
        for voter, (predictions, _) in votes.items()
    }


def neighbor_weights(
    voter: str, labels: np.ndarray, distances: np.ndarray, parameters: VoteParameters
) -> np.ndarray:
    """(Q, K) float64: what each neighbour's vote weighs, 0 at padding."""
    ranks = np.broadcast_to(np.arange(labels.shape[1]), labels.shape)
    weights = _weights(voter, ranks, np.asarray(distances, np.float64), parameters)
    return np.where(labels >= 0, weights, 0.0)


def _vote(
    labels: np.ndarray,
    ranks: np.ndarray,
    distances: np.ndarray,
    counted: np.ndarray,
    voters: Sequence[str],
    parameters: VoteParameters,
    multiplier: np.ndarray | None,
    confidences: bool,
) -> dict[str, Votes]:
    """Votes with the given (Q or 1, K) ranks; only ``counted`` (Q, K) neighbours have a vote."""
    for voter in voters:
        if voter not in VOTERS:
            raise VisualMemoryError(f"unknown voter {voter!r}. Use one of {', '.join(VOTERS)}")
    queries, k = shape = labels.shape
    ranks = np.broadcast_to(ranks, shape)
    votes = {
        voter: Votes(np.empty(shape, np.int64), np.empty(shape) if confidences else None)
        for voter in voters
    }

    def vote_block(rows: slice) -> None:
        # Rank by rank over many queries at once: (K, B), so that one rank is contiguous.
        block_distances = np.ascontiguousarray(distances[rows].T, dtype=np.float64)
        masked = None if counted[rows].all() else counted[rows].T
        factor = None if multiplier is None else multiplier[rows].T
        before = _previous_of_label(labels[rows])
        padded = np.pad(labels[rows], ((0, 0), (1, 0)), constant_values=PADDING).ravel()
        for voter, (predictions, shares) in votes.items():
            weights = _weights(voter, ranks[rows].T, block_distances, parameters)
            if factor is not None:
                weights *= factor
            if masked is not None:
                weights = np.where(masked, weights, 0.0)
            best = _best_scores(before, weights)
            padded.take(_leaders(best), out=predictions[rows], mode="clip")
            if shares is not None:
                totals = np.cumsum(weights, axis=0).T
                np.divide(best[1:].T, totals, out=shares[rows], where=totals > 0)
                shares[rows][totals <= 0] = 0.0
                np.minimum(shares[rows], 1.0, out=shares[rows])  # two roundings apart

    step = max(1, _SCORES_PER_BLOCK // max(1, k))
    blocks = [slice(start, start + step) for start in range(0, queries, step)]
    if len(blocks) == 1:
        vote_block(blocks[0])
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(vote_block, blocks))
    return votes


def _weights(
    voter: str, ranks: np.ndarray, distances: np.ndarray, parameters: VoteParameters
) -> np.ndarray:
    """A new (K, B) float64 array of weights."""
    if voter == "plurality":
        return np.ones(ranks.shape)
    if voter == "distance":
        return np.exp(-distances)
    if voter == "softmax":
        return np.exp((1.0 - distances) / parameters.temperature)
    return 1.0 / (ranks + parameters.offset)


def _previous_of_label(labels: np.ndarray) -> np.ndarray:
    """Where the score of each neighbour's class stands before the neighbour votes.

    labels: (B, K). Returns (K, B) intp, flat positions in a (1 + K, B) table of
    scores whose row i + 1 belongs to neighbour i and whose row 0 is zero: the row of
    the nearest earlier neighbour of the same query and label, or row 0. So no table
    of classes is needed, however many classes there are.
    """
    queries, k = labels.shape
    if k == 0:
        return np.empty((0, queries), np.intp)
    bits = int(k).bit_length()
    if labels.max(initial=0) >= 1 << (62 - bits):
        labels = np.unique(labels, return_inverse=True)[1].reshape(labels.shape)
    narrow = labels.max(initial=0) < 1 << (30 - bits)  # 32-bit keys sort several times faster
    keys: np.ndarray = labels.astype(np.int32 if narrow else np.int64)
    keys <<= bits
    keys |= np.arange(k, dtype=keys.dtype)
    keys.sort(axis=1)  # by label, then by rank
    ranks = keys & ((1 << bits) - 1)
    same = (keys[:, 1:] >> bits) == (keys[:, :-1] >> bits)
    rows = np.zeros((queries, k), dtype=np.intp)
    places = ranks + np.arange(0, queries * k, k)[:, None]
    rows.ravel()[places[:, 1:]] = np.where(same, ranks[:, :-1] + 1, 0)
    return np.ascontiguousarray(rows.T) * queries + np.arange(queries)


def _best_scores(before: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(1 + K, B) float64: row k is the highest score of any class among the first k."""
    k, queries = before.shape
    scores = np.zeros((k + 1, queries))
    best = np.zeros((k + 1, queries))
    flat = scores.ravel()
    for rank in range(k):
        after = scores[rank + 1]
        flat.take(before[rank], out=after, mode="clip")  # unlike "raise", needs no buffer
        after += weights[rank]
        np.maximum(best[rank], after, out=best[rank + 1])
    return best


def _leaders(best: np.ndarray) -> np.ndarray:
    """Who leads at each k: (B, K) intp, flat positions in a (B, 1 + K) table of labels.

    Column i + 1 of that table belongs to neighbour i, column 0 to nobody.
    """
    k, queries = best.shape[0] - 1, best.shape[1]
    # The lead changes exactly where the best score grows, to the class that voted then.
    columns = np.arange(1, k + 1, dtype=np.min_scalar_type(k))[:, None]
    leaders = (best[1:] > best[:-1]) * columns
    for rank in range(1, k):
        np.maximum(leaders[rank - 1], leaders[rank], out=leaders[rank])
    return leaders.T + np.arange(0, queries * (k + 1), k + 1)[:, None]
