"""TFRecord files, without TensorFlow.

A file is a run of frames, all numbers little-endian:

    uint64  length of the data
    uint32  masked CRC-32C of the eight bytes above
    bytes   data
    uint32  masked CRC-32C of the data

What is read is untrusted: both checksums are verified before a byte is handed on, and
a length is believed only as far as the file goes.
"""

from __future__ import annotations

import gzip
import struct
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import IO, Any, NamedTuple, TypeVar, cast

import google_crc32c
import numpy as np

from vm_core.errors import VisualMemoryError

MAX_RECORD_BYTES = 1 << 28
CHUNK_BYTES = 1 << 21  # long reads, short enough that the passes over them find them cached

_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_HEADER_BYTES, _FOOTER_BYTES = 12, 4
OVERHEAD_BYTES = _HEADER_BYTES + _FOOTER_BYTES
_DAMAGED = "the file is damaged or is no TFRecord file: restore it or write it again"

_Crc = TypeVar("_Crc", int, np.ndarray)


class CorruptRecordError(VisualMemoryError):
    """A TFRecord file that is cut short, altered, or no TFRecord file at all."""


class Frames(NamedTuple):
    """Whole, verified records that lie in one buffer.

    data: (B,) uint8, overwritten when the next frames are asked for: copy what you keep.
    starts, ends: (N,) int64, where each record's data begins and ends in ``data``.
    first: number of the first of these records in the file, counted from 0.
    """

    data: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    first: int


def write_records(file: IO[bytes], records: Iterable[bytes]) -> int:
    """Writes each record as one frame and returns how many there were."""
    count = 0
    pending: list[bytes] = []
    pending_bytes = 0
    for record in records:
        crc = _masked(google_crc32c.value(record))
        pending += (_header(len(record)), record, _FOOTER.pack(crc))
        pending_bytes += len(record)
        count += 1
        if pending_bytes > CHUNK_BYTES:
            file.write(b"".join(pending))
            pending.clear()
            pending_bytes = 0
    file.write(b"".join(pending))
    return count


def read_records(
    file: IO[bytes],
    max_record_bytes: int = MAX_RECORD_BYTES,
    compression: str | None = None,
) -> Iterator[bytes]:
    """The records of a file opened for reading, in order.

    compression: None or "GZIP". The records before a fault are yielded; then
    CorruptRecordError names the file, the record, the cause and the remedy. A record
    longer than ``max_record_bytes`` is such a fault.
    """
    for frames in read_frames(file, max_record_bytes, compression):
        data = frames.data
        for start, end in zip(frames.starts.tolist(), frames.ends.tolist(), strict=True):
            yield data[start:end].tobytes()


def read_frames(
    file: IO[bytes],
    max_record_bytes: int = MAX_RECORD_BYTES,
    compression: str | None = None,
) -> Iterator[Frames]:
    """As ``read_records``, but a buffer of verified records at a time, not yet copied out.

    Holds one buffer of 2 MiB, or of at most twice the longest record.
    """
    if compression not in (None, "GZIP"):
        raise VisualMemoryError(
            f"compression {compression!r} is not known: give None or 'GZIP', "
            "or decompress the file first"
        )
    name = _name(file)
    stream = gzip.GzipFile(fileobj=file) if compression else file
    buffer = np.empty(CHUNK_BYTES, np.uint8)
    filled = offset = number = 0  # offset: where the buffer begins in the uncompressed file
    while True:
        try:
            read = cast(Any, stream).readinto(buffer[filled:].data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise _corrupt(name, number, offset, f"{error} (GZIP compression)") from error
        filled += read
        starts, ends, fault = _walk(buffer[:filled], max_record_bytes)
        unread = fault and offset == 0 and not len(starts) and not compression
        if unread and bytes(buffer[:2]) == b"\x1f\x8b":
            raise CorruptRecordError(
                f"{name}: the file is compressed with gzip: read it with compression='GZIP'"
            )
        if len(starts):
            yield Frames(buffer[:filled], starts, ends, number)
        number += len(starts)
        done = int(ends[-1]) + _FOOTER_BYTES if len(starts) else 0
        offset += done
        if fault:
            raise _corrupt(name, number, offset, fault)
        rest = filled - done
        if not read:
            if rest:
                raise _corrupt(name, number, offset, f"the file ends {rest} bytes into the record")
            return
        # The buffer grows only once it is full of one record's bytes, so a length that
        # lies costs no more memory than the file is long.
        room = 2 * len(buffer) if rest == len(buffer) else len(buffer)
        target = np.empty(room, np.uint8) if room > len(buffer) else buffer
        target[:rest] = buffer[done:filled]
        buffer, filled = target, rest


def _walk(data: np.ndarray, max_record_bytes: int) -> tuple[np.ndarray, np.ndarray, str | None]:
    """Bounds of the leading good records, and what is wrong with the one after them."""
    starts: list[int] = []
    ends: list[int] = []
    fault = None
    position, filled = 0, len(data)
    view, unpack = data.data, _HEADER.unpack_from
    while position + _HEADER_BYTES <= filled:
        length, length_crc = unpack(view, position)
        if length_crc != _length_crc(length):
            fault = f"the checksum of its length does not match; {_DAMAGED}"
            break
        if length > max_record_bytes:
            fault = (
                f"it declares {length} bytes and max_record_bytes is {max_record_bytes}; "
                "raise the limit if you trust the file"
            )
            break
        start = position + _HEADER_BYTES
        end = start + length
        position = end + _FOOTER_BYTES
        if position > filled:
            break
        starts.append(start)
        ends.append(end)
    # crc32c takes an array's slice as it is; a slice of bytes would be a copy.
    crc32c = google_crc32c.value
    crcs = [crc32c(data[s:e]) for s, e in zip(starts, ends, strict=True)]
    start_array, end_array = np.array(starts, np.int64), np.array(ends, np.int64)
    stored = np.ndarray((max(filled - 3, 0),), "<u4", data, strides=(1,))[end_array]
    wrong = np.flatnonzero(stored != _masked(np.array(crcs, np.uint64)))
    if len(wrong):
        good = wrong[0]
        fault = f"the checksum of its data does not match; {_DAMAGED}"
        return start_array[:good], end_array[:good], fault
    return start_array, end_array, fault


def _masked(crc: _Crc) -> _Crc:
    """TFRecord's mask: rotate right by 15 bits and add a constant (uint64 arrays or int)."""
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


@lru_cache(maxsize=4096)
def _length_crc(length: int) -> int:
    return _masked(google_crc32c.value(length.to_bytes(8, "little")))


@lru_cache(maxsize=4096)
def _header(length: int) -> bytes:
    return _HEADER.pack(length, _length_crc(length))


def _name(file: IO[bytes]) -> str:
    for attribute in ("full_name", "path", "name"):
        if isinstance(name := getattr(file, attribute, None), str):
            return name
    return "TFRecord stream"


def _corrupt(name: str, number: int, offset: int, cause: str) -> CorruptRecordError:
    remedy = "" if ";" in cause else f"; {_DAMAGED}"
    return CorruptRecordError(
        f"{name}: record {number} (counted from 0), at byte {offset}: {cause}{remedy}"
    )
