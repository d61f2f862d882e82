import json
from pathlib import Path

import numpy as np
import pytest

from vm_core.errors import VisualMemoryError
from vm_core.neighbors import Neighbors, read_json
from vm_core.pruning import (
    LeaveOneOutCounts,
    hard_excluded,
    multipliers,
    soft_weights,
    without_self,
)
from vm_core.records import strings

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
