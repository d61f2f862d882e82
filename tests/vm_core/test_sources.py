"""Readers: what they list, what they read, and what they say of what they cannot read."""

from __future__ import annotations

import errno
import gzip
import hashlib
import itertools
import os
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from vm_core import plugins, sources, storage, tfrecord
from vm_core.building import BuildConfig
from vm_core.classes import ClassTable
from vm_core.errors import VisualMemoryError
from vm_core.evaluation import EvaluationConfig
from vm_core.example_proto import Example
from vm_core.failures import check_failures, count_reasons
from vm_core.records import UNKNOWN, ImageRecord, Rejected, count_images
from vm_core.sources import Source


def source_of(kind: str, path: object, **settings) -> Source:
    return sources.parse({"kind": kind, "path": str(path), **settings})


def read(source: Source) -> list[ImageRecord | Rejected]:
    """All records, with a class table of this source alone."""
    listing = source.listing()
    classes = ClassTable.from_keys([listing.class_keys], listing.class_names)
    return [record for split in listing.splits for record in source.records(split, classes)]


def ids(source: Source) -> list[str]:
    return [record.id for record in read(source)]


def versions(source: Source) -> list[str]:
    return [split.version for split in source.listing().splits]


def touch(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"image {name}")
    return folder


# --- share ---


def test_shares_are_disjoint_stable_and_complete(photos):
    whole = ids(source_of("folder", photos))
    assert len(whole) == 210
    edges = [0, 0.25, 0.8, 1]
    parts = [ids(source_of("folder", photos, share=pair)) for pair in pairwise(edges)]
    assert sorted(id for part in parts for id in part) == whole == sorted(whole)
    for part, wanted in zip(parts, (0.25, 0.55, 0.2), strict=True):
        assert abs(len(part) / 210 - wanted) < 0.1
    source = source_of("folder", photos, share=(0, 0.8))
    assert sum(source.expected(split) for split in source.listing().splits) == 168
    assert len(source.listing().class_keys) == 10  # a share has the classes of the whole


# --- folder ---


def test_folder_of_photos(few_photos):
    source = source_of("folder", few_photos)
    listing = source.listing()
    assert listing.class_keys == ["iris", "peony", "rose", "viola"]
    assert [split.images for split in listing.splits] == [32]
    records = read(source)
    assert [record.id for record in records] == sorted(record.id for record in records)
    assert records[0].source == "few"
    assert [record.label for record in records] == [0] * 8 + [1] * 8 + [2] * 8 + [3] * 8
    for record in records:
        assert record.data == os.path.join(os.path.dirname(few_photos), record.id)
        assert storage.read_bytes(record.data).startswith(b"\x89PNG")


def test_folder_reads_nested_files_and_no_clutter(tmp_path):
    names = ["cat/1.jpg", "cat/a b/ü/2.JPG", "dog/no extension", "dog/写真.png", "dog/x::y.png"]
    clutter = ["loose.jpg", ".hidden/1.jpg", "cat/.DS_Store", "cat/._1.jpg", "dog/.git/1.jpg"]
    clutter += ["cat/Thumbs.db", "dog/desktop.ini"]
    root = touch(tmp_path / "my photos", *names, *clutter)
    (root / "empty").mkdir()
    assert ids(source_of("folder", root)) == [f"my photos/{name}" for name in sorted(names)]
    assert ids(source_of("folder", f"{root}/", name="mine")) == [f"mine/{n}" for n in sorted(names)]
    assert source_of("folder", root).listing().class_keys == ["cat", "dog"]
    for record in read(source_of("folder", root)):
        assert storage.read_bytes(record.data).decode().endswith(record.id.split("/", 1)[1])
    only = source_of("folder", root, extensions=[".jpg"])
    assert ids(only) == ["my photos/cat/1.jpg", "my photos/cat/a b/ü/2.JPG"]
    assert only.listing().class_keys == ["cat"]


