import json

import numpy as np
import pytest

from vm_core import checkpoints, sealed, split_files, storage
from vm_core.errors import DamagedError
from vm_core.records import Embedded, EmbeddingBlock, Rejected, strings
from vm_core.sources import Split


def damages(data: bytes):
    """Every bit of a few bytes flipped, cuts, additions, and nothing at all."""
    random = np.random.default_rng(0)
    places = {0, 63, 64, 65, len(data) - 1, *random.integers(0, len(data), 20).tolist()}
    for place in sorted(place for place in places if place < len(data)):
        for bit in range(8):
            yield data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]
    ends = {0, 1, 64, 65, len(data) // 2, len(data) - 1}
    yield from (data[:end] for end in sorted(ends) if end < len(data))
    yield from (data + b"x", data * 2, b"\0" * len(data))


def test_a_sealed_file_is_what_it_was_or_absent(tmp_path):
    path = str(tmp_path / "a")
    assert sealed.read(path) is None
    for data in (b"", b"x", b"several\nlines\n" * 100):
        sealed.write(path, data)
        assert sealed.read(path) == data
        whole = storage.read_bytes(path)
        for damaged in damages(whole):
            storage.write_bytes(path, damaged)
            assert sealed.read(path) is None


def test_what_must_be_there(tmp_path):
    path = str(tmp_path / "a")
    with pytest.raises(DamagedError, match=f"{path} is missing or damaged. Start the same"):
        sealed.require_json(path)
    sealed.write_json(path, {"a": [1, None]})
    assert sealed.require_json(path) == sealed.read_json(path) == {"a": [1, None]}


def test_signed_json_is_readable_and_checked():
    value = {"a": [1, 2.5, None, "ü"], "b": {"2": 0.1}}
    signed = sealed.sign(value)
    assert json.loads(signed).items() > value.items()
    assert sealed.verify(signed) == value
    assert sealed.verify(json.dumps(json.loads(signed)).encode()) == value  # spaces are no content
    for old, new in ((b"2.5", b"2.6"), (b'"a"', b'"c"'), (b"null", b"1"), (b"sha256", b"sha255")):
        with pytest.raises(ValueError, match="does not agree with its key sha256"):
            sealed.verify(signed.replace(old, new))
    for data in (b"", b"[]", b"null", b"[" * 100_000, b"\xff", b"{"):
        with pytest.raises(ValueError):
            sealed.verify(data)


def test_a_damaged_checkpoint_is_absent(tmp_path):
    """Each damage of a checkpoint would otherwise be published with other content."""
    path = str(tmp_path / "split.arrow")
    block = EmbeddingBlock(
        strings(["a", "b"]),
        np.array([0, 1]),
        strings(["s", "s"]),
        np.eye(2, 8, dtype=np.float32),
        strings([b"jpeg", b"png"]),
    )
    checkpoints.write(path, Embedded(block, (Rejected("c", "s", "empty"),)))
    whole = storage.read_bytes(path)
    assert checkpoints.read(path).rejected == (Rejected("c", "s", "empty"),)
    for damaged in damages(whole):
        storage.write_bytes(path, damaged)
        assert checkpoints.read(path) is None


def test_a_damaged_list_of_splits_is_an_error(tmp_path):
    (path,) = split_files.write(str(tmp_path), [(0, Split(("a",), "v", 1))])
    storage.write_bytes(path, storage.read_bytes(path)[:-1])
    with pytest.raises(DamagedError, match=f"{path} is missing or damaged"):
        split_files.read(path)
