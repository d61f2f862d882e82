"""When a build is published already, when it is a version of its own, and what it keeps."""

import shlex
from functools import reduce

import numpy as np
import pyarrow as pa
import pytest

from vm_core import building, config, encoders, indexing, pruning, recall, storage
from vm_core.building import BuildConfig, BuildPlan
from vm_core.classes import ClassTable
from vm_core.errors import VisualMemoryError
from vm_core.memory import Manifest, Memory
from vm_core.pruning import PruneConfig
from vm_core.records import Embedded, EmbeddingBlock, strings

ROWS, SHARDS = 600, 2


def plan_of(
    root, probes=0, minimum_recall=0.05, partitioning=None, classes=3, named=(), **settings
) -> BuildPlan:
    """A build whose shards are made up; its sources and its encoder are never read."""
    config = BuildConfig.model_validate(
        {
            "memory": str(root),
            "sources": [{"kind": "folder", "path": "none"}],
            "encoder": {"kind": "saved_model", "path": "none"},
            "shards": SHARDS,
            "images": {"thumbnail_pixels": 0},
            "index": {"kind": "exact"},
            "partitioning": {"rows": 80, "probes": probes, **(partitioning or {})},
            "minimum_recall": minimum_recall,
            "recall_queries": 100,
            **settings,
        }
    )
    table = ClassTable.from_keys([named], {}) if named else ClassTable()
    build = f"made-up-{classes}-{'-'.join(named)}"
    before = building.classes_before(str(root), build, table)
    return BuildPlan(str(root), config, "print", table, build, before)


def build(plan: BuildPlan) -> Manifest:
    """The stages of a build, one after the other."""
    finished = building.finished_shards(plan)
    classes = int(plan.fingerprint.split("-")[2])
    entries = [finished.get(shard) or write_shard(plan, shard, classes) for shard in range(SHARDS)]
    index_plan = building.plan_index(plan, entries)
    for bundle in range(index_plan.bundles):
        indexing.sample_shards(index_plan, bundle)
    indexing.train(index_plan)
    counts = [indexing.assign_shards(index_plan, n) for n in range(index_plan.bundles)]
    tasks = indexing.plan_partitions(index_plan, counts)
    built = [indexing.build_partition(index_plan, task) for task in tasks]
    queries, cells = indexing.read_held_out(index_plan, built), [entry.cell for entry in built]
    hits = [indexing.search_held_out(index_plan, queries, cells, entry) for entry in built]
    return building.publish(plan, entries, built, reduce(recall.merge, hits))