def test_folder_follows_links_once(tmp_path):
    root = touch(tmp_path / "data", "cat/1.jpg", "dog/1.jpg")
    (root / "cat" / "again").symlink_to(root)
    (root / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (root / "cat" / "self.jpg").symlink_to("self.jpg")
    touch(tmp_path / "elsewhere", "2.jpg")
    (root / "fox").symlink_to(tmp_path / "elsewhere")
    # A link to nothing is read like a file, and its image goes to quarantine.
    names = ["cat/1.jpg", "cat/gone.jpg", "cat/self.jpg", "dog/1.jpg", "fox/2.jpg"]
    assert ids(source_of("folder", root)) == [f"data/{name}" for name in names]


def test_folder_with_names_that_are_not_unicode(tmp_path):
    root = touch(tmp_path / "data", "cat/1.jpg")
    folder = os.fsencode(root) + b"/caf\xe9"
    os.mkdir(folder)
    Path(os.fsdecode(folder + b"/\xff.jpg")).write_text("image")
    source = source_of("folder", root)
    assert source.listing().class_keys == ["caf\\xe9", "cat"]
    first, _ = read(source)
    assert (first.id, first.label) == ("data/caf\\xe9/\\xff.jpg", 0)
    assert storage.read_bytes(first.data) == b"image"
    for split in source.listing().splits:
        repr(split).encode()
        assert all(isinstance(item, bytes) for item in split.items)


def test_folder_splits_are_complete(tmp_path, monkeypatch):
    monkeypatch.setattr("vm_core.sources.folder.IMAGES_PER_SPLIT", 4)
    root = touch(tmp_path / "data", *[f"c{i % 3}/{i}" for i in range(10)])
    splits = source_of("folder", root).listing().splits
    assert [split.images for split in splits] == [4, 4, 2]
    assert len(set(ids(source_of("folder", root)))) == 10
    assert len({split.version for split in splits}) == 3


def test_folder_version_follows_its_files(tmp_path):
    source = source_of("folder", touch(tmp_path, "cat/1", "cat/2"))
    first = versions(source)
    assert versions(source) == first
    os.utime(tmp_path / "cat" / "2", ns=(5, 5))
    second = versions(source)
    (tmp_path / "cat" / "2").write_text("longer than before")
    os.utime(tmp_path / "cat" / "2", ns=(5, 5))
    third = versions(source)
    (tmp_path / "cat" / "2").rename(tmp_path / "cat" / "3")
    fourth = versions(source)
    touch(tmp_path, "cat/.hidden")
    assert versions(source) == fourth
    assert len({*first, *second, *third, *fourth}) == 4


def test_folder_class_list(tmp_path):
    touch(tmp_path / "data", "n01/1", "n02/1")
    (tmp_path / "names.txt").write_text("n01 tench, Tinca tinca\nn09 unused\n")
    source = source_of("folder", tmp_path / "data", class_list=str(tmp_path / "names.txt"))
    listing = source.listing()
    classes = ClassTable.from_keys([listing.class_keys], listing.class_names)
    assert classes.names == ("tench, Tinca tinca", "n02")


def test_folder_of_queries_may_have_unknown_classes(tmp_path):
    source = source_of("folder", touch(tmp_path, "cat/1", "yak/1"))
    (split,) = source.listing().splits
    found = source.records(split, ClassTable(("cat",), ("cat",), (0,)))
    assert [record.label for record in found] == [0, UNKNOWN]


def test_folder_in_a_bucket():
    for name in ("cat/1.jpg", "dog/a b.jpg", "dog/.hidden"):
        storage.write_bytes(f"memory://photos-here/{name}", name.encode())
    source = source_of("folder", "memory://photos-here")
    assert ids(source) == ["photos-here/cat/1.jpg", "photos-here/dog/a b.jpg"]
    assert [storage.read_bytes(record.data) for record in read(source)][1] == b"dog/a b.jpg"
    first = versions(source)
    storage.write_bytes("memory://photos-here/cat/1.jpg", b"cat/2.jpg")
    assert versions(source) != first


def test_folder_errors(tmp_path):
    for path in (tmp_path / "none", touch(tmp_path, "file") / "file"):
        with pytest.raises(VisualMemoryError, match=r"is not a folder\. Give a folder that holds"):
            source_of("folder", path).listing()
    with pytest.raises(VisualMemoryError, match=r"no images in class folders\. Expected .*/CLASS"):
        source_of("folder", tmp_path).listing()
    touch(tmp_path, "cat/1.jpg")
    with pytest.raises(VisualMemoryError, match="no images in class folders"):
        source_of("folder", tmp_path, extensions=[".png"]).listing()
    with pytest.raises(VisualMemoryError, match="class list .* cannot be read"):
        source_of("folder", tmp_path, class_list=str(tmp_path / "none.txt")).listing()


# --- manifest ---


@pytest.fixture
def table(tmp_path):
    def write(text: str | bytes, name: str = "set/images.csv") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def test_manifest(table, tmp_path):
    path = table("path,label,who\na.jpg,cat,me\nsub/b c.jpg,dog,\n/abs/c.jpg,cat,\n")
    source = source_of("manifest", path)
    assert source.listing().class_keys == ["cat", "dog"]
    assert read(source) == [
        ImageRecord("set/a.jpg", 0, "set", f"{tmp_path}/set/a.jpg"),
        ImageRecord("set/sub/b c.jpg", 1, "set", f"{tmp_path}/set/sub/b c.jpg"),
        ImageRecord("set//abs/c.jpg", 0, "set", "/abs/c.jpg"),
    ]


def test_manifest_root_name_and_urls(table):
    path = table("path,label\na.jpg,cat\nmemory://bucket/b.jpg,dog\n")
    found = read(source_of("manifest", path, root="memory://x/y", name="n"))
    assert found == [
        ImageRecord("n/a.jpg", 0, "n", "memory://x/y/a.jpg"),
        ImageRecord("n/memory://bucket/b.jpg", 1, "n", "memory://bucket/b.jpg"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        '\ufeffpath,label\n"a, b.jpg","007"\n"c ""d"".jpg",NA\n',
        '"path","label"\r\n"a, b.jpg",007\r\n"c ""d"".jpg"," NA "\r\n',
    ],
)
def test_manifest_labels_are_text(table, text):
    source = source_of("manifest", table(text))
    assert source.listing().class_keys == ["007", "NA"]
    assert ids(source) == ["set/a, b.jpg", 'set/c "d".jpg']


def test_manifest_columns_and_split(table):
    text = "file,species,key,fold\na,cat,1,train\nb,dog,2,test\nc,cat,3,test\n"
    columns = {"path_column": "file", "label_column": "species", "split_column": "fold"}
    source = source_of("manifest", table(text), **columns, id_column="key", split="test")
    assert ids(source) == ["set/2", "set/3"]
    assert [Path(record.data).name for record in read(source)] == ["b", "c"]
    with pytest.raises(
        VisualMemoryError, match=r"no row has fold = 'val'\. Values there: test, tr"
    ):
        source_of("manifest", table(text), **columns, split="val").listing()


def test_manifest_rows_without_path_or_label_are_rejected(table):
    source = source_of(
        "manifest",
        table("id,path,label\n1,,cat\n2,b.jpg,\n3,c.jpg, \n4,d.jpg,cat\n"),
        id_column="id",
    )
    first, second, third, fourth = read(source)
    assert first == Rejected("set/1", "set", "the manifest's row has no path")
    assert second == Rejected("set/2", "set", "the manifest's row has no label")
    assert third == Rejected("set/3", "set", "the manifest's row has no label")
    assert fourth.label == 0
    assert source.listing().class_keys == ["cat"]


def test_manifest_as_parquet(tmp_path):
    columns = {"path": ["a.jpg", None, "c.jpg"], "label": [3, 4, None]}
    for name, values in {
        "plain": pa.table(columns),
        "dictionary": pa.table(columns).set_column(
            0, "path", pa.array(columns["path"]).dictionary_encode()
        ),
    }.items():
        path = tmp_path / f"{name}.parquet"
        pa.parquet.write_table(values, path)
        source = source_of("manifest", path, name="n")
        assert source.listing().class_keys == ["3", "4"]
        good, *bad = read(source)
        assert (good.id, good.label) == ("n/a.jpg", 3)
        assert [item.reason.rpartition(" ")[2] for item in bad] == ["path", "label"]


def test_manifest_version_follows_table_and_images(table, tmp_path):
    text = "path,label\na.jpg,cat\nb.jpg,dog\n"
    source = source_of("manifest", table(text))
    touch(tmp_path / "set", "a.jpg", "b.jpg", "c.jpg")
    first = versions(source)
    table(text)
    touch(tmp_path / "set", "c.jpg")
    assert versions(source) == first
    os.utime(tmp_path / "set" / "b.jpg", ns=(7, 7))
    second = versions(source)
    table(text.replace("dog", "fox"))
    assert len({*first, *second, *versions(source)}) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "file,label\na,b\n",
            r"has no column 'path'\. Its columns: file, label\. Name them with pa",
        ),
        ("path;label\na;b\n", r"has no column 'path', 'label'\. Its columns: path;label\."),
        ("path,label\n", r"has no rows: nothing to read"),
        ("", r"cannot be read: .* It must be CSV with a header line, or Parquet"),
        ("path,label\na,b,c\n", r"cannot be read: .* It must be CSV"),
        ("path,label\na,b\n".encode("utf-16"), r"cannot be read: .* It must be CSV"),
        (b"path,label\n\xe9.jpg,b\n", r"cannot be read: .* It must be CSV"),
        ("path,label,label\na,b,c\n", r"has more than one column 'label'"),
    ],
)
def test_manifest_errors(table, text, message):
    with pytest.raises(VisualMemoryError, match=message):
        source_of("manifest", table(text)).listing()


