"""Class keys, names and labels.

A class key is what the data calls a class: a folder's name, a label in a table. Its
label is the integer that every array holds.
"""

from __future__ import annotations

import base64
import io
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from vm_core import storage
from vm_core.errors import DamagedError, VisualMemoryError
from vm_core.records import PADDING, UNKNOWN
from vm_core.tables import parse_table

_SCHEMA = pa.schema([("label", pa.int64()), ("key", pa.string()), ("name", pa.string())])
_REMEDY = "Restore it from a copy, or build the memory again"


@dataclass(frozen=True)
class ClassTable:
    """The classes of a memory: ``labels[i]`` is the label of ``keys[i]``, called ``names[i]``.

    With no keys, labels are the integers that the data itself carries, and any
    non-negative one is valid.
    """

    keys: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    labels: tuple[int, ...] = field(default=())

    @staticmethod
    def from_keys(
        keys_of_sources: Iterable[Sequence[str] | None], names: Mapping[str, str]
    ) -> ClassTable:
        """Numbers the classes of several sources; None stands for plain integer labels.

        Keys that are all integers are their own labels; otherwise labels count the
        sorted keys from 0. Integer labels beside named classes raise VisualMemoryError.
        """
        keys_of_sources = list(keys_of_sources)
        keys = sorted({key for keys in keys_of_sources for key in keys or ()})
        integers = all(_is_label(key) for key in keys)
        if None in keys_of_sources and not integers:
            raise VisualMemoryError(
                f"one source has plain integer labels, another has named classes ({keys[0]!r}, "
                "...): they cannot be matched. Give the first the option class_list, a file "
                "with one class key a line"
            )
        if None in keys_of_sources:
            return ClassTable()
        labels = [int(key) for key in keys] if integers else list(range(len(keys)))
        order = sorted(range(len(keys)), key=labels.__getitem__)
        return ClassTable(
            tuple(keys[i] for i in order),
            tuple(names.get(keys[i], keys[i]) for i in order),
            tuple(labels[i] for i in order),
        )

    @cached_property
    def _label_of(self) -> dict[str, int]:
        return dict(zip(self.keys, self.labels, strict=True))

    @cached_property
    def _name_of(self) -> dict[int, str]:
        return dict(zip(self.labels, self.names, strict=True))

    def label(self, key: str) -> int:
        """The label of a class key, or UNKNOWN."""
        if not self.keys and _is_label(key):
            return int(key)
        return self._label_of.get(key, UNKNOWN)

    @cached_property
    def _key_of(self) -> dict[int, str]:
        return dict(zip(self.labels, self.keys, strict=True))

    def key(self, label: int) -> str:
        """The class key of a label; a label that has none is its own key."""
        return self._key_of.get(label, str(label))

    def name(self, label: int) -> str:
        """What to call a label in tables and reports."""
        if label == PADDING:
            return "(no neighbour)"
        if label == UNKNOWN:
            return "(class not in the memory)"
        return self._name_of.get(label, str(label))

    def to_parquet(self) -> bytes:
        table = pa.table(
            {
                "label": pa.array(self.labels, pa.int64()),
                "key": pa.array(self.keys, pa.string()),
                "name": pa.array(self.names, pa.string()),
            }
        )
        sink = io.BytesIO()
        pq.write_table(table, sink)
        return sink.getvalue()

    @staticmethod
    def parse(path: str, data: bytes) -> ClassTable:
        """The table in the bytes of a file; path: of the file. Raises DamagedError."""
        table = parse_table(path, data, _REMEDY, _SCHEMA)
        columns = [table.column(name).to_pylist() for name in ("key", "name", "label")]
        if any(None in column for column in columns):
            raise DamagedError(f"{path} is damaged: a class has no key or name. {_REMEDY}")
        return ClassTable(*map(tuple, columns))


def read_class_list(path: str) -> dict[str, str]:
    """Class names by class key, in the file's order.

    One class a line, as ImageNet's lists have it: the key, then, if it is to be shown
    by another name, white space and the name.
    """
    names: dict[str, str] = {}
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise VisualMemoryError(
            f"class list {path!r} cannot be read: {error}. Give a UTF-8 text file with one class "
            "a line"
        ) from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        key, *name = line.strip().split(maxsplit=1)
        if key in names:
            raise VisualMemoryError(
                f"class list {path}, line {number}: the class key {key!r} stands there twice. "
                "Give every class one line"
            )
        names[key] = name[0] if name else key
    return names


def _is_label(key: str) -> bool:
    return key.isascii() and key.isdigit() and len(key) <= 18 and str(int(key)) == key


def pack_counts(labels: np.ndarray) -> str:
    """How many rows have each of the (N,) int64 labels, in a few bytes a class, as text.

    A shard may have tens of thousands of classes, and a memory tens of thousands of shards.
    """
    present, counts = np.unique(labels, return_counts=True)
    pairs = np.stack([np.diff(present, prepend=0), counts]).astype("<i8")
    return base64.b64encode(zlib.compress(pairs.tobytes())).decode()


def add_counts(packed: Iterable[str]) -> dict[int, int]:
    """Rows by label, ascending, of all that ``pack_counts`` returned."""
    total: Counter[int] = Counter()
    for text in packed:
        pairs = np.frombuffer(zlib.decompress(base64.b64decode(text)), "<i8").reshape(2, -1)
        total.update(dict(zip(np.cumsum(pairs[0]).tolist(), pairs[1].tolist(), strict=True)))
    return dict(sorted(total.items()))
