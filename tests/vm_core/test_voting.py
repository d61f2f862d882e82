import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core.errors import VisualMemoryError
from vm_core.neighbors import read_json
from vm_core.voting import VOTERS, VoteParameters, vote, vote_paper_exact

GOLDEN = Path(__file__).parents[1] / "golden"


def weight(voter, rank, distance, parameters):
    return {
        "plurality": 1.0,
        "distance": math.exp(-distance),
        "softmax": float(np.exp((1.0 - distance) / parameters.temperature)),
        "rank": 1.0 / (rank + parameters.offset),
    }[voter]


def slow_vote(labels, distances, voter, parameters, multiplier):
    """One query, one neighbour after the other: predictions and confidences at every k."""
    scores, best, winner, total = {}, 0.0, -1, 0.0
    predictions, confidences = [], []
    for rank, (label, distance, factor) in enumerate(
        zip(labels, distances, multiplier, strict=True)
    ):
        if label >= 0:
            vote_weight = weight(voter, rank, distance, parameters) * factor
            total += vote_weight
            scores[label] = scores.get(label, 0.0) + vote_weight
            if scores[label] > best:
                best, winner = scores[label], label
        predictions.append(winner)
        confidences.append(best / total if total else 0.0)
    return predictions, confidences


@st.composite
def ballots(draw):
    """Labels with 0, huge ones, ties and padding anywhere; distances with ties; factors with 0."""
    queries, k = draw(st.integers(0, 6)), draw(st.integers(1, 9))
    label = st.sampled_from(
        [-1, 0, 1, 2, 7, *draw(st.sampled_from([[], [2**30], [2**62, 2**63 - 1]]))]
    )
    rows = st.lists(st.lists(label, min_size=k, max_size=k), min_size=queries, max_size=queries)
    labels = np.array(draw(rows), dtype=np.int64).reshape(queries, k)
    numbers = st.lists(
        st.sampled_from([0.0, 0.1, 0.25, 0.5, 1.0]), min_size=queries * k, max_size=queries * k
    )
    distances = np.sort(np.array(draw(numbers)).reshape(queries, k), axis=1)
    distances[labels < 0] = np.inf
    multiplier = np.array(draw(numbers)).reshape(queries, k) if draw(st.booleans()) else None
    return labels, distances, multiplier


@settings(max_examples=200, deadline=None, derandomize=True)
@given(ballots(), st.sampled_from([VoteParameters(), VoteParameters(0.5, 1.0)]))
def test_equals_one_neighbour_after_the_other(ballot, parameters):
    labels, distances, multiplier = ballot
    votes = vote(labels, distances, VOTERS, parameters, multiplier, confidences=True)
    factors = np.ones(labels.shape) if multiplier is None else multiplier
    for voter in VOTERS:
        for row in range(len(labels)):
            predictions, confidences = slow_vote(
                labels[row].tolist(), distances[row], voter, parameters, factors[row]
            )
            assert votes[voter].predictions[row].tolist() == predictions
            np.testing.assert_allclose(votes[voter].confidences[row], confidences, rtol=1e-12)


def test_many_queries_cross_the_cache_blocks_and_wide_rows_the_small_integers():
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 5, (900, 300))
    labels[rng.random(900) < 0.1, 150:] = -1
    distances = np.sort(rng.random(labels.shape), axis=1)
    votes = vote(labels, distances)
    for row in (0, 340, 341, 342, 899):
        for voter in VOTERS:
            expected, _ = slow_vote(
                labels[row].tolist(), distances[row], voter, VoteParameters(), np.ones(300)
            )
            assert votes[voter].predictions[row].tolist() == expected


def test_tie_goes_to_the_class_that_reached_the_score_first():
    # 3 and 5 both have two votes at k = 4, but 5 had its second one first.
    votes = vote(np.array([[3, 5, 5, 3]]), np.zeros((1, 4)), ["plurality"])
    assert votes["plurality"].predictions.tolist() == [[3, 3, 5, 5]]
    # 1/2 against 1/3 + 1/6: a tie in float64 too.
    votes = vote(np.array([[1, 2, 3, 4, 2]]), np.zeros((1, 5)), ["rank"])
    assert votes["rank"].predictions[0, -1] == 1


@pytest.mark.parametrize("name", ["small", "wide"])
def test_golden_predictions(name):
    expected = json.loads((GOLDEN / f"{name}_expected.json").read_text())
    (block,) = read_json(str(GOLDEN / f"{name}_queries_neighbor_info.json"), block_rows=1000)
    columns = np.array(expected["predictions_k_values"]) - 1
    for votes in (vote, vote_paper_exact):  # labels start at 1, nothing excluded: no fault shows
        for voter, result in votes(block.labels, block.distances).items():
            found = result.predictions[:, columns].tolist()
            assert found == expected["predictions_at_k"][voter]


def test_fault_1_label_0_wins_only_as_the_nearest():
    labels, distances = np.array([[4, 0, 0], [0, 0, 4]]), np.zeros((2, 3))
    correct = vote(labels, distances, ["plurality"])["plurality"].predictions
    published = vote_paper_exact(labels, distances, ["plurality"])["plurality"].predictions
    assert correct.tolist() == [[4, 4, 0], [0, 0, 0]]
    assert published.tolist() == [[4, 4, 4], [0, 0, 0]]


def test_faults_2_and_3_take_the_weight_of_another_neighbour():
    labels = np.array([[9, 1, 2, 2]])
    excluded = np.array([[True, False, False, False]])
    # Kept 1, 2, 2 are weighted by the distances 0, .1, .9 in place of .1, .9, .9.
    distances = np.array([[0.0, 0.1, 0.9, 0.9]])
    votes = vote_paper_exact(labels, distances, ["distance"], excluded=excluded)
    assert votes["distance"].predictions.tolist() == [[9, 1, 1, 2]]
    scores = {1: math.exp(0), 2: math.exp(-0.1) + math.exp(-0.9)}
    assert scores[2] > scores[1]
    # And by the multipliers 1, .1, .1 in place of .1, .1, 1.
    multiplier = np.array([[1.0, 0.1, 0.1, 1.0]])
    votes = vote_paper_exact(
        labels, np.zeros((1, 4)), ["plurality"], multiplier=multiplier, excluded=excluded
    )
    assert votes["plurality"].predictions.tolist() == [[9, 1, 1, 1]]


def test_published_query_with_every_neighbour_excluded_votes_as_if_none_were():
    labels = np.array([[3, 5, 5]])
    votes = vote_paper_exact(
        labels, np.zeros((1, 3)), ["plurality"], excluded=np.ones((1, 3), bool)
    )
    assert votes["plurality"].predictions.tolist() == [[3, 3, 5]]


def test_errors():
    with pytest.raises(VisualMemoryError, match="unknown voter 'borda'. Use one of plurality"):
        vote(np.zeros((1, 1), np.int64), np.zeros((1, 1)), ["borda"])
    with pytest.raises(VisualMemoryError, match="temperature 0.001 is out of range"):
        VoteParameters(temperature=0.001)
    with pytest.raises(VisualMemoryError, match="offset 0 is out of range"):
        VoteParameters(offset=0)
