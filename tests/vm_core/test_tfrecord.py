"""TFRecord framing: against TensorFlow's own, and against damage."""

from __future__ import annotations

import gzip
import io
import random
import struct
import tracemalloc

import google_crc32c
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core import tfrecord
from vm_core.errors import VisualMemoryError
from vm_core.tfrecord import CorruptRecordError, read_records, write_records

RECORDS = [b"", b"one", bytes(range(256)) * 9, b"\0" * 70]


def encode(records: list[bytes]) -> bytes:
    file = io.BytesIO()
    assert write_records(file, records) == len(records)
    return file.getvalue()


def header(length: int) -> bytes:
    packed = struct.pack("<Q", length)
    return packed + struct.pack("<I", tfrecord._masked(google_crc32c.value(packed)))


def read_until_fault(data: bytes) -> tuple[list[bytes], str | None]:
    records = []
    try:
        for record in read_records(io.BytesIO(data)):
            records.append(record)
    except CorruptRecordError as error:
        return records, str(error)
    return records, None


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_round_trip(records):
    assert list(read_records(io.BytesIO(encode(records)))) == records


@pytest.mark.parametrize("chunk", [16, 64, 1000])
def test_records_longer_than_the_buffer(monkeypatch, chunk):
    monkeypatch.setattr(tfrecord, "CHUNK_BYTES", chunk)
    assert list(read_records(io.BytesIO(encode(RECORDS)))) == RECORDS


def test_reads_what_tensorflow_writes(tmp_path):
    import tensorflow as tf

    path = str(tmp_path / "theirs")
    with tf.io.TFRecordWriter(path) as writer:
        for record in RECORDS:
            writer.write(record)
    with open(path, "rb") as file:
        assert list(read_records(file)) == RECORDS
    with open(path, "rb") as file:
        assert file.read() == encode(RECORDS)


def test_tensorflow_reads_what_we_write(tmp_path):
    import tensorflow as tf

    path = tmp_path / "ours"
    path.write_bytes(encode(RECORDS))
    assert list(tf.data.TFRecordDataset(str(path)).as_numpy_iterator()) == RECORDS


def test_gzip():
    packed = gzip.compress(encode(RECORDS))
    assert list(read_records(io.BytesIO(packed), compression="GZIP")) == RECORDS
    with pytest.raises(CorruptRecordError, match="read it with compression='GZIP'"):
        list(read_records(io.BytesIO(packed)))
    for damaged in (packed[:-20], packed[:30] + b"xxxx" + packed[34:], encode(RECORDS)):
        with pytest.raises(CorruptRecordError):
            list(read_records(io.BytesIO(damaged), compression="GZIP"))
    with pytest.raises(VisualMemoryError, match="compression 'LZ4' is not known"):
        list(read_records(io.BytesIO(packed), compression="LZ4"))


def test_truncation_at_every_offset():
    data = encode(RECORDS)
    whole = [len(encode(RECORDS[:count])) for count in range(len(RECORDS) + 1)]
    for size in range(len(data)):
        records, fault = read_until_fault(data[:size])
        assert records == RECORDS[: len(records)]
        if size in whole:
            assert fault is None and len(records) == whole.index(size)
        else:
            assert fault is not None and f"record {len(records)} " in fault


@settings(deadline=None)
@given(st.integers(0, 2**32))
def test_flipped_bits_are_found(seed):
    data = bytearray(encode(RECORDS))
    for _ in range(random.Random(seed).randint(1, 3)):
        bit = random.Random(seed).randrange(len(data) * 8)
        data[bit // 8] ^= 1 << bit % 8
        seed += 1
    if bytes(data) != encode(RECORDS):
        records, fault = read_until_fault(bytes(data))
        assert fault is not None and records == RECORDS[: len(records)]


def test_fault_names_file_record_offset_and_remedy(tmp_path):
    path = tmp_path / "shard-7"
    data = bytearray(encode(RECORDS))
    offset = len(encode(RECORDS[:2]))
    data[offset + 12] ^= 1
    path.write_bytes(data)
    with open(path, "rb") as file, pytest.raises(CorruptRecordError) as caught:
        list(read_records(file))
    text = str(caught.value)
    for part in (str(path), "record 2 ", f"byte {offset}", "checksum of its data", "restore it"):
        assert part in text


@pytest.mark.parametrize("length", [2**27, 2**40, 2**63, 2**64 - 1])
def test_declared_length_allocates_nothing(length):
    tracemalloc.start()
    with pytest.raises(CorruptRecordError):
        list(read_records(io.BytesIO(header(length) + b"x" * 100)))
    assert tracemalloc.get_traced_memory()[1] < 2 * tfrecord.CHUNK_BYTES + 1_000_000
    tracemalloc.stop()


def test_record_over_the_limit():
    with pytest.raises(CorruptRecordError, match=r"declares 2304 bytes.*raise the limit"):
        list(read_records(io.BytesIO(encode(RECORDS)), max_record_bytes=1000))
