"""Builds: what a rerun does again, what a killed run leaves, and that the counts add up."""

import dataclasses
import os
import shutil
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest

from pipelines.build import build
from tests.integration.harness import (
    SHARDS,
    build_memory,
    configuration,
    count_encoded,
    files_below,
    rows_of,
    run_python,
    shard_contents,
    table,
    write_config,
)
from vm_core import building, embedding, indexing, memory, recall
from vm_core.building import BuildConfig
from vm_core.embedding import BatchedEncoder
from vm_core.errors import VisualMemoryError
from vm_core.memory import Memory
from vm_core.partitioning import Partitioning
from vm_core.recall import HeldOut
from vm_core.records import shard_of, unit_interval


@pytest.fixture
def inputs(few_photos, tmp_path):
    """A copy of the photos that a test may change."""
    return shutil.copytree(few_photos, tmp_path / "few")


def test_equals_the_same_computation_without_beam(memory, tmp_path, monkeypatch):
    monkeypatch.setattr("vm_core.sources.folder.IMAGES_PER_SPLIT", 5)
    config = BuildConfig.model_validate({**memory.manifest.config, "memory": str(tmp_path)})
    plan, splits = building.plan_build(config)
    assert len(splits) > 1

    records = [
        record
        for number, split in splits
        for record in config.sources[number].records(split, plan.classes)
    ]
    encoder = BatchedEncoder(config.encoder.load(), config.encoder.batch_size)
    everything = embedding.embed_records(records, lambda: encoder, config.encoder, config.images)
    block = everything.block.take(np.argsort(everything.block.ids))
    stored = rows_of(memory)
    assert sum(shard.embedded > 0 for shard in memory.manifest.shards) > 1
    for name in ("ids", "labels", "sources", "vectors"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(block, name))
    norms = np.linalg.norm(block.vectors.astype(np.float64), axis=1)
    np.testing.assert_allclose(norms, 1, atol=1e-6)
    assert memory.thumbnails(block.ids) == dict(zip(block.ids, block.thumbnails, strict=True))

    # The steps one after another, by hand and backwards, publish the same content.
    parts = [
        part
        for numbered in reversed(splits)
        for part in embedding.by_shard(
            embedding.embed_split(plan.embedding, numbered, lambda: encoder), SHARDS
        )
    ]
    entries = [
        building.write_shard_files(plan, shard, [part for owner, part in parts if owner == shard])
        for shard in reversed(range(SHARDS))
    ]
    index_plan = building.plan_index(plan, entries)
    counts = [indexing.assign_shards(index_plan, bundle) for bundle in range(index_plan.bundles)]
    partitions = [
        indexing.build_partition(index_plan, task)
        for task in indexing.plan_partitions(index_plan, counts)
    ]
    manifest = building.publish(plan, entries, partitions, None)
    assert manifest.content_digest == memory.manifest.content_digest
    assert shard_contents(Memory(str(tmp_path))) == shard_contents(memory)


def test_a_rerun_does_nothing(inputs, small_encoder, tmp_path, monkeypatch):
    settings = configuration(tmp_path / "memory", small_encoder, inputs)
    first = build_memory(settings)
    before = files_below(tmp_path / "memory" / "builds")
    calls = count_encoded(monkeypatch)
    again = build_memory(settings)
    assert calls == [] and again.manifest == first.manifest
    after = files_below(tmp_path / "memory" / "builds")
    # The class table is written with every publication; shards and index are not.
    changed = {name for name in before if before[name] != after[name]}
    assert before.keys() == after.keys()
    assert all(name.endswith("/classes.parquet") for name in changed)


def test_only_a_missing_shard_is_made_again(inputs, small_encoder, tmp_path, monkeypatch):
    (inputs / "iris" / "broken.png").write_bytes(b"GIF89a")
    settings = configuration(tmp_path / "memory", small_encoder, inputs, max_failure_share=0.1)
    first = build_memory(settings)
    contents = shard_contents(first)
    before = files_below(tmp_path / "memory" / "builds")
    lost = first.manifest.shards[1]
    os.remove(first.path(lost.embeddings))

    calls = count_encoded(monkeypatch)
    again = build_memory(settings)
    assert sum(calls) == lost.embedded
    assert 0 < lost.embedded < first.manifest.total("embedded")
    assert again.manifest == first.manifest and shard_contents(again) == contents
    after = files_below(tmp_path / "memory" / "builds")
    changed = {name for name in before if before[name] != after.get(name)}
    assert all("-00001-of-" in name or name.endswith("/classes.parquet") for name in changed)


