import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core import plugins
from vm_core.errors import VisualMemoryError
from vm_core.neighbors import Neighbors, read_json
from vm_core.pruning import (
    SCORES_SCHEMA,
    LeaveOneOutCounts,
    PruneConfig,
    hard,
    hard_excluded,
    multipliers,
    read_scores,
    scores_of,
    soft,
    soft_weights,
    without_self,
    worst_share,
)
from vm_core.records import strings, unit_interval

GOLDEN = Path(__file__).parents[1] / "golden"


def block(query_ids, query_labels, neighbors, labels):
    labels = np.array(labels)
    distances = np.where(labels < 0, np.inf, np.arange(labels.shape[1]) / 10)
    ids = np.array(neighbors, dtype=object)
    return Neighbors(strings(query_ids), np.array(query_labels), ids, labels, distances)


def test_self_is_removed_wherever_it_stands():
    found = without_self(
        block(
            ["a", "b", "c", "d", "e"],
            [1, 1, 1, 1, 1],
            [["a", "x", "y"], ["x", "b", "y"], ["x", "y", "z"], ["x", "d", ""], ["x", "y", ""]],
            [[1, 2, 3], [2, 1, 3], [2, 3, 4], [2, 1, -1], [2, 3, -1]],
        )
    )
    # c and e do not meet themselves: their own last neighbour goes, as in the paper.
    expected = [["x", "y"], ["x", "y"], ["x", "y"], ["x", ""], ["x", ""]]
    assert found.ids.tolist() == expected
    assert found.labels.tolist() == [[2, 3], [2, 3], [2, 3], [2, -1], [2, -1]]
    assert found.distances[1].tolist() == [0.0, 0.2]


@pytest.mark.parametrize("name", ["small", "wide"])
@pytest.mark.parametrize("block_rows", [7, 1000])
def test_golden_counts_in_any_grouping(name, block_rows):
    expected = json.loads((GOLDEN / f"{name}_expected.json").read_text())
    parts = []
    for piece in read_json(str(GOLDEN / f"{name}_memory_neighbor_info.json"), block_rows):
        parts.append(LeaveOneOutCounts())
        parts[-1].add(piece)
    counts = LeaveOneOutCounts()
    for part in reversed(parts):
        counts.merge(part)
    for field in ("wrong_at_10", "correct_at_10", "wrong_at_max"):
        assert getattr(counts, field) == expected[field]
    assert sorted(hard_excluded(counts, expected["hard_threshold"])) == expected["excluded"]
    assert soft_weights(counts) == expected["soft_weights"]


def test_multipliers_are_1_for_items_never_counted():
    ids = np.array([["a", "b"], ["c", ""]], dtype=object)
    assert multipliers(ids, {"a": 0.5, "c": 0.25}).tolist() == [[0.5, 1.0], [0.25, 1.0]]


def test_threshold_must_count():
    with pytest.raises(VisualMemoryError, match="threshold 0 would remove every item. Use 1"):
        hard_excluded(LeaveOneOutCounts(), 0)


def scores(values, shapley=None):
    """Scores by id as a table of rows, which are numbered in the order given."""
    table = pa.table({"id": list(values), "score": list(values.values())})
    if shapley is None:
        return scores_of([table], "score")
    return scores_of([table.append_column("shapley", [shapley])], "score", ties=True)


def items(weights, values):
    """Weights by id from weights by row."""
    ids = [list(values)[row] for row in weights["row"].to_pylist()]
    return dict(zip(ids, weights["weight"].to_pylist(), strict=True))


@pytest.mark.parametrize("name", ["small", "wide"])
def test_weights_from_golden_scores(name):
    expected = json.loads((GOLDEN / f"{name}_expected.json").read_text())
    removed = hard(scores(expected["wrong_at_max"]), expected["hard_threshold"])
    removed = items(removed, expected["wrong_at_max"])
    assert sorted(removed) == expected["excluded"] and not any(removed.values())
    counts = expected["wrong_at_10"] | {"never counted": 0}
    assert items(soft(scores(counts)), counts) == pytest.approx(expected["soft_weights"])


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    values=st.dictionaries(
        st.text(), st.tuples(st.integers(-2, 2), st.sampled_from([-0.5, 0.0, 0.25])), max_size=30
    ),
    share=st.floats(0, 1, exclude_min=True, exclude_max=True),
    highest=st.booleans(),
)
def test_a_share_is_exact_and_ties_go_by_shapley_value_and_then_by_hash(values, share, highest):
    """values: of each id, in any order, a score and a Shapley value."""

    def rank(id):
        score, shapley = values[id]
        return -score if highest else score, shapley, unit_interval(id, "prune")

    expected = sorted(values, key=rank)[: round(share * len(values))]
    of_ids = {id: score for id, (score, _) in values.items()}
    table = scores(of_ids, pa.array([shapley for _, shapley in values.values()], pa.float64()))
    removed = items(worst_share(table, share, highest), values)
    assert removed == dict.fromkeys(expected, 0.0)
    threshold = {id for id, value in of_ids.items() if (value >= 1 if highest else value <= 1)}
    assert items(hard(table, 1, highest), values) == dict.fromkeys(threshold, 0.0)


def test_no_class_loses_more_because_its_ids_come_first():
    ids = [f"{name}/{number}" for name in ("aster", "iris", "zinnia") for number in range(400)]
    removed = items(worst_share(scores(dict.fromkeys(ids, 0), [0.0] * 1200), 0.25), ids)
    lost = Counter(id.partition("/")[0] for id in removed)
    assert lost.total() == 300 and min(lost.values()) > 75


