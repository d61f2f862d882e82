"""Evaluations: what is measured, what is written, and that Beam adds nothing to it."""

import csv
import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import tensorflow as tf

from pipelines.evaluate import evaluate
from tests.integration.harness import (
    build_memory,
    configuration,
    count_encoded,
    files_below,
    rows_of,
    run_python,
    table,
    write_config,
)
from vm_core import embedding, sealed, shards
from vm_core.analysis import analyze
from vm_core.embedding import BatchedEncoder
from vm_core.errors import VisualMemoryError
from vm_core.evaluation import EvaluationConfig, export_neighbors
from vm_core.exact import top_k
from vm_core.metrics import EvaluationMetrics
from vm_core.neighbors import NEIGHBORS_SCHEMA, Neighbors, from_arrow, read_json
from vm_core.predictions import PREDICTIONS_SCHEMA
from vm_core.pruning import LeaveOneOutCounts
from vm_core.records import PADDING, UNKNOWN, EmbeddingBlock, strings, unit_interval
from vm_core.voting import VOTERS, vote

K = 12


@pytest.fixture(scope="module")
def queries(photos, tmp_path_factory):
    """Photos of the memory's species and of one that it does not hold, and a broken file."""
    folder = tmp_path_factory.mktemp("queries") / "held-out"
    for species in ("iris", "peony", "rose", "viola", "phlox"):
        (folder / species).mkdir(parents=True)
        for photo in sorted(Path(photos, species).iterdir())[8:16]:
            shutil.copy(photo, folder / species)
    (folder / "iris" / "broken.png").write_bytes(b"")
    return folder


def run(memory, output, *beam_arguments, **settings):
    config = {"memory": memory.root, "output": str(output), "k": K, "query_shards": 3, **settings}
    return evaluate(EvaluationConfig.model_validate(config), beam_arguments)


def folder_source(path):
    return [{"kind": "folder", "path": str(path)}]


@pytest.fixture(scope="module")
def evaluated(memory, queries, tmp_path_factory):
    """An evaluation on a folder; several splits, three shards of queries."""
    output = tmp_path_factory.mktemp("evaluated") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vm_core.sources.folder.IMAGES_PER_SPLIT", 6)
        return run(
            memory, output, queries=folder_source(queries), max_failure_share=0.1, tuning_share=0.3
        )


def neighbors_in(output) -> Neighbors:
    found = Neighbors.concatenate(
        [from_arrow(pq.read_table(path)) for path in sorted(Path(output).glob("neighbors-*"))]
    )
    return found.take(np.argsort(found.query_ids))


def predictions_in(output, voter: str) -> dict[str, list[int]]:
    """Query id to its prediction at every k."""
    rows = table(f"{output}/predictions-*.parquet").to_pylist()
    found: dict[str, list[int]] = {}
    for row in rows:
        if row["voter"] == voter:
            found.setdefault(row["query_id"], []).append(row["label"])
            assert row["k"] == len(found[row["query_id"]])
    return found


