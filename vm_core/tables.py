"""Parquet side tables."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from vm_core import storage


def write_table(path: str, table: pa.Table, row_group_size: int = 4096) -> str:
    """Writes a Parquet file whose bytes follow from the rows alone; returns its SHA-256."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", row_group_size=row_group_size)
    storage.write_bytes(path, sink.getvalue())
    return hashlib.sha256(sink.getvalue()).hexdigest()


@contextlib.contextmanager
def table_writer(path: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A Parquet file to be written block by block; it appears when complete."""
    with (
        storage.write_atomic(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        yield writer