def test_manifest_that_is_not_there(tmp_path, table):
    with pytest.raises(VisualMemoryError, match=r"does not exist\. Give a CSV or Parquet file"):
        source_of("manifest", tmp_path / "none.csv").listing()
    with pytest.raises(VisualMemoryError, match=r"cannot be read: .* or Parquet"):
        source_of("manifest", table("path,label\n", "set/x.parquet")).listing()


# --- tfrecord ---


def example(**features) -> bytes:
    """A tf.train.Example; ``image__encoded`` stands for image/encoded."""
    message = Example()
    for name, value in features.items():
        feature = message.features.feature[name.replace("__", "/")]
        kind = {bytes: "bytes_list", int: "int64_list", float: "float_list"}[type(value)]
        getattr(feature, kind).value.append(value)
    return message.SerializeToString()


def imagenet(number: int, label: int) -> bytes:
    return example(
        image__encoded=b"image %d" % number,
        image__class__label=label,
        image__filename=b"n01_%d.JPEG" % number,
        image__height=500,
    )


def write(path: Path, *records: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        tfrecord.write_records(file, records)
    return path


def test_tfrecord_with_imagenets_keys(tmp_path):
    for shard in range(3):
        examples = [imagenet(shard * 4 + i, i) for i in range(4)]
        write(tmp_path / "set" / f"train-{shard}-of-3", *examples)
    source = source_of("tfrecord", tmp_path / "set" / "train-*")
    listing = source.listing()
    assert listing.class_keys is None
    assert [split.images for split in listing.splits] == [None]
    assert read(source) == [
        ImageRecord(f"set/n01_{i}.JPEG", i % 4, "set", b"image %d" % i) for i in range(12)
    ]


def test_tfrecord_agrees_with_tensorflows_own(tmp_path):
    tf = pytest.importorskip("tensorflow")
    features = {
        "image/encoded": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"\xff\xd8"])),
        "image/class/label": tf.train.Feature(int64_list=tf.train.Int64List(value=[7])),
        "image/filename": tf.train.Feature(bytes_list=tf.train.BytesList(value=["ü".encode()])),
    }
    message = tf.train.Example(features=tf.train.Features(feature=features))
    for kind in ("", "GZIP"):
        path = tmp_path / ("a.tfrecord" + (".gz" if kind else ""))
        with tf.io.TFRecordWriter(str(path), kind) as writer:
            writer.write(message.SerializeToString())
        found = read(source_of("tfrecord", path, name="n"))
        assert found == [ImageRecord("n/ü", 7, "n", b"\xff\xd8")]