def write_shard(plan: BuildPlan, shard: int, classes: int):
    generator = np.random.default_rng(shard)
    count = ROWS // SHARDS
    vectors = generator.normal(size=(count, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    ids = strings([f"{shard}/{n:04d}" for n in range(count)])
    labels = np.arange(shard, ROWS, SHARDS) % classes
    block = EmbeddingBlock(ids, labels, strings(["x"] * count), vectors)
    return building.write_shard_files(plan, shard, [Embedded(block)])


@pytest.fixture(autouse=True)
def no_encoder(monkeypatch):
    """Manifests are read without looking for the model."""
    monkeypatch.setattr(encoders.Encoder, "fingerprint", lambda _: "print")


def test_other_settings_of_a_search_are_another_version(tmp_path):
    one = plan_of(tmp_path, probes=1)
    first = build(one)
    assert (first.version, first.probes) == ("000001", 1) and building.is_published(one)
    asked = [
        (plan_of(tmp_path, probes=4), 4),
        (plan_of(tmp_path, probes=99), len({entry.cell for entry in first.partitions})),
        (plan_of(tmp_path, partitioning={"coverage": 0.5}), None),
        (plan_of(tmp_path, partitioning={"coverage": 1.0}), None),
        (plan_of(tmp_path, probes=1), 1),
    ]
    for number, (plan, probes) in enumerate(asked, start=2):
        assert not building.is_published(plan)
        manifest = build(plan)
        assert manifest.version == f"{number:06d}"
        assert manifest.probes == (probes or manifest.probes)
        assert manifest.content_digest == first.content_digest
        assert manifest.partitions == first.partitions  # nothing is built again
        assert building.is_published(plan)
        assert build(plan).version == manifest.version  # a repeated attempt


def test_a_published_index_must_find_what_is_asked_now(tmp_path):
    build(plan_of(tmp_path, probes=1))
    strict = plan_of(tmp_path, probes=1, minimum_recall=0.97)
    with pytest.raises(VisualMemoryError, match=r"recall@10 is 0\.\d+ .* minimum_recall is 0\.97"):
        building.is_published(strict)
    # What the error says helps.
    more = plan_of(tmp_path, probes=99, minimum_recall=0.97)
    assert not building.is_published(more)
    assert build(more).recall.at[10] >= 0.97 and building.is_published(more)


def test_new_classes_are_measured_where_there_are_more_classes_than_queries(tmp_path):
    """Of 200 classes with 3 rows each, 5 are new; 10 queries alone would hardly meet them."""
    first = build(plan_of(tmp_path, probes=99, classes=195, recall_queries=10))
    assert first.recall.new_classes is None and first.new_classes == []
    again = plan_of(tmp_path, probes=3, classes=195, recall_queries=10)
    assert build(again).partitions == first.partitions  # its own classes are not new to it
    plan = plan_of(tmp_path, probes=99, classes=200, recall_queries=10)
    assert not building.is_published(plan)
    second = build(plan)
    new = second.recall.new_classes
    assert new.labels == second.new_classes == [195, 196, 197, 198, 199]
    assert new.queries == 15 and new.unmeasured == []  # all the rows that they have
    assert new.at == {1: 1.0, 10: 1.0, 100: 1.0} == second.recall.at
    # Now it is the version before itself, and still the same.
    for same in (plan, plan_of(tmp_path, probes=99, classes=200, recall_queries=10)):
        assert building.is_published(same) and build(same) == second
    fewer = build(plan_of(tmp_path, probes=1, classes=200, recall_queries=10))
    assert fewer.partitions == second.partitions and fewer.new_classes == second.new_classes
    assert fewer.recall.new_classes.at[10] < 1


def test_an_index_that_loses_the_new_classes_is_not_published(tmp_path, monkeypatch):
    build(plan_of(tmp_path, probes=99, classes=195, recall_queries=100))
    search = indexing.search_held_out

    def losing(plan, queries, cells, entry):
        hits = search(plan, queries, cells, entry)
        hits.ranks[queries.labels >= 195] = 9_999
        return hits

    monkeypatch.setattr(indexing, "search_held_out", losing)
    plan = plan_of(tmp_path, probes=99, classes=200, recall_queries=100, minimum_recall=0.9)
    with pytest.raises(VisualMemoryError, match=r"the 5 new classes: recall@10 is 0\.000 on 15 he"):
        build(plan)
    assert Memory(str(tmp_path)).manifest.version == "000001"


def test_new_classes_are_known_by_their_keys(tmp_path):
    """A class that sorts first shifts the labels of all others."""
    build(plan_of(tmp_path, classes=2, named=("lily", "rose")))
    manifest = build(plan_of(tmp_path, classes=3, named=("iris", "lily", "rose")))
    assert manifest.new_classes == manifest.recall.new_classes.labels == [0]


def test_scann_over_few_rows_is_searched_exactly(tmp_path):
    """Whole, 600 rows are too few for ScaNN; so are the parts of any memory, if uneven."""
    manifest = build(plan_of(tmp_path, index={"kind": "scann"}, probes=99))
    assert {entry.index.kind for entry in manifest.partitions} == {"exact"}
    assert manifest.recall.at[10] == 1


def prune(memory, rows, settings):
    table = pa.table([rows, np.zeros(len(rows), np.float32)], schema=pruning.ROW_WEIGHTS_SCHEMA)
    pruned = pruning.stage(memory, table, settings)
    return pruning.publish_staged(pruned, memory.manifest.version)


def test_weights_stay_with_their_partitions(tmp_path):
    build(plan_of(tmp_path, probes=1))
    memory = Memory(str(tmp_path))
    removed = memory.rows(0)["row"][:20]
    pruned = prune(memory, removed, {"method": "hard"})
    assert building.is_published(plan_of(tmp_path, probes=1))
    manifest = build(plan_of(tmp_path, probes=3))
    assert (manifest.version, manifest.probes) == ("000003", 3)
    assert manifest.weights == pruned.weights and manifest.content_digest == pruned.content_digest
    assert Memory(str(tmp_path)).open_partition(0).weights.sum() == len(memory.rows(0)) - len(
        removed
    )
    assert build(plan_of(tmp_path, probes=3)).version == "000003"
    opened = Memory(str(tmp_path))
    assert opened.check_files() == len(opened.files())
    (tmp_path / manifest.weights.file(1)).unlink()
    with pytest.raises(VisualMemoryError, match=r"(?s)1 of .* is missing\n.*prune --undo$"):
        opened.check_files()
    undone = pruning.undo(Memory(str(tmp_path)))
    assert undone.weights is None and undone.probes == 3


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "hard", "share": 0.25, "by": "wrong_at_10"},
        {"method": "hard", "threshold": 2.5, "scores": "my scores.csv", "lowest": True},
        {"method": "soft", "gamma_scale": 1.5},
        {
            "method": "hard",
            "by": "shapley",
            "threshold": -0.5,
            "leave_one_out": {"ks": [7, 30], "shapley_k": 5, "exclude_duplicates": True},
        },
    ],
)
def test_a_build_that_drops_the_pruning_says_so_and_how_to_repeat_it(tmp_path, caplog, settings):
    build(plan_of(tmp_path, probes=1))
    memory = Memory(str(tmp_path))
    prune(memory, [0], PruneConfig(memory=memory.root, **settings).recipe)
    assert not caplog.text
    # The same rows in the same partitions, in other folders: the weights still fit.
    assert build(plan_of(tmp_path, probes=1, recall_queries=90)).weights is not None
    assert not caplog.text
    assert build(plan_of(tmp_path, probes=1, partitioning={"rows": 70})).weights is None
    text = caplog.messages[0]
    assert "version 000003 of" in text and "is pruned (1 items removed, 0 weighted)" in text
    command = shlex.split(text.partition("Prune it as well: ")[2])
    assert command[:4] == ["visual-memory", "prune", "--memory", str(tmp_path)]
    assert command[4::2] == ["--set"] * len(command[5::2])
    again = config.load(PruneConfig, None, command[5::2], {"memory": memory.root})
    given = PruneConfig(memory=memory.root, **settings)
    assert again.recipe == given.recipe
    assert again.leave_one_out_settings == given.leave_one_out_settings