def test_equals_the_same_computation_without_beam(memory, queries, evaluated):
    plan, results = evaluated
    source = plan.config.queries[0]
    assert len(source.listing().splits) == 1  # one here, seven in the run
    settings = memory.encoder()
    encoder = BatchedEncoder(settings.load(), settings.batch_size)
    embedded = embedding.embed_records(
        source.records(source.listing().splits[0], memory.classes),
        lambda: encoder,
        settings,
        plan.config.images,
    )
    block = embedded.block.take(np.argsort(embedded.block.ids))
    assert len(block) == 40 and len(embedded.rejected) == 1

    stored = rows_of(memory)
    rows, distances = top_k(block.vectors, stored.vectors, K)
    found = neighbors_in(plan.output)
    assert len(list(Path(plan.output).glob("neighbors-*"))) == 3
    np.testing.assert_array_equal(found.query_ids, block.ids)
    np.testing.assert_array_equal(found.query_labels, block.labels)
    np.testing.assert_array_equal(found.ids, stored.ids[rows])
    np.testing.assert_array_equal(found.labels, stored.labels[rows])
    np.testing.assert_array_equal(found.distances, distances)

    votes = vote(found.labels, found.distances)
    for voter in VOTERS:
        predicted = predictions_in(plan.output, voter)
        np.testing.assert_array_equal([predicted[id] for id in block.ids], votes[voter].predictions)
    tuning = np.array([unit_interval(id, "tuning") < 0.3 for id in block.ids])
    assert 0 < tuning.sum() < len(block) - 1
    for name, chosen in (("tuning", tuning), ("test", ~tuning)):
        metrics = EvaluationMetrics(K, memory.classes.labels)
        metrics.add(found.take(chosen))
        assert results[name] == json.loads(json.dumps(metrics.result()))
    for voter, chosen in results["chosen_k"].items():
        right = votes[voter].predictions == block.labels[:, None]
        assert chosen["k"] == right[tuning].mean(axis=0).argmax() + 1
        assert chosen["accuracy"] == pytest.approx(right[~tuning][:, chosen["k"] - 1].mean())


def test_several_workers_and_other_shards(memory, queries, evaluated, tmp_path):
    plan, results = evaluated
    other, found = run(
        memory,
        tmp_path,
        "--direct_num_workers=2",
        "--direct_running_mode=multi_threading",
        queries=folder_source(queries),
        max_failure_share=0.1,
        tuning_share=0.3,
        query_shards=5,
    )
    for name in ("test", "tuning", "chosen_k", "queries"):
        assert found[name] == results[name]
    ours, theirs = neighbors_in(other.output), neighbors_in(plan.output)
    for name in ("query_ids", "query_labels", "ids", "labels", "distances"):
        np.testing.assert_array_equal(getattr(ours, name), getattr(theirs, name))
    assert (tmp_path / "accuracy.csv").read_bytes() == Path(plan.path("accuracy.csv")).read_bytes()
    assert (tmp_path / "per_class.csv").read_bytes() == Path(
        plan.path("per_class.csv")
    ).read_bytes()


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading"])
def test_several_partitions_find_what_one_finds(
    mode, small_encoder, few_photos, queries, evaluated, tmp_path
):
    """With one partition the neighbours stay where they are found; here they are sent on."""
    divided = build_memory(
        configuration(
            tmp_path / "memory", small_encoder, few_photos, partitioning={"rows": 12, "probes": 99}
        )
    )
    assert len(divided.manifest.partitions) > 2
    plan, results = evaluated
    assert len(plan.memory.manifest.partitions) == 1
    arguments = (f"--direct_running_mode={mode}", "--direct_num_workers=2")
    other, found = run(
        divided,
        tmp_path / "out",
        *arguments,
        queries=folder_source(queries),
        max_failure_share=0.1,
        tuning_share=0.3,
    )
    for name in ("test", "tuning", "chosen_k", "queries"):
        assert found[name] == results[name]
    for name in ("neighbors", "predictions", "quarantine", "leaks"):
        for shard in range(3):
            ours, theirs = (Path(each.shard_file(name, shard)) for each in (other, plan))
            assert ours.read_bytes() == theirs.read_bytes()


def test_counts_and_unknown_classes(evaluated):
    plan, results = evaluated
    queries = results["queries"]
    assert queries["read"] == 41 and queries["embedded"] == 40 and queries["quarantined"] == 1
    assert queries["tuning"] + queries["test"] == 40 and queries["duplicates"] == 0
    # Phlox is not in the memory: its 8 photos are counted, and are wrong.
    assert results["test"]["unknown"] + results["tuning"]["unknown"] == 8
    found = neighbors_in(plan.output)
    phlox = np.array(["/phlox/" in id for id in found.query_ids])
    np.testing.assert_array_equal(found.query_labels == UNKNOWN, phlox)
    (row,) = table(f"{plan.output}/quarantine-*.parquet").to_pylist()
    assert row == {
        "id": "held-out/iris/broken.png",
        "source": "held-out",
        "reason": "the file is empty (0 bytes)",
        "images": 1,
    }


