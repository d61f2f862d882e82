"""Versions of a memory: published once, swapped at once, opened with clear errors."""

import json
import pickle
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vm_core import encoders, index, memory, storage
from vm_core.encoders import _trust
from vm_core.errors import VisualMemoryError
from vm_core.index_files import PartitionEntry
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
    class_counts="",
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
        class_counts={0: 4, 2: 6, 5: 4},
        shards=[SHARD, SHARD.model_copy(update={"reasons": {}})],
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
        new_classes=[],
        files={"builds/b/classes.parquet": "c" * 64},
        config={"shards": 2},
    )


@pytest.fixture(params=["local", "bucket"])
def root(request, tmp_path):
    if request.param == "local":
        return str(tmp_path / "memory")
    return request.getfixturevalue("bucket") + "/memory"


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
    assert opened.class_counts == {0: 4, 2: 6, 5: 4}
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


def digests(root):
    """The content digest of every version."""
    names = [file.path[-len("000001.json") :][:6] for file in storage.walk(f"{root}/versions")]
    return {name: Memory(root, name).manifest.content_digest for name in names}


def assert_each_has_its_own(root, published):
    """published: version and digest, as each publisher was told."""
    assert len(digests(root)) == len(published)
    assert digests(root) == dict(published)
    assert memory.current_version(root) == max(digests(root))


def test_publishers_in_threads(root, manifest):
    start = threading.Barrier(4)

    def attempt(publisher):
        start.wait()
        told = [publish(root, changed(manifest, f"{publisher}{turn}")) for turn in range(5)]
        return [(version.version, version.content_digest) for version in told]

    with ThreadPoolExecutor(4) as pool:
        published = [each for told in pool.map(attempt, range(4)) for each in told]
    assert_each_has_its_own(root, published)


PUBLISHER = """
import sys, time
from vm_core import storage
from vm_core.memory import Manifest, publish

root, manifest, name, other = sys.argv[1:]
manifest = Manifest.model_validate_json(manifest)
storage.write_bytes(f"{root}/ready/{name}", b"")
while not storage.is_file(f"{root}/ready/{other}"):
    time.sleep(0.001)
for turn in range(8):
    digest = f"{name}{turn}" * 32
    print(publish(root, manifest.model_copy(update={"content_digest": digest})).version, digest)
"""


def test_publishers_in_processes(root, manifest):
    command = [sys.executable, "-c", PUBLISHER, root, manifest.model_dump_json()]
    processes = [
        subprocess.Popen([*command, *names], stdout=subprocess.PIPE, text=True)
        for names in ("ab", "ba")
    ]
    told = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    published = [line.split() for text in told for line in text.splitlines()]
    assert len(published) == 16
    assert_each_has_its_own(root, published)


@pytest.mark.parametrize("claimed_by_other", ["before", "after"])
def test_the_higher_number_of_two_is_current(root, manifest, monkeypatch, caplog, claimed_by_other):
    """Another publishes while the first has its number and not yet the pointer."""
    publish(root, changed(manifest, "a"))
    swap = storage.swap

    def interrupted(path, old, new):
        at_pointer = path.endswith("CURRENT")
        if at_pointer == (claimed_by_other == "after"):
            monkeypatch.setattr(storage, "swap", swap)
            publish(root, changed(manifest, "b"))
        return swap(path, old, new)

    monkeypatch.setattr(storage, "swap", interrupted)
    published = publish(root, changed(manifest, "c"))
    first, second = ("b", "c") if claimed_by_other == "before" else ("c", "b")
    assert digests(root) == {"000001": "a" * 64, "000002": first * 64, "000003": second * 64}
    assert published.version == ("000003" if second == "c" else "000002")
    assert Memory(root).manifest.content_digest == second * 64
    text = "version 000003 of .* was published at the same time as 000002 and is the current one"
    assert bool(re.search(text, caplog.text)) == (second == "b")


def test_what_came_between_is_not_taken_back(root, manifest):
    publish(root, changed(manifest, "a"))
    publish(root, changed(manifest, "b"), base="000001")
    with pytest.raises(VisualMemoryError, match="000002.* from version 000001: somebody"):
        publish(root, changed(manifest, "c"), base="000001")
    assert sorted(digests(root)) == ["000001", "000002"]
    # A repeated attempt of what is published already is no conflict.
    assert publish(root, changed(manifest, "b"), base="000001").version == "000002"


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
    with pytest.raises(VisualMemoryError, match=rf"has format {format!r}, this program reads 4"):
        Memory(root)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b'{"format": 4}',
        lambda data: b"",
        lambda data: data.replace(b'"probes": 1', b'"probes": 2'),
        lambda data: data.replace(b'"sha256"', b'"sha255"'),
        lambda data: b"[" * 100_000,
        lambda data: b"\xff\xfe",
        lambda data: b"null",
    ],
)
def test_a_damaged_manifest(root, manifest, damage):
    publish(root, manifest)
    path = f"{root}/versions/000001.json"
    storage.write_bytes(path, damage(storage.read_bytes(path)))
    with pytest.raises(VisualMemoryError, match=r"000001.json is damaged"):
        Memory(root)


def test_the_encoder_must_be_the_memory_s(root, manifest, tmp_path, monkeypatch):
    publish(root, manifest)
    opened = Memory(root)
    # A model is a program: one that only the memory names does not run.
    monkeypatch.setenv(_trust.VARIABLE, str(tmp_path / "trusted"))
    with pytest.raises(
        VisualMemoryError, match="you have not used before.*--encoder PATH.*inspect"
    ):
        opened.encoder()
    _trust.trust(manifest.encoder_fingerprint)
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


def test_what_travels_to_workers_does_not_grow_with_the_memory(root, manifest):
    publish(root, manifest)
    publish(root, changed(manifest, "e").model_copy(update={"shards": manifest.shards * 500}))
    small, large = Memory(root, "000001"), Memory(root)
    assert len(large.manifest.model_dump_json()) > 100_000
    sizes = [len(pickle.dumps(each)) for each in (small, large)]
    assert sizes[1] - sizes[0] < 100


def test_a_memory_arrives_as_it_was_sent(root, manifest):
    """Also one whose manifest was changed and not published."""
    publish(root, manifest)
    opened = Memory(root)
    staged = opened.with_manifest(opened.manifest.model_copy(update={"version": "staged"}))
    publish(root, changed(manifest, "e"))
    for sent in (opened, staged):
        arrived = pickle.loads(pickle.dumps(sent))
        assert (arrived.root, arrived.manifest) == (sent.root, sent.manifest)
    assert staged.manifest.version == "staged" != opened.manifest.version