def test_tfrecord_class_list(tmp_path):
    path = write(tmp_path / "a", *[imagenet(i, i) for i in range(4)])
    (tmp_path / "classes.txt").write_text("n02 goldfish\nn01 tench\n")
    settings = {"class_list": str(tmp_path / "classes.txt"), "first_label": 1, "name": "n"}
    source = source_of("tfrecord", path, **settings)
    listing = source.listing()
    assert listing.class_keys == ["n02", "n01"]
    classes = ClassTable.from_keys([listing.class_keys], listing.class_names)
    assert classes.names == ("tench", "goldfish")
    zero, one, two, three = read(source)
    assert (one.label, two.label) == (classes.label("n02"), classes.label("n01")) == (1, 0)
    for record, label in ((zero, 0), (three, 3)):
        assert record.reason == f"label {label} has no line in {tmp_path}/classes.txt"


def test_tfrecord_of_numbers_for_a_memory_of_names(tmp_path):
    """Label 0 of the data is not the memory's class 0."""
    source = source_of("tfrecord", write(tmp_path / "a", imagenet(1, 0)))
    (split,) = source.listing().splits
    (record,) = source.records(split, ClassTable(("cat",), ("cat",), (0,)))
    assert record.label == UNKNOWN


def test_tfrecord_records_that_cannot_be_used(tmp_path):
    path = write(
        tmp_path / "set" / "a",
        imagenet(0, 0),
        example(image__class__label=1, image__filename=b"x"),
        example(image__encoded=b"i", image__filename=b"x"),
        example(image__encoded=b"i", image__class__label=-1),
        example(image__encoded=b"i", image__class__label=b"cat"),
        example(image__encoded=5, image__class__label=1),
        b"\xff\xff no protobuf",
        b"",
        imagenet(8, 0),
    )
    first, *bad, last = read(source_of("tfrecord", path))
    assert (first.id, last.id) == ("set/n01_0.JPEG", "set/n01_8.JPEG")
    assert [item.id for item in bad] == [f"{path}#{number}" for number in range(1, 8)]
    assert [item.reason.partition(": ")[0] for item in bad] == [
        "the record has no bytes under 'image/encoded'",
        "the record has no label under 'image/class/label'",
        "the record has no label under 'image/class/label'",
        "the record has no label under 'image/class/label'",
        "the record has no bytes under 'image/encoded'",
        "the record is not a tf.train.Example",
        "the record has no bytes under 'image/encoded'",
    ]


