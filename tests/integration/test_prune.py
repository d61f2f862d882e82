"""Pruning a memory: what is removed is gone, what is weighted weighs less, and it can be undone."""

import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import commands, prune
from pipelines.evaluate import evaluate
from tests.integration.harness import (
    build_memory,
    configuration,
    count_encoded,
    files_below,
    rows_of,
    table,
)
from vm_core import plugins, pruning
from vm_core.errors import VisualMemoryError
from vm_core.evaluation import EvaluationConfig
from vm_core.exact import top_k
from vm_core.memory import Memory
from vm_core.neighbors import Neighbors
from vm_core.pruning import LeaveOneOutCounts, PruneConfig
from vm_core.records import PADDING, unit_interval
from vm_core.shards import read_shard
from vm_core.tables import write_table
from vm_core.voting import vote

K = 12


@pytest.fixture
def own(memory, tmp_path):
    """A copy of the shared memory, free to change."""
    root = tmp_path / "memory"
    shutil.copytree(memory.root, root)
    return Memory(str(root))


@pytest.fixture(scope="module")
def queries(photos, tmp_path_factory):
    folder = tmp_path_factory.mktemp("queries") / "held-out"
    for species in ("iris", "peony", "rose", "viola"):
        (folder / species).mkdir(parents=True)
        for photo in sorted(Path(photos, species).iterdir())[8:14]:
            shutil.copy(photo, folder / species)
    return folder


def publish(memory, weights, settings):
    """Publishes weights by id."""
    ids = pa.chunked_array([list(weights)], pa.large_string())
    columns = [pruning.rows_of(memory, ids), list(weights.values())]
    table = pa.table(columns, schema=pruning.ROW_WEIGHTS_SCHEMA)
    return pruning.publish_staged(pruning.stage(memory, table, settings), memory.manifest.version)


def counts_of(memory):
    """Leave-one-out counts by the paper's definition, from exact search over all rows."""
    rows = rows_of(memory)
    places, distances = top_k(rows.vectors, rows.vectors, len(rows))
    labels = rows.labels[places]
    counts = LeaveOneOutCounts()
    counts.add(Neighbors(rows.ids, rows.labels, rows.ids[places], labels, distances))
    return counts


def pruned_by(memory, **settings):
    given = {"memory": memory.root, **settings}
    return prune.prune(plugins.validate(PruneConfig, given, "options"))


def test_a_version_with_weights_and_back(own):
    rows = rows_of(own)
    removed, weighted = rows.ids[::3], rows.ids[1::3]
    weights = dict.fromkeys(removed, 0.0) | dict.fromkeys(weighted, 0.5)
    before = files_below(own.root)
    published = publish(own, weights, {"method": "by hand"})
    pruned = Memory(own.root)
    assert pruned.manifest == published and published.version == "000002"
    assert published.content_digest != own.manifest.content_digest
    entry = published.weights
    assert (entry.removed, entry.weighted) == (len(removed), len(weighted))
    assert entry.settings == {"method": "by hand"} and entry.base_version == "000001"
    after = files_below(own.root)
    assert {name: after[name] for name in before if name != "CURRENT"} == {
        name: stamp for name, stamp in before.items() if name != "CURRENT"
    }
    assert set(after) - set(before) == {"versions/000002.json", *entry.files}

    found = pruned.searcher()(rows, K)
    kept = ~np.isin(rows.ids, removed)
    places, distances = top_k(rows.vectors, rows.vectors[kept], K)
    np.testing.assert_array_equal(found.ids, rows.ids[kept][places])
    np.testing.assert_array_equal(found.distances, distances)
    expected = np.where(np.isin(found.ids, weighted), 0.5, 1)
    np.testing.assert_array_equal(found.weights, expected.astype(np.float32))

    # The same weights again are the same version; others take their place.
    again = publish(pruned, dict(reversed(weights.items())), {})
    assert again == published
    other = publish(pruned, {rows.ids[0]: 0.0}, {})
    assert other.version == "000003" and other.weights.base_version == "000001"
    assert (other.weights.removed, other.weights.weighted) == (1, 0)

    undone = pruning.undo(Memory(own.root))
    assert undone.version == "000004" and undone.weights is None
    assert undone.content_digest == own.manifest.content_digest
    same, whole = Memory(own.root).searcher()(rows, K), own.searcher()(rows, K)
    np.testing.assert_array_equal(same.ids, whole.ids)
    assert same.weights is None
    with pytest.raises(VisualMemoryError, match="000004 .* has no weights: there is nothing"):
        pruning.undo(Memory(own.root))


