"""The paper's analysis of a neighbour table: votes at every k, pruning, reliability."""

from __future__ import annotations

import json
from collections.abc import Mapping

import numpy as np

from vm_core import storage
from vm_core.errors import VisualMemoryError
from vm_core.neighbors import Neighbors, is_in, read_json
from vm_core.predictions import PREDICTIONS_SCHEMA, predictions_table
from vm_core.pruning import (
    HARD_THRESHOLD,
    LeaveOneOutCounts,
    hard_excluded,
    multipliers,
    soft_weights,
)
from vm_core.tables import table_writer
from vm_core.voting import PAPER_PARAMETERS, VOTERS, VoteParameters, Votes, vote, vote_paper_exact

_PRUNED_VOTERS = ("plurality", "rank")


def analyze(
    queries_path: str,
    leave_one_out_path: str | None = None,
    hard_threshold: int = HARD_THRESHOLD,
    paper_exact: bool = False,
    *,
    out_dir: str,
    parameters: VoteParameters = PAPER_PARAMETERS,
) -> dict:
    """Analyses a JSON neighbour table; writes metrics.json and predictions.parquet to ``out_dir``.

    With a leave-one-out table (the memory's items searched in the memory) the
    soft_plurality, soft_rank, hard_plurality and hard_rank voters and the counts
    they rest on are added. Hard pruning removes items first, k counts those kept.
    ``paper_exact`` reproduces the published notebook, see ``vote_paper_exact``.

    Returns what metrics.json holds: ``accuracy_at_k`` (voter -> K floats; -1, the
    prediction without neighbours, is wrong), ``reliability_at_k`` (K floats: the
    share of neighbours of a rank with a true label), ``entropy_base2`` (query id ->
    entropy of its neighbours' labels in bits), and with a leave-one-out table
    ``wrong_at_10``, ``correct_at_10``, ``wrong_at_max`` (item id -> count),
    ``excluded`` (sorted ids) and ``soft_weights`` (item id -> weight).

    The tables are streamed: one block at a time is in memory, and a few numbers per
    query and memory item. Where lists differ in length, K is the longest's and a
    prediction stands after its list's end; predictions.parquet then leaves out the k
    beyond the longest list of the query's block. Raises VisualMemoryError for an
    unusable table; neither file appears then.
    """
    results: dict = {}
    pruning: tuple[set[str], dict[str, float]] | None = None
    if leave_one_out_path is not None:
        counts = LeaveOneOutCounts()
        for block in read_json(leave_one_out_path):
            counts.add(block)
        pruning = hard_excluded(counts, hard_threshold), soft_weights(counts)
        results = {
            "wrong_at_10": dict(counts.wrong_at_10),
            "correct_at_10": dict(counts.correct_at_10),
            "wrong_at_max": dict(counts.wrong_at_max),
            "excluded": sorted(pruning[0]),
            "soft_weights": pruning[1],
        }

    tally = _Tally()
    entropies: dict[str, float] = {}
    path = storage.join(out_dir, "predictions.parquet")
    with table_writer(path, PREDICTIONS_SCHEMA) as writer:
        for block in read_json(queries_path):
            votes = _votes(block, pruning, paper_exact, parameters)
            tally.add(block, votes)
            for query_id, bits in zip(block.query_ids, entropy(block.labels).tolist(), strict=True):
                if query_id in entropies:
                    raise VisualMemoryError(
                        f"query {query_id!r} comes twice in {queries_path!r} and would be counted "
                        "twice. Remove one of the two entries"
                    )
                entropies[query_id] = bits
            predictions = {voter: result.predictions for voter, result in votes.items()}
            table = predictions_table(block.query_ids, predictions)
            writer.write_table(table, row_group_size=1 << 20)
        if not tally.queries:
            raise VisualMemoryError(
                f"{queries_path!r} holds no query with a true label. Nothing can be measured; "
                "check that it is the table of the queries"
            )
    results = {**tally.result(), "entropy_base2": entropies, **results}
    with storage.write_atomic(storage.join(out_dir, "metrics.json")) as file:
        # One entry at a time, so that the text of all of them is never in memory.
        for index, (name, value) in enumerate(results.items()):
            file.write(b",\n" if index else b"{\n")
            file.write(f"{json.dumps(name)}: {json.dumps(value)}".encode())
        file.write(b"\n}\n")
    return results