def test_tfrecord_ids_come_from_the_content_where_there_is_no_name(tmp_path):
    one, two = (example(image__encoded=data, image__class__label=1) for data in (b"1", b"2"))
    odd = example(image__encoded=b"3", image__class__label=1, image__filename=b"caf\xe9")
    there = ids(source_of("tfrecord", write(tmp_path / "a", one, two, odd), name="n"))
    assert there[0] == "n/" + hashlib.sha256(b"1").hexdigest()[:32]
    assert there[2] == "n/caf\ufffd"
    assert ids(source_of("tfrecord", write(tmp_path / "b", two, one, odd), name="n"))[:2] == [
        there[1],
        there[0],
    ]


@pytest.mark.parametrize("damaged", [0, 1, 3])
@pytest.mark.parametrize("share", [(0, 1), (0, 0.01), (0.99, 1)])
def test_tfrecord_damage_costs_the_rest_of_one_file(tmp_path, damaged, share):
    """And is told in every share: which images were lost nobody knows."""
    records = [imagenet(i, 0) for i in range(5)]
    path = write(tmp_path / "set" / "a", *records)
    write(tmp_path / "set" / "b", imagenet(7, 0))
    data = bytearray(path.read_bytes())
    data[sum(len(record) + 16 for record in records[:damaged]) + 30] ^= 1
    path.write_bytes(data)
    found = read(source_of("tfrecord", tmp_path / "set" / "*", share=share))
    if share == (0, 1):
        good = [record.id for record in found if isinstance(record, ImageRecord)]
        assert good == [f"set/n01_{i}.JPEG" for i in [*range(damaged), 7]]
    (lost,) = [item for item in found if isinstance(item, Rejected)]
    assert lost.id == f"{path}#{damaged}"
    assert lost.source == "set"
    expected = (5 - damaged) * (share[1] - share[0]) if damaged else 1
    assert lost.images == max(1, round(expected))
    about = f"about {lost.images:,} records by its size: {path}: record {damaged} (counted from"
    assert lost.reason.startswith(f"rest of the file lost: {about}")
    assert "checksum of its data does not match" in lost.reason


