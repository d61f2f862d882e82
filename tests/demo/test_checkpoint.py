"""Old PyTorch checkpoints: what is read, and what is refused."""

from __future__ import annotations

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from demo.checkpoint import read_tensors
from vm_core.errors import VisualMemoryError

SYSTEM = {"protocol_version": 1001, "little_endian": True}


class Storage:
    def __init__(self, values: np.ndarray, size: int | None = None, view: Any = None):
        names = {"float32": "FloatStorage", "int64": "LongStorage", "float64": "DoubleStorage"}
        self.values, self.view = values, view
        self.size = values.size if size is None else size
        self.type = getattr(sys.modules["torch"], names[values.dtype.name])


class Tensor:
    def __init__(self, storage: Storage, offset: int, shape: tuple, strides: tuple):
        self.arguments = (storage, offset, shape, strides, False, OrderedDict())

    def __reduce__(self) -> tuple:
        return sys.modules["torch._utils"]._rebuild_tensor_v2, self.arguments


class Writer(pickle.Pickler):
    def persistent_id(self, obj: Any) -> tuple | None:
        if not isinstance(obj, Storage):
            return None
        return ("storage", obj.type, str(id(obj)), "cpu", obj.size, obj.view)


@pytest.fixture(autouse=True)
def torch(monkeypatch) -> None:
    """As much of PyTorch as pickle asks for when it writes a checkpoint's names."""
    module, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    for name in ("FloatStorage", "LongStorage", "DoubleStorage"):
        setattr(module, name, type(name, (), {"__module__": "torch"}))

    def rebuild() -> None:
        pass

    rebuild.__module__, rebuild.__qualname__ = "torch._utils", "_rebuild_tensor_v2"
    utils._rebuild_tensor_v2 = rebuild
    monkeypatch.setitem(sys.modules, "torch", module)
    monkeypatch.setitem(sys.modules, "torch._utils", utils)


def checkpoint(tensors: Any, storages: list[Storage], system: dict = SYSTEM) -> bytes:
    file = io.BytesIO()
    for part in (0x1950A86A20F9469CFC6C, 1001, system, tensors, [str(id(s)) for s in storages]):
        Writer(file, protocol=2).dump(part)
    for storage in storages:
        file.write(storage.values.size.to_bytes(8, "little") + storage.values.tobytes())
    return file.getvalue()


def read(tmp_path: Path, data: bytes) -> dict[str, np.ndarray]:
    path = tmp_path / "weights.pth"
    path.write_bytes(data)
    return read_tensors(str(path))


def floats(length: int, **settings: Any) -> Storage:
    return Storage(np.arange(length, dtype=np.float32), **settings)


def test_tensors_are_views_of_their_storages(tmp_path):
    shared, counter = floats(24), Storage(np.array([1 << 40]))
    tensors = OrderedDict(
        kernel=Tensor(shared, 0, (2, 3, 4), (1, 8, 2)),
        tail=Tensor(shared, 20, (4,), (1,)),
        counter=Tensor(counter, 0, (), ()),
    )
    tensors._metadata = OrderedDict(version=1)  # PyTorch's, an attribute
    found = read(tmp_path, checkpoint(tensors, [counter, shared]))
    assert list(found) == ["kernel", "tail", "counter"]
    kernel = np.arange(24, dtype=np.float32).reshape(3, 4, 2).transpose(2, 0, 1)
    np.testing.assert_array_equal(found["kernel"], kernel, strict=True)
    np.testing.assert_array_equal(found["tail"], np.float32([20, 21, 22, 23]), strict=True)
    assert found["counter"].dtype == np.int64
    assert found["counter"] == 1 << 40
    assert not found["kernel"].flags.writeable


@pytest.mark.parametrize("name", ["os.system", "builtins.eval", "torch.DoubleStorage", "torch.os"])
def test_any_other_global_is_refused_by_name(tmp_path, name):
    marker = tmp_path / "ran"
    call = f"c{name.replace('.', chr(10), 1)}\n(S'touch {marker}'\ntR.".encode()
    with pytest.raises(VisualMemoryError, match=f"names {name}, which"):
        read(tmp_path, call)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("offset", "shape", "strides"),
    [
        (0, (5,), (1,)),
        (1, (4,), (1,)),
        (-1, (2,), (1,)),
        (0, (-1,), (1,)),
        (3, (2,), (-1,)),
        (0, (2,), (4,)),
        (0, (3, 3), (0, 1)),
        (0, (2,), (1, 1)),
        (0, (2**31 + 1,), (2**31,)),  # in bytes it wraps around to 0
        (0, (1,), (2**70,)),
        (0, ("2",), (1,)),
        (0.0, (2,), (1,)),
    ],
)
def test_tensor_outside_its_storage_is_refused(tmp_path, offset, shape, strides):
    storage = floats(4)
    tensors = {"first": Tensor(storage, offset, shape, strides)}
    with pytest.raises(VisualMemoryError, match="or is damaged"):
        read(tmp_path, checkpoint(tensors, [storage]))


@pytest.mark.parametrize("settings", [{"size": 3}, {"size": -1}, {"view": ("0", 0, 4)}])
def test_storage_of_another_size_or_a_view_is_refused(tmp_path, settings):
    storage = floats(4, **settings)
    with pytest.raises(VisualMemoryError, match="or is damaged"):
        read(tmp_path, checkpoint({"first": Tensor(storage, 0, (1,), (1,))}, [storage]))


def test_other_contents_are_refused(tmp_path):
    storage = floats(4)
    tensor = Tensor(storage, 0, (4,), (1,))
    zipped = io.BytesIO()
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    contents = [
        b"",
        b"no checkpoint",
        zipped.getvalue(),
        checkpoint({"first": tensor}, [storage], SYSTEM | {"little_endian": False}),
        checkpoint([tensor], [storage]),
        checkpoint({"first": 1}, [storage]),
        checkpoint({"first": tensor}, []),
    ]
    for data in contents:
        with pytest.raises(
            VisualMemoryError, match="is not a PyTorch checkpoint in the old format"
        ):
            read(tmp_path, data)


def test_file_cut_anywhere_is_refused(tmp_path):
    storage = floats(4)
    data = checkpoint({"first": Tensor(storage, 0, (1,), (1,))}, [storage])
    assert len(read(tmp_path, data)) == 1
    for end in range(len(data)):
        with pytest.raises(VisualMemoryError, match="or is damaged"):
            read(tmp_path, data[:end])