def _votes(
    block: Neighbors,
    pruning: tuple[set[str], dict[str, float]] | None,
    paper_exact: bool,
    parameters: VoteParameters,
) -> dict[str, Votes]:
    ballot = vote_paper_exact if paper_exact else vote
    votes = ballot(block.labels, block.distances, VOTERS, parameters)
    if pruning is None:
        return votes
    excluded, weights = pruning
    multiplier = multipliers(block.ids, weights)
    soft = ballot(block.labels, block.distances, _PRUNED_VOTERS, parameters, multiplier)
    if paper_exact:
        removed = is_in(block.ids, excluded)
        hard = vote_paper_exact(
            block.labels, block.distances, _PRUNED_VOTERS, parameters, excluded=removed
        )
    else:
        kept = block.without(excluded)
        hard = vote(kept.labels, kept.distances, _PRUNED_VOTERS, parameters)
    votes |= {f"soft_{voter}": result for voter, result in soft.items()}
    return votes | {f"hard_{voter}": result for voter, result in hard.items()}


class _Tally:
    """Correct predictions per voter and k, and right neighbours per rank."""

    def __init__(self) -> None:
        self.queries = 0
        self._correct: dict[str, np.ndarray] = {}
        self._valid = np.zeros(0, np.int64)
        self._matches = np.zeros(0, np.int64)

    def add(self, block: Neighbors, votes: Mapping[str, Votes]) -> None:
        scored = block.scored
        truth = block.take(scored)
        k = max(block.k, len(self._valid))
        self.queries += len(truth)
        for voter, (predictions, _) in votes.items():
            correct = truth.is_correct(predictions[scored]).sum(axis=0)
            before = self._correct.get(voter, np.zeros(0, np.int64))
            # After the end of a list the last prediction stands.
            self._correct[voter] = _widen(before, k, "edge") + _widen(correct, k, "edge")
        valid = (truth.labels >= 0).sum(axis=0)
        matches = truth.is_correct(truth.labels).sum(axis=0)
        self._valid = _widen(self._valid, k) + _widen(valid, k)
        self._matches = _widen(self._matches, k) + _widen(matches, k)

    def result(self) -> dict:
        return {
            "accuracy_at_k": {
                voter: (correct / self.queries).tolist() for voter, correct in self._correct.items()
            },
            "reliability_at_k": (self._matches / np.maximum(self._valid, 1)).tolist(),
        }


def _widen(counts: np.ndarray, k: int, mode: str = "constant") -> np.ndarray:
    if not len(counts):
        return np.zeros(k, np.int64)
    return np.pad(counts, (0, k - len(counts)), mode=mode)  # type: ignore[call-overload]


def entropy(labels: np.ndarray) -> np.ndarray:
    """(Q,) float64: entropy in bits of each query's (Q, K) neighbour labels, padding left out."""
    queries, k = labels.shape
    ordered = np.sort(labels, axis=1)
    changes = np.ones((queries, k), dtype=bool)
    changes[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    (starts,) = np.nonzero(changes.ravel())
    counts = np.diff(starts, append=queries * k)
    valid = ordered.ravel()[starts] >= 0
    rows = starts[valid] // max(1, k)
    shares = counts[valid] / (labels >= 0).sum(axis=1)[rows]
    # Adding zero turns the -0.0 of a single class into 0.0.
    return np.bincount(rows, -shares * np.log2(shares), minlength=queries) + 0.0