def test_what_cannot_be_weighed():
    with pytest.raises(VisualMemoryError, match="share 1 of the items .*between 0 and 1"):
        worst_share(scores({"a": 1}, [0.0]), 1)


def test_scores_of_tables():
    tables = [
        pa.table({"id": ["a", "b"], "label": [1, 2], "shapley": [0.5, None]}),
        pa.table({"id": ["c"], "label": [1], "shapley": [-1.0]}),
    ]
    expected = {"row": [0, 2], "score": [0.5, -1.0]}
    assert scores_of(tables, "shapley").to_pydict() == expected
    hashes = [unit_interval(id, "prune") for id in ("a", "c")]
    expected |= {"shapley": [0.5, -1.0], "order": hashes}
    assert scores_of(tables, "shapley", ties=True).to_pydict() == expected
    assert scores_of([], "shapley").schema == SCORES_SCHEMA


def test_scores_from_files(tmp_path):
    schema = pa.schema({"id": pa.large_string(), "score": pa.float64(), "shapley": pa.float64()})
    columns = [["0012", "a, b", "NA"], [3.0, -0.5, 1e-9]]
    expected = pa.table([*columns, [0.0] * 3], schema=schema)
    text = 'note,quality,id\nx,3,0012\ny,-0.5,"a, b"\nz,1e-9,NA\n'
    (tmp_path / "scores.csv").write_text(text)
    assert read_scores(str(tmp_path / "scores.csv"), "quality").equals(expected)
    expected = pa.table([*columns, [0.25, -1, 2]], schema=schema)
    pq.write_table(expected, tmp_path / "scores.parquet")
    assert read_scores(str(tmp_path / "scores.parquet"), "score").equals(expected)
    of_shapley = pa.table([columns[0], *[[0.25, -1, 2]] * 2], schema=schema)
    assert read_scores(str(tmp_path / "scores.parquet"), "shapley").equals(of_shapley)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,other\na,1\n", "0 columns 'score', not one; their columns are id, other. Name"),
        ("name,score\na,1\n", "0 columns 'id', not one"),
        ("id,score,score\na,1,2\n", "2 columns 'score', not one"),
        ("id,score\na,good\n", "holds string, not numbers. Choose another"),
        ("id,score\na,1\nb,nan\n", "1 rows .* no number in 'score' .* item 'b'"),
        ("id,score\na,1\nb,\nc,\n", "2 rows .* no number in 'score' .* item 'b'"),
        ("id,score\na,1\nb,1\na,2\n", "1 ids come more than once .* such as 'a'"),
        ("id,score\na,1,7\n", "cannot be read: .*Give a Parquet file"),
        ("", "cannot be read: .*line of column names"),
    ],
)
def test_unusable_scores(tmp_path, text, message):
    path = tmp_path / "scores.csv"
    path.write_text(text)
    with pytest.raises(VisualMemoryError, match=f"scores '{path}' .*{message}|{message}"):
        read_scores(str(path), "score")


def test_no_scores(tmp_path):
    with pytest.raises(VisualMemoryError, match="do not exist. Give a CSV or Parquet file"):
        read_scores(str(tmp_path / "scores.csv"), "score")


def config(**given):
    return plugins.validate(PruneConfig, {"memory": "m", **given}, "options")


def test_the_papers_settings_are_the_defaults():
    of_hard, of_soft = config(method="hard"), config(method="soft")
    assert (of_hard.column, of_hard.limit, of_hard.highest) == ("wrong_at_100", 128, True)
    assert (of_soft.column, of_soft.gamma_scale) == ("wrong_at_10", 1.75)
    assert config(method="hard", by="shapley", share=0.1).highest is False
    assert of_hard.leave_one_out_settings == {"ks": (10, 100)}
    of_30 = config(method="soft", by="wrong_at_30", leave_one_out={"shapley_k": 5})
    assert of_30.leave_one_out_settings == {"ks": (10, 30, 100), "shapley_k": 5}
    of_5 = config(method="soft", leave_one_out={"ks": [5]})
    assert of_5.leave_one_out_settings == {"ks": (5, 10)}
    assert config(method="hard", scores="f.csv", threshold=2).highest is True
    assert config(method="hard", scores="f.csv", threshold=2, lowest=True).highest is False
    assert items(of_hard.weights(scores({"a": 127, "b": 128})), "ab") == {"b": 0}
    assert items(of_soft.weights(scores({"a": 0, "b": 6})), "ab") == {"b": 0.25}
    of_share = config(method="hard", share=0.5)
    assert items(of_share.weights(scores({"a": 1, "b": 0}, [0.0, 0.0])), "ab") == {"a": 0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "hard", "by": "shapley"}, "threshold or a share to prune by shapley"),
        ({"method": "hard", "scores": "f.csv"}, "threshold or a share to prune by f.csv"),
        ({"method": "hard", "threshold": 3, "share": 0.1}, "not both"),
        ({"method": "hard", "by": "wrong", "share": 0.1}, "by must be wrong_at_K, correct"),
        ({"method": "hard", "by": "shapley", "scores": "f.csv", "share": 0.1}, "by and scores"),
        ({"method": "soft", "share": 0.1}, "soft removes nothing"),
        ({"method": "soft", "by": "shapley"}, "needs wrong counts"),
        ({"method": "hard", "lowest": True}, "lowest is for the scores of a file"),
        ({"method": "hard", "share": 1.0}, "less than 1"),
        ({"method": "hard", "threshold": float("nan")}, "finite"),
    ],
)
def test_settings_that_contradict(given, message):
    with pytest.raises(VisualMemoryError, match=message):
        config(**given)
