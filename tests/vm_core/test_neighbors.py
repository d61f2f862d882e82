import json
import tracemalloc
from dataclasses import fields

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core.errors import VisualMemoryError
from vm_core.neighbors import (
    NEIGHBORS_SCHEMA,
    Neighbors,
    from_arrow,
    read_json,
    to_arrow,
    write_json,
)
from vm_core.records import strings


def make_block(queries=20, k=7, seed=0, ragged=True, sets=False, dtype=np.float64, weighted=False):
    rng = np.random.default_rng(seed)
    ids = np.array([f"m{i}" for i in range(50)], dtype=object)
    ids = np.stack([rng.choice(ids, k, replace=False) for _ in range(queries)])
    labels = rng.integers(0, 5, (queries, k))
    distances = np.sort(rng.random((queries, k)), axis=1).astype(dtype)
    if ragged:
        gone = np.arange(k) >= rng.integers(0, k + 1, (queries, 1))
        gone[0] = False
        ids[gone], labels[gone], distances[gone] = "", -1, np.inf
    query_labels, label_sets = rng.integers(0, 5, queries), None
    if sets:
        label_sets = rng.integers(0, 5, (queries, 3))
        label_sets[:, 1:] += [5, 10]
        label_sets[np.arange(3) >= rng.integers(0, 4, (queries, 1))] = -2
        label_sets[0] = [1, 2, 3]
        query_labels = label_sets[:, 0].copy()
    query_ids = strings([f'q"{seed}/{i}\u00e9' for i in range(queries)])
    weights = rng.choice([0.25, 1, 1.75], (queries, k)) if weighted else None
    return Neighbors(query_ids, query_labels, ids, labels, distances, label_sets, weights)


def assert_equal(a, b):
    for name in (field.name for field in fields(Neighbors)):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)


def rows(block):
    """Each query's neighbours as plain tuples, padding left out."""
    return [
        [(i, la, d) for i, la, d in zip(*row, strict=True) if la != -1]
        for row in zip(
            block.ids.tolist(), block.labels.tolist(), block.distances.tolist(), strict=True
        )
    ]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(st.integers(0, 10_000), st.integers(1, 25), st.booleans(), st.booleans())
def test_json_round_trip(tmp_path_factory, seed, block_rows, sets, narrow):
    path = tmp_path_factory.mktemp("json") / "table.json"
    block = make_block(seed=seed, sets=sets, dtype=np.float32 if narrow else np.float64)
    write_json(str(path), [block.take(slice(0, 3)), block.take(slice(3, None))], "encoder")
    blocks = list(read_json(str(path), block_rows))
    assert all(len(piece) <= block_rows for piece in blocks)
    found = Neighbors.concatenate(blocks)
    assert_equal(found, block)  # float32 values survive exactly
    text = json.loads(path.read_text())
    first = text[block.query_ids[0]]
    assert first["featurizer"] == "encoder" and first["image_id"] == block.query_ids[0]
    assert isinstance(first["image_class"], list) == sets


def test_json_of_nothing(tmp_path):
    path = tmp_path / "table.json"
    write_json(str(path), [], "encoder")
    assert json.loads(path.read_text()) == {}
    assert list(read_json(str(path))) == []


GOOD = {
    "image_class": 1,
    "neighbor_image_ids": ["a", "b"],
    "neighbor_classes": [1, 2],
    "neighbor_distances": [0, 0.5],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_class": None}, "'image_class' must hold integers"),
        ({"image_class": [1, "x"]}, "'image_class' must hold integers"),
        ({"neighbor_classes": [1, 2.5]}, "'neighbor_classes' must hold integers"),
        ({"neighbor_classes": [1, -1]}, "class -1 in 'neighbor_classes' is negative"),
        ({"neighbor_classes": [True, False]}, "'neighbor_classes' must hold integers"),
        ({"neighbor_distances": [0.1, "0.2"]}, "'neighbor_distances' must hold numbers"),
        ({"neighbor_distances": [[0.1], [0.1, 0.2]]}, "'neighbor_distances' must hold numbers"),
        ({"neighbor_distances": 3}, "'neighbor_distances' must hold numbers"),
        ({"neighbor_distances": [0.1]}, "2 neighbor_image_ids, 2 neighbor_classes and 1 neighbor_"),
        ({"neighbor_image_ids": ["a", 3]}, "'neighbor_image_ids' must be a list of strings"),
    ],
)
def test_bad_row_names_the_query_and_the_remedy(tmp_path, change, message):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"good": GOOD, "bad one": GOOD | change}))
    with pytest.raises(VisualMemoryError) as error:
        list(read_json(str(path)))
    assert message in str(error.value)
    assert f"query 'bad one' of '{path}'" in str(error.value)
    assert "Correct this entry" in str(error.value)


@pytest.mark.parametrize("name", list(GOOD))
def test_missing_key(tmp_path, name):
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"q": {key: GOOD[key] for key in GOOD if key != name}}))
    with pytest.raises(VisualMemoryError, match=f"query 'q' .* the key '{name}' is missing"):
        list(read_json(str(path)))


def test_not_a_table(tmp_path):
    path = tmp_path / "table.json"
    path.write_text(json.dumps([GOOD]))
    with pytest.raises(VisualMemoryError, match="does not begin with '{'"):
        list(read_json(str(path)))
    path.write_text('{"q": 3}')
    with pytest.raises(VisualMemoryError, match="query 'q' .* expected an object, found int"):
        list(read_json(str(path)))
    path.write_text(json.dumps({"q1": GOOD, "q2": GOOD})[:-30])
    with pytest.raises(VisualMemoryError, match="not valid JSON after query 'q1'.*cut short"):
        list(read_json(str(path)))
    path.write_text(json.dumps({"q": GOOD | {"neighbor_classes": [1, 2**64]}}))
    with pytest.raises(VisualMemoryError, match="not valid JSON at its first query.*overflow"):
        list(read_json(str(path)))


