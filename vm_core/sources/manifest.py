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
from vm_core.errors import VisualMemoryError
from vm_core.records import ImageRecord, Rejected
from vm_core.sources import IMAGES_PER_SPLIT, Listing, Source, Split, in_groups


class Plugin(Source):
    """Reads the images that a table lists.

    Paths are relative to ``root``, which is the manifest's own folder if not given; URLs
    and absolute paths stand for themselves. On a bucket, an image that is replaced under
    its old name goes unnoticed in a rerun: asking for every one's date takes too long.
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
        folder, _, file = storage.absolute(self.path).rpartition("/")
        name = self.name or folder.rpartition("/")[2] or file
        root = self._root()
        for id, path, label in split.items:
            full_id = f"{name}/{id or path}"
            if not path:
                yield Rejected(full_id, name, f"the manifest's row has no {self.path_column}")
            elif not label:
                yield Rejected(full_id, name, f"the manifest's row has no {self.label_column}")
            else:
                yield ImageRecord(full_id, classes.label(label), name, _locate(root, path))

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
        except (ValueError, OSError) as error:
            raise VisualMemoryError(
                f"manifest {self.path!r} cannot be read: {error}. It must be CSV with a header "
                "line, or Parquet"
            ) from error

    @staticmethod
    def _column(table: pa.Table, name: str) -> list[str]:
        return ["" if v is None else str(v).strip() for v in table.column(name).to_pylist()]


def _locate(root: str, path: str) -> str:
    return path if "://" in path else storage.join(root, path)


def _as_text(file: IO[bytes]) -> pyarrow.csv.ConvertOptions:
    """Keeps every column as text: a label "007" is not the number 7."""
    header = next(csv.reader([file.readline().decode("utf-8-sig")]), [])
    file.seek(0)
    return pyarrow.csv.ConvertOptions(column_types={name: pa.string() for name in header})