def test_what_is_written(memory, evaluated):
    plan, results = evaluated
    names = {path.name for path in Path(plan.output).iterdir()}
    kinds = ("neighbors", "predictions", "leaks", "quarantine")
    shard_names = {f"{kind}-{shard:05d}-of-00003.parquet" for kind in kinds for shard in range(3)}
    assert names - {"work"} == shard_names | {
        "accuracy.csv",
        "metrics.json",
        "per_class.csv",
        "report.html",
    }
    assert not list(Path(plan.output).glob("work/*"))
    stored = sealed.verify(Path(plan.path("metrics.json")).read_bytes())
    assert stored == results
    assert results["memory"]["rows"] == 32 and results["memory"]["classes"] == 4
    assert results["memory"]["content_digest"] == memory.manifest.content_digest
    assert results["k"] == K and results["fixed_k"] == [1, 10]
    for shard in range(3):
        assert pq.read_schema(plan.shard_file("neighbors", shard)).equals(NEIGHBORS_SCHEMA)
        assert pq.read_schema(plan.shard_file("predictions", shard)).equals(PREDICTIONS_SCHEMA)
    with open(plan.path("accuracy.csv")) as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * len(VOTERS) * K
    for row in rows:
        values = results[row["queries"]]["accuracy_at_k"][row["voter"]]
        assert float(row["accuracy"]) == values[int(row["k"]) - 1]
    with open(plan.path("per_class.csv")) as file:
        rows = list(csv.DictReader(file))
    assert {row["class"] for row in rows} == {"iris", "peony", "rose", "viola"}
    for row in rows:
        if row["k"] == "10":
            expected = results["test"]["per_class"][row["label"]]["accuracy"][row["voter"]]
            assert float(row["accuracy"]) == expected


def test_a_second_run_does_nothing(memory, queries, evaluated, monkeypatch):
    plan, results = evaluated
    before = files_below(plan.output)
    calls = count_encoded(monkeypatch)
    monkeypatch.setattr("vm_core.sources.folder.IMAGES_PER_SPLIT", 6)
    again = evaluate(plan.config)[1]
    assert again == results and calls == [] and files_below(plan.output) == before


def test_exported_neighbours_analysed_give_the_same_accuracies(memory, queries, tmp_path):
    plan, results = run(
        memory, tmp_path, queries=folder_source(queries), max_failure_share=0.1, tuning_share=0
    )
    assert results["chosen_k"] is None and results["tuning"] is None
    export_neighbors(plan, str(tmp_path / "neighbors.json"))
    analysed = analyze(str(tmp_path / "neighbors.json"), out_dir=str(tmp_path / "analysis"))
    assert analysed["accuracy_at_k"] == results["test"]["accuracy_at_k"]
    assert analysed["reliability_at_k"] == results["test"]["reliability_at_k"]


def test_leave_one_out(memory, tmp_path):
    plan, results = run(memory, tmp_path, leave_one_out=True, k=40, tuning_share=0)
    found, stored = neighbors_in(tmp_path), rows_of(memory)
    np.testing.assert_array_equal(found.query_ids, stored.ids)
    np.testing.assert_array_equal(found.query_labels, stored.labels)
    assert results["queries"]["read"] == 32 and results["leave_one_out"]
    # 31 others for each, and padding up to 40.
    np.testing.assert_array_equal((found.labels != PADDING).sum(axis=1), 31)
    assert (found.labels[:, 31:] == PADDING).all() and np.isinf(found.distances[:, 31:]).all()
    for id, ids in zip(found.query_ids, found.ids, strict=True):
        assert set(ids[:31]) == set(stored.ids) - {id}
    for predicted in predictions_in(tmp_path, "rank").values():
        assert len(predicted) == 40 and len(set(predicted[30:])) == 1
    export_neighbors(plan, str(tmp_path / "neighbors.json"))
    row = json.loads((tmp_path / "neighbors.json").read_text())[stored.ids[0]]
    # As in the paper's tables an item is its own first neighbour; analyze takes it out.
    assert row["neighbor_image_ids"] == [stored.ids[0], *found.ids[0, :31]]
    assert row["neighbor_distances"][0] == 0
    counts = LeaveOneOutCounts()
    for block in read_json(str(tmp_path / "neighbors.json")):
        counts.add(block)
    wrong = (found.labels != found.query_labels[:, None]) & (found.labels != PADDING)
    assert counts.wrong_at_max == Counter(found.ids[wrong])