def test_reading_needs_the_memory_of_a_block_not_of_the_file(tmp_path):
    path = tmp_path / "table.json"
    block = make_block(queries=100, k=40, ragged=False)
    copies = (
        Neighbors(
            strings([f"{copy}-{i}" for i in range(100)]),
            block.query_labels,
            block.ids,
            block.labels,
            block.distances,
        )
        for copy in range(30)
    )
    write_json(str(path), copies, "encoder")
    size = path.stat().st_size
    assert size > 4_000_000
    tracemalloc.start()
    count = sum(len(piece) for piece in read_json(str(path), block_rows=50))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 3000
    assert peak < size / 5


def test_arrow_round_trip():
    block = make_block(dtype=np.float32)
    table = to_arrow(block)
    assert table.schema == NEIGHBORS_SCHEMA
    assert_equal(from_arrow(table), block)
    assert_equal(from_arrow(table.slice(5, 4)), block.take(slice(5, 9)))
    assert_equal(from_arrow(table.to_batches()[0]), block)
    assert_equal(from_arrow(pa.concat_tables([table, table])), Neighbors.concatenate([block] * 2))
    assert len(from_arrow(table.slice(0, 0))) == 0
    weighted = make_block(dtype=np.float32, weighted=True)
    assert to_arrow(weighted).schema == NEIGHBORS_SCHEMA
    assert_equal(from_arrow(to_arrow(weighted)), weighted)
    assert_equal(from_arrow(table.drop_columns("neighbor_weights")), block)


def test_arrow_refuses_what_it_cannot_hold():
    with pytest.raises(VisualMemoryError, match="Write it as JSON"):
        to_arrow(make_block(sets=True))
    mixed = pa.concat_tables([to_arrow(make_block()), to_arrow(make_block(weighted=True))])
    with pytest.raises(VisualMemoryError, match=r"'neighbor_weights'.*differ in length \(0 to 7"):
        from_arrow(mixed)
    table = to_arrow(make_block()).to_pydict()
    table["neighbor_labels"][3] = [1]
    with pytest.raises(VisualMemoryError, match=r"'neighbor_labels'.*differ in length \(1 to 7\)"):
        from_arrow(pa.table(table, NEIGHBORS_SCHEMA))


def test_without_closes_ranks():
    block = make_block()
    excluded = {"m1", "m2", "m3", "m10", "m20", "m30", "m40"}
    pruned = block.without(excluded)
    assert rows(pruned) == [[n for n in row if n[0] not in excluded] for row in rows(block)]
    assert pruned.ids.shape == block.ids.shape
    padding = pruned.labels == -1
    assert (np.diff(padding.astype(int), axis=1) >= 0).all()
    assert (pruned.ids[padding] == "").all() and np.isinf(pruned.distances[padding]).all()
    assert rows(block.without(set(block.ids.ravel()))) == [[]] * len(block)
    assert make_block(dtype=np.float32).without(excluded).distances.dtype == np.float32


def test_take_first_and_concatenate():
    a, b = make_block(seed=1), make_block(seed=2, k=3)
    both = Neighbors.concatenate([a, b])
    assert both.k == 7 and rows(both) == rows(a) + rows(b)
    assert rows(both.take(np.array([25, 3]))) == [rows(b)[5], rows(a)[3]]
    assert rows(a.first(2)) == [row[:2] for row in rows(a)]
    mixed = Neighbors.concatenate([a, make_block(seed=3, sets=True)])
    assert mixed.query_label_sets.shape == (40, 3)
    assert mixed.query_label_sets[0].tolist() == [a.query_labels[0], -2, -2]


def weights(block):
    """Each query's weights by neighbour, padding left out."""
    return [
        {id: weight for id, weight in zip(*row, strict=True) if id}
        for row in zip(block.ids.tolist(), block.weights.tolist(), strict=True)
    ]


def test_weights_stay_with_their_neighbours():
    block = make_block(weighted=True)
    assert make_block().first(3).weights is None and make_block().without({"m1"}).weights is None
    excluded = {f"m{i}" for i in range(0, 50, 3)}
    kept = [{id: w for id, w in row.items() if id not in excluded} for row in weights(block)]
    assert weights(block.without(excluded)) == kept
    assert weights(block.take(np.array([4, 2]))) == [weights(block)[4], weights(block)[2]]
    np.testing.assert_array_equal(block.first(3).weights, block.weights[:, :3])
    assert weights(block.first(9)) == weights(block)
    plain = make_block(seed=2, k=3)
    both = Neighbors.concatenate([block, plain])
    assert both.weights.dtype == np.float64 and both.weights.shape == both.ids.shape
    assert weights(both)[:20] == weights(block)
    assert all(set(row.values()) <= {1.0} for row in weights(both)[20:])


def test_is_correct():
    block = make_block(queries=3, k=2, ragged=False)
    plain = Neighbors(
        block.query_ids, np.array([0, 2, -2]), block.ids, block.labels, block.distances
    )
    predictions = np.array([[0, 1], [-1, 2], [-1, -2]])
    assert plain.is_correct(predictions).tolist() == [[True, False], [False, True], [False] * 2]
    sets = np.array([[0, 1], [2, -2], [-2, -2]])
    several = Neighbors(block.query_ids, sets[:, 0], block.ids, block.labels, block.distances, sets)
    assert several.is_correct(predictions).tolist() == [[True, True], [False, True], [False] * 2]
    assert several.scored.tolist() == [True, True, False]
