"""A few queries worth looking at: right, wrong, and undecided ones, with what decided."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from vm_core.neighbors import Neighbors
from vm_core.records import EmbeddingBlock, unit_interval
from vm_core.voting import VoteParameters, neighbor_weights, vote

KINDS = ("right", "wrong", "uncertain")

# By true class: score, query id and example, the best score first.
_Chosen = dict[int, list[tuple[float, str, "Example"]]]


@dataclass(frozen=True)
class Example:
    """One query with its vote. The neighbours are those that voted, nearest first.

    confidence: the winner's share of all weight, 0 to 1. weights: each neighbour's
    share of all weight. thumbnail: JPEG bytes, None where none are kept.
    """

    query_id: str
    label: int
    prediction: int
    confidence: float
    neighbor_ids: tuple[str, ...]
    neighbor_labels: tuple[int, ...]
    distances: tuple[float, ...]
    weights: tuple[float, ...]
    thumbnail: bytes | None


def explain(
    block: Neighbors,
    thumbnails: Iterable[bytes | None],
    voter: str,
    k: int,
    parameters: VoteParameters,
) -> list[Example]:
    """The vote on every query of a block, in full."""
    block = block.first(k)
    votes = vote(
        block.labels, block.distances, [voter], parameters, block.weights, confidences=True
    )[voter]
    assert votes.confidences is not None
    weights = neighbor_weights(voter, block.labels, block.distances, parameters)
    if block.weights is not None:
        weights *= block.weights
    total = weights.sum(axis=1, keepdims=True)
    shares = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    examples = []
    for row, thumbnail in enumerate(thumbnails):
        found = int((block.labels[row] >= 0).sum())
        examples.append(
            Example(
                query_id=block.query_ids[row],
                label=int(block.query_labels[row]),
                prediction=int(votes.predictions[row, -1]),
                confidence=float(votes.confidences[row, -1]),
                neighbor_ids=tuple(block.ids[row, :found]),
                neighbor_labels=tuple(block.labels[row, :found].tolist()),
                distances=tuple(block.distances[row, :found].tolist()),
                weights=tuple(shares[row, :found].tolist()),
                thumbnail=thumbnail,
            )
        )
    return examples


@dataclass
class Gallery:
    """Keeps the ``size`` most telling queries of each kind; merging is associative.

    right: a sample by a hash of the id. wrong: the most confident mistakes.
    uncertain: the least confident votes, right or wrong. Every class gives one query
    before any class gives a second, so that a frequent class does not fill the page.
    """

    voter: str
    k: int
    parameters: VoteParameters
    size: int = 8
    chosen: dict[str, _Chosen] = field(default_factory=dict)

    def add(self, block: Neighbors, queries: EmbeddingBlock) -> None:
        """Looks at a block of neighbours; ``queries`` are the same queries, in the same order."""
        block = block.first(min(self.k, block.k))
        votes = vote(
            block.labels,
            block.distances,
            [self.voter],
            self.parameters,
            block.weights,
            confidences=True,
        )[self.voter]
        assert votes.confidences is not None
        confidences = votes.confidences[:, -1]
        right = votes.predictions[:, -1] == block.query_labels
        sample = np.array([unit_interval(id, "gallery") for id in block.query_ids])
        for kind, eligible, score in (
            ("right", right, sample),
            ("wrong", ~right, -confidences),
            ("uncertain", np.ones_like(right), confidences),
        ):
            rows = np.flatnonzero(eligible)
            rows = rows[np.lexsort((block.query_ids[rows].astype(str), score[rows]))]
            rows = np.array(self._telling(rows, block.query_labels), np.int64)
            pictures = (
                [None] * len(rows) if queries.thumbnails is None else queries.thumbnails[rows]
            )
            examples = explain(block.take(rows), pictures, self.voter, block.k, self.parameters)
            found: _Chosen = {}
            for value, example in zip(score[rows].tolist(), examples, strict=True):
                found.setdefault(example.label, []).append((value, example.query_id, example))
            self._keep(kind, found)

    def merge(self, other: Gallery) -> None:
        for kind, chosen in other.chosen.items():
            self._keep(kind, chosen)

    def examples(self, kind: str) -> list[Example]:
        """The chosen queries of a kind: the best of every class, then the second best, ..."""
        entries = [
            (place, *entry)
            for ranked in self.chosen.get(kind, {}).values()
            for place, entry in enumerate(ranked)
        ]
        entries.sort(key=lambda entry: entry[:3])
        return [example for *_, example in entries[: self.size]]

    def _telling(self, rows: np.ndarray, labels: np.ndarray) -> list[int]:
        """Of rows in order of score those that can be shown: ``size`` of ``size`` classes."""
        by_class: dict[int, list[int]] = {}
        for row, label in zip(rows.tolist(), labels[rows].tolist(), strict=True):
            if label in by_class or len(by_class) < self.size:
                by_class.setdefault(label, []).append(row)
        return [row for members in by_class.values() for row in members[: self.size]]

    def _keep(self, kind: str, found: _Chosen) -> None:
        chosen = self.chosen.setdefault(kind, {})
        for label, entries in found.items():
            both = chosen.get(label, []) + entries
            chosen[label] = sorted(both, key=lambda entry: entry[:2])[: self.size]
        # Where there are more classes than places only the best query of the best is shown.
        best = sorted(chosen, key=lambda label: chosen[label][0][:2])[: self.size]
        self.chosen[kind] = {label: chosen[label] for label in best}
