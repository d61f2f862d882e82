"""TFRecord shards of tf.train.Example, with ImageNet's usual keys."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from typing import Any, Literal

from vm_core import storage, tfrecord
from vm_core.classes import ClassTable, read_class_list
from vm_core.errors import UnreachableError, VisualMemoryError
from vm_core.example_proto import Example
from vm_core.records import UNKNOWN, ImageRecord, Rejected
from vm_core.sources import Listing, Source, Split

_BYTES_PER_SPLIT = 64 << 20
_LARGE_FILE = 1 << 30
_USUAL_RECORD = 110_000  # bytes, ImageNet's mean

_log = logging.getLogger(__name__)


class Plugin(Source):
    """Reads the shards that match a glob pattern.

    The id is NAME/ followed by ``id_key``'s value, or by a hash of the image where the
    record has none. Labels are integers, unless ``class_list`` names the classes: then
    label ``first_label`` is its first line. A split is a whole file, or several small
    ones, since a TFRecord file can only be read from its start. Files that end in ``.gz``
    are decompressed.
    """

    kind: Literal["tfrecord"] = "tfrecord"
    image_key: str = "image/encoded"
    label_key: str = "image/class/label"
    id_key: str = "image/filename"
    class_list: str | None = None
    first_label: int = 0

    def listing(self) -> Listing:
        files = storage.list_files(storage.absolute(self.path))
        if not files:
            raise VisualMemoryError(
                f"tfrecord source: no file matches {self.path!r}. Give a path or a glob pattern "
                "such as /data/train-*-of-*"
            )
        if max(file.size for file in files) > _LARGE_FILE:
            _log.warning(
                "%s has files of over 1 GiB: each is read by one worker. More and smaller "
                "shards spread the work better",
                self.path,
            )
        names = read_class_list(self.class_list) if self.class_list else {}
        return Listing(list(_pack(files)), list(names) if self.class_list else None, names)

    def read(self, split: Split, classes: ClassTable) -> Iterator[ImageRecord | Rejected]:
        name = self.effective_name
        keys = list(read_class_list(self.class_list)) if self.class_list else None
        read_bytes = read_records = 0
        for path, size in split.items:
            number = done = 0
            try:
                with storage.open_read(path) as file:
                    for data in tfrecord.read_records(file, compression=_compression(path)):
                        yield self._parse(data, f"{path}#{number}", name, keys, classes)
                        number += 1
                        done += tfrecord.OVERHEAD_BYTES + len(data)
            except UnreachableError:
                raise
            except (tfrecord.CorruptRecordError, OSError) as error:
                # Where one record is damaged, the place of the next is not known.
                lost = self._lost(path, size, done, read_bytes + done, read_records + number)
                yield Rejected(
                    f"{path}#{number}",
                    name,
                    f"rest of the file lost: about {lost:,} records by its size: {error}",
                    lost,
                )
            read_bytes, read_records = read_bytes + done, read_records + number

    def _lost(self, path: str, size: int, done: int, read_bytes: int, records: int) -> int:
        """About how many records of the share are in the unread rest of a file of ``size`` bytes.

        done: bytes of the file that were read, decompressed. The others are of all files so
        far, from which the size of a record follows.
        """
        mean = read_bytes / records if records else _USUAL_RECORD
        if _compression(path):
            size = max(size, done)  # of images, which compress little
        low, high = self.share
        return max(1, round((size - done) / mean * (high - low)))

    def _folder(self) -> str:
        return storage.absolute(self.path).rpartition("/")[0]

    def _in_share(self, record: ImageRecord | Rejected) -> bool:
        # What cannot be read has no id to go by: it is reported whatever the share.
        return isinstance(record, Rejected) or super()._in_share(record)

    def _parse(
        self, data: bytes, where: str, name: str, keys: list[str] | None, classes: ClassTable
    ) -> ImageRecord | Rejected:
        try:
            features = Example.FromString(data).features.feature
        except Exception as error:  # protobuf's error class depends on its implementation
            return Rejected(where, name, f"the record is not a tf.train.Example: {error}")
        image = _first(features, self.image_key)
        label = _first(features, self.label_key)
        identifier = _first(features, self.id_key)
        if not isinstance(image, bytes):
            return Rejected(where, name, f"the record has no bytes under {self.image_key!r}")
        if not isinstance(label, int) or label < 0:
            return Rejected(where, name, f"the record has no label under {self.label_key!r}")
        if not isinstance(identifier, bytes) or not identifier:
            identifier = hashlib.sha256(image).hexdigest()[:32].encode()
        row = f"{name}/{identifier.decode(errors='replace')}"
        if keys is not None:
            line = label - self.first_label
            if not 0 <= line < len(keys):
                return Rejected(row, name, f"label {label} has no line in {self.class_list}")
            return ImageRecord(row, classes.label(keys[line]), name, image)
        # With named classes in the memory a bare number names none of them.
        return ImageRecord(row, UNKNOWN if classes.keys else label, name, image)


def _compression(path: str) -> str | None:
    return "GZIP" if path.endswith(".gz") else None


def _first(features: Any, key: str) -> bytes | int | None:
    if key not in features:
        return None
    feature = features[key]
    values = getattr(feature, feature.WhichOneof("kind") or "bytes_list").value
    return values[0] if values else None


def _pack(files: list[storage.FileInfo]) -> Iterator[Split]:
    group: list[storage.FileInfo] = []
    for file in files:
        if group and sum(f.size for f in group) + file.size > _BYTES_PER_SPLIT:
            yield _split(group)
            group = []
        group.append(file)
    yield _split(group)


def _split(files: list[storage.FileInfo]) -> Split:
    version = hashlib.sha256(repr([(f.path, f.size, f.version) for f in files]).encode())
    return Split(tuple((file.path, file.size) for file in files), version.hexdigest(), None)
