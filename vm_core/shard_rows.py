"""The records of an embedding shard, from bytes to columns: ``vm_core.shards`` has the format.

Records as ``write_shard`` makes them are parsed column by column in NumPy, the vectors
gathered in one copy; those of any other layout by protobuf, one at a time.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from google.protobuf.message import DecodeError

from vm_core.errors import VisualMemoryError
from vm_core.example_proto import BYTES, Cursor, Example, Slices, feature, feature_head, windows
from vm_core.tfrecord import Frames

DTYPES = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}

_CACHED_BYTES = 1 << 18  # vectors are converted in pieces that stay in the processor's cache
_LENGTH_TOLERANCE = 1e-3  # vectors that were normalised in float16 are off by half of it
_SUBNORMAL = np.array([2.0**-130], np.float32)


class Layout:
    """What all records of a shard have in common, and the bytes that follow from it."""

    def __init__(self, dtype: str, fingerprint: str, dimension: int):
        self.dtype, self.fingerprint, self.dimension = dtype, fingerprint, dimension
        self.vector_bytes = dimension * DTYPES[dtype].itemsize
        self.prefix = feature(b"dtype", BYTES, dtype.encode()) + feature(
            b"fingerprint", BYTES, utf8(fingerprint)
        )
        self.vector_head = feature_head(b"vector", BYTES, self.vector_bytes)


class Row(NamedTuple):
    """One record as protobuf has it; vector: (D,) of the stored dtype."""

    id: str
    label: int
    source: str
    fingerprint: str
    dtype: str
    vector: np.ndarray


class Columns(NamedTuple):
    """N rows of a block, without their vectors."""

    ids: list[str]
    labels: np.ndarray
    sources: list[str]


def decode(path: str, frames: Frames, layout: Layout, vectors: np.ndarray) -> Columns:
    """Parses N records; their vectors go into ``vectors``, (N, D) float32."""
    columns = _decode_columns(frames, layout, vectors)
    if columns is None:
        columns = _decode_rows(path, frames, layout, vectors)
    if len(bad := unusable(vectors, layout.dtype)):
        row = int(bad[0])
        cause = why_unusable(columns.ids[row], vectors[row])
        raise _bad_record(path, frames.first + row, cause)
    return columns


def unusable(vectors: np.ndarray, dtype: str) -> np.ndarray:
    """The rows (positions) that are not finite or not of unit length.

    vectors: (N, D) float32, as they were before or after they were stored as ``dtype``, whose
    rounding may change a length.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        lengths = np.sqrt(np.vecdot(vectors, vectors))
    tolerance = _LENGTH_TOLERANCE + float(ml_dtypes.finfo(DTYPES[dtype]).eps) / 2
    return np.flatnonzero(~(np.abs(lengths - 1) <= tolerance))


def why_unusable(id: str, vector: np.ndarray) -> str:
    """What is wrong with a vector (D,) that is unusable."""
    if not np.isfinite(vector).all():
        return f"the vector of id {id!r} holds NaN or infinity"
    length = np.linalg.norm(vector.astype(np.float64))
    return f"the vector of id {id!r} has length {length:.6g}, not 1: divide it by its length"


def _decode_columns(frames: Frames, layout: Layout, vectors: np.ndarray) -> Columns | None:
    """The fast way, for records as write_shard makes them; None if any of them is not."""
    data, starts, ends, _ = frames
    cursor = Cursor(data, starts)
    cursor.expect(b"\x0a")
    size = cursor.length()
    cursor.ok &= cursor.at + size == ends
    cursor.expect(layout.prefix)
    ids = cursor.bytes_feature(b"id")
    labels = cursor.int64_feature(b"label")
    sources = cursor.bytes_feature(b"source")
    cursor.expect(layout.vector_head)
    cursor.ok &= cursor.at + layout.vector_bytes == ends
    # The cursor never goes back, so a row that ends where its record does stayed inside it.
    if not (cursor.ok.all() and (ids.starts < ids.ends).all()):
        return None
    _gather(data, cursor.at, DTYPES[layout.dtype], vectors)
    try:
        return Columns(
            [id.decode() for id in ids.tolist()],
            labels,
            _decode_texts(sources),
        )
    except UnicodeDecodeError:
        return None