def test_changed_inputs_are_a_new_version(inputs, small_encoder, tmp_path, monkeypatch):
    settings = configuration(tmp_path / "memory", small_encoder, inputs)
    first = build_memory(settings)
    removed = sorted((inputs / "rose").iterdir())[0]
    removed.unlink()
    second = build_memory(settings)
    assert (first.manifest.version, second.manifest.version) == ("000001", "000002")
    assert second.manifest.content_digest != first.manifest.content_digest
    assert set(rows_of(first).ids) - set(rows_of(second).ids) == {f"few/rose/{removed.name}"}
    old = Memory(str(tmp_path / "memory"), "000001")
    assert old.manifest == first.manifest
    np.testing.assert_array_equal(rows_of(old).vectors, rows_of(first).vectors)


_KILLED = textwrap.dedent(
    """
    import os, signal, sys

    config, wanted, times = sys.argv[1], sys.argv[2], int(sys.argv[3])
    rename = os.replace

    def replace(temporary, name):
        global times
        if wanted in name:
            times -= 1
            if times == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        rename(temporary, name)

    os.replace = replace
    from vm_core.sources import folder
    folder.IMAGES_PER_SPLIT = 4
    from pipelines import cli
    cli.main(["build", "--config", config])
    """
)


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_was(
    memory, few_photos, small_encoder, tmp_path, monkeypatch
):
    monkeypatch.setattr("vm_core.sources.folder.IMAGES_PER_SPLIT", 4)
    root = tmp_path / "memory"
    settings = configuration(root, small_encoder, few_photos)
    config = write_config(tmp_path / "config.yaml", settings)

    run = run_python("-c", _KILLED, config, ".arrow", "4")
    assert run.returncode == -signal.SIGKILL, run.stderr
    (work,) = (path for path in (root / "work").iterdir() if path.is_dir())  # beside its lock
    assert len(list(work.glob("*.arrow"))) == 3
    assert len(list(work.glob("*.incomplete-*"))) == 1
    assert not (root / "CURRENT").exists() and not list(root.glob("builds/*/shard-*"))

    run = run_python("-c", _KILLED, config, "/thumbnails-", "2")
    assert run.returncode == -signal.SIGKILL, run.stderr
    assert len(list(work.glob("*.arrow"))) == 8
    assert len(list(root.glob("builds/*/*.incomplete-*"))) == 1
    assert len(list(root.glob("builds/*/shard-*.json"))) == 1
    (finished,) = root.glob("builds/*/shard-*.json")
    stamp = finished.stat().st_mtime_ns
    # Also one killed while it built an index, which is a folder.
    folder = finished.parent / "index-0123456789ab" / "partition-00000.incomplete-0123456789ab"
    folder.mkdir(parents=True)
    (folder / "rows.parquet").write_bytes(b"half")
    folder.with_name("partition-00001.incomplete-0123456789ab").mkdir()  # before its first file

    calls = count_encoded(monkeypatch)
    rebuilt = build_memory(settings)
    assert calls == []
    assert finished.stat().st_mtime_ns == stamp
    assert rebuilt.manifest.content_digest == memory.manifest.content_digest
    assert shard_contents(rebuilt) == shard_contents(memory)
    assert not list(root.rglob("*.incomplete-*"))
    assert not work.exists()


def test_counts_add_up_and_quarantine_says_why(inputs, small_encoder, tmp_path):
    (inputs / "iris" / "empty.jpg").write_bytes(b"")
    (inputs / "viola" / "deep").mkdir()
    (inputs / "viola" / "deep" / "notes.txt").write_text("these are violas")
    files = sum(path.is_file() for path in inputs.rglob("*"))
    again = {"kind": "folder", "path": str(inputs), "share": [0.5, 1.0]}
    settings = configuration(
        tmp_path / "memory", small_encoder, inputs, again, max_failure_share=0.2
    )
    manifest = build_memory(settings).manifest
    twice = sum(
        unit_interval(f"few/{path.relative_to(inputs)}", "share") >= 0.5
        for path in inputs.rglob("*")
        if path.is_file()
    )
    assert manifest.total("read") == files + twice
    assert manifest.total("quarantined") == 2
    assert manifest.total("embedded") == files - 2 == sum(manifest.class_counts.values())
    assert manifest.total("duplicates") == twice
    assert manifest.source_counts() == {"few": files - 2}
    rows = table(
        f"{tmp_path}/memory/builds/*/quarantine-*.parquet".replace(
            "*/quar", manifest.build + "/quar"
        )
    )
    found = sorted((row["id"], row["source"], row["reason"]) for row in rows.to_pylist())
    assert [row[:2] for row in found] == [
        ("few/iris/empty.jpg", "few"),
        ("few/viola/deep/notes.txt", "few"),
    ]
    assert found[0][2] == "the file is empty (0 bytes)"
    assert "the content is text" in found[1][2]
    for number, shard in enumerate(manifest.shards):
        assert shard.read == shard.embedded + shard.quarantined + shard.duplicates
        names = table(f"{tmp_path}/memory/{shard.quarantine}")["id"].to_pylist()
        assert len(names) == shard.quarantined
        assert all(shard_of(id, SHARDS) == number for id in names)