def test_weights_that_cannot_be(own):
    ids = rows_of(own).ids
    with pytest.raises(VisualMemoryError, match="all 32 items would be removed"):
        publish(own, dict.fromkeys(ids, 0.0), {})
    assert Memory(own.root).manifest == own.manifest


@pytest.mark.parametrize("partition_rows", [1000, 9])
def test_pruning_by_the_papers_counts(few_photos, small_encoder, tmp_path, partition_rows):
    """In one partition, and in several of which rows have copies."""
    settings = {"partitioning": {"rows": partition_rows, "spill": "nearest", "probes": 99}}
    memory = build_memory(configuration(tmp_path / "m", small_encoder, few_photos, **settings))
    assert (len(memory.manifest.partitions) > 1) == (partition_rows == 9)
    counts = counts_of(memory)
    ranked = sorted(counts.wrong_at_10.values())
    threshold = ranked[len(ranked) * 2 // 3]
    hard = pruned_by(memory, method="hard", by="wrong_at_10", threshold=threshold)
    excluded = {id for id, count in counts.wrong_at_10.items() if count >= threshold}
    assert hard.published == "000002" and 0 < len(excluded) < len(rows_of(memory))
    rows = rows_of(memory)
    found = Memory(memory.root).searcher()(rows, 40)
    assert set(found.ids[found.labels != PADDING]) == set(rows.ids) - excluded
    assert (found.labels != PADDING).sum(axis=1).tolist() == [32 - len(excluded)] * 32

    # The counts are those of the whole memory, though the current version is pruned.
    soft = pruned_by(memory, method="soft")
    assert soft.published == "000003" and soft.memory.manifest.weights.removed == 0
    found = Memory(memory.root).searcher()(rows, 40)
    gamma = pruning.soft_weights(counts)
    expected = [gamma.get(id, 1.0) for id in found.ids[:, :32].ravel()]
    np.testing.assert_allclose(found.weights[:, :32].ravel(), expected, rtol=1e-6)


def test_what_it_changes_is_measured_on_the_tuning_queries_alone(own, queries, tmp_path):
    evaluation = {
        "queries": [{"kind": "folder", "path": str(queries)}],
        "tuning_share": 0.4,
        "k": K,
        "query_shards": 2,
    }
    settings = {"method": "soft", "evaluation": evaluation | {"output": str(tmp_path / "kept")}}
    dry = prune.prune(plugins.validate(PruneConfig, {"memory": own.root, **settings}, ""), (), True)
    assert dry.published is None and Memory(own.root).manifest == own.manifest
    real = pruned_by(own, **settings)
    assert real.published == "000002" and (real.before, real.after) == (dry.before, dry.after)
    assert not files_below(Path(own.root, "work"))
    assert real.before["queries"] == sum(
        unit_interval(f"held-out/{path.parent.name}/{path.name}", "tuning") < 0.4
        for path in queries.glob("*/*")
    )

    # An evaluation of the published versions says the same.
    for version, measured in (("000001", real.before), ("000002", real.after)):
        config = {"memory": own.root, "version": version, "output": str(tmp_path / version)}
        plan, results = evaluate(EvaluationConfig.model_validate({**config, **evaluation}))
        assert results["tuning"] == measured
    neighbors = table(f"{plan.output}/neighbors-*.parquet").to_pylist()
    predictions = table(f"{plan.output}/predictions-*.parquet").to_pylist()
    ranks = {p["query_id"]: p["label"] for p in predictions if (p["voter"], p["k"]) == ("rank", K)}
    for row in neighbors:
        of_row = [
            np.array([row[f"neighbor_{name}"]]) for name in ("labels", "distances", "weights")
        ]
        assert (of_row[2] != 1).any()
        votes = vote(of_row[0], of_row[1], ["rank"], multiplier=of_row[2])["rank"]
        assert ranks[row["query_id"]] == votes.predictions[0, -1]


def test_queries_are_encoded_once(own, queries, tmp_path, monkeypatch):
    encoded = count_encoded(monkeypatch)
    evaluation = {"queries": [{"kind": "folder", "path": str(queries)}], "tuning_share": 0.5}
    for output in ({}, {"output": str(tmp_path / "kept")}):
        encoded.clear()
        pruned = pruned_by(own, method="soft", evaluation=evaluation | output)
        assert pruned.before and pruned.after and sum(encoded) == 24
        assert not files_below(Path(own.root, "work"))
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"before", "after"}
    assert not [*(tmp_path / "kept").rglob("*.arrow")]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": 0}, "evaluation: k = 0: .* greater than or equal to 1"),
        ({"temperature": 0.001}, "evaluation: softmax temperature 0.001 is out of range"),
        ({"queries": [{"kind": "folder", "path": "/nowhere"}]}, "'/nowhere' is not a folder"),
        ({"queries": [], "embeddings": "/nowhere/*"}, "no file matches '/nowhere/\\*'"),
        ({"tuning_share": 0}, "tuning_share = 0 none .* Give a share above 0"),
        ({"output": "/proc/nowhere"}, "cannot write to '/proc/nowhere'"),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused_before_any_work(
    own, queries, monkeypatch, given, message
):
    monkeypatch.setattr("pipelines.running.run", lambda *_: pytest.fail("work was started"))
    evaluation = {"queries": [{"kind": "folder", "path": str(queries)}], **given}
    with pytest.raises(VisualMemoryError, match=message):
        pruned_by(own, method="soft", evaluation=evaluation)


