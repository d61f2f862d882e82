"""Batches come back under their keys; a file without its marker is not there."""

import numpy as np
import pytest

from vm_core import batch_files
from vm_core.batch_files import BatchFile
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
