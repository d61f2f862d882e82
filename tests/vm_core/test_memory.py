"""Versions of a memory: published once, swapped at once, opened with clear errors."""

import json

import pytest

from vm_core import encoders, index, memory, storage
from vm_core.errors import VisualMemoryError
from vm_core.indexing import PartitionEntry
from vm_core.memory import Manifest, Memory, ShardEntry, publish
from vm_core.recall import Recall

SHARD = ShardEntry(
    embeddings="builds/b/embeddings-00000-of-00001.tfrecord",
    files={"builds/b/embeddings-00000-of-00001.tfrecord": "0" * 64},
    thumbnails=None,
    quarantine="builds/b/quarantine-00000-of-00001.parquet",
    bytes=100,
    dimension=4,
    read=10,
    embedded=7,
    quarantined=2,
    duplicates=1,
    class_counts={0: 4, 5: 3},
    source_counts={"a": 7},
    reasons={"empty": 2},
)


@pytest.fixture
def manifest(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "saved_model.pb").write_bytes(b"weights")
    encoder = encoders.parse({"kind": "saved_model", "path": str(model)})
    return Manifest(
        format=memory.FORMAT,
        version="",
        created="2024-01-01T00:00:00+00:00",
        content_digest="d" * 64,
        build="b",
        encoder=encoder,
        encoder_fingerprint=encoder.fingerprint(),
        dimension=4,
        dtype="float32",
        classes="builds/b/classes.parquet",
        shards=[SHARD, SHARD.model_copy(update={"class_counts": {5: 1, 2: 6}, "reasons": {}})],
        partitions=[
            PartitionEntry(
                folder="builds/b/index-0/partition-00000",
                cell=0,
                count=14,
                home=14,
                bytes=99,
                index=index.parse({"kind": "scann", "leaves": 7}),
                files={},
            )
        ],
        centroids=None,
        probes=1,
        recall=Recall(
            queries=9, at={1: 0.5, 10: 0.25}, worst_class=None, new_classes=None, by_probes={}
        ),
        config={"shards": 2},
    )


@pytest.fixture
def root(tmp_path):
    return str(tmp_path / "memory")


def changed(manifest, digest):
    return manifest.model_copy(update={"content_digest": digest * 64})


def test_manifest_round_trip(root, manifest):
    published = publish(root, manifest)
    opened = Memory(root).manifest
    assert opened == published and opened.version == "000001"
    assert type(opened.encoder).__module__ == "vm_core.encoders.saved_model"
    assert opened.partitions[0].index.leaves == 7
    assert opened.recall.at == {1: 0.5, 10: 0.25}
    assert opened.total("read") == 20 and opened.total("duplicates") == 2
    assert opened.class_counts() == {0: 4, 2: 6, 5: 4}
    assert opened.source_counts() == {"a": 14} and opened.reasons() == {"empty": 2}


def test_publishing_again_changes_nothing(root, manifest):
    first = publish(root, manifest)
    again = publish(root, manifest.model_copy(update={"created": "later"}))
    assert again == first
    assert len(storage.list_files(f"{root}/versions/*")) == 1


def test_versions_count_up_and_old_ones_stay(root, manifest):
    versions = [publish(root, changed(manifest, digit)).version for digit in "abab"]
    assert versions == ["000001", "000002", "000003", "000004"]
    assert memory.current_version(root) == "000004"
    assert Memory(root, "000002").manifest.content_digest == "b" * 64
    # After a gap, and after version 9, they still count up.
    storage.write_bytes(f"{root}/versions/000041.json", b"{}")
    assert publish(root, changed(manifest, "c")).version == "000042"


def test_a_crash_before_the_pointer_is_swapped_leaves_the_old_version(root, manifest, monkeypatch):
    publish(root, changed(manifest, "a"))
    swap = storage.swap

    def crash(path, old, new):
        if path.endswith("CURRENT"):
            raise KeyboardInterrupt
        return swap(path, old, new)

    monkeypatch.setattr(storage, "swap", crash)
    with pytest.raises(KeyboardInterrupt):
        publish(root, changed(manifest, "b"))
    monkeypatch.undo()
    assert Memory(root).manifest.content_digest == "a" * 64
    published = publish(root, changed(manifest, "b"))
    assert Memory(root).manifest == published
    assert Memory(root, "000001").manifest.content_digest == "a" * 64


def test_not_a_memory(tmp_path):
    with pytest.raises(VisualMemoryError, match=r"is not a visual memory: it does not exist"):
        Memory(str(tmp_path / "nowhere"))
    with pytest.raises(VisualMemoryError, match=r"is not a visual memory: it has no file CURRENT"):
        Memory(str(tmp_path))
    (tmp_path / "CURRENT").write_text("")
    with pytest.raises(VisualMemoryError):
        Memory(str(tmp_path))


def test_unknown_version(root, manifest):
    publish(root, manifest)
    with pytest.raises(VisualMemoryError, match="has no version '000007'.*000007.json does not"):
        Memory(root, "000007")


@pytest.mark.parametrize("format", [1, "2", None])
def test_another_format(root, manifest, format):
    publish(root, manifest)
    path = f"{root}/versions/000001.json"
    settings = json.loads(storage.read_bytes(path)) | {"format": format}
    storage.write_bytes(path, json.dumps(settings).encode())
    with pytest.raises(VisualMemoryError, match=rf"has format {format!r}, this program reads 2"):
        Memory(root)


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b'{"format": 2}', lambda data: b""]
)
def test_a_damaged_manifest(root, manifest, damage):
    publish(root, manifest)
    path = f"{root}/versions/000001.json"
    storage.write_bytes(path, damage(storage.read_bytes(path)))
    with pytest.raises(VisualMemoryError, match=r"000001.json is damaged"):
        Memory(root)


def test_the_encoder_must_be_the_memory_s(root, manifest, tmp_path):
    publish(root, manifest)
    opened = Memory(root)
    assert opened.encoder().path == manifest.encoder.path
    moved = tmp_path / "moved"
    (tmp_path / "model").rename(moved)
    assert opened.encoder(str(moved)).path == str(moved)
    with pytest.raises(VisualMemoryError, match="is not a SavedModel"):
        opened.encoder()
    (moved / "saved_model.pb").write_bytes(b"other weights")
    with pytest.raises(VisualMemoryError) as raised:
        opened.encoder(str(moved))
    text = str(raised.value)
    assert manifest.encoder_fingerprint in text and repr(str(moved)) in text
    assert "--encoder PATH" in text
