"""The queries that a report shows, and the vote on each."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core.gallery import KINDS, Gallery, explain
from vm_core.neighbors import Neighbors
from vm_core.records import PADDING, UNKNOWN, EmbeddingBlock, strings
from vm_core.voting import VOTERS, VoteParameters, vote

PARAMETERS = VoteParameters()


def block(seed: int, queries: int, k: int = 6, classes: int = 4) -> Neighbors:
    generator = np.random.default_rng(seed)
    labels = generator.integers(classes, size=(queries, k))
    missing = np.arange(k) >= generator.integers(1, k + 1, size=queries)[:, None]
    distances = np.sort(generator.random((queries, k)), axis=1).astype(np.float32)
    ids = np.array([f"m{i}" for i in range(queries * k)], object).reshape(queries, k)
    return Neighbors(
        strings([f"q{i:03d}" for i in generator.permutation(queries)]),
        generator.integers(UNKNOWN, classes, size=queries),
        np.where(missing, "", ids),
        np.where(missing, PADDING, labels),
        np.where(missing, np.inf, distances).astype(np.float32),
    )


def embeddings(queries: Neighbors) -> EmbeddingBlock:
    pictures = strings([id.encode() for id in queries.query_ids])
    vectors = np.ones((len(queries), 1), np.float32)
    return EmbeddingBlock(
        queries.query_ids, queries.query_labels, queries.query_ids, vectors, pictures
    )


@pytest.mark.parametrize("voter", VOTERS)
def test_the_explanation_is_the_vote(voter):
    neighbors = block(0, 30)
    votes = vote(neighbors.labels, neighbors.distances, [voter], confidences=True)[voter]
    examples = explain(neighbors, [None] * 30, voter, 9, PARAMETERS)  # more than there are
    for row, example in enumerate(examples):
        assert example.prediction == votes.predictions[row, -1]
        assert example.confidence == pytest.approx(votes.confidences[row, -1])
        found = (neighbors.labels[row] >= 0).sum()
        assert example.neighbor_ids == tuple(neighbors.ids[row, :found])
        assert len(example.weights) == len(example.distances) == found
        assert sum(example.weights) == pytest.approx(1)
        of_winner = [
            weight
            for weight, label in zip(example.weights, example.neighbor_labels, strict=True)
            if label == example.prediction
        ]
        assert sum(of_winner) == pytest.approx(example.confidence)


@pytest.mark.parametrize("voter", VOTERS)
def test_weights_of_a_pruned_memory_are_in_the_shares(voter):
    neighbors = block(0, 30)
    multiplier = np.random.default_rng(1).choice(np.float32([0.25, 1, 1.75]), (30, 6))
    weighted = replace(neighbors, weights=multiplier)
    plain = explain(neighbors, [None] * 30, voter, 6, PARAMETERS)
    examples = explain(weighted, [None] * 30, voter, 6, PARAMETERS)
    votes = vote(
        neighbors.labels, neighbors.distances, [voter], multiplier=multiplier, confidences=True
    )[voter]
    for row, (example, without) in enumerate(zip(examples, plain, strict=True)):
        shares = np.array(without.weights) * multiplier[row, : len(without.weights)]
        np.testing.assert_allclose(example.weights, shares / shares.sum())
        assert example.prediction == votes.predictions[row, -1]
        assert example.confidence == pytest.approx(votes.confidences[row, -1])
    gallery = Gallery(voter, 9, PARAMETERS, size=30)
    gallery.add(weighted, embeddings(weighted))
    by_id = {example.query_id: example for example in examples}
    for example in gallery.examples("wrong"):
        assert example == replace(by_id[example.query_id], thumbnail=example.thumbnail)


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    queries=st.integers(0, 60),
    classes=st.integers(1, 15),
    cuts=st.lists(st.integers(0, 60), max_size=4),
    size=st.integers(1, 5),
)
def test_however_the_queries_come_the_same_are_shown(seed, queries, classes, cuts, size):
    neighbors = block(seed, queries, classes=classes)

    def gallery(parts):
        made = Gallery("rank", 5, PARAMETERS, size)
        for part in parts:
            made.add(part, embeddings(part))
        return made

    whole = gallery([neighbors])
    edges = sorted({0, queries, *(min(cut, queries) for cut in cuts)})
    parts = [neighbors.take(slice(a, b)) for a, b in itertools.pairwise(edges)]
    merged = gallery([])
    for part in reversed(parts):
        merged.merge(gallery([part]))
    for kind in KINDS:
        assert merged.examples(kind) == whole.examples(kind)
        assert gallery(parts).examples(kind) == whole.examples(kind)
        assert len(whole.examples(kind)) <= size


def test_what_is_shown():
    neighbors = block(1, 200)
    gallery = Gallery("rank", 5, PARAMETERS)
    gallery.add(neighbors, embeddings(neighbors))
    right, wrong, uncertain = (gallery.examples(kind) for kind in KINDS)
    assert all(example.prediction == example.label for example in right)
    assert all(example.prediction != example.label for example in wrong)
    assert all(example.thumbnail == example.query_id.encode() for example in right + wrong)
    everything = explain(neighbors, [None] * 200, "rank", 5, PARAMETERS)
    lowest = min(example.confidence for example in everything)
    assert uncertain[0].confidence == lowest
    for shown in (right, wrong, uncertain):
        # As long as there are classes left none is shown twice.
        classes = {example.label for example in shown}
        assert len(shown) == 8
        assert len({example.label for example in shown[: len(classes)]}) == len(classes)
    mistakes = [example for example in everything if example.prediction != example.label]
    assert wrong[0].confidence == max(example.confidence for example in mistakes)


def test_nothing_to_show():
    gallery = Gallery("rank", 5, PARAMETERS)
    assert [gallery.examples(kind) for kind in KINDS] == [[], [], []]
