import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.vm_core.test_neighbors import make_block
from vm_core import analysis
from vm_core.analysis import PREDICTIONS_SCHEMA, analyze, entropy
from vm_core.errors import VisualMemoryError
from vm_core.neighbors import Neighbors, write_json

GOLDEN = Path(__file__).parents[1] / "golden"


def predictions(out_dir, expected):
    """Voter -> (Q, K) predictions, checked for order and completeness."""
    table = pq.read_table(f"{out_dir}/predictions.parquet")
    assert table.schema == PREDICTIONS_SCHEMA
    ids, k = expected["query_ids"], expected["k"]
    voters = list(dict.fromkeys(table["voter"].to_pylist()))
    assert table["query_id"].to_pylist() == list(np.repeat(ids, len(voters) * k))
    assert table["k"].to_pylist() == list(range(1, k + 1)) * len(ids) * len(voters)
    assert table["voter"].to_pylist()[: len(voters) * k] == list(np.repeat(voters, k))
    labels = table["label"].to_numpy().reshape(len(ids), len(voters), k)
    return {voter: labels[:, index] for index, voter in enumerate(voters)}


@pytest.mark.parametrize("block_rows", [16, 1024])
@pytest.mark.parametrize("name", ["small", "wide"])
def test_golden_published_figures_to_the_last_prediction(name, block_rows, tmp_path, monkeypatch):
    read = analysis.read_json
    monkeypatch.setattr(analysis, "read_json", lambda path: read(path, block_rows))
    expected = json.loads((GOLDEN / f"{name}_expected.json").read_text())
    result = analyze(
        str(GOLDEN / f"{name}_queries_neighbor_info.json"),
        str(GOLDEN / f"{name}_memory_neighbor_info.json"),
        expected["hard_threshold"],
        paper_exact=True,
        out_dir=str(tmp_path),
    )
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    for field in ("wrong_at_10", "correct_at_10", "wrong_at_max", "excluded"):
        assert result[field] == expected[field]
    assert result["soft_weights"] == pytest.approx(expected["soft_weights"], rel=1e-12)
    assert result["reliability_at_k"] == pytest.approx(expected["reliability_at_k"], rel=1e-12)
    assert list(result["entropy_base2"]) == expected["query_ids"]
    found = list(result["entropy_base2"].values())
    assert found == pytest.approx(expected["entropy_base2"], rel=1e-12)
    assert set(result["accuracy_at_k"]) == set(expected["accuracy_at_k"])
    columns = np.array(expected["predictions_k_values"]) - 1
    for voter, labels in predictions(tmp_path, expected).items():
        assert labels[:, columns].tolist() == expected["predictions_at_k"][voter]
        accuracies = expected["accuracy_at_k"][voter]
        assert result["accuracy_at_k"][voter] == pytest.approx(accuracies, rel=1e-12)


def test_golden_default_mode_differs_in_hard_pruning_only(tmp_path):
    expected = json.loads((GOLDEN / "small_expected.json").read_text())
    result = analyze(
        str(GOLDEN / "small_queries_neighbor_info.json"),
        str(GOLDEN / "small_memory_neighbor_info.json"),
        expected["hard_threshold"],
        out_dir=str(tmp_path),
    )
    for voter, accuracies in expected["accuracy_at_k"].items():
        assert (result["accuracy_at_k"][voter] == accuracies) != voter.startswith("hard")
    table = json.loads((GOLDEN / "small_queries_neighbor_info.json").read_text())
    hard = predictions(tmp_path, expected)["hard_plurality"]
    for row, query_id in enumerate(expected["query_ids"]):
        query = table[query_id]
        kept = [
            label
            for id, label in zip(
                query["neighbor_image_ids"], query["neighbor_classes"], strict=True
            )
            if id not in expected["excluded"]
        ]
        for k in (1, 5, 20):
            counts = Counter(kept[:k])
            winners = [label for label, count in counts.items() if count == max(counts.values())]
            assert hard[row, k - 1] in winners