def test_nothing_of_an_earlier_evaluation_stays(memory, tmp_path, monkeypatch):
    output = tmp_path / "[out]"  # no pattern
    settings = {"leave_one_out": True, "k": 1}
    for shards_of_queries in (3, 2):
        run(memory, output, query_shards=shards_of_queries, **settings)
    np.testing.assert_array_equal(neighbors_in(output).query_ids, rows_of(memory).ids)
    assert len(list(output.glob("*-of-*.parquet"))) == 2 * 4
    monkeypatch.setattr("pipelines.running.run", lambda *_: None)  # a run that was killed
    with pytest.raises(VisualMemoryError, match="without results"):
        run(memory, output, query_shards=2, leave_one_out=True, k=2)
    assert not (output / "metrics.json").exists()


def test_the_memory_s_own_shards_as_queries(memory, tmp_path):
    pattern = f"{memory.root}/builds/*/embeddings-*.tfrecord"
    _, results = run(memory, tmp_path, embeddings=pattern, tuning_share=0)
    found, stored = neighbors_in(tmp_path), rows_of(memory)
    np.testing.assert_array_equal(found.query_ids, stored.ids)
    assert (found.ids[:, 0] == stored.ids).all()  # here the query itself is a neighbour
    assert results["test"]["accuracy_at_k"]["plurality"][0] == 1
    assert "data:image/jpeg" in (tmp_path / "report.html").read_text()


@pytest.fixture(scope="module")
def other_memory(photos, small_encoder, tmp_path_factory):
    """A memory with other classes, so that its labels mean something else."""
    folder = tmp_path_factory.mktemp("other")
    for species in ("aquilegia", "iris", "phlox", "viola"):
        (folder / "more" / species).mkdir(parents=True)
        for photo in sorted(Path(photos, species).iterdir())[:4]:
            shutil.copy(photo, folder / "more" / species)
    return build_memory(configuration(folder / "memory", small_encoder, folder / "more"))


def test_the_shards_of_another_memory_have_their_labels_translated(memory, other_memory, tmp_path):
    pattern = f"{other_memory.root}/builds/*/embeddings-*.tfrecord"
    _, results = run(memory, tmp_path, embeddings=pattern, tuning_share=0)
    found = neighbors_in(tmp_path)
    species = [id.split("/")[1] for id in found.query_ids]
    expected = {"iris": 0, "viola": 3, "aquilegia": UNKNOWN, "phlox": UNKNOWN}
    np.testing.assert_array_equal(found.query_labels, [expected[name] for name in species])
    assert results["test"]["unknown"] == 8 and results["queries"]["test"] == 16


def _numbered(folder, path, labels, encoder_fingerprint, seed):
    """An embedding shard beside no class table: its labels are plain numbers."""
    vectors = np.random.default_rng(seed).normal(size=(len(labels), 16))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = strings([f"{path}/{number}" for number in range(len(labels))])
    block = EmbeddingBlock(
        ids, np.array(labels), strings([path] * len(labels)), vectors.astype(np.float32)
    )
    shards.write_shard(f"{folder}/{path}.tfrecord", block, encoder_fingerprint, "float32")


def test_plain_labels_that_the_memory_does_not_have_are_unknown(memory, tmp_path):
    fingerprint = memory.manifest.encoder_fingerprint
    _numbered(tmp_path, "numbers", [0, 3, 4, 99], fingerprint, seed=1)
    _, results = run(
        memory, tmp_path / "out", embeddings=f"{tmp_path}/numbers.tfrecord", tuning_share=0
    )
    np.testing.assert_array_equal(
        neighbors_in(tmp_path / "out").query_labels, [0, 3, UNKNOWN, UNKNOWN]
    )
    assert results["test"]["unknown"] == 2


