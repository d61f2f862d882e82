"""Parquet side tables."""

from __future__ import annotations

import contextlib
import hashlib
import io
from collections.abc import Callable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from vm_core import storage
from vm_core.errors import DamagedError, VisualMemoryError


def write_table(path: str, table: pa.Table, row_group_size: int = 4096) -> str:
    """Writes a Parquet file whose bytes follow from the rows alone; returns its SHA-256.

    Its pages have checksums, so that a part of the file can be read and checked.
    """
    sink = io.BytesIO()
    pq.write_table(
        table, sink, compression="zstd", row_group_size=row_group_size, write_page_checksum=True
    )
    storage.write_bytes(path, sink.getvalue())
    return hashlib.sha256(sink.getvalue()).hexdigest()


def read_table(path: str, sha256: str, remedy: str, schema: pa.Schema | None = None) -> pa.Table:
    """Reads a Parquet file at once.

    sha256: that it must have. schema: of the columns that are read, all if None. Raises
    DamagedError, with the remedy, if the file is missing, changed, or no such table.
    """
    data = storage.read_verified(path, sha256, remedy)
    return parse_table(path, data, remedy, schema)


def parse_table(path: str, data: bytes, remedy: str, schema: pa.Schema | None = None) -> pa.Table:
    """The table in the bytes of a Parquet file; path: of the file. Raises DamagedError."""
    with _damage(path, remedy):
        return _checked(pq.read_table(io.BytesIO(data), columns=schema and schema.names), schema)


def read_some(
    path: str,
    ids: Sequence[str],
    remedy: str,
    schema: pa.Schema,
    owns: Callable[[str], bool],
) -> pa.Table:
    """The rows of some ids from a file that is sorted by its first column, ``id``.

    Reads the parts of the file that may have them. owns: whether the file is that of an id.
    Raises DamagedError.
    """
    try:
        with _damage(path, remedy), storage.open_read(path) as file:
            metadata = pq.read_metadata(file)
            if metadata.num_rows and not owns(metadata.row_group(0).column(0).statistics.min):
                raise DamagedError(f"{path} has the rows of another file. {remedy}")
            table = pq.read_table(
                file,
                columns=schema.names,
                filters=[("id", "in", list(ids))],
                page_checksum_verification=True,
            )
            return _checked(table, schema)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing. {remedy}") from None


def _checked(table: pa.Table, schema: pa.Schema | None) -> pa.Table:
    if schema is not None:
        table = table.cast(schema)
    table.validate(full=True)
    return table


@contextlib.contextmanager
def _damage(path: str, remedy: str) -> Iterator[None]:
    """Whatever Arrow makes of a damaged file becomes a DamagedError."""
    try:
        yield
    except VisualMemoryError:
        raise
    except (
        *(pa.ArrowException, ValueError, KeyError, OSError, OverflowError),
        *(AttributeError, TypeError),
    ) as error:
        reason = str(error).partition("\n")[0]
        raise DamagedError(f"{path} is damaged: {reason}. {remedy}") from error


@contextlib.contextmanager
def table_writer(path: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
    """A Parquet file to be written block by block; it appears when complete."""
    with (
        storage.write_atomic(path) as file,
        pq.ParquetWriter(file, schema, compression="zstd") as writer,
    ):
        yield writer