def table_of(path, rows):
    path.write_text(
        json.dumps(
            {
                query_id: {
                    "featurizer": "f",
                    "image_id": query_id,
                    "image_class": label,
                    "neighbor_image_ids": [f"m{i}" for i in range(len(labels))],
                    "neighbor_classes": labels,
                    "neighbor_distances": [i / 10 for i in range(len(labels))],
                }
                for query_id, (label, labels) in rows.items()
            }
        )
    )
    return str(path)


def test_all_excluded_is_a_wrong_prediction(tmp_path):
    queries = table_of(tmp_path / "q.json", {"q": (2, [2, 2])})
    memory = table_of(tmp_path / "m.json", {"x": (1, [2, 2, 1]), "y": (1, [2, 2, 1])})
    result = analyze(queries, memory, 2, out_dir=str(tmp_path / "out"))
    assert result["excluded"] == ["m0", "m1"]
    assert result["accuracy_at_k"]["hard_rank"] == [0.0, 0.0]
    assert result["accuracy_at_k"]["rank"] == [1.0, 1.0]
    published = analyze(queries, memory, 2, paper_exact=True, out_dir=str(tmp_path / "out"))
    assert published["accuracy_at_k"]["hard_rank"] == [1.0, 1.0]


def test_lists_of_different_lengths_in_different_blocks(tmp_path, monkeypatch):
    read = analysis.read_json
    rows = {"a": (1, [1]), "b": (2, [1, 2, 2]), "c": ([1, 3], [0, 3]), "d": ([], [1, 1])}
    path = table_of(tmp_path / "q.json", rows)
    results = []
    for block_rows in (1, 2, 4):
        monkeypatch.setattr(analysis, "read_json", lambda path, n=block_rows: read(path, n))
        results.append(analyze(path, out_dir=str(tmp_path / "out")))
    assert results[0] == results[1] == results[2]
    result = results[0]
    # d has no true label and is left out; a's prediction stands after its list's end.
    assert result["accuracy_at_k"]["plurality"] == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert result["reliability_at_k"] == pytest.approx([1 / 3, 1.0, 1.0])
    assert result["entropy_base2"]["d"] == 0.0
    assert "excluded" not in result and "soft_rank" not in result["accuracy_at_k"]


def test_entropy_leaves_padding_out():
    labels = np.array([[1, 2, 1, 2], [3, 3, -1, -1], [5, 6, 6, -1], [-1, -1, -1, -1]])
    expected = [1.0, 0.0, -math.log2(1 / 3) / 3 - math.log2(2 / 3) * 2 / 3, 0.0]
    assert entropy(labels).tolist() == pytest.approx(expected, rel=1e-15)


def test_nothing_appears_when_a_table_is_unusable(tmp_path):
    out = tmp_path / "out"
    path = tmp_path / "q.json"
    entry = json.dumps(json.loads(Path(table_of(path, {"q": (1, [1])})).read_text())["q"])
    path.write_text(f'{{"q": {entry}, "q": {entry}}}')
    with pytest.raises(VisualMemoryError, match="query 'q' comes twice in .*Remove one"):
        analyze(str(path), out_dir=str(out))
    path.write_text("{}")
    with pytest.raises(VisualMemoryError, match="holds no query with a true label"):
        analyze(str(path), out_dir=str(out))
    assert not out.exists() or not list(out.iterdir())


def test_row_groups_are_streamed(tmp_path):
    path = str(tmp_path / "q.json")
    blocks = [make_block(queries=1500, k=5, seed=seed) for seed in (1, 2)]
    write_json(path, blocks, "f")
    analyze(path, out_dir=str(tmp_path / "out"))
    file = pq.ParquetFile(tmp_path / "out" / "predictions.parquet")
    assert file.num_row_groups == 3  # blocks of 1024 queries
    assert file.metadata.row_group(0).column(3).compression == "ZSTD"
    assert file.metadata.num_rows == Neighbors.concatenate(blocks).labels.size * 4
    assert pa.types.is_dictionary(file.schema_arrow.field("voter").type)