@pytest.mark.parametrize("cause", ["damage", "read error"])
def test_what_is_lost_of_a_tfrecord_counts_in_full(tmp_path, monkeypatch, cause):
    """10 of 500 records can be read: 98% failed, not one of eleven."""
    records = [imagenet(i, 0) for i in range(500)]
    path = write(tmp_path / "set" / "a", *records)
    if cause == "damage":
        data = bytearray(path.read_bytes())
        data[sum(len(record) + 16 for record in records[:10]) + 30] ^= 1
        path.write_bytes(data)
    else:
        read_records = tfrecord.read_records

        def broken(file, compression=None):
            yield from itertools.islice(read_records(file, compression=compression), 10)
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(tfrecord, "read_records", broken)
    found = read(source_of("tfrecord", path))
    assert len(found) == 11
    assert abs(found[-1].images - 490) <= 25
    with pytest.raises(VisualMemoryError, match=r"\d+ of 5\d\d images \(9\d.\d%\) are unusable"):
        lost = count_images(found[10:])
        check_failures(10 + lost, lost, count_reasons(found[10:]), 0.01, "tables")


def test_sources_of_the_same_name_are_refused(tmp_path):
    """Their images would share ids, and one of each pair would be lost as a duplicate."""
    for folder in ("pets/train", "birds/train"):
        (tmp_path / folder / "cat").mkdir(parents=True)
        (tmp_path / folder / "cat" / "1.png").write_bytes(folder.encode())
    pets, birds = ({"kind": "folder", "path": f"{tmp_path}/{n}/train"} for n in ("pets", "birds"))
    with pytest.raises(ValueError, match=r"pets/train' and '.*birds/train' have .*key name"):
        sources.parse_all([pets, birds])
    sources.parse_all([pets, birds | {"name": "birds"}])
    sources.parse_all([pets | {"share": [0, 0.5]}, pets | {"share": [0.5, 1]}])
    for settings in ({"name": "train", "path": "x"}, {"path": f"{tmp_path}/birds/train/"}):
        with pytest.raises(ValueError, match="have the same name"):
            sources.parse_all([pets, {"kind": "folder"} | settings])
    for config in (BuildConfig, EvaluationConfig):
        key = "sources" if config is BuildConfig else "queries"
        settings = {
            "memory": "m",
            "encoder": {"kind": "saved_model", "path": "e"},
            key: [pets, birds],
        }
        if config is EvaluationConfig:
            settings = {"memory": "m", "output": "o", key: [pets, birds]}
        with pytest.raises(VisualMemoryError, match="have the same name 'train'"):
            plugins.validate(config, settings, "options")


@pytest.mark.parametrize(
    "path",
    ["http://127.0.0.1:1/a.png", "zip://a.png::file:///etc/x.zip", "ftp://h/a", "gs://b::x/a"],
)
def test_a_manifest_names_files_and_buckets_only(tmp_path, path):
    (tmp_path / "list.csv").write_text(f"path,label\n{path},cat\n")
    (found,) = read(source_of("manifest", tmp_path / "list.csv"))
    assert found.reason.startswith(f"the manifest's row names {path!r}: only local files and")


@pytest.mark.parametrize(
    "column, values, cause",
    [
        ("label", pa.array([0.0, float("nan")]), "column 'label', row 1 .*: nan is neither"),
        ("label", pa.array([0.5, 1.0]), "column 'label', row 0 .*: 0.5 is neither"),
        ("label", pa.array([1, 2], pa.timestamp("ns")), r"'label' holds timestamp\[ns\], not text"),
        ("path", pa.array([b"a", b"\xff"]), "'path' holds binary, not text"),
        ("label", pa.array([["a"], ["b"]]), "'label' holds list"),
    ],
)
def test_columns_of_a_manifest_are_text_or_whole_numbers(tmp_path, column, values, cause):
    columns = {"path": pa.array(["a", "b"]), "label": pa.array(["x", "y"]), column: values}
    pa.parquet.write_table(pa.table(columns), tmp_path / "list.parquet")
    with pytest.raises(VisualMemoryError, match=cause):
        source_of("manifest", tmp_path / "list.parquet").listing()


def test_whole_numbers_of_any_type_are_labels(tmp_path):
    columns = {"path": pa.array(["a", "b"]), "label": pa.array([7.0, 8.0])}
    pa.parquet.write_table(pa.table(columns), tmp_path / "list.parquet")
    assert source_of("manifest", tmp_path / "list.parquet").listing().class_keys == ["7", "8"]


