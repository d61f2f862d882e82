"""Evaluation results as sums that can be added in any order.

Everything is kept as integers (distances and confidences in fixed point), minima
and maxima: any grouping of the queries into blocks, added and merged in any order,
gives identical results.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from vm_core.errors import VisualMemoryError
from vm_core.neighbors import Neighbors
from vm_core.records import UNKNOWN
from vm_core.voting import PAPER_PARAMETERS, VOTERS, VoteParameters, Votes, vote

# Fixed point with 30 binary places: sums of 2^32 distances up to 2 fit in 64 bits.
_ONE = 1 << 30


class EvaluationMetrics:
    """Accuracy at every k and what explains it, over any number of neighbour blocks.

    k: neighbours used, K below. classes: the labels that queries may have, C of
    them. headline: the voter and k of the confusion, the calibration and the accuracy
    per class (k is cut to K). bins: confidence bins of the calibration.

    A query with label UNKNOWN counts as wrong; one with an empty label set is left
    out. A query with several true labels counts under the first of them.
    """

    def __init__(
        self,
        k: int,
        classes: Sequence[int] | np.ndarray,
        voters: Sequence[str] = VOTERS,
        headline: tuple[str, int] = ("rank", 10),
        bins: int = 15,
        parameters: VoteParameters = PAPER_PARAMETERS,
    ) -> None:
        if headline[0] not in voters:
            raise VisualMemoryError(
                f"the headline voter {headline[0]!r} is not among the voters "
                f"{', '.join(voters)}. Add it to them or choose one of them"
            )
        if k < 1 or headline[1] < 1 or bins < 1:
            raise VisualMemoryError(
                f"k = {k}, headline k = {headline[1]}, bins = {bins}: "
                "all three count something. Use 1 or more"
            )
        self.k = k
        self.classes = np.unique(np.asarray(classes, dtype=np.int64))
        self.voters = tuple(voters)
        self.headline = (headline[0], min(headline[1], k))
        self.parameters = parameters
        voter_count, class_count = len(self.voters), len(self.classes)
        self._sums = {
            # queries: all that are scored, of them UNKNOWN, left out for an empty label set
            "queries": np.zeros(3, np.int64),
            "correct": np.zeros((voter_count, k), np.int64),
            "class_queries": np.zeros(class_count, np.int64),
            "class_correct": np.zeros((voter_count, k, class_count), np.int64),
            "matches": np.zeros(k, np.int64),  # neighbours with a true label, by rank
            "calibration": np.zeros((bins, 3), np.int64),  # queries, correct, confidence
            # by rank; then the first neighbour where it is right, and where it is wrong
            "distance_count": np.zeros(k + 2, np.int64),
            "distance_sum": np.zeros(k + 2, np.int64),
        }
        self._distance_min = np.full(k + 2, np.inf)
        self._distance_max = np.full(k + 2, -np.inf)
        self._confusion: Counter[tuple[int, int]] = Counter()

    def add(self, block: Neighbors, multiplier: np.ndarray | None = None) -> dict[str, Votes]:
        """Lets the block's neighbours vote, counts the results and returns the votes.

        Queries with an empty label set do not vote.

        multiplier: (Q, K of the block) weights of the neighbours, as of ``vote``; the
        block's own if it is None. Raises VisualMemoryError for a query whose label is not
        among the classes.
        """
        scored = block.scored
        if multiplier is None:
            multiplier = block.weights
        if multiplier is not None:
            missing = max(0, self.k - multiplier.shape[1])
            multiplier = np.pad(multiplier[scored, : self.k], ((0, 0), (0, missing)))
        self._sums["queries"] += [
            scored.sum(),
            (block.query_labels[scored] == UNKNOWN).sum(),
            (~scored).sum(),
        ]
        block = block.take(scored).first(self.k)
        votes = vote(block.labels, block.distances, self.voters, self.parameters, multiplier)
        if not len(block):
            return votes
        groups = self._by_class(block)
        for index, voter in enumerate(self.voters):
            correct = block.is_correct(votes[voter].predictions)
            self._sums["correct"][index] += correct.sum(axis=0)
            self._add_classes(index, correct, *groups)
        np.add.at(self._sums["class_queries"], *np.unique(groups[0], return_counts=True))
        self._add_headline(block, multiplier)
        self._add_distances(block)
        return votes

    def _by_class(self, block: Neighbors) -> tuple[np.ndarray, np.ndarray]:
        """Class positions, ascending, and the rows they belong to, of the queries with a class."""
        positions = np.searchsorted(self.classes, block.query_labels)
        known = np.zeros(len(block), dtype=bool)
        inside = positions < len(self.classes)
        known[inside] = self.classes[positions[inside]] == block.query_labels[inside]
        (strange,) = np.nonzero(~known & (block.query_labels != UNKNOWN))
        if len(strange):
            row = strange[0]
            raise VisualMemoryError(
                f"label {block.query_labels[row]} of query {block.query_ids[row]!r} is not among "
                f"the {len(self.classes)} classes given. List it, or label the query {UNKNOWN} "
                "(unknown to the memory)"
            )
        rows = np.nonzero(known)[0]
        rows = rows[np.argsort(positions[rows], kind="stable")]
        return positions[rows], rows

    def _add_classes(
        self, voter: int, correct: np.ndarray, positions: np.ndarray, rows: np.ndarray
    ) -> None:
        if len(rows):
            classes, starts = np.unique(positions, return_index=True)
            sums = np.add.reduceat(correct[rows].astype(np.int64), starts, axis=0)
            self._sums["class_correct"][voter][:, classes] += sums.T

    def _add_headline(self, block: Neighbors, multiplier: np.ndarray | None) -> None:
        voter, k = self.headline
        if multiplier is not None:
            multiplier = multiplier[:, :k]
        votes = vote(
            block.labels[:, :k],
            block.distances[:, :k],
            [voter],
            self.parameters,
            multiplier,
            confidences=True,
        )[voter]
        assert votes.confidences is not None
        predictions, confidences = votes.predictions[:, -1], votes.confidences[:, -1]
        correct = block.is_correct(predictions[:, None])[:, 0]
        bins = len(self._sums["calibration"])
        bin_of = np.minimum((confidences * bins).astype(np.int64), bins - 1)
        values = np.column_stack([np.ones_like(bin_of), correct, np.rint(confidences * _ONE)])
        np.add.at(self._sums["calibration"], bin_of, values.astype(np.int64))
        truths = np.where(correct, predictions, block.query_labels)
        pairs, counts = np.unique(
            np.column_stack([truths, predictions]), axis=0, return_counts=True
        )
        for (truth, predicted), count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self._confusion[truth, predicted] += count

    def _add_distances(self, block: Neighbors) -> None:
        valid = block.labels >= 0
        matches = block.is_correct(block.labels)
        self._sums["matches"] += matches.sum(axis=0)
        right, wrong = matches[:, :1], valid[:, :1] & ~matches[:, :1]
        counted = np.concatenate([valid, right, wrong], axis=1)
        columns = [*range(self.k), 0, 0]
        distances = block.distances[:, columns].astype(np.float64)
        fixed = np.rint(np.where(counted, distances, 0) * _ONE).astype(np.int64)
        self._sums["distance_count"] += counted.sum(axis=0)
        self._sums["distance_sum"] += fixed.sum(axis=0)
        low = np.where(counted, distances, np.inf).min(axis=0)
        high = np.where(counted, distances, -np.inf).max(axis=0)
        np.minimum(self._distance_min, low, out=self._distance_min)
        np.maximum(self._distance_max, high, out=self._distance_max)

    def merge(self, other: EvaluationMetrics) -> None:
        """Adds what another accumulator, made with the same arguments, has counted."""
        for name, sums in self._sums.items():
            sums += other._sums[name]
        np.minimum(self._distance_min, other._distance_min, out=self._distance_min)
        np.maximum(self._distance_max, other._distance_max, out=self._distance_max)
        self._confusion.update(other._confusion)

    def best_k(self, voter: str) -> int:
        """The smallest k at which the voter is most accurate."""
        return int(self._sums["correct"][self.voters.index(voter)].argmax()) + 1

    def class_accuracy_at_k(self, voter: str) -> np.ndarray:
        """(K, C) float64, columns in ascending order of class; NaN for a class without queries."""
        correct = self._sums["class_correct"][self.voters.index(voter)]
        totals = self._sums["class_queries"].astype(np.float64)
        return np.divide(correct, np.where(totals > 0, totals, np.nan))

    def result(self) -> dict:
        """All results as plain numbers, lists and dicts, None where nothing was counted."""
        queries, unknown, unscored = self._sums["queries"].tolist()
        accuracy = {
            voter: _ratios(correct, np.full(self.k, queries))
            for voter, correct in zip(self.voters, self._sums["correct"], strict=True)
        }
        best = {voter: self.best_k(voter) for voter in self.voters}
        distances = {
            "count": self._sums["distance_count"].tolist(),
            "mean": _ratios(self._sums["distance_sum"] / _ONE, self._sums["distance_count"]),
            "min": [low if low < np.inf else None for low in self._distance_min.tolist()],
            "max": [high if high > -np.inf else None for high in self._distance_max.tolist()],
        }
        voter, k = self.headline
        return {
            "queries": queries,
            "unknown": unknown,
            "unscored": unscored,
            "accuracy_at_k": accuracy,
            "best_k": best,
            "best_accuracy": {voter: accuracy[voter][best[voter] - 1] for voter in self.voters},
            "reliability_at_k": _ratios(
                self._sums["matches"], self._sums["distance_count"][: self.k]
            ),
            "headline": {"voter": voter, "k": k, "accuracy": accuracy[voter][k - 1]},
            "per_class": self._per_class(),
            "confusion": [[*pair, count] for pair, count in sorted(self._confusion.items())],
            "calibration": self._calibration(),
            "distances": {name: values[: self.k] for name, values in distances.items()},
            "first_neighbor_distance": {
                "right": {name: values[self.k] for name, values in distances.items()},
                "wrong": {name: values[self.k + 1] for name, values in distances.items()},
            },
        }

    def _per_class(self) -> dict[str, dict]:
        correct = self._sums["class_correct"][:, self.headline[1] - 1]
        return {
            str(label): {
                "queries": total,
                "accuracy": {
                    voter: int(correct[index, position]) / total
                    for index, voter in enumerate(self.voters)
                },
            }
            for position, (label, total) in enumerate(
                zip(self.classes.tolist(), self._sums["class_queries"].tolist(), strict=True)
            )
            if total
        }

    def _calibration(self) -> dict:
        counts, correct, confidences = self._sums["calibration"].T
        gaps = np.abs(correct * _ONE - confidences).sum()
        return {
            "expected_error": _ratios(np.array([gaps / _ONE]), np.array([counts.sum()]))[0],
            "count": counts.tolist(),
            "accuracy": _ratios(correct, counts),
            "confidence": _ratios(confidences / _ONE, counts),
        }


def _ratios(parts: np.ndarray, wholes: np.ndarray) -> list[float | None]:
    return [
        part / whole if whole else None
        for part, whole in zip(parts.tolist(), wholes.tolist(), strict=True)
    ]