def test_a_partition_that_lost_a_file_is_built_again(tmp_path):
    plan = plan_of(tmp_path, probes=1)
    first = build(plan)
    kept, lost = (tmp_path / first.partitions[n].folder / "vectors.npy" for n in (0, 1))
    stamp = kept.stat().st_mtime_ns
    lost.write_bytes(lost.read_bytes()[:-1])
    assert not building.is_published(plan)
    assert build(plan) == first and building.is_published(plan)
    assert kept.stat().st_mtime_ns == stamp
    assert not storage.damaged(str(tmp_path), Memory(str(tmp_path)).files())


@pytest.mark.parametrize("name", ["classes", "centroids"])
def test_a_lost_file_that_all_partitions_share_is_made_again(tmp_path, name):
    plan = plan_of(tmp_path, probes=1)
    first = build(plan)
    memory = Memory(str(tmp_path))
    path = tmp_path / getattr(first, name)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    expected = f"version 000001, are missing or damaged:\n  {getattr(first, name)} is damaged: its "
    with pytest.raises(VisualMemoryError, match=expected):
        memory.check_files()
    path.unlink()
    plan = plan_of(tmp_path, probes=1)  # needs neither
    assert not building.is_published(plan)
    assert build(plan) == first and building.is_published(plan)
    assert not storage.damaged(memory.root, memory.files())


def test_folders_of_other_attempts_go_and_those_of_versions_stay(tmp_path):
    first = build(plan_of(tmp_path, probes=1))
    index = (tmp_path / first.partitions[0].folder).parent
    (index / "partition-00001-0000killed00").mkdir()
    (index / "partition-00001-0000killed00" / "rows.parquet").write_bytes(b"half")
    before = {path.name for path in index.iterdir()}
    assert build(plan_of(tmp_path, probes=2)).version == "000002"
    assert before - {path.name for path in index.iterdir()} == {"partition-00001-0000killed00"}
    for version in ("000001", "000002"):
        assert not storage.damaged(str(tmp_path), Memory(str(tmp_path), version).files())