@pytest.fixture(scope="module")
def numbered_memory(few_photos, small_encoder, tmp_path_factory):
    """A memory whose labels are plain integers, 1 and 2."""
    folder = tmp_path_factory.mktemp("numbered")
    _write_tfrecord(folder / "train.tfrecord", few_photos, {"iris": 1, "rose": 2})
    source = {"kind": "tfrecord", "path": str(folder / "train.tfrecord")}
    return build_memory(configuration(folder / "memory", small_encoder, source))


def _write_tfrecord(path, folder, labels):
    def feature(value):
        if isinstance(value, bytes):
            return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))
        return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))

    with tf.io.TFRecordWriter(str(path)) as writer:
        for species, label in labels.items():
            for photo in sorted(Path(folder, species).iterdir()):
                features = {
                    "image/encoded": feature(photo.read_bytes()),
                    "image/class/label": feature(label),
                    "image/filename": feature(f"{species}/{photo.name}".encode()),
                }
                example = tf.train.Example(features=tf.train.Features(feature=features))
                writer.write(example.SerializeToString())


def test_queries_with_numbers_that_the_memory_does_not_have_are_unknown(
    numbered_memory, few_photos, tmp_path
):
    _write_tfrecord(tmp_path / "test.tfrecord", few_photos, {"iris": 1, "peony": 3})
    source = {"kind": "tfrecord", "path": str(tmp_path / "test.tfrecord")}
    _, results = run(numbered_memory, tmp_path / "out", queries=[source], tuning_share=0)
    assert results["queries"]["test"] == 16 and results["test"]["unknown"] == 8
    assert results["test"]["accuracy_at_k"]["plurality"][0] == 0.5  # the irises find themselves
    assert list(results["test"]["per_class"]) == ["1"]


def test_numbers_of_another_memory_name_no_class_of_this_one(memory, numbered_memory, tmp_path):
    pattern = f"{numbered_memory.root}/builds/*/embeddings-*.tfrecord"
    _, results = run(memory, tmp_path, embeddings=pattern, tuning_share=0)
    assert results["test"]["unknown"] == 16
    _, results = run(numbered_memory, tmp_path / "own", leave_one_out=True, tuning_share=0)
    assert results["test"]["unknown"] == 0 and set(results["test"]["per_class"]) == {"1", "2"}


def test_shards_of_another_encoder_are_refused(memory, tmp_path):
    _numbered(tmp_path, "strange", [0, 1], "0123456789abcdef", seed=2)
    with pytest.raises(VisualMemoryError, match="fingerprint '0123456789abcdef'") as raised:
        run(memory, tmp_path / "out", embeddings=f"{tmp_path}/strange.tfrecord")
    assert "Traceback" not in str(raised.value) and "while running" not in str(raised.value)


def test_a_damaged_shard_is_one_clean_message(memory, tmp_path):
    _numbered(tmp_path, "cut", [0, 1], memory.manifest.encoder_fingerprint, seed=3)
    path = tmp_path / "cut.tfrecord"
    path.write_bytes(path.read_bytes()[:-10])
    for mode in ("in_memory", "multi_threading"):
        arguments = (f"--direct_running_mode={mode}", "--direct_num_workers=2")
        with pytest.raises(VisualMemoryError, match="restore it or write it again") as raised:
            run(memory, tmp_path / mode, *arguments, embeddings=str(path))
        assert "Traceback" not in str(raised.value) and "while running" not in str(raised.value)


def test_fewer_rows_than_neighbours(memory, queries, tmp_path):
    _, results = run(
        memory,
        tmp_path,
        queries=folder_source(queries),
        k=50,
        max_failure_share=0.1,
        fixed_k=[1, 32, 50, 60],
    )
    found = neighbors_in(tmp_path)
    assert found.k == 50 and (found.labels[:, 32:] == PADDING).all()
    assert results["fixed_k"] == [1, 32, 50]
    for values in results["test"]["accuracy_at_k"].values():
        assert len(values) == 50 and len(set(values[31:])) == 1
    assert results["test"]["reliability_at_k"][32:] == [None] * 18


