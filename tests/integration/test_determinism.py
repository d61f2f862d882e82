"""The same inputs give the same bytes, whoever computes them and in whatever order."""

import csv
import random
import shutil
from pathlib import Path

import pytest

from tests.integration.harness import (
    build_memory,
    configuration,
    rows_of,
    run_python,
    shard_contents,
    write_config,
)
from vm_core.memory import Memory

THREADS = ("--direct_num_workers=2", "--direct_running_mode=multi_threading")
PROCESSES = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")


@pytest.fixture(scope="module")
def inputs(few_photos, tmp_path_factory):
    """Photos, of which one is twice there under one id, and some files that are no images."""
    folder = tmp_path_factory.mktemp("inputs") / "few"
    shutil.copytree(few_photos, folder)
    for species in ("iris", "rose"):
        (folder / species / "broken.png").write_bytes(b"not an image")
        (folder / species / "empty.png").write_bytes(b"")
    return folder


@pytest.fixture(scope="module")
def settings(inputs, small_encoder):
    sources = (inputs, {"kind": "folder", "path": str(inputs), "share": [0.2, 0.6]})
    return configuration("", small_encoder, *sources, max_failure_share=0.5)


@pytest.fixture(scope="module")
def reference(settings, tmp_path_factory):
    memory = build_memory({**settings, "memory": str(tmp_path_factory.mktemp("reference"))})
    manifest = memory.manifest
    assert sum(shard.embedded > 0 for shard in manifest.shards) > 1
    assert manifest.total("quarantined") == 4 and manifest.total("duplicates") > 0
    return memory


def assert_same(memory: Memory, reference: Memory) -> None:
    assert shard_contents(memory) == shard_contents(reference)
    assert memory.manifest.content_digest == reference.manifest.content_digest


def test_repeated(settings, reference, tmp_path):
    assert_same(build_memory({**settings, "memory": str(tmp_path)}), reference)


@pytest.mark.parametrize("images_per_split", [1, 5])
def test_other_splits(settings, reference, tmp_path, monkeypatch, images_per_split):
    monkeypatch.setattr("vm_core.sources.folder.IMAGES_PER_SPLIT", images_per_split)
    memory = build_memory({**settings, "memory": str(tmp_path)})
    assert memory.manifest.build != reference.manifest.build
    assert_same(memory, reference)


@pytest.mark.parametrize("workers", [THREADS, PROCESSES], ids=["threads", "processes"])
def test_several_workers(settings, reference, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("vm_core.sources.folder.IMAGES_PER_SPLIT", 4)
    assert_same(build_memory({**settings, "memory": str(tmp_path)}, *workers), reference)


@pytest.mark.slow
def test_a_process_with_other_hashes_of_strings(settings, reference, tmp_path):
    config = write_config(tmp_path / "config.yaml", {**settings, "memory": str(tmp_path / "m")})
    run = run_python("-m", "pipelines.build", "--config", config, PYTHONHASHSEED="1")
    assert run.returncode == 0, run.stderr
    assert_same(Memory(str(tmp_path / "m")), reference)


def test_shuffled_manifest(few_photos, small_encoder, tmp_path, monkeypatch):
    monkeypatch.setattr("vm_core.sources.manifest.IMAGES_PER_SPLIT", 6)
    rows = [
        (f"{path.parent.name}/{path.name}", path.parent.name)
        for path in sorted(Path(few_photos).glob("*/*"))
    ]
    rows += [rows[3], (rows[5][0], "rose")]  # twice the same, and one id under two classes
    memories = []
    for order in range(3):
        folder = tmp_path / f"{order}"
        folder.mkdir()
        with open(folder / "list.csv", "w", newline="") as file:
            csv.writer(file).writerows([("path", "label"), *rows])
        source = {"kind": "manifest", "path": str(folder / "list.csv"), "root": few_photos}
        source |= {"name": "few"}
        settings = configuration(folder / "memory", small_encoder, source, max_failure_share=0.1)
        memories.append(build_memory(settings))
        random.Random(order).shuffle(rows)
    assert memories[0].manifest.total("duplicates") == 1
    assert memories[0].manifest.total("quarantined") == 2
    assert_same(memories[1], memories[0])
    assert_same(memories[2], memories[0])


@pytest.mark.slow
def test_the_real_encoder_over_two_processes(photos, encoder_path, tmp_path, monkeypatch):
    monkeypatch.setattr("vm_core.sources.folder.IMAGES_PER_SPLIT", 25)
    source = {"kind": "folder", "path": photos, "share": [0, 0.3]}
    settings = configuration(tmp_path / "one", encoder_path, source)
    settings["encoder"] = {"kind": "saved_model", "path": encoder_path}
    one = build_memory(settings)
    assert 45 < one.manifest.total("embedded") < 75
    assert one.manifest.dimension == 1280
    two = build_memory({**settings, "memory": str(tmp_path / "two")}, *PROCESSES)
    assert_same(two, one)
    assert (rows_of(two).vectors == rows_of(one).vectors).all()