def test_a_folder_that_links_lead_around_in_is_read_once(tmp_path):
    (tmp_path / "set" / "cat").mkdir(parents=True)
    (tmp_path / "set" / "cat" / "1.png").write_bytes(b"1")
    (tmp_path / "set" / "cat" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "again").symlink_to("cat")
    assert ids(source_of("folder", tmp_path / "set")) == ["set/cat/1.png"]


def test_tfrecord_truncated_or_no_tfrecord_at_all(tmp_path):
    path = write(tmp_path / "a", imagenet(0, 0), imagenet(1, 0))
    path.write_bytes(path.read_bytes()[:-5])
    (tmp_path / "b").write_text("these are not the records you are looking for")
    (tmp_path / "c").write_bytes(b"")
    (tmp_path / "d").write_bytes(gzip.compress(path.read_bytes()))
    (split,) = source_of("tfrecord", tmp_path / "[a-d]").listing().splits
    (tmp_path / "b2").write_bytes((tmp_path / "b").read_bytes())
    good, *lost = read(source_of("tfrecord", tmp_path / "[a-d]"))
    assert good.data == b"image 0"
    for item, part in zip(
        lost,
        ["the file ends", "the checksum of its length does not match", "compressed with gzip"],
        strict=True,
    ):
        assert part in item.reason
    assert len(split.items) == 4
    (tmp_path / "a").unlink()
    first, *_ = source_of("tfrecord", tmp_path / "[a-d]").read(split, ClassTable())
    assert "No such file" in first.reason


def test_tfrecord_whose_first_length_looks_like_gzip(tmp_path):
    """35,615 is 8B1F in hexadecimal."""
    filler = 35_615 - len(example(image__encoded=b"", image__class__label=1))
    record = next(
        record
        for size in range(filler, filler - 20, -1)
        if len(record := example(image__encoded=b"i" * size, image__class__label=1)) == 35_615
    )
    path = write(tmp_path / "a", record)
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    (found,) = read(source_of("tfrecord", path))
    assert isinstance(found, ImageRecord)


def test_tfrecord_small_files_share_a_split(tmp_path, monkeypatch):
    sizes = [5, 3, 1, 1, 1, 9, 1]
    for number, size in enumerate(sizes):
        write(tmp_path / f"{number}", *[imagenet(number * 10 + i, 0) for i in range(size)])
    whole = sum(path.stat().st_size for path in tmp_path.iterdir())
    monkeypatch.setattr("vm_core.sources.tfrecord._BYTES_PER_SPLIT", whole * 13 // 42)
    source = source_of("tfrecord", tmp_path / "*")
    found = [[int(Path(path).name) for path, _ in split.items] for split in source.listing().splits]
    assert found == [[0], [1, 2, 3, 4], [5], [6]]
    assert len(set(ids(source))) == sum(sizes)


def test_tfrecord_version_follows_its_files(tmp_path):
    path = write(tmp_path / "a", imagenet(0, 0))
    source = source_of("tfrecord", tmp_path / "*")
    first = versions(source)
    assert versions(source) == first
    write(path, imagenet(0, 1))
    os.utime(path, ns=(3, 3))
    second = versions(source)
    write(tmp_path / "b", imagenet(1, 0))
    assert len({*first, *second, *versions(source)}) == 3


def test_tfrecord_without_files(tmp_path):
    with pytest.raises(
        VisualMemoryError, match=r"no file matches .*glob pattern such as /data/tra"
    ):
        source_of("tfrecord", tmp_path / "train-*").listing()


def test_tfrecord_warns_of_large_files(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("vm_core.sources.tfrecord._LARGE_FILE", 10)
    source_of("tfrecord", write(tmp_path / "a", imagenet(0, 0))).listing()
    assert "More and smaller shards spread the work better" in caplog.text


# --- several sources ---


def test_integers_and_names_of_two_sources_do_not_mix(tmp_path):
    numbers = source_of("tfrecord", write(tmp_path / "a", imagenet(0, 0))).listing()
    names = source_of("folder", touch(tmp_path / "set", "cat/1")).listing()
    with pytest.raises(VisualMemoryError, match="option class_list"):
        ClassTable.from_keys([numbers.class_keys, names.class_keys], {})
    integers = source_of("folder", touch(tmp_path / "by number", "3/1", "12/1")).listing()
    table = ClassTable.from_keys([numbers.class_keys, integers.class_keys], {})
    assert [table.label(key) for key in integers.class_keys] == [12, 3]
