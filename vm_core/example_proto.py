"""``tf.train.Example`` on the wire, without the seconds that importing TensorFlow takes.

A serialised example with one value per feature is a nest of lengths:

    0A len(features)  then for each feature, in the order of the keys
       0A len(entry)
          0A len(key) key
          12 len(feature)
             kind len(list)          kind: 0A bytes, 1A int64
                0A len(value) value  value: the bytes, or the varint of the int64

``feature`` writes this, ``Cursor`` reads it from many records at once, and ``Example``
is the protobuf class, for records of any other shape.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

BYTES, INT64 = 0x0A, 0x1A  # tags of Feature.bytes_list and Feature.int64_list


def varint(value: int) -> bytes:
    """A number in [0, 2**64) as protobuf writes it: seven bits a byte, low bits first."""
    if value < 0x80:
        return bytes((value,))
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def feature(key: bytes, kind: int, value: bytes) -> bytes:
    """One entry of ``Features.feature`` with one value (an int64 as the bytes of its varint)."""
    return feature_head(key, kind, len(value)) + value


def feature_head(key: bytes, kind: int, size: int) -> bytes:
    """What stands before a feature's value of ``size`` bytes: tags and nested lengths."""
    head = b"\x0a" + varint(size)
    for tag in (bytes((kind,)), b"\x12"):
        head = tag + varint(len(head) + size) + head
    head = b"\x0a" + varint(len(key)) + key + head
    return b"\x0a" + varint(len(head) + size) + head


class Cursor:
    """Reads the same features from many serialised examples at once, column by column.

    data: (B,) uint8 that holds all records; at: (N,) int64, where each is read next.
    ``ok``: (N,) bool, turns False, for good, in rows that are not as expected; what the
    methods return for such a row means nothing but is safe to add up. Reading never
    leaves ``data``, whatever the bytes say.
    """

    def __init__(self, data: np.ndarray, at: np.ndarray):
        self._data, self.at = data, at
        self.ok = np.ones(len(at), bool)

    def expect(self, constant: bytes) -> None:
        """Steps over bytes that every row must have here."""
        size = len(constant)
        if size == 1:
            self.ok &= self._data.take(self.at, mode="clip") == constant[0]
        elif size > len(self._data):
            self.ok[:] = False
        else:
            found = windows(self._data, size)
            self.ok &= found[np.minimum(self.at, len(found) - 1)] == np.void(constant)
        self.at = self.at + size

    def varint(self) -> np.ndarray:
        """(N,) int64: the variable-length integers that stand here."""
        byte = self._data.take(self.at, mode="clip")
        self.at = self.at + 1
        rows = np.flatnonzero(byte >= 0x80)
        if not len(rows):
            return byte.astype(np.int64)
        value = (byte & 0x7F).astype(np.uint64)
        for shift in range(7, 70, 7):
            if not len(rows):
                break
            byte = self._data.take(self.at[rows], mode="clip")
            value[rows] |= (byte & 0x7F).astype(np.uint64) << np.uint64(shift)
            self.at[rows] += 1
            if shift == 63:
                self.ok[rows] &= byte <= 1  # more would not fit in 64 bits
            rows = rows[byte >= 0x80]
        return value.view(np.int64)

    def length(self) -> np.ndarray:
        """(N,) int64 within [0, B]: varints that are lengths."""
        value = self.varint()
        long = value.view(np.uint64) > len(self._data)
        if long.any():
            self.ok &= ~long
            value[long] = 0
        return value

    def bytes_feature(self, key: bytes) -> Slices:
        """Steps over a feature that holds one value of bytes."""
        start, end = self._value(key, BYTES)
        self.at = end
        return Slices(self._data, start, end)

    def int64_feature(self, key: bytes) -> np.ndarray:
        """(N,) int64; steps over a feature that holds one of them."""
        _, end = self._value(key, INT64)
        value = self.varint()
        self.ok &= self.at == end
        return value

    def _value(self, key: bytes, kind: int) -> tuple[np.ndarray, np.ndarray]:
        """Steps to the value of a feature; where it begins and ends.

        The nested lengths must agree, so that the feature holds this one value.
        """
        self.expect(b"\x0a")
        size = self.length()
        end = self.at + size
        for opening in (b"\x0a" + varint(len(key)) + key + b"\x12", bytes((kind,)), b"\x0a"):
            self.expect(opening)
            size = self.length()
            self.ok &= self.at + size == end
        return self.at, end


class Slices(NamedTuple):
    """N byte strings that lie in ``data``, (B,) uint8; starts and ends: (N,) int64."""

    data: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    def tolist(self) -> list[bytes]:
        data = self.data
        bounds = zip(self.starts.tolist(), self.ends.tolist(), strict=True)
        return [data[start:end].tobytes() for start, end in bounds]

    def first(self) -> bytes:
        return self.data[self.starts[0] : self.ends[0]].tobytes()

    def all_equal(self) -> bool:
        sizes = self.ends - self.starts
        if len(sizes) == 0 or sizes[0] == 0 or (sizes != sizes[0]).any():
            return not sizes.any()
        found = windows(self.data, int(sizes[0]))[self.starts]
        return bool((found == found[0]).all())


def windows(data: np.ndarray, size: int) -> np.ndarray:
    """(B - size + 1,) void view: element i is the ``size`` bytes of ``data`` from i on."""
    return np.ndarray((len(data) - size + 1,), f"V{size}", data, strides=(1,))


def _example_class() -> Any:
    """Builds the class of ``tf.train.Example``: the same bytes, in a pool of its own."""
    file = descriptor_pb2.FileDescriptorProto(
        name="visual_memory_example.proto", package="visual_memory", syntax="proto3"
    )
    repeated = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED
    message = descriptor_pb2.FieldDescriptorProto.TYPE_MESSAGE

    for kind, name in (("BYTES", "BytesList"), ("FLOAT", "FloatList"), ("INT64", "Int64List")):
        type_of_value = descriptor_pb2.FieldDescriptorProto.Type.Value(f"TYPE_{kind}")
        values = file.message_type.add(name=name)
        values.field.add(name="value", number=1, label=repeated, type=type_of_value)

    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(("BytesList", "FloatList", "Int64List"), start=1):
        feature.field.add(
            name=name.removesuffix("List").lower() + "_list",
            number=number,
            type=message,
            type_name=f".visual_memory.{name}",
            oneof_index=0,
        )

    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, type=descriptor_pb2.FieldDescriptorProto.TYPE_STRING)
    entry.field.add(name="value", number=2, type=message, type_name=".visual_memory.Feature")
    features.field.add(
        name="feature",
        number=1,
        label=repeated,
        type=message,
        type_name=".visual_memory.Features.FeatureEntry",
    )

    example = file.message_type.add(name="Example")
    example.field.add(name="features", number=1, type=message, type_name=".visual_memory.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(file.SerializeToString())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("visual_memory.Example"))


Example = _example_class()
"""``tf.train.Example``, the same on the wire."""