@pytest.mark.parametrize(
    "workers",
    [(), ("--direct_num_workers=2", "--direct_running_mode=multi_threading")],
    ids=["one", "threads"],
)
def test_too_many_failures(inputs, small_encoder, tmp_path, monkeypatch, workers):
    for number in range(3):
        (inputs / "rose" / f"broken{number}.jpg").write_bytes(b"no image")
    settings = configuration(tmp_path / "memory", small_encoder, inputs, max_failure_share=0.05)
    with pytest.raises(VisualMemoryError) as raised:
        build_memory(settings, *workers)
    text = str(raised.value)
    assert text.startswith("3 of 35 images (8.6%) are unusable; max_failure_share allows 5.0%.")
    assert "\n        3  not an image: the content is text" in text
    assert text.endswith("or go on without them: --set max_failure_share=0.09")
    assert f"{tmp_path}/memory/builds/" in text and "Traceback" not in text
    assert memory.current_version(str(tmp_path / "memory")) is None
    assert len(list(tmp_path.glob("memory/builds/*/quarantine-*.parquet"))) == SHARDS

    calls = count_encoded(monkeypatch)
    published = build_memory({**settings, "max_failure_share": 0.09})
    assert calls == [] and published.manifest.total("embedded") == 32


def test_a_folder_of_nothing_but_failures(inputs, small_encoder, tmp_path):
    for photo in inputs.glob("*/*"):
        photo.write_bytes(b"")
    settings = configuration(tmp_path / "memory", small_encoder, inputs, max_failure_share=1)
    with pytest.raises(VisualMemoryError, match=r"32 of 32 images \(100.0%\) are unusable"):
        build_memory(settings)


def test_an_empty_share(inputs, small_encoder, tmp_path):
    source = {"kind": "folder", "path": str(inputs), "share": [0.0, 1e-9]}
    with pytest.raises(VisualMemoryError, match="there are no images to read"):
        build_memory(configuration(tmp_path / "memory", small_encoder, source))


def test_one_image_and_many_shards(inputs, small_encoder, tmp_path):
    photos = sorted(inputs.glob("*/*"))
    for photo in photos[1:]:
        photo.unlink()
    settings = configuration(tmp_path / "memory", small_encoder, inputs) | {"shards": 9}
    built = build_memory(settings)
    assert built.manifest.total("embedded") == 1 and len(built.manifest.shards) == 9
    assert built.rows(0)["id"].to_pylist() == [f"few/iris/{photos[0].name}"]


@pytest.mark.parametrize("dtype, tolerance", [("float16", 1e-3), ("bfloat16", 8e-3)])
def test_smaller_dtypes(memory, few_photos, small_encoder, tmp_path, dtype, tolerance):
    built = build_memory(configuration(tmp_path, small_encoder, few_photos, dtype=dtype))
    assert built.manifest.dtype == dtype
    assert built.manifest.total("bytes") < memory.manifest.total("bytes")
    exact, rounded = rows_of(memory), rows_of(built)
    np.testing.assert_array_equal(rounded.ids, exact.ids)
    np.testing.assert_allclose(rounded.vectors, exact.vectors, atol=tolerance)


def test_a_memory_can_be_moved(memory, tmp_path):
    moved = Memory(str(shutil.copytree(memory.root, tmp_path / "moved")))
    assert moved.manifest == memory.manifest
    assert moved.rows(0) == memory.rows(0)
    id = rows_of(moved).ids[0]
    assert moved.thumbnails([id, "no such id"]).keys() == {id}


def test_an_error_that_is_not_the_user_s_keeps_its_traceback(memory, tmp_path, monkeypatch):
    def fail(*_):
        raise ZeroDivisionError("a fault of the program")

    monkeypatch.setattr(building, "publish", fail)
    config = BuildConfig.model_validate({**memory.manifest.config, "memory": str(tmp_path)})
    with pytest.raises(Exception, match="a fault of the program") as raised:
        build(config)
    assert not isinstance(raised.value, VisualMemoryError)


