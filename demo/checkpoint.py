"""Reads the tensors of an old PyTorch checkpoint (before the zip format), without PyTorch.

Such a file is five pickles and then raw numbers, one storage after the other. Unpickling calls
whatever the file names; here it may name only what ``_GLOBALS`` lists: a dictionary, a record
of our own, and types of numbers, which are mere strings. Any other name is refused before it
is looked up, so the file can neither run code nor import any. The numbers are read as numbers,
and no tensor reaches outside its storage. Refused as well: zip files, big-endian files, storages
that are views of others, and objects that are not a dictionary of tensors.

A pickle can still be made to fill the memory: read only files whose hash is known.
"""

from __future__ import annotations

import io
import math
import pickle
from collections import OrderedDict
from typing import Any, NamedTuple

import numpy as np

from vm_core.errors import VisualMemoryError

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


class _Storage(NamedTuple):
    """Numbers that come later in the file; tensors can share them."""

    dtype: str
    key: str
    size: int


class _Tensor(NamedTuple):
    """Where a tensor's numbers are in its storage, counted in numbers, not bytes."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    requires_grad: bool
    backward_hooks: Any


_GLOBALS = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    ("torch", "FloatStorage"): "<f4",
    ("torch", "LongStorage"): "<i8",
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str, /) -> Any:
        if (module, name) not in _GLOBALS:
            raise VisualMemoryError(
                f"the checkpoint names {module}.{name}, which a file of weights has no need of. "
                "It may be harmful: do not load it otherwise; use the pinned one"
            )
        return _GLOBALS[module, name]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, dtype, key, _device, size, view = pid
        if kind != "storage" or view is not None or dtype not in ("<f4", "<i8"):
            raise ValueError(f"{kind!r} of {dtype!r}, view {view!r}, is not supported")
        return _Storage(dtype, key, size)


def read_tensors(path: str) -> dict[str, np.ndarray]:
    """The tensors of a state dict by name: float32 or int64, read-only views of the file's bytes.

    Raises:
      VisualMemoryError: the file is damaged, or has what is refused (see above).
    """
    with open(path, "rb") as file:
        data = file.read()
    try:
        return _read(data)
    except VisualMemoryError:
        raise
    except Exception as error:  # a damaged pickle can raise any
        raise VisualMemoryError(
            f"{path!r} is not a PyTorch checkpoint in the old format, or is damaged: {error}. "
            "Fetch the pinned one again"
        ) from error


def _read(data: bytes) -> dict[str, np.ndarray]:
    file = io.BytesIO(data)
    magic, protocol, system, tensors, keys = (_Unpickler(file).load() for _ in range(5))
    if (magic, protocol, system["little_endian"]) != (_MAGIC, _PROTOCOL, True):
        raise ValueError(f"it starts with {magic!r}, {protocol!r}, {system!r}")
    storages = {tensor.storage.key: tensor.storage for tensor in tensors.values()}
    numbers = {}
    for key in keys:
        storage = storages[key]
        size = int.from_bytes(file.read(8), "little")
        if size != storage.size:
            raise ValueError(f"storage {key!r} has {size} numbers, not {storage.size!r}")
        numbers[storage] = np.frombuffer(data, storage.dtype, size, offset=file.tell())
        file.seek(numbers[storage].nbytes, io.SEEK_CUR)
    return {name: _array(tensor, numbers[tensor.storage]) for name, tensor in tensors.items()}


def _array(tensor: _Tensor, numbers: np.ndarray) -> np.ndarray:
    _, offset, shape, strides, *_ = tensor
    last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    # In Python's integers, which do not overflow: numpy's view below trusts what it is given.
    if min((offset, *shape, *strides)) < 0 or max(last + 1, math.prod(shape)) > numbers.size:
        raise ValueError(f"{tensor!r} is not within its storage")
    strides_bytes = [stride * numbers.itemsize for stride in strides]
    return np.lib.stride_tricks.as_strided(numbers[offset:], shape, strides_bytes, writeable=False)
