"""Queries that are close to rows, as real queries are, and are none of them.

They lie a third of the way from a row to its nearest neighbour. Half-way the two would be
equally near, and which of them comes first a matter of rounding.
"""

from __future__ import annotations

import numpy as np

from vm_core.exact import top_k

_NEIGHBOURS = 100
_COPY = 0.01  # Euclidean: a third of it is still a distance of 5e-6, far above its rounding


def beside(vectors: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """(Q, D) float32 unit queries, a third of the way from the chosen rows to their neighbours.

    vectors: (N, D) float32, float16 or bfloat16, unit length. chosen: (Q,) positions, or (N,)
    bool. A row's copies are passed over: between two of them the query would be a row. Where
    none of the 100 nearest is anything else, a random direction takes the neighbour's place.
    Always the same for the same arguments.
    """
    rows = vectors[chosen].astype(np.float32)
    others = np.random.default_rng(0).standard_normal(rows.shape, np.float32)
    others /= np.linalg.norm(others, axis=1, keepdims=True)
    nearest, _ = top_k(rows, vectors, min(_NEIGHBOURS, len(vectors)))
    left = np.arange(len(rows))  # have no neighbour yet; mostly the second nearest is one
    for place in nearest.T:
        near = vectors[place[left]].astype(np.float32)
        is_other = np.linalg.norm(near - rows[left], axis=1) > _COPY
        others[left[is_other]] = near[is_other]
        left = left[~is_other]
    between = 2 * rows + others
    return between / np.linalg.norm(between, axis=1, keepdims=True)