def test_scores_of_a_file(own, tmp_path):
    ids = rows_of(own).ids
    quality = np.linspace(0, 1, len(ids))
    path = str(tmp_path / "quality.parquet")
    write_table(path, pa.table({"id": pa.array(ids, pa.string()), "quality": quality}))
    settings = {"method": "hard", "scores": path, "score_column": "quality", "lowest": True}
    result = pruned_by(own, **settings, share=0.25)
    entry = Memory(own.root).manifest.weights
    recorded = pa.concat_tables([pq.read_table(own.path(name)) for name in entry.files])
    assert recorded["id"].to_pylist() == ids[:8].tolist() and result.before is None
    expected = {"method": "hard", "by": "quality", "scores": path, "lowest": True, "share": 0.25}
    assert entry.settings == expected
    write_table(path, pa.table({"id": ["nobody", ids[0]], "quality": [0.5, -0.7]}))
    with pytest.raises(VisualMemoryError, match="1 of 2 ids are not in .*'nobody'"):
        pruned_by(own, **settings, share=0.25)
    with pytest.raises(VisualMemoryError, match=f"needs counts, and item '{ids[0]}' has -0.7"):
        pruned_by(own, method="soft", scores=path, score_column="quality")
    assert Memory(own.root).manifest.version == "000002"


@pytest.mark.parametrize("partition_rows", [1000, 9])
def test_rows_of_ids(few_photos, small_encoder, tmp_path, partition_rows):
    settings = {"partitioning": {"rows": partition_rows, "spill": "nearest", "probes": 99}}
    memory = build_memory(configuration(tmp_path / "m", small_encoder, few_photos, **settings))
    stored = [read_shard(memory.path(shard.embeddings)).ids for shard in memory.manifest.shards]
    numbers = {id: number for number, id in enumerate(np.concatenate(stored))}
    generator = np.random.default_rng(0)
    for known in (0, 1, 9, 32):
        ids = [*generator.permutation(list(numbers))[:known].tolist(), "nobody", ""]
        generator.shuffle(ids)
        # As a table of very many ids comes: in pieces.
        pieces = pa.chunked_array([ids[:4], [], ids[4:]], pa.large_string())
        rows = pruning.rows_of(memory, pieces)
        assert rows.tolist() == [numbers.get(id, -1) for id in ids]
    assert pruning.rows_of(memory, pa.chunked_array([], pa.large_string())).tolist() == []


