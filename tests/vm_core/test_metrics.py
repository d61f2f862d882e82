import itertools
import json
import pickle
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.vm_core.test_neighbors import make_block
from vm_core.errors import VisualMemoryError
from vm_core.metrics import EvaluationMetrics
from vm_core.neighbors import Neighbors
from vm_core.voting import VOTERS, vote

CLASSES = range(5)


def measure(block, **arguments):
    metrics = EvaluationMetrics(block.k, CLASSES, **({"headline": ("rank", 3)} | arguments))
    metrics.add(block)
    return metrics


@pytest.fixture
def block():
    block = make_block(queries=200, k=6, seed=5)
    block.query_labels[::17] = -2
    return block


@settings(max_examples=30, deadline=None, derandomize=True)
@given(
    st.lists(st.integers(0, 60), max_size=5),
    st.randoms(use_true_random=False),
    st.booleans(),
    st.integers(0, 1000),
)
def test_any_partition_in_any_order_gives_identical_results(cuts, random, sets, seed):
    block = make_block(queries=60, k=6, seed=seed, sets=sets)
    classes = range(20)
    whole = EvaluationMetrics(6, classes)
    whole.add(block)
    bounds = sorted({0, 60, *cuts})
    parts = []
    for start, stop in itertools.pairwise(bounds):
        part = EvaluationMetrics(6, classes)
        part.add(block.take(slice(start, stop)))
        parts.append(pickle.loads(pickle.dumps(part)))
    while len(parts) > 1:
        random.shuffle(parts)
        parts[0].merge(parts.pop())
    assert json.dumps(parts[0].result()) == json.dumps(whole.result())


def test_results_against_the_definitions(block):
    metrics = measure(block, bins=4)
    result = metrics.result()
    votes = vote(block.labels, block.distances, confidences=True)
    truth = block.query_labels
    for voter in VOTERS:
        correct = votes[voter].predictions == truth[:, None]
        assert result["accuracy_at_k"][voter] == pytest.approx(correct.mean(axis=0).tolist())
        best = int(np.argmax(correct.sum(axis=0))) + 1
        assert result["best_k"][voter] == best == metrics.best_k(voter)
        by_class = metrics.class_accuracy_at_k(voter)
        for label in CLASSES:
            np.testing.assert_allclose(by_class[:, label], correct[truth == label].mean(axis=0))
            found = result["per_class"][str(label)]["accuracy"][voter]
            assert found == pytest.approx(correct[truth == label][:, 2].mean())
    assert result["queries"] == 200 and result["unknown"] == (truth == -2).sum() > 0
    predictions = votes["rank"].predictions[:, 2]
    pairs = Counter(zip(truth.tolist(), predictions.tolist(), strict=True))
    assert result["confusion"] == [[*pair, count] for pair, count in sorted(pairs.items())]
    valid = block.labels >= 0
    assert result["reliability_at_k"] == pytest.approx(
        [(block.labels[valid[:, i], i] == truth[valid[:, i]]).mean() for i in range(6)]
    )
    for i in range(6):
        distances = block.distances[valid[:, i], i]
        assert result["distances"]["count"][i] == len(distances)
        assert result["distances"]["mean"][i] == pytest.approx(distances.mean(), abs=1e-8)
        assert result["distances"]["min"][i] == distances.min()
        assert result["distances"]["max"][i] == distances.max()
    right = block.labels[:, 0] == truth
    for name, mask in (("right", right), ("wrong", ~right & valid[:, 0])):
        stats = result["first_neighbor_distance"][name]
        assert stats["count"] == mask.sum()
        assert stats["mean"] == pytest.approx(block.distances[mask, 0].mean(), abs=1e-8)
    confidences = votes["rank"].confidences[:, 2]
    bins = np.minimum((confidences * 4).astype(int), 3)
    error = sum(
        abs((predictions[bins == b] == truth[bins == b]).sum() - confidences[bins == b].sum())
        for b in range(4)
    )
    assert result["calibration"]["expected_error"] == pytest.approx(error / 200, abs=1e-8)
    assert result["calibration"]["count"] == np.bincount(bins, minlength=4).tolist()
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_the_blocks_own_weights_multiply():
    weighted = make_block(queries=60, k=6, seed=3, sets=True, weighted=True)
    plain = replace(weighted, weights=None)
    expected, found = EvaluationMetrics(8, range(20)), EvaluationMetrics(8, range(20))
    votes = expected.add(plain, weighted.weights)
    for voter, result in found.add(weighted).items():
        np.testing.assert_array_equal(result.predictions, votes[voter].predictions)
    assert found.result() == expected.result()
    unweighted = EvaluationMetrics(8, range(20))
    unweighted.add(plain)
    assert found.result() != unweighted.result()


def test_best_k_is_the_smallest_of_equals():
    block = make_block(queries=4, k=3, ragged=False)
    same = Neighbors(
        block.query_ids, np.ones(4, int), block.ids, np.ones((4, 3), int), block.distances
    )
    assert measure(same).best_k("rank") == 1


def test_several_true_labels_and_none():
    block = make_block(queries=2, k=1, ragged=False)
    sets = np.array([[3, 1], [-2, -2]])
    real = Neighbors(
        block.query_ids, sets[:, 0], block.ids, np.array([[1], [1]]), block.distances, sets
    )
    result = measure(real).result()
    assert (result["queries"], result["unscored"], result["unknown"]) == (1, 1, 0)
    assert result["accuracy_at_k"]["rank"] == [1.0]
    assert result["confusion"] == [[1, 1, 1]]


def test_narrow_wide_and_empty_blocks(block):
    metrics = EvaluationMetrics(10, CLASSES)
    metrics.add(block, np.ones((200, 6)))
    metrics.add(make_block(queries=5, k=12), np.ones((5, 12)))
    result = metrics.result()
    assert len(result["accuracy_at_k"]["rank"]) == 10
    assert result["distances"]["count"][9] <= 5
    empty = EvaluationMetrics(3, CLASSES).result()
    assert empty["accuracy_at_k"]["rank"] == [None] * 3
    assert empty["calibration"]["expected_error"] is None


def test_multiplier_reaches_the_vote(block):
    multiplier = np.random.default_rng(0).random(block.labels.shape)
    metrics = EvaluationMetrics(6, CLASSES)
    metrics.add(block, multiplier)
    votes = vote(block.labels, block.distances, multiplier=multiplier)["rank"].predictions
    expected = (votes == block.query_labels[:, None]).mean(axis=0).tolist()
    assert metrics.result()["accuracy_at_k"]["rank"] == pytest.approx(expected)


def test_errors(block):
    with pytest.raises(VisualMemoryError, match=r"label 4 of query .* not among the 4 classes"):
        EvaluationMetrics(6, range(4)).add(block)
    with pytest.raises(VisualMemoryError, match="headline voter 'rank' is not among the voters"):
        EvaluationMetrics(6, CLASSES, voters=["softmax"])
    with pytest.raises(VisualMemoryError, match="k = 0, .* Use 1 or more"):
        EvaluationMetrics(0, CLASSES)