def test_one_query(memory, queries, tmp_path):
    photo = sorted((queries / "rose").iterdir())[0]
    (tmp_path / "one" / "rose").mkdir(parents=True)
    shutil.copy(photo, tmp_path / "one" / "rose")
    for share in (0.0, 0.999999):
        _, results = run(
            memory,
            tmp_path / f"{share}",
            queries=folder_source(tmp_path / "one"),
            tuning_share=share,
        )
        assert results["queries"]["test"] == (1 if share == 0 else 0)


def test_too_many_unusable_queries(memory, queries, tmp_path, monkeypatch):
    source = folder_source(queries)
    with pytest.raises(VisualMemoryError, match=r"1 of 41 images \(2.4%\) are unusable") as raised:
        run(memory, tmp_path, queries=source)
    assert f"{tmp_path}/quarantine-*.parquet" in str(raised.value)
    assert not (tmp_path / "metrics.json").exists()
    calls = count_encoded(monkeypatch)
    _, results = run(memory, tmp_path, queries=source, max_failure_share=0.03)
    assert calls == [] and results["queries"]["quarantined"] == 1


@pytest.mark.slow
def test_as_a_module_over_two_processes(memory, queries, evaluated, tmp_path):
    """The classes of the module are then those of __main__, and the workers must find them."""
    _, results = evaluated
    config = write_config(
        tmp_path / "config.yaml",
        {
            "tuning_share": 0.3,
            "max_failure_share": 0.1,
            "query_shards": 3,
            "queries": folder_source(queries),
        },
    )
    arguments = ["--config", config, "--memory", memory.root, "--out", str(tmp_path / "out")]
    arguments += ["--k", str(K), "--export-neighbors", str(tmp_path / "neighbors.json")]
    arguments += ["--direct_num_workers=2", "--direct_running_mode=multi_processing"]
    done = run_python("-m", "pipelines.evaluate", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["test"] == results["test"] and found["tuning"] == results["tuning"]
    assert len(json.loads((tmp_path / "neighbors.json").read_text())) == 40
    assert "quarantined" in done.stdout and "rank" in done.stdout


def test_queries_that_the_memory_holds_are_reported_as_leaks(memory, tmp_path):
    pattern = f"{memory.root}/builds/*/embeddings-*.tfrecord"
    config = EvaluationConfig(memory=memory.root, embeddings=pattern, output=str(tmp_path), k=1)
    _, results = evaluate(config)
    assert results["queries"]["leaks"] == 32  # they stand in the memory under their own ids
    leaks = table(f"{tmp_path}/leaks-*.parquet").to_pylist()
    assert {(leak["query_id"], leak["item_id"]) for leak in leaks} == {
        (id, id) for id in rows_of(memory).ids
    }
    run(memory, tmp_path / "loo", leave_one_out=True, k=1)
    leaks = table(f"{tmp_path}/loo/leaks-*.parquet").to_pylist()
    assert all(leak["query_id"] != leak["item_id"] for leak in leaks)
    copy = tmp_path / "copy"
    block = rows_of(memory)
    renamed = dataclasses.replace(block, ids=np.array([f"x{id}" for id in block.ids], object))
    shards.write_shard(str(copy), renamed, memory.manifest.encoder_fingerprint, "float32")
    config = EvaluationConfig(
        memory=memory.root, embeddings=str(copy), output=str(tmp_path / "2"), k=5
    )
    _, results = evaluate(config)
    assert results["queries"]["leaks"] == len(block)
    leaks = table(f"{tmp_path}/2/leaks-*.parquet").to_pylist()
    pairs = {(leak["query_id"], leak["item_id"]) for leak in leaks}
    assert pairs >= {(f"x{id}", id) for id in block.ids}
    assert all(leak["distance"] < 0.01 for leak in leaks)