def test_the_plan_says_what_shapes_the_shards(memory, tmp_path):
    config = BuildConfig.model_validate({**memory.manifest.config, "memory": str(tmp_path)})
    plan, _ = building.plan_build(config)
    assert plan.fingerprint == memory.manifest.build
    same = {"index": {"kind": "exact"}, "max_failure_share": 0.5}
    other = {"shards": 4}, {"dtype": "float16"}, {"images": {"thumbnail_pixels": 0}}

    def fingerprint(changes):
        changed = BuildConfig.model_validate({**config.model_dump(), **changes})
        return building.plan_build(changed)[0].fingerprint

    assert fingerprint(same) == plan.fingerprint
    assert len({plan.fingerprint, *map(fingerprint, other)}) == 4
    assert dataclasses.replace(plan, root="/elsewhere").folder == plan.folder


def test_without_thumbnails(memory, few_photos, small_encoder, tmp_path):
    images = {"thumbnail_pixels": 0}
    built = build_memory(configuration(tmp_path, small_encoder, few_photos, images=images))
    assert built.thumbnails(rows_of(memory).ids) == {}
    assert not list(Path(tmp_path).rglob("thumbnails*"))
    np.testing.assert_array_equal(rows_of(built).vectors, rows_of(memory).vectors)


def test_an_index_that_finds_too_little_is_not_published(memory, tmp_path, monkeypatch):
    config = BuildConfig.model_validate({**memory.manifest.config, "memory": str(tmp_path)})
    plan, _ = building.plan_build(config)
    config = config.model_copy(update={"partitioning": Partitioning(rows=8)})
    plan = dataclasses.replace(plan, config=config)
    shards = list(building.finished_shards(dataclasses.replace(plan, root=memory.root)).values())
    index_plan = building.plan_index(plan, shards)
    assert indexing.needs_recall(index_plan)
    with pytest.raises(VisualMemoryError, match=r"no results of its .* recall is unknown"):
        building.publish(plan, shards, memory.manifest.partitions, None)
    labels = np.zeros(4, np.int64)
    monkeypatch.setattr(
        indexing, "read_held_out", lambda *_: HeldOut(vectors=labels, labels=labels)
    )
    hits = recall.nothing(4)
    hits.rows[:, :10] = np.arange(10)
    hits.ranks[:, :7] = 0
    with pytest.raises(VisualMemoryError, match=r"recall@10 is 0\.700 .* minimum_recall is 0\.9\."):
        building.publish(plan, shards, memory.manifest.partitions, hits)
    assert not (tmp_path / "CURRENT").exists()


def test_missing_rows_of_a_partition_are_noticed(memory, tmp_path):
    moved = Memory(str(shutil.copytree(memory.root, tmp_path / "copy")))
    path = moved.path(f"{moved.manifest.partitions[0].folder}/vectors.npy")
    np.save(path, np.load(path)[:-1])
    with pytest.raises(VisualMemoryError, match="vectors.npy is damaged"):
        moved.open_partition(0)


def test_several_partitions_find_what_one_finds(memory, few_photos, small_encoder, tmp_path):
    """Through Beam: divided, with copies, visiting all: the same neighbours bit for bit."""
    queries = rows_of(memory)
    expected = memory.searcher()(queries, 7, exclude_self=True)
    digests = set()
    for spill in ("none", "nearest", "soar"):
        settings = configuration(
            tmp_path / spill,
            small_encoder,
            few_photos,
            partitioning={"rows": 9, "spill": spill, "probes": 99},
            index={"kind": "exact"},
        )
        divided = build_memory(settings, "--direct_num_workers=2")
        manifest = divided.manifest
        assert len(manifest.partitions) > 3 and manifest.recall.at[10] == 1
        assert all(entry.count <= 9 for entry in manifest.partitions)
        assert sum(entry.home for entry in manifest.partitions) == len(queries)
        found = divided.searcher()(queries, 7, exclude_self=True)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.distances, expected.distances)
        digests.add(manifest.content_digest)
        again = build_memory(settings | {"memory": str(tmp_path / f"{spill}-again")})
        assert again.manifest.content_digest == manifest.content_digest
        assert not (tmp_path / spill / "work").exists() or not any(
            path.is_file() for path in (tmp_path / spill / "work").rglob("*")
        )
    assert len(digests) == 3
