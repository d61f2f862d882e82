"""Products of queries and rows, block by block, in the precisions that can be had quickly."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from vm_core.errors import VisualMemoryError
from vm_core.shard_rows import DTYPES

_BFLOAT16 = DTYPES["bfloat16"]
_PRODUCTS = 2**21  # of a block in float32: 8 MB
_VALUES = 2**22  # of a block of rows in float32: 16 MB
_COARSE = 4  # times as many in bfloat16, of which TensorFlow shares out each product


@dataclass(frozen=True)
class Precision:
    """A way to compute products.

    blocks(queries, vectors, span) yields, for the (N, D) vectors of a span of rows, the first
    row of a block and the products (Q, rows), valid until the next one. tolerance(D): what a
    product of unit vectors is never off by. spare(k): how many candidates more than k are
    kept, so that the k nearest are among them but for crowds.
    """

    name: str
    blocks: Callable[[np.ndarray, np.ndarray, slice], Iterator[tuple[int, np.ndarray]]]
    tolerance: Callable[[int], float]
    spare: Callable[[int], int]


def slices(start: int, stop: int, size: int) -> list[slice]:
    """The span in slices of a size, the last one shorter."""
    return [slice(a, b) for a, b in pairwise([*range(start, stop, size), stop])]


def _float32_blocks(
    queries: np.ndarray, vectors: np.ndarray, span: slice
) -> Iterator[tuple[int, np.ndarray]]:
    size = max(min(_PRODUCTS // len(queries), _VALUES // vectors.shape[1]), 1)
    if size > 32:
        # An odd multiple of a cache line: rows of products a power of two apart would
        # displace one another from the caches.
        size -= size % 32 + 16
    products = np.empty(len(queries) * size, np.float32)
    for part in slices(span.start, span.stop, size):
        block = float32(vectors[part])
        out = products[: len(queries) * len(block)].reshape(len(queries), len(block))
        yield part.start, np.matmul(queries, block.T, out=out)


def _float32_tolerance(dimension: int) -> float:
    # The rounding error grows with the square root of the length (Higham & Mary 2019); four
    # times that is out of its reach.
    return 4 * math.sqrt(dimension) * 2.0**-24


FLOAT32 = Precision("float32", _float32_blocks, _float32_tolerance, lambda k: 12)


def _bfloat16_blocks(
    queries: np.ndarray, vectors: np.ndarray, span: slice
) -> Iterator[tuple[int, np.ndarray]]:
    tf = tensorflow()
    size = max(_COARSE * min(_PRODUCTS // len(queries), _VALUES // vectors.shape[1]), 1)
    rounded = np.empty((min(size, span.stop - span.start), vectors.shape[1]), _BFLOAT16)
    with tf.device("CPU"):
        left = tf.constant(queries.astype(_BFLOAT16))
    for part in slices(span.start, span.stop, size):
        block = vectors[part]
        right = rounded[: len(block)]
        right[...] = block if block.dtype == _BFLOAT16 else float32(block)
        with tf.device("CPU"):
            products = tf.matmul(left, tf.constant(right), transpose_b=True)
            bits = tf.bitcast(products, tf.int16)
        yield part.start, np.asarray(memoryview(bits)).view(_BFLOAT16)  # Tensor.numpy() copies


def _bfloat16_tolerance(dimension: int) -> float:
    # Each factor and the sum are rounded to 8 bits, off by 2**-8 of their size at the most;
    # the sum of the absolute products of unit vectors is at most 1 (Cauchy-Schwarz). 2 % more
    # is for products of these errors and for lengths that storage has rounded.
    return 1.02 * 3 * 2.0**-8 + _float32_tolerance(dimension)


BFLOAT16 = Precision("bfloat16", _bfloat16_blocks, _bfloat16_tolerance, lambda k: k + 28)


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for products of bfloat16, at twice the speed or more."""
    try:
        with open("/proc/cpuinfo") as file:
            flags = next((line for line in file if line.startswith("flags")), "").split()
    except OSError:
        return False
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def float32(block: np.ndarray) -> np.ndarray:
    """The (N, D) vectors as contiguous float32."""
    if block.dtype != np.float16:
        return np.ascontiguousarray(block, np.float32)
    # Faster than NumPy's, for finite numbers: shift exponent and fraction to where float32
    # has them, drop the copies of the sign, make up for the exponents' other zero.
    bits = block.view(np.int16).astype(np.int32, order="C")
    bits <<= 13
    bits &= np.int32(-0x70002000)
    wide = bits.view(np.float32)
    wide *= np.float32(2.0**112)
    return wide


def tensorflow() -> Any:
    """TensorFlow. Raises VisualMemoryError where it cannot be imported."""
    try:
        import tensorflow
    except ImportError as error:
        raise VisualMemoryError(
            f"index (exact): TensorFlow cannot be used: {error}. "
            "Install tensorflow or write backend: numpy"
        ) from None
    return tensorflow
