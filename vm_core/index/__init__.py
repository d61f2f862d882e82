"""Indexes over the vectors of one partition, one module a kind: exact, scann, auto.

An index is derived from a partition's vectors and can always be made again from them.
It knows rows by their position; ids and labels are kept beside it (vm_core.partitions).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from vm_core import plugins

TopK = Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]
"""(Q, D) float32 unit queries and k to rows (Q, k) int64 and distances (Q, k) float32.

Distances are cosine distances in [0, 2], ascending, ties by row. Where there are fewer
than k rows the rest is row -1 at distance +inf.
"""


class Index(plugins.Settings):
    """Base of the indexes."""

    kind: str

    def choose(self, rows: int) -> Index:
        """The index to build for a partition of so many rows."""
        return self

    def build(self, vectors: np.ndarray, folder: str) -> None:
        """Writes an index over (N, D) unit vectors into a local folder.

        The vectors are float32, float16 or bfloat16, often mapped from a file.
        """
        raise NotImplementedError

    def open(self, vectors: np.ndarray, folder: str) -> TopK:
        """Opens what ``build`` wrote for these vectors. The folder may be gone afterwards."""
        raise NotImplementedError


def parse(settings: Any) -> Index:
    """The index that settings describe. Raises VisualMemoryError."""
    return plugins.configure(__name__, settings, Index)
