"""Small cases by hand at the edges: row 0, label 0, k = 0, nothing at all, parts of queries."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest

from vm_core import item_scores, weights
from vm_core.building import classes_before
from vm_core.embedding import gather
from vm_core.errors import DamagedError
from vm_core.item_scores import Lists
from vm_core.memory import Memory
from vm_core.metrics import EvaluationMetrics
from vm_core.neighbors import Neighbors
from vm_core.partitioning import _unit
from vm_core.pruning import LeaveOneOutCounts, without_self
from vm_core.records import PADDING, UNKNOWN, Embedded, EmbeddingBlock, shard_of, strings
from vm_core.search import assemble
from vm_core.shards import write_shard
from vm_core.voting import VOTERS, vote


def block_of(count: int, dimension: int = 3) -> EmbeddingBlock:
    vectors = np.eye(dimension, dtype=np.float32)[np.arange(count) % dimension]
    ids = strings([f"q{number}" for number in range(count)])
    return EmbeddingBlock(ids, np.zeros(count, np.int64), strings(["s"] * count), vectors)


def found_of(queries: EmbeddingBlock, places: list[int], name: str) -> Neighbors:
    some = queries.take(np.array(places))
    shape = (len(places), 2)
    return Neighbors(
        some.ids,
        some.labels,
        np.full(shape, name),
        np.zeros(shape, np.int64),
        np.full(shape, 0.5, np.float32),
    )


@pytest.mark.parametrize("queries, places", [(3, [1]), (2, [0]), (5, [4, 2])])
def test_the_first_part_covers_some_queries_only(queries, places):
    block = block_of(queries)
    answer = assemble(block, 2, [(np.array(places), found_of(block, places, "x"))])
    assert answer.ids.shape == (queries, 2)
    for row in range(queries):
        expected = ["x", "x"] if row in places else ["", ""]
        assert answer.ids[row].tolist() == expected
        assert (answer.labels[row] == (0 if row in places else PADDING)).all()
        assert np.isfinite(answer.distances[row]).all() == (row in places)


def test_no_part_at_all():
    answer = assemble(block_of(2), 3, [])
    assert answer.ids.tolist() == [[""] * 3] * 2 and (answer.labels == PADDING).all()


def test_row_0_may_be_the_last_that_a_search_finds():
    """Row 0 found last is a row, not the end of what there is."""
    asked = []

    def search(queries, k):
        asked.append(k)
        order = np.array([3, 2, 1, 0])[:k]
        rows = np.full((len(queries), k), -1, np.int64)
        rows[:, : len(order)] = order
        distances = np.where(rows >= 0, np.arange(k, dtype=np.float32), np.inf)
        return rows, distances.astype(np.float32)

    removed = np.array([False, True, True, True])
    rows, distances = weights.without(search, removed)(np.ones((1, 2), np.float32), 1)
    assert rows.tolist() == [[0]] and np.isfinite(distances).all()


def test_items_of_class_0_are_counted():
    """Counts of a query whose label is 0, and of one that has none."""
    block = Neighbors(
        strings(["q0", "q1"]),
        np.array([0, 1]),
        np.array([["q0", "a", "b"], ["q1", "a", "b"]]),
        np.array([[0, 0, 1], [1, 0, 1]]),
        np.zeros((2, 3), np.float32),
    )
    counts = LeaveOneOutCounts()
    counts.add(block)
    assert dict(counts.wrong_at_10) == {"a": 1, "b": 1}
    assert dict(counts.correct_at_10) == {"a": 1, "b": 1}
    assert dict(counts.wrong_at_max) == {"a": 1, "b": 1}


def test_a_neighbour_of_no_class_is_no_wrong_one():
    block = Neighbors(
        strings(["q"]),
        np.array([0]),
        np.array([["q", "a", ""]]),
        np.array([[0, 1, PADDING]]),
        np.array([[0, 0.1, np.inf]], np.float32),
    )
    counts = LeaveOneOutCounts()
    counts.add(block)
    assert dict(counts.wrong_at_max) == {"a": 1}


def test_queries_left_out_are_counted_apart():
    block = Neighbors(
        strings(["q0", "q1", "q2"]),
        np.array([0, UNKNOWN, UNKNOWN]),
        np.array([["a"]] * 3),
        np.zeros((3, 1), np.int64),
        np.zeros((3, 1), np.float32),
        query_label_sets=np.array([[0], [UNKNOWN], [UNKNOWN]]),
    )
    metrics = EvaluationMetrics(1, [0], headline=("rank", 1))
    metrics.add(block)
    assert metrics._sums["queries"].tolist() == [1, 0, 2]


@pytest.mark.parametrize("queries", [0, 2])
@pytest.mark.parametrize("k", [0, 1])
def test_votes_of_no_neighbours_and_of_no_queries(queries, k):
    labels, distances = np.zeros((queries, k), np.int64), np.zeros((queries, k))
    for votes in vote(labels, distances, VOTERS).values():
        assert votes.predictions.shape == (queries, k)
        assert (votes.predictions == 0).all()


def test_a_zero_centroid_stays_zero():
    rows = np.array([[0.0, 0.0], [3.0, 4.0]], np.float32)
    with np.errstate(all="raise"):
        assert _unit(rows).tolist() == [[0.0, 0.0], [np.float32(0.6), np.float32(0.8)]]


def test_a_list_that_is_complete_has_a_last_value_and_others_none():
    correct = np.array([[True, True], [True, True], [True, False]])
    lengths = np.array([2, 2, 1])
    complete = np.array([True, False, True])
    values = item_scores.shapley(correct, lengths, complete, 1)
    one = round(1 / item_scores.FIXED_POINT)
    # Alone the nearest makes all of the difference; of two equal ones each makes a half.
    assert values[0].tolist() == [one // 2, one // 2] or abs(values[0].sum() - one) <= 1
    assert values[1].tolist() == [0, 0]
    assert values[2].tolist() == [one, 0]


@pytest.mark.parametrize("limit", [0, 10**9])
def test_sums_are_the_same_whenever_they_are_added_up(monkeypatch, limit):
    """With a limit of 0 every tally is added up at once."""
    monkeypatch.setattr(item_scores, "_KEEP_ROWS", limit)
    sums = item_scores.Sums(2)
    assert [part.tolist() for part in sums.total()] == [[], []]
    added = [
        (np.array([0, 5]), np.array([[1, 10], [2, 20]])),
        (np.array([0]), np.array([[4, 40]])),
        (np.array([3, 5, 9]), np.array([[8, 80], [16, 160], [32, 320]])),
    ]
    for part in added:
        sums.add(*part)
    for _ in range(2):  # asking changes nothing
        rows, values = sums.total()
        assert rows.tolist() == [0, 3, 5, 9]
        assert values.tolist() == [[5, 50], [8, 80], [18, 180], [32, 320]]
    sums.add(*added[1])
    assert sums.total()[1].tolist()[0] == [9, 90]


def test_an_item_that_stands_twice_is_row_0():
    lists = Lists(
        np.array([[0, 0, -1, -1]]),
        np.array([[0.2, 0.1, np.inf, np.inf]], np.float32),
        np.array([[True, True, False, False]]),
    )
    found = item_scores.nearest(lists, 3)
    assert found.rows.tolist() == [[0, -1, -1]]
    assert found.distances[0, 0] == np.float32(0.1)


def test_gathering_nothing():
    found, duplicates = gather([])
    assert (len(found.block), found.rejected, duplicates, found.batch_size) == (0, (), 0, 0)
    assert len(gather([Embedded.nothing()] * 2)[0].block) == 0


def test_no_version_has_no_classes(tmp_path):
    assert classes_before(str(tmp_path), "fingerprint", None) is None


def test_weights_of_no_rows_change_nothing():
    table = pa.table({"id": [], "weight": []}, schema=weights.WEIGHTS_SCHEMA)
    assert table.num_rows == 0


def test_a_shard_that_stands_for_another(tmp_path):
    """Two files of one kind that were swapped: as many rows, and those of another shard."""
    ids = sorted(f"id{number}" for number in range(40))
    owner = np.array([shard_of(id, 2) for id in ids])
    memory = object.__new__(Memory)
    memory.root = str(tmp_path)
    memory.manifest = SimpleNamespace(shards=[])
    for shard in range(2):
        mine = strings([id for id, of in zip(ids, owner, strict=True) if of == shard][:10])
        vectors = np.eye(10, dtype=np.float32)
        block = EmbeddingBlock(mine, np.zeros(10, np.int64), strings(["s"] * 10), vectors)
        write_shard(f"{tmp_path}/{shard}", block, "f", "float32")
        entry = SimpleNamespace(embeddings=f"{shard}", embedded=10)
        memory.manifest.shards.append(entry)
        if shard == 0:
            assert memory.read_shard(0).ids.tolist() == mine.tolist()
    memory.manifest.shards.reverse()
    for shard in range(2):
        with pytest.raises(DamagedError, match=f"{tmp_path}/{1 - shard} has the rows of another"):
            memory.read_shard(shard)
    memory.manifest.shards[0] = SimpleNamespace(embeddings="0", embedded=9)
    with pytest.raises(DamagedError, match="/0 has 10 rows and was written with 9"):
        memory.read_shard(0)


def test_a_pointer_that_names_no_version_says_where_the_versions_are(tmp_path):
    (tmp_path / "CURRENT").write_text("000001\n")
    with pytest.raises(DamagedError) as raised:
        Memory(str(tmp_path))
    text = str(raised.value)
    assert text.startswith(f"{tmp_path}/CURRENT is damaged: it names no version. Name one with")
    assert text.endswith(f"the versions are in {tmp_path}/versions")


def test_an_item_that_is_not_among_its_neighbours_loses_the_last_one():
    """The last one has label 0."""
    block = Neighbors(
        strings(["z"]),
        np.array([1]),
        np.array([["a", "b", ""]]),
        np.array([[1, 0, PADDING]]),
        np.array([[0.1, 0.2, np.inf]], np.float32),
    )
    assert without_self(block).ids.tolist() == [["a", ""]]
