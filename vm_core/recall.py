"""How much of the exact answer an approximate index finds."""

from __future__ import annotations

import numpy as np

from vm_core.index import TopK
from vm_core.index.exact import top_k
from vm_core.records import EmbeddingBlock

_DEPTHS = (1, 10, 100)
_QUERIES = 500


def measure_recall(search: TopK, block: EmbeddingBlock, seed: int = 0) -> dict[int, float]:
    """Recall at 1, 10 and 100 of a search over a block's rows, against exact search.

    The queries are held out: a third of the way from a random row to its nearest
    neighbour, close to the data as real queries are, and rows of no index. Half-way the
    two would be equally near, and which of them comes first a matter of rounding.
    """
    generator = np.random.default_rng(seed)
    chosen = generator.choice(len(block), size=min(_QUERIES, len(block)), replace=False)
    rows = block.vectors[np.sort(chosen)]
    nearest, _ = top_k(rows, block.vectors, 2)
    between = 2 * rows + block.vectors[nearest[:, 1]]
    queries = between / np.linalg.norm(between, axis=1, keepdims=True)
    depths = [depth for depth in _DEPTHS if depth <= len(block)]
    exact, _ = top_k(queries, block.vectors, depths[-1])
    found, _ = search(queries, depths[-1])
    return {
        depth: float(
            np.mean(
                [
                    len(np.intersect1d(a, b)) / depth
                    for a, b in zip(exact[:, :depth], found[:, :depth], strict=True)
                ]
            )
        )
        for depth in depths
    }
