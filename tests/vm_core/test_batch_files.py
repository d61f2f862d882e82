"""Batches come back under their keys; a file without its marker is not there."""

import errno
import re

import numpy as np
import pytest

from vm_core import batch_files, storage
from vm_core.batch_files import BatchFile
from vm_core.errors import VisualMemoryError
from vm_core.records import strings


def test_batches_come_back_as_they_were(tmp_path):
    path = str(tmp_path / "file")
    rng = np.random.default_rng(0)
    written: dict[int, list[dict]] = {}
    with batch_files.writing(path) as out:
        for key, rows in [(7, 3), (0, 2), (7, 5)]:
            columns = {
                "number": rng.integers(0, 9, rows),
                "list": rng.random((rows, 4)).astype(np.float32),
                "yes": rng.random((rows, 2)) < 0.5,
                "text": strings(["ä", "", "c", "d", "e"][:rows]),
            }
            out.write(key, columns)
            written.setdefault(key, []).append(columns)
        out.facts["what"] = [1, 2]
        assert not batch_files.is_complete(path)
    assert batch_files.is_complete(path)
    file = BatchFile(path)
    assert (file.keys, file.facts, list(file.read(5))) == ([0, 7], {"what": [1, 2]}, [])
    for key, batches in written.items():
        for read, columns in zip(file.read(key), batches, strict=True):
            assert read.keys() == columns.keys()
            for name, values in columns.items():
                assert read[name].dtype == values.dtype
                np.testing.assert_array_equal(read[name], values)


def test_a_file_may_have_no_batches(tmp_path):
    with batch_files.writing(str(tmp_path / "none")):
        pass
    file = BatchFile(str(tmp_path / "none"))
    assert file.keys == [] and list(file.read(0)) == []


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError):
        with batch_files.writing(str(tmp_path / "file")) as out:
            out.write(0, {"number": np.arange(3)})
            raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", ["json", "arrow"])
@pytest.mark.parametrize("share", [None, 0, 0.5, 0.9])
def test_damage_is_named_with_what_to_do(tmp_path, suffix, share):
    path = str(tmp_path / "work" / "file")
    with batch_files.writing(path) as out:
        for key in range(3):
            out.write(key, {"number": np.arange(1_000), "text": strings(["a"] * 1_000)})
    damaged = tmp_path / "work" / f"file.{suffix}"
    data = damaged.read_bytes()
    damaged.unlink()
    if share is not None:
        damaged.write_bytes(data[: int(share * len(data))])
    expected = f"{re.escape(str(damaged))} .*Start the (same )?command again: it is made anew"
    assert not batch_files.is_complete(path)
    for read in (lambda file: file.read_at_once(2), lambda file: list(file.read(2))):
        with pytest.raises(VisualMemoryError, match=expected):
            read(BatchFile(path))


def test_what_is_not_the_file_s_fault_stays_what_it_is(tmp_path, monkeypatch):
    path = str(tmp_path / "file")
    with batch_files.writing(path) as out:
        out.write(0, {"number": np.arange(3)})

    def full(_):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(storage, "open_read", full)
    with pytest.raises(OSError, match="Too many open files"):
        BatchFile(path).read_at_once(0)
