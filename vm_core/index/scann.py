"""ScaNN (arXiv 1908.10396): partitioned, quantised and re-ranked approximate search."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from vm_core import storage
from vm_core.errors import VisualMemoryError
from vm_core.index import Index, Partition
from vm_core.records import EmbeddingBlock, strings

_ROWS_FILE = "rows.parquet"
_MINIMUM_ROWS = 1_000


class Plugin(Index):
    """A tree over the rows, anisotropic hashing in its leaves, re-ranking in float32.

    Parameters left at 0 follow from the number of rows: leaves about its square root, of
    which a tenth is searched, but at least 25. ``reorder`` is the number of candidates
    whose exact distance is computed, at least four times k.
    """

    kind: Literal["scann"] = "scann"
    leaves: int = Field(0, ge=0)
    leaves_to_search: int = Field(0, ge=0)
    reorder: int = Field(400, ge=1)
    dimensions_per_block: int = Field(2, ge=1)
    anisotropic_threshold: float = Field(0.2, gt=0, lt=1)

    def build(self, read: Callable[[], EmbeddingBlock], folder: str) -> None:
        block = read()
        if len(block) < _MINIMUM_ROWS:
            raise VisualMemoryError(
                f"a ScaNN index needs at least {_MINIMUM_ROWS:,} rows to learn its codebook; the "
                f"partition has {len(block):,}. Use index.kind = exact or auto"
            )
        leaves = self.leaves or round(math.sqrt(len(block)))
        searcher = (
            _scann()
            .builder(block.vectors, 10, "dot_product")
            .tree(
                num_leaves=leaves,
                num_leaves_to_search=self.leaves_to_search or _leaves_to_search(leaves),
                training_sample_size=min(len(block), 250_000),
            )
            .score_ah(
                self.dimensions_per_block,
                anisotropic_quantization_threshold=self.anisotropic_threshold,
            )
            .reorder(self.reorder)
            .build()
        )
        index = os.path.join(folder, "scann")
        os.mkdir(index)
        searcher.serialize(index, relative_path=True)
        # ScaNN would keep ids as a pickle; beside the index they are a table.
        pq.write_table(
            pa.table({"id": pa.array(block.ids, pa.string()), "label": block.labels}),
            os.path.join(folder, _ROWS_FILE),
        )

    def open(self, shards: Sequence[str], folder: str) -> Partition:
        with storage.local_copy(folder) as local:
            searcher = _scann().load_searcher(os.path.join(local, "scann"))
            table = pq.read_table(os.path.join(local, _ROWS_FILE))
        ids = strings(table.column("id").to_pylist())

        def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
            return _search(searcher, queries, k, max(self.reorder, 4 * k), len(ids))

        return Partition(ids, table.column("label").to_numpy(), search)


def _leaves_to_search(leaves: int) -> int:
    # A tenth of few leaves misses much: recall@10 was 0.82 with 6 of 55 leaves over 3,000
    # CIFAR-10 images, 0.99 with 25.
    return min(leaves, max(25, math.ceil(leaves / 10)))


def _search(
    searcher: Any, queries: np.ndarray, k: int, reorder: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    rows = np.full((len(queries), k), -1, np.int64)
    distances = np.full((len(queries), k), np.inf, np.float32)
    found = min(k, count)
    if not found or not len(queries):
        return rows, distances
    neighbors, products = searcher.search_batched_parallel(
        queries, final_num_neighbors=found, pre_reorder_num_neighbors=min(reorder, count)
    )
    # Where the searched leaves hold fewer than k rows ScaNN fills up with row 0 and NaN.
    valid = ~np.isnan(products)
    rows[:, :found] = np.where(valid, neighbors.astype(np.int64), -1)
    distances[:, :found] = np.where(valid, np.maximum(1.0 - products, 0.0), np.inf)
    # Rows are in the order of ids: sorting by row, then by distance, breaks ties by id.
    order = np.lexsort((rows, distances), axis=1)
    return np.take_along_axis(rows, order, axis=1), np.take_along_axis(distances, order, axis=1)


def _scann() -> Any:
    try:
        from scann import scann_ops_pybind
    except ImportError as error:
        raise VisualMemoryError(
            f"cannot import scann ({error}). scann 1.4.2 goes with TensorFlow 2.20. Run: "
            "pip install 'scann[tf]==1.4.2' 'tensorflow==2.20.*', or use index.kind = exact"
        ) from error
    return scann_ops_pybind