def test_a_damaged_table_of_rows_is_no_reason_to_prune_others(own, tmp_path):
    path, ids = Path(own.path(own.manifest.partitions[0].folder), "rows.parquet"), rows_of(own).ids
    write_table(str(tmp_path / "s.parquet"), pa.table({"id": ids, "score": np.arange(len(ids))}))
    rows = pq.read_table(path)
    pq.write_table(rows.set_column(0, "row", pa.array(rows["row"].to_pylist()[::-1])), path)
    for settings in ({"scores": str(tmp_path / "s.parquet"), "share": 0.25}, {"share": 0.25}):
        with pytest.raises(VisualMemoryError, match="rows.parquet is damaged: "):
            pruned_by(own, method="hard", **settings)
    assert Memory(own.root).manifest == own.manifest and not list(Path(own.root).glob("weights"))


def test_command(own, queries, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    arguments = ["--memory", own.root, "--method", "hard"]

    def run(*more):
        status = commands.main(prune.command, [*arguments, *more])
        return status, capsys.readouterr()

    status, said = run()
    assert status == 0 and "0 removed, 0 weighted, of 32" in said.out
    assert "No item is as bad as that. Lower the threshold" in said.out
    status, said = run("--share", "0.1")
    assert status == 0 and "3 removed, 0 weighted, of 32" in said.out
    assert "No accuracy was measured. Give labelled images with --queries PATH" in said.out
    assert "000002, made from 000001" in said.out
    some = ["--queries", str(queries), "--set", "evaluation.tuning_share=0.5"]
    status, said = run("--share", "0.2", "--dry-run", *some)
    assert status == 0 and "none published, 000001 is as it was" in said.out
    assert "tuning queries" in said.out and "after, k=10" in said.out
    assert Memory(own.root).manifest.version == "000002"
    status, said = run("--undo")
    assert status == 0 and own.manifest.content_digest in said.out.replace("\n", "")
    assert Memory(own.root).manifest.weights is None
    status, said = run("--by", "shapley")
    assert status == 2 and "give a threshold or a share to prune by shapley" in said.err
    status, said = run("--share", "0.2", "--set", "evaluation.tuning_share=0.0", *some[:2])
    assert status == 2 and "queries is a tuning query" in said.err
    assert Memory(own.root).manifest.weights is None


@pytest.mark.parametrize("partition_rows", [1000, 9])
def test_what_is_removed_is_no_query_of_leave_one_out(
    few_photos, small_encoder, tmp_path, partition_rows
):
    """As if it had never been there; what weighs less is one."""
    settings = {"partitioning": {"rows": partition_rows, "spill": "nearest", "probes": 99}}
    memory = build_memory(configuration(tmp_path / "m", small_encoder, few_photos, **settings))
    stored, path = rows_of(memory), str(tmp_path / "scores.parquet")
    write_table(path, pa.table({"id": stored.ids, "score": 1 * (np.arange(32) % 3 == 0)}))

    def evaluated(output):
        given = {"memory": memory.root, "leave_one_out": True, "k": 5, "tuning_share": 0.3}
        given |= {"output": str(tmp_path / output)}
        return evaluate(EvaluationConfig.model_validate(given))[1]["queries"]

    pruned_by(memory, method="soft", scores=path)
    totals = evaluated("soft")
    assert totals["read"] == totals["embedded"] == 32
    pruned_by(memory, method="hard", scores=path, threshold=1)
    totals = evaluated("hard")
    kept = stored.take(np.arange(32) % 3 != 0)
    assert totals["read"] == totals["embedded"] == totals["test"] + totals["tuning"] == len(kept)
    found = table(f"{tmp_path}/hard/neighbors-*.parquet").sort_by("query_id").to_pydict()
    assert found["query_id"] == kept.ids.tolist()
    places, _ = top_k(kept.vectors, kept.vectors, 6)
    others = [[p for p in row if p != own][:5] for own, row in enumerate(places.tolist())]
    assert found["neighbor_ids"] == kept.ids[np.array(others)].tolist()
