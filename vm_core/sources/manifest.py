"""A table of images: CSV or Parquet with a path and a label in every row."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator
from typing import IO, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from vm_core import storage
from vm_core.classes import ClassTable, read_class_list
from vm_core.errors import UnreachableError, VisualMemoryError
from vm_core.records import ImageRecord, Rejected
from vm_core.sources import IMAGES_PER_SPLIT, Listing, Source, Split, in_groups

_USABLE = (
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_string_view,
    pa.types.is_integer,
    pa.types.is_boolean,
    pa.types.is_null,
)
_SCHEMES = ("file", "gs", "gcs", "s3", "az", "abfs", "memory")


class Plugin(Source):
    """Reads the images that a table lists.

    Paths are relative to ``root``, which is the manifest's own folder if not given; absolute
    paths and URLs of files and buckets stand for themselves. Labels are text or whole
    numbers. On a bucket, an image that is replaced under its old name goes unnoticed in a
    rerun: asking for every one's date takes too long.
    The id is NAME/ followed by the id column, or by the path where there is none.
    ``split`` keeps the rows with that value in ``split_column``.
    """

    kind: Literal["manifest"] = "manifest"
    root: str | None = None
    path_column: str = "path"
    label_column: str = "label"
    id_column: str | None = None
    split_column: str = "split"
    split: str | None = None
    class_list: str | None = None

    def listing(self) -> Listing:
        table = self._read_table()
        required = [self.path_column, self.label_column]
        required += [self.id_column] if self.id_column else []
        required += [self.split_column] if self.split is not None else []
        missing = [name for name in required if name not in table.column_names]
        if missing:
            raise VisualMemoryError(
                f"manifest {self.path!r} has no column {', '.join(map(repr, missing))}. Its "
                f"columns: {', '.join(table.column_names)}. Name them with path_column, "
                "label_column, id_column and split_column"
            )
        if doubled := [name for name in required if table.column_names.count(name) > 1]:
            raise VisualMemoryError(
                f"manifest {self.path!r} has more than one column {doubled[0]!r}. Rename the others"
            )
        columns = [self._column(table, name) for name in required[:2]]
        ids = self._column(table, self.id_column) if self.id_column else columns[0]
        rows = list(zip(ids, *columns, strict=True))
        if self.split is not None:
            splits = self._column(table, self.split_column)
            rows = [row for row, split in zip(rows, splits, strict=True) if split == self.split]
            if not rows:
                raise VisualMemoryError(
                    f"manifest {self.path!r}: no row has {self.split_column} = {self.split!r}. "
                    f"Values there: {', '.join(sorted(set(splits)))}"
                )
        if not rows:
            raise VisualMemoryError(f"manifest {self.path!r} has no rows: nothing to read")
        return Listing(
            splits=[
                Split(tuple(group), self._version(group), len(group))
                for group in in_groups(rows, IMAGES_PER_SPLIT)
            ],
            class_keys=sorted({label for _, _, label in rows if label}),
            class_names=read_class_list(self.class_list) if self.class_list else {},
        )

    def read(self, split: Split, classes: ClassTable) -> Iterator[ImageRecord | Rejected]:
        name = self.effective_name
        root = self._root()
        for id, path, label in split.items:
            full_id = f"{name}/{id or path}"
            if not path:
                yield Rejected(full_id, name, f"the manifest's row has no {self.path_column}")
            elif not label:
                yield Rejected(full_id, name, f"the manifest's row has no {self.label_column}")
            elif refusal := _refusal(path):
                yield Rejected(full_id, name, refusal)
            else:
                yield ImageRecord(full_id, classes.label(label), name, _locate(root, path))

    def _folder(self) -> str:
        return storage.absolute(self.path).rpartition("/")[0]

    def _version(self, rows: list[tuple[str, str, str]]) -> str:
        root = self._root()
        stamps = [storage.stamp(_locate(root, path)) if path else "" for _, path, _ in rows]
        return hashlib.sha256(repr((rows, stamps)).encode()).hexdigest()

    def _root(self) -> str:
        return storage.absolute(self.root or storage.absolute(self.path).rpartition("/")[0] + "/")

    def _read_table(self) -> pa.Table:
        if not storage.exists(self.path):
            raise VisualMemoryError(
                f"manifest {self.path!r} does not exist. Give a CSV or Parquet file"
            )
        try:
            with storage.open_read(self.path) as file:
                if self.path.endswith(".parquet"):
                    return pyarrow.parquet.read_table(file)
                return pyarrow.csv.read_csv(file, convert_options=_as_text(file))
        except UnreachableError:
            raise
        except (ValueError, OSError) as error:
            raise VisualMemoryError(
                f"manifest {self.path!r} cannot be read: {error}. It must be CSV with a header "
                "line, or Parquet"
            ) from error

    def _column(self, table: pa.Table, name: str) -> list[str]:
        """A column as text, '' for null. Raises VisualMemoryError if its type is of no use."""
        column = table.column(name)
        kind = column.type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if pa.types.is_floating(kind):
            numbers = column.to_pylist()
            for row, number in enumerate(numbers):
                if number is not None and not float(number).is_integer():
                    raise VisualMemoryError(
                        f"manifest {self.path!r}, column {name!r}, row {row} (counted from 0): "
                        f"{number} is neither text nor a whole number. Give text or whole numbers"
                    )
            return ["" if number is None else str(int(number)) for number in numbers]
        if not any(is_usable(kind) for is_usable in _USABLE):
            raise VisualMemoryError(
                f"manifest {self.path!r}: column {name!r} holds {kind}, not text or whole numbers. "
                "Write it as text"
            )
        return ["" if v is None else str(v).strip() for v in column.to_pylist()]


def _refusal(path: str) -> str | None:
    """Why a row's path is not read: another program or machine would be asked for it."""
    scheme, separator, rest = path.partition("://")
    if separator and (scheme not in _SCHEMES or "::" in rest):
        return (
            f"the manifest's row names {path!r}: only local files and "
            f"{', '.join(f'{each}://' for each in _SCHEMES)} are read"
        )
    return None


def _locate(root: str, path: str) -> str:
    return path if "://" in path else storage.join(root, path)


def _as_text(file: IO[bytes]) -> pyarrow.csv.ConvertOptions:
    """Keeps every column as text: a label "007" is not the number 7."""
    header = next(csv.reader([file.readline().decode("utf-8-sig")]), [])
    file.seek(0)
    return pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in header})
