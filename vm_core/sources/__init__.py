"""Readers of labelled images, one module a format: folder, manifest, tfrecord.

A reader lists its work as splits, on the machine that starts the run, and reads one
split at a time, on any worker. A split is small, has a few hundred images behind it,
and says by its ``version`` whether what is behind it changed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from pydantic import Field, model_validator

from vm_core import plugins, storage
from vm_core.classes import ClassTable
from vm_core.records import ImageRecord, Rejected, unit_interval

IMAGES_PER_SPLIT = 512


class Split(NamedTuple):
    """A piece of a source that one worker reads at once.

    items: what the reader needs to find its images; tuples, strings, bytes and numbers.
    version: digest of the sizes and change times of the files behind it.
    images: how many images it has, None if that takes reading it.
    """

    items: tuple
    version: str
    images: int | None


class Listing(NamedTuple):
    """What a source holds, as far as it can be told without reading the images.

    class_keys: the classes, or None when labels are the integers that the data carries.
    class_names: names to show, by class key, where they differ from the key.
    """

    splits: list[Split]
    class_keys: list[str] | None
    class_names: dict[str, str]


class Source(plugins.Settings):
    """Base of the readers.

    ``name`` prefixes every id, so that two sources cannot collide; left out, it is the
    last folder of the path. ``share`` keeps the records whose id falls in a part of the
    unit interval: [0, 0.8] and [0.8, 1] are two disjoint and stable subsets of one
    data set.
    """

    kind: str
    path: str
    name: str = ""
    share: tuple[float, float] = Field((0.0, 1.0))

    @property
    def effective_name(self) -> str:
        """What begins the ids of this source: ``name``, or the last folder of the path."""
        return self.name or self._folder().rpartition("/")[2] or self.kind

    def _folder(self) -> str:
        """The folder that the source is named after."""
        return storage.absolute(self.path).rstrip("/")

    @model_validator(mode="after")
    def _check_share(self) -> Source:
        low, high = self.share
        if not 0 <= low < high <= 1:
            raise ValueError(
                f"share {list(self.share)} must be [low, high] with 0 <= low < high <= 1"
            )
        return self

    def listing(self) -> Listing:
        """Lists the source. Raises VisualMemoryError if there is nothing to read."""
        raise NotImplementedError

    def expected(self, split: Split) -> int:
        """About how many records of a split are in the share; 0 if not known. For progress."""
        low, high = self.share
        return round((split.images or 0) * (high - low))

    def read(self, split: Split, classes: ClassTable) -> Iterator[ImageRecord | Rejected]:
        """Reads the records of one split, whether or not they are in the share."""
        raise NotImplementedError

    def records(self, split: Split, classes: ClassTable) -> Iterator[ImageRecord | Rejected]:
        """The records of one split that are in the configured share."""
        return filter(self._in_share, self.read(split, classes))

    def _in_share(self, record: ImageRecord | Rejected) -> bool:
        low, high = self.share
        return (low, high) == (0, 1) or low <= unit_interval(record.id, "share") < high


def parse(settings: Any) -> Source:
    """The reader that settings describe. Raises VisualMemoryError."""
    return plugins.configure(__name__, settings, Source)


def parse_all(settings: Any) -> tuple[Source, ...]:
    """The readers of a configuration.

    Raises ValueError if ``settings`` is no list, and if the images of two sources would get
    the same ids.
    """
    if not isinstance(settings, list | tuple):
        raise ValueError("must be a list of sources, each with kind and path")
    readers = tuple(parse(each) for each in settings)
    by_name: dict[str, Source] = {}
    for reader in readers:
        first = by_name.setdefault(reader.effective_name, reader)
        if (first.kind, first.path) != (reader.kind, reader.path):
            raise ValueError(
                f"the sources {first.path!r} and {reader.path!r} have the same name "
                f"{reader.effective_name!r}, so their images could have the same ids. Give one of "
                "them another name with the key name"
            )
    return readers


def from_argument(argument: str) -> Source:
    """The reader for a path given on a command line, recognised by its form.

    ``*.csv`` and ``*.parquet`` are manifests, names with ``tfrecord`` are TFRecord
    shards, anything else is a folder with one folder per class.
    """
    if argument.endswith((".csv", ".parquet")):
        return parse({"kind": "manifest", "path": argument})
    if "tfrecord" in argument.rpartition("/")[2]:
        return parse({"kind": "tfrecord", "path": argument})
    return parse({"kind": "folder", "path": argument})


def in_groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of ``size`` items; the last may be shorter."""
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
