"""Embedding shards: TFRecord files of one ``tf.train.Example`` per image, sorted by id.

    feature      kind    value
    dtype        bytes   how the vector is stored: float32, float16 or bfloat16
    fingerprint  bytes   the encoder's fingerprint; one per shard
    id           bytes   UTF-8, not empty, unique in the shard
    label        int64
    source       bytes   UTF-8, the data set the row came from
    vector       bytes   D little-endian numbers of that dtype, unit length; one D per shard

Any TensorFlow program reads them (here a float32 shard):

    kinds = {"id": tf.string, "label": tf.int64, "vector": tf.string}
    features = {key: tf.io.FixedLenFeature([], kind) for key, kind in kinds.items()}
    def parse(records):
        rows = tf.io.parse_example(records, features)
        return {**rows, "vector": tf.io.decode_raw(rows["vector"], tf.float32)}
    dataset = tf.data.TFRecordDataset(paths).batch(1024).map(parse)

The bytes of a shard follow from its content alone: features stand in the order of their
names, as protobuf's deterministic serialisation has them. So the vector comes last, and a
buffer of records written here is parsed column by column in NumPy, the vectors gathered
in one copy. A record of another layout is parsed by protobuf, one at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from vm_core import storage
from vm_core.errors import DamagedError, VisualMemoryError
from vm_core.example_proto import BYTES, INT64, feature, varint
from vm_core.records import EmbeddingBlock, strings
from vm_core.shard_rows import (
    DTYPES,
    Columns,
    Layout,
    Row,
    decode,
    parse_row,
    unusable,
    utf8,
    why_unusable,
)
from vm_core.tfrecord import Frames, read_frames, write_records

BLOCK_ROWS = 4096


class ShardSummary(NamedTuple):
    """What a manifest notes of a shard: rows, file size, SHA-256 in hexadecimal, D."""

    count: int  # type: ignore[assignment]  # the name hides tuple.count, which nobody needs
    bytes: int
    sha256: str
    dimension: int


def write_shard(path: str, block: EmbeddingBlock, fingerprint: str, dtype: str) -> ShardSummary:
    """Writes a block as one shard, atomically; the same block gives the same bytes.

    Thumbnails are not part of it: they are a side table.

    block: rows in ascending order of their ids, all different; vectors of unit length, within
    0.001. They are rounded to ``dtype``, a key of DTYPES. VisualMemoryError if anything is
    amiss.
    """
    if dtype not in DTYPES:
        raise VisualMemoryError(
            f"cannot store vectors as {dtype!r}: the dtypes of a shard are {', '.join(DTYPES)}"
        )
    _check_block(path, block)
    if len(bad := unusable(block.vectors, dtype)):
        raise VisualMemoryError(
            f"{path}: {why_unusable(block.ids[bad[0]], block.vectors[bad[0]])}, or send the row to "
            "quarantine, before writing"
        )
    vectors = np.ascontiguousarray(block.vectors).astype(DTYPES[dtype], copy=False)
    with storage.write_atomic(path) as file:
        hashing = storage.HashingWriter(file)
        records = _encode(block, vectors, fingerprint, dtype)
        count = write_records(hashing, records)  # type: ignore[arg-type]
    return ShardSummary(count, hashing.bytes, hashing.sha256.hexdigest(), vectors.shape[1])


def read_shard(
    path: str, expected_fingerprint: str | None = None, expected_rows: int | None = None
) -> EmbeddingBlock:
    """The whole shard as one block; an empty shard gives vectors of shape (0, 0).

    VisualMemoryError if the file is damaged, a record is not as above, a vector is not of
    unit length (within 0.001 and the dtype's rounding), or the fingerprint is not the
    expected one; DamagedError if there are not as many rows as expected.
    """
    block = next(_blocks(path, None, expected_fingerprint), None)
    if block is None:
        block = EmbeddingBlock(
            strings([]), np.empty(0, np.int64), strings([]), np.empty((0, 0), np.float32)
        )
    check_rows(path, len(block), expected_rows)
    return block


def check_rows(path: str, rows: int, expected: int | None) -> None:
    """Raises DamagedError for a shard that was cut between two records, or replaced.

    expected: by its marker or a manifest; None if that is not known.
    """
    if expected is not None and rows != expected:
        raise DamagedError(
            f"{path} has {rows:,} rows and was written with {expected:,}: it was cut off or "
            "replaced. Start its build again, which makes the shard anew"
        )


def read_blocks(
    path: str, rows: int = BLOCK_ROWS, expected_fingerprint: str | None = None
) -> Iterator[EmbeddingBlock]:
    """The shard in blocks of ``rows`` rows, the last one shorter; none for an empty shard.

    Holds one block and a buffer of 2 MiB, however long the shard is. Errors as in
    ``read_shard``, raised when the reading comes to the fault.
    """
    if rows < 1:
        raise VisualMemoryError(f"cannot read blocks of {rows} rows: give rows of at least 1")
    return _blocks(path, rows, expected_fingerprint)


# Writing ----------------------------------------------------------------------------


def _check_block(path: str, block: EmbeddingBlock) -> None:
    columns = [block.labels, block.sources, block.vectors]
    if any(len(column) != len(block) for column in columns):
        raise VisualMemoryError(
            f"{path}: a block of {len(block)} ids has columns of "
            f"{[len(column) for column in columns]} rows: give every column one row per id"
        )
    if block.vectors.ndim != 2 or block.vectors.shape[1] == 0:
        raise VisualMemoryError(
            f"{path}: vectors have shape {block.vectors.shape}: give an (N, D) matrix, D > 0"
        )
    if len(block) and block.ids[0] == "":
        raise VisualMemoryError(
            f"{path}: an id is empty, which stands for a missing neighbour: name every row"
        )
    for left, right in pairwise(block.ids):
        if left == right:
            raise VisualMemoryError(
                f"{path}: id {left!r} occurs twice: remove duplicates before writing"
            )
        if left > right:
            raise VisualMemoryError(
                f"{path}: id {right!r} follows {left!r}: sort the block by id before writing"
            )


def _encode(
    block: EmbeddingBlock, vectors: np.ndarray, fingerprint: str, dtype: str
) -> Iterator[bytes]:
    layout = Layout(dtype, fingerprint, vectors.shape[1])
    prefix, vector_head = layout.prefix, layout.vector_head
    vector_bytes = layout.vector_bytes
    label_feature = lru_cache(maxsize=4096)(
        lambda label: feature(b"label", INT64, varint(label & 0xFFFF_FFFF_FFFF_FFFF))
    )
    source_feature = lru_cache(maxsize=4096)(lambda source: feature(b"source", BYTES, utf8(source)))
    rows = zip(block.ids, block.labels.tolist(), block.sources, vectors, strict=True)
    for id, label, source, vector in rows:
        head = (
            prefix
            + feature(b"id", BYTES, utf8(id))
            + label_feature(label)
            + source_feature(source)
            + vector_head
        )
        yield b"\x0a" + varint(len(head) + vector_bytes) + head + vector.tobytes()


# Reading ----------------------------------------------------------------------------


def _blocks(
    path: str, rows: int | None, expected_fingerprint: str | None
) -> Iterator[EmbeddingBlock]:
    with storage.open_read(path) as file:
        size = file.seek(0, 2)
        file.seek(0)
        layout = None
        vectors = np.empty((0, 0), np.float32)
        parts: list[Columns] = []
        filled = 0
        for frames in read_frames(file):
            done = 0
            if layout is None:
                first = parse_row(path, frames, 0)
                layout = _shard_layout(path, first, expected_fingerprint)
            while done < len(frames.starts):
                if not filled:
                    # Never more rows than the rest of the file can hold: what stays
                    # unused of an allocation is never touched and costs no memory.
                    most = size // layout.vector_bytes
                    vectors = np.empty((min(rows or most, most), layout.dimension), np.float32)
                count = min(len(frames.starts) - done, len(vectors) - filled)
                part = Frames(
                    frames.data,
                    frames.starts[done : done + count],
                    frames.ends[done : done + count],
                    frames.first + done,
                )
                parts.append(decode(path, part, layout, vectors[filled : filled + count]))
                done += count
                filled += count
                if filled == rows:
                    yield _assemble(parts, layout, vectors)
                    parts, filled = [], 0
        if layout and filled:
            yield _assemble(parts, layout, vectors[:filled])


def _assemble(parts: list[Columns], layout: Layout, vectors: np.ndarray) -> EmbeddingBlock:
    return EmbeddingBlock(
        strings([id for part in parts for id in part.ids]),
        np.concatenate([part.labels for part in parts]),
        strings([source for part in parts for source in part.sources]),
        vectors,
    )


def _shard_layout(path: str, first: Row, expected_fingerprint: str | None) -> Layout:
    if expected_fingerprint is not None and first.fingerprint != expected_fingerprint:
        raise VisualMemoryError(
            f"{path}: the shard has the encoder fingerprint {first.fingerprint!r}, expected "
            f"{expected_fingerprint!r}: embed its images again with the encoder of this memory"
        )
    return Layout(first.dtype, first.fingerprint, len(first.vector))
