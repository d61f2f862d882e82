"""Exact search as an index."""

from __future__ import annotations

from typing import Literal

import numpy as np

from vm_core import exact
from vm_core.index import Index, TopK


class Plugin(Index):
    """Searches the vectors themselves; it has no files of its own.

    backend: what computes the products. Answers are the same to the last bit. numpy: float32
    on the CPU. bfloat16: TensorFlow on the CPU, twice as fast where the CPU has instructions
    for it (AVX512-BF16, AMX). tensorflow: float32 on TensorFlow's device. auto takes, for
    large searches, tensorflow where there is a GPU and bfloat16 where the CPU has it; else
    numpy.
    """

    kind: Literal["exact"] = "exact"
    backend: exact.Backend = "auto"

    def build(self, vectors: np.ndarray, folder: str) -> None:
        pass

    def open(self, vectors: np.ndarray, folder: str) -> TopK:
        exact.check_backend(self.backend)  # tells now that it is missing
        return lambda queries, k: exact.top_k(queries, vectors, k, self.backend)
