"""Embedding shards: to the byte what protobuf would write, and safe against damage."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core import shard_rows, shards, tfrecord
from vm_core.errors import VisualMemoryError
from vm_core.example_proto import Example
from vm_core.records import EmbeddingBlock, strings
from vm_core.shards import DTYPES, read_blocks, read_shard, write_shard

FINGERPRINT = "dinov2-l14:3f9a"
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@st.composite
def blocks(draw, min_rows=0):
    ids = sorted(draw(st.lists(TEXT.filter(len), min_size=min_rows, max_size=12, unique=True)))
    count = len(ids)
    labels = draw(st.lists(INT64 | st.integers(-2, 300), min_size=count, max_size=count))
    sources = draw(st.lists(TEXT, min_size=count, max_size=count))
    return make_block(ids, draw(st.integers(1, 70)), labels, sources)


def make_block(ids, dimension=5, labels=None, sources=None) -> EmbeddingBlock:
    vectors = np.random.default_rng(len(ids)).standard_normal((len(ids), dimension))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return EmbeddingBlock(
        strings(ids),
        np.array(range(len(ids)) if labels is None else labels, np.int64),
        strings(["imagenet"] * len(ids) if sources is None else sources),
        vectors.astype(np.float32),
    )


def assert_same(found: EmbeddingBlock, expected: EmbeddingBlock, dtype="float32") -> None:
    assert found.ids.tolist() == expected.ids.tolist()
    assert found.labels.tolist() == expected.labels.tolist()
    assert found.labels.dtype == np.int64
    assert found.sources.tolist() == expected.sources.tolist()
    assert found.vectors.dtype == np.float32
    if len(expected):
        rounded = expected.vectors.astype(DTYPES[dtype]).astype(np.float32)
        np.testing.assert_array_equal(found.vectors, rounded)


def stored_records(path: str) -> list[bytes]:
    with open(path, "rb") as file:
        return list(tfrecord.read_records(file))


def store(path: str, records: list[bytes]) -> str:
    with open(path, "wb") as file:
        tfrecord.write_records(file, records)
    return path


def altered(record: bytes, **changes) -> bytes:
    """The record with other features: bytes, int, list of float, or None to leave one out."""
    example = Example.FromString(record)
    for key, value in changes.items():
        if key in example.features.feature:
            del example.features.feature[key]
        feature = example.features.feature[key]
        if value is None:
            del example.features.feature[key]
        elif isinstance(value, bytes):
            feature.bytes_list.value.append(value)
        elif isinstance(value, int):
            feature.int64_list.value.append(value)
        else:
            feature.float_list.value.extend(value)
    return example.SerializeToString(deterministic=True)


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "shard")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("shards")


@settings(deadline=None, max_examples=60)
@given(block=blocks(), dtype=st.sampled_from(list(DTYPES)), rows=st.integers(1, 5))
def test_round_trip(folder, block, dtype, rows):
    path = str(folder / "round_trip")
    summary = write_shard(path, block, FINGERPRINT, dtype)
    with open(path, "rb") as file:
        data = file.read()
    assert summary == (
        len(block),
        len(data),
        hashlib.sha256(data).hexdigest(),
        block.vectors.shape[1],
    )
    assert_same(read_shard(path, FINGERPRINT), block, dtype)
    parts = list(read_blocks(path, rows))
    assert [len(part) for part in parts[:-1]] == [rows] * (len(parts) - 1)
    if parts:
        assert_same(EmbeddingBlock.concatenate(parts), block, dtype)
    else:
        assert len(block) == 0


@settings(deadline=None, max_examples=60)
@given(block=blocks(), dtype=st.sampled_from(list(DTYPES)))
def test_bytes_are_those_of_tensorflow(folder, block, dtype):
    import tensorflow as tf

    path = str(folder / "bytes")
    write_shard(path, block, FINGERPRINT, dtype)
    vectors = block.vectors.astype(DTYPES[dtype])
    expected = []
    for row in range(len(block)):
        features = {
            "vector": vectors[row].tobytes(),
            "source": block.sources[row].encode(),
            "id": block.ids[row].encode(),
            "fingerprint": FINGERPRINT.encode(),
            "dtype": dtype.encode(),
        }
        example = tf.train.Example()
        for key, value in features.items():
            example.features.feature[key].bytes_list.value.append(value)
        example.features.feature["label"].int64_list.value.append(block.labels[row])
        expected.append(example.SerializeToString(deterministic=True))
    assert stored_records(path) == expected


def test_documented_reader(path):
    import tensorflow as tf

    block = make_block([f"{row:04d}é" for row in range(2000)], 9)
    write_shard(path, block, FINGERPRINT, "float32")
    snippet = re.search(r"\n\n    kinds.*?\n\n", shards.__doc__ or "", re.DOTALL)
    assert snippet
    names: dict = {"tf": tf, "paths": [path]}
    exec(textwrap.dedent(snippet.group()), names)
    rows = list(names["dataset"].unbatch().as_numpy_iterator())
    assert [row["id"].decode() for row in rows] == block.ids.tolist()
    assert [row["label"] for row in rows] == block.labels.tolist()
    np.testing.assert_array_equal([row["vector"] for row in rows], block.vectors)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_tensorflow_decodes_the_narrow_dtypes(path, dtype):
    import tensorflow as tf

    block = make_block(["a", "b"], 300)
    write_shard(path, block, FINGERPRINT, dtype)
    vectors = [
        Example.FromString(record).features.feature["vector"].bytes_list.value[0]
        for record in stored_records(path)
    ]
    decoded = tf.cast(tf.io.decode_raw(vectors, tf.dtypes.as_dtype(dtype)), tf.float32)
    np.testing.assert_array_equal(read_shard(path).vectors, decoded.numpy())


def test_same_rows_same_bytes(path, tmp_path):
    block = make_block([f"{row:03d}" for row in range(50)])
    first = write_shard(path, block, FINGERPRINT, "float32")
    assert write_shard(str(tmp_path / "again"), block, FINGERPRINT, "float32") == first
    shuffled = block.take(np.random.default_rng(1).permutation(50))
    resorted = shuffled.take(np.argsort(shuffled.ids))
    assert write_shard(path, resorted, FINGERPRINT, "float32") == first


def test_long_ids_and_many_buffers(path, monkeypatch):
    monkeypatch.setattr(tfrecord, "CHUNK_BYTES", 40_000)
    ids = sorted(f"{row:05d}" + "ü" * (row * 37 % 9000) for row in range(300))
    block = make_block(ids, 40, np.arange(300) * 999_999_937 - 3, [f"s{row}" for row in range(300)])
    write_shard(path, block, FINGERPRINT, "float32")
    assert_same(read_shard(path), block)
    assert_same(EmbeddingBlock.concatenate(list(read_blocks(path, 7))), block)


def test_float16_widens_as_numpy_does():
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    for half in (every[np.isfinite(every)].reshape(-1, 4), every[np.isnan(every)][:, None]):
        out = np.empty(half.shape, np.float32)
        shard_rows._widen(half, out)
        np.testing.assert_array_equal(out.view(np.uint32), half.astype(np.float32).view(np.uint32))


def test_imports_no_tensorflow(path):
    write_shard(path, make_block(["a"]), FINGERPRINT, "float32")
    code = (
        "import sys; from vm_core import shards;"
        f"block = shards.read_shard({path!r}); shards.write_shard({path!r}, block, 'x', 'float16');"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("layout", ["reversed", "floats", "extra", "long_varint"])
def test_other_layouts_of_the_same_rows(path, layout):
    block = make_block([f"{row:02d}" for row in range(20)], 6)
    write_shard(path, block, FINGERPRINT, "float32")

    def rewrite(row: int, record: bytes) -> bytes:
        if layout == "floats":
            return altered(record, vector=block.vectors[row].tolist(), dtype=None)
        if layout == "extra":
            return altered(record, zebra=7, caption=b"a zebra")
        if layout == "long_varint":  # the outermost length, in three bytes where two would do
            return record[:2] + bytes((record[2] | 0x80, 0)) + record[3:]
        features = Example.FromString(record).features.feature
        pieces = []
        for key in sorted(features, reverse=True):
            piece = Example()
            piece.features.feature[key].CopyFrom(features[key])
            pieces.append(piece.features.SerializeToString())
        body = b"".join(pieces)
        assert 128 <= len(body) < 1 << 14
        return b"\x0a" + bytes((len(body) & 0x7F | 0x80, len(body) >> 7)) + body

    records = [rewrite(row, record) for row, record in enumerate(stored_records(path))]
    assert records != stored_records(path)
    assert_same(read_shard(store(path, records)), block)
    write_shard(path, block, FINGERPRINT, "float32")
    original = stored_records(path)
    mixed = original[:5] + records[5:10] + original[10:]
    if layout != "long_varint":
        assert_same(read_shard(store(path, mixed)), block)


@settings(deadline=None, max_examples=400)
@given(data=st.data())
def test_fast_parser_agrees_with_protobuf(data):
    """Of any bytes at all the fast parser says what protobuf says, or nothing."""
    block = make_block(["a", "é" * 70], 4, [5, -2])
    records = [
        bytearray(record) for record in shards._encode(block, block.vectors, FINGERPRINT, "float32")
    ]
    for _ in range(data.draw(st.integers(1, 3))):
        record = records[data.draw(st.integers(0, 1))]
        at = data.draw(st.integers(0, len(record) - 1))
        record[at] = data.draw(st.integers(0, 255) | st.sampled_from([record[at] ^ 1, 0x80]))
    file = io.BytesIO()
    tfrecord.write_records(file, [bytes(record) for record in records])
    file.seek(0)
    (frames,) = tfrecord.read_frames(file)
    layout = shard_rows.Layout("float32", FINGERPRINT, 4)
    fast, slow = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)
    columns = shard_rows._decode_columns(frames, layout, fast)
    if columns is not None:
        expected = shard_rows._decode_rows("path", frames, layout, slow)
        assert fast.tobytes() == slow.tobytes()
        assert columns.labels.tolist() == expected.labels.tolist()
        assert (columns.ids, columns.sources) == (expected.ids, expected.sources)
    else:
        with contextlib.suppress(VisualMemoryError):
            shard_rows._decode_rows("path", frames, layout, slow)


def test_damage_is_never_read(path):
    block = make_block(["a", "b", "c"])
    write_shard(path, block, FINGERPRINT, "float32")
    with open(path, "rb") as file:
        data = file.read()
    sizes = np.cumsum([0] + [len(record) + 16 for record in stored_records(path)]).tolist()
    for size in range(len(data)):
        with open(path, "wb") as file:
            file.write(data[:size])
        if size in sizes:  # a whole file of fewer records: the manifest knows the count
            assert len(read_shard(path)) == sizes.index(size)
        else:
            with pytest.raises(tfrecord.CorruptRecordError, match=re.escape(path)):
                read_shard(path)
    for at in range(len(data)):
        with open(path, "wb") as file:
            file.write(data[:at] + bytes((data[at] ^ 1 << at % 8,)) + data[at + 1 :])
        with pytest.raises(tfrecord.CorruptRecordError, match=re.escape(path)):
            read_shard(path)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"fingerprint": b"other"}, "its fingerprint is 'other', in the records before 'dinov2"),
        ({"dtype": b"float16"}, "its dtype is 'float16', in the records before 'float32'"),
        ({"dtype": b"float64"}, "its dtype 'float64' is none of float32, float16, bfloat16"),
        ({"dtype": None}, "its feature 'dtype' holds 0 values in bytes_list, not one"),
        ({"vector": b"12345678"}, "its dimension is 2, in the records before 5"),
        ({"vector": b"12345"}, "its vector has 5 bytes, which is no row of float32"),
        ({"vector": b""}, "its vector has 0 bytes"),
        (
            {"vector": np.array([1, 2, np.nan, 4, 5], np.float32).tobytes()},
            "id 'b' holds NaN or infinity",
        ),
        ({"id": b""}, "its id is empty"),
        ({"id": b"\xff"}, "its feature 'id' is not UTF-8"),
        ({"source": b"\xff"}, "its feature 'source' is not UTF-8"),
        ({"label": b"7"}, "its feature 'label' holds 0 values in int64_list"),
    ],
)
def test_wrong_record(path, changes, text):
    write_shard(path, make_block(["a", "b", "c"]), FINGERPRINT, "float32")
    records = stored_records(path)
    records[1] = altered(records[1], **changes)
    store(path, records)
    with pytest.raises(VisualMemoryError, match=re.escape(text)) as caught:
        read_shard(path)
    assert path in str(caught.value) and "record 1 " in str(caught.value)
    assert "write the shard again" in str(caught.value)


def test_not_an_example(path):
    with pytest.raises(VisualMemoryError, match=r"record 0 .*no tf.train.Example"):
        read_shard(store(path, [b"\xff\xff"]))


def test_float16_infinity_is_refused(path):
    write_shard(path, make_block(["a", "b"]), FINGERPRINT, "float16")
    records = stored_records(path)
    records[1] = altered(records[1], vector=np.array([1, np.inf, 0, 0, 0], np.float16).tobytes())
    with pytest.raises(VisualMemoryError, match="id 'b' holds NaN or infinity"):
        read_shard(store(path, records))


@pytest.mark.parametrize(("factor", "text"), [(3, "3"), (1.01, "1.01"), (0, "0"), (1e30, "1e+30")])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_vectors_that_are_not_of_unit_length_are_refused(path, tmp_path, factor, text, dtype):
    block = make_block(["a", "b", "c"])
    write_shard(path, block, FINGERPRINT, dtype)
    records = stored_records(path)
    scaled = (block.vectors[1] * np.float32(factor)).astype(DTYPES[dtype])
    records[1] = altered(records[1], vector=scaled.tobytes())
    with pytest.raises(VisualMemoryError, match=r"record 1 .*id 'b' has length .*, not 1: divide"):
        read_shard(store(path, records))
    block.vectors[1] *= factor
    with pytest.raises(VisualMemoryError, match=f"id 'b' has length {re.escape(text)}, not 1: di"):
        write_shard(str(tmp_path / "other"), block, FINGERPRINT, dtype)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("dimension", [1, 3, 384, 4096])
def test_rounding_is_no_other_length(path, dtype, dimension):
    generator = np.random.default_rng(dimension)
    # Equal components are all rounded the same way: the most that a dtype can do to a length.
    vectors = np.stack([generator.normal(size=dimension), np.ones(dimension), np.eye(dimension)[0]])
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    halves = vectors.astype(np.float16)  # as encoders that compute in it give them
    for given_vectors in (vectors, halves):
        block = dataclasses.replace(
            make_block(["a", "b", "c"], dimension), vectors=given_vectors.astype(np.float32)
        )
        write_shard(path, block, FINGERPRINT, dtype)
        assert_same(read_shard(path), block, dtype)


def test_unexpected_fingerprint(path):
    write_shard(path, make_block(["a"]), FINGERPRINT, "float32")
    with pytest.raises(VisualMemoryError, match=r"'dinov2-l14:3f9a', expected 'clip'.*embed"):
        read_shard(path, "clip")
    with pytest.raises(VisualMemoryError, match="expected 'clip'"):
        list(read_blocks(path, expected_fingerprint="clip"))


def test_empty_shard(path):
    assert write_shard(path, make_block([], 8), FINGERPRINT, "float32").count == 0
    assert read_shard(path, FINGERPRINT).vectors.shape == (0, 0)
    assert list(read_blocks(path)) == []


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        (["a", "a"], "id 'a' occurs twice: remove duplicates"),
        (["b", "a"], "id 'a' follows 'b': sort the block"),
        ([""], "an id is empty"),
        (["\ud800"], "has no UTF-8 form"),
    ],
)
def test_ids_that_cannot_be_written(path, tmp_path, ids, text):
    with pytest.raises(VisualMemoryError, match=re.escape(text)):
        write_shard(path, make_block(ids), FINGERPRINT, "float32")
    assert list(tmp_path.iterdir()) == []


def test_blocks_that_cannot_be_written(path):
    block = make_block(["a", "b"])
    with pytest.raises(VisualMemoryError, match="'int8': the dtypes of a shard are float32"):
        write_shard(path, block, FINGERPRINT, "int8")
    with pytest.raises(VisualMemoryError, match="give every column one row per id"):
        write_shard(path, EmbeddingBlock(block.ids, block.labels[:1], block.sources, block.vectors),
                    FINGERPRINT, "float32")  # fmt: skip
    with pytest.raises(VisualMemoryError, match=r"give an \(N, D\) matrix"):
        write_shard(path, make_block(["a"], 0), FINGERPRINT, "float32")
    block.vectors[1, 3] = np.inf
    with pytest.raises(VisualMemoryError, match="id 'b' holds NaN or infinity, or send the row"):
        write_shard(path, block, FINGERPRINT, "float16")
    with pytest.raises(VisualMemoryError, match="blocks of 0 rows"):
        read_blocks(path, 0)