def _gather(data: np.ndarray, starts: np.ndarray, dtype: np.dtype, vectors: np.ndarray) -> None:
    """Copies the vectors that start in ``data`` at ``starts`` into (N, D) float32 rows."""
    found = windows(data, vectors.shape[1] * dtype.itemsize)
    step = max(1, _CACHED_BYTES // vectors[:1].nbytes)
    for row in range(0, len(vectors), step):
        out = vectors[row : row + step]
        stored = found[starts[row : row + step]].view(dtype).reshape(out.shape)
        if dtype == np.float16:
            _widen(stored, out)
        else:
            out[:] = stored


def _widen(half: np.ndarray, out: np.ndarray) -> None:
    """float16 to float32, exactly, at several times the speed of NumPy's conversion.

    Moving sign, exponent and fraction to float32's places leaves a number that is 2**112
    too small, subnormals included. That fails for infinity and NaN, and where the thread
    is set to treat float32's subnormals as zero: there NumPy converts.
    """
    bits = out.view(np.int32)
    bits[:] = half.view(np.int16)
    bits <<= 13
    bits &= -0x70002000
    out *= np.float32(2.0**112)
    special = np.vecdot(out, out) >= 2.0**32  # infinity and NaN came out as 65536 and more
    if special.any() or (_SUBNORMAL * np.float32(2.0**112))[0] == 0:
        out[:] = half


def _decode_rows(path: str, frames: Frames, layout: Layout, vectors: np.ndarray) -> Columns:
    """The general way: any serialisation of the features, one record at a time."""
    columns = Columns([], np.empty(len(vectors), np.int64), [])
    for index in range(len(vectors)):
        row = parse_row(path, frames, index)
        for name, found, shard in (
            ("fingerprint", row.fingerprint, layout.fingerprint),
            ("dtype", row.dtype, layout.dtype),
            ("dimension", len(row.vector), layout.dimension),
        ):
            if found != shard:
                cause = f"its {name} is {found!r}, in the records before {shard!r}"
                raise _bad_record(path, frames.first + index, cause)
        columns.ids.append(row.id)
        columns.labels[index] = row.label
        columns.sources.append(row.source)
        vectors[index] = row.vector
    return columns


def parse_row(path: str, frames: Frames, index: int) -> Row:
    bad_record = partial(_bad_record, path, frames.first + index)
    try:
        example = Example.FromString(
            frames.data[frames.starts[index] : frames.ends[index]].tobytes()
        )
    except DecodeError as error:
        raise bad_record(f"it is no tf.train.Example ({error})") from error
    features = example.features.feature

    def value(key: str, kind: str) -> Any:
        values: Any = getattr(features[key], kind).value if key in features else ()
        if len(values) != 1:
            raise bad_record(f"its feature {key!r} holds {len(values)} values in {kind}, not one")
        return values[0]

    def text(key: str) -> str:
        try:
            return value(key, "bytes_list").decode()
        except UnicodeDecodeError as error:
            raise bad_record(f"its feature {key!r} is not UTF-8 ({error})") from error

    if "vector" in features and features["vector"].float_list.value:
        dtype = "float32"
        vector = np.array(features["vector"].float_list.value, np.float32)
    else:
        dtype, stored = text("dtype"), value("vector", "bytes_list")
        if dtype not in DTYPES:
            raise bad_record(f"its dtype {dtype!r} is none of {', '.join(DTYPES)}")
        if len(stored) == 0 or len(stored) % DTYPES[dtype].itemsize:
            raise bad_record(f"its vector has {len(stored)} bytes, which is no row of {dtype}")
        vector = np.frombuffer(stored, DTYPES[dtype])
    if not (id := text("id")):
        raise bad_record("its id is empty")
    return Row(
        id,
        value("label", "int64_list"),
        text("source"),
        text("fingerprint"),
        dtype,
        vector,
    )


def _decode_texts(texts: Slices) -> list[str]:
    """As decoding each, but one for all where they are the same, as sources mostly are."""
    if texts.all_equal():
        return [texts.first().decode()] * len(texts.starts)
    decode = lru_cache(maxsize=4096)(bytes.decode)
    return [decode(text) for text in texts.tolist()]


def utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise VisualMemoryError(
            f"{text!r} has no UTF-8 form ({error.reason}): use valid Unicode in ids and sources"
        ) from error


def _bad_record(path: str, number: int, cause: str) -> VisualMemoryError:
    return VisualMemoryError(
        f"{path}: record {number} (counted from 0): {cause}; "
        "remove it or write the shard again with write_shard"
    )
