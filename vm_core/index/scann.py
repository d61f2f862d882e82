"""ScaNN (arXiv 1908.10396): partitioned, quantised and re-ranked approximate search."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import os
import re
import sys
from typing import Any, Literal, NamedTuple

import numpy as np
from pydantic import Field, TypeAdapter, model_validator

from vm_core.errors import DamagedError, VisualMemoryError
from vm_core.exact import check_products
from vm_core.index import Index, TopK
from vm_core.index._tuning import Setting, tune
from vm_core.index.exact import Plugin as Exact
from vm_core.untrusted import parse_json

ReorderDtype = Literal["float32", "bfloat16", "int8"]

_MINIMUM_ROWS = 1_000
REORDER_BYTES: dict[ReorderDtype, int] = {"float32": 4, "bfloat16": 2, "int8": 1}
CODEBOOK_SAMPLE = 20_000
LEAF_SAMPLE = 100
_DEPTH = 100
_BATCH = 256  # queries that a thread takes at a time, ScaNN's default
_VALUES = 2**20  # of the vectors whose distances are computed at a time: 4 MB


class Tuned(NamedTuple):
    """What a build settled on. recall@100 and milliseconds a query, if they were measured."""

    reorder_dtype: ReorderDtype
    dimensions_per_block: int
    leaves_to_search: int
    reorder: int
    recall: float | None = None
    milliseconds: float | None = None


class Plugin(Index):
    """A tree over the rows, anisotropic hashing in its leaves, re-ranking.

    A partition of under 1,000 rows, too few to learn a codebook from, is searched exactly.

    leaves: at 0 about the square root of the number of rows.
    leaves_to_search: at 0 twice the square root of the leaves, at least 25.
    reorder: how many candidates are re-ranked for up to 100 neighbours; for more of them
        proportionally more.
    reorder_dtype: of the copy of the vectors they are re-ranked with. The distances of
        what is found are exact whatever it is.
    training_threads: at 0 one a core.

    What is wanted of the index can be given instead of how to get there:

    maximum_bytes: of a partition's index, on disk and about as many in memory. The most
        precise reorder_dtype that fits is taken, from the given one down, then blocks of
        more dimensions.
    target_recall: of the 100 nearest, for held-out queries. The fastest search that
        reaches it by a standard error is taken.
    maximum_milliseconds: a query, searched by the batch where the index is built. Beside
        target_recall it is a limit; alone, the search that finds most within it is taken.

    The last two determine leaves_to_search and reorder.
    """

    kind: Literal["scann"] = "scann"
    leaves: int = Field(0, ge=0)
    leaves_to_search: int = Field(0, ge=0)
    reorder: int = Field(400, ge=1)
    reorder_dtype: ReorderDtype = "float32"
    dimensions_per_block: int = Field(2, ge=1)
    anisotropic_threshold: float = Field(0.2, gt=0, lt=1)
    training_threads: int = Field(0, ge=0)
    target_recall: float | None = Field(None, gt=0, le=1)
    maximum_bytes: int | None = Field(None, gt=0)
    maximum_milliseconds: float | None = Field(None, gt=0)

    @model_validator(mode="after")
    def _given_or_found(self) -> Plugin:
        if self._tunes and (self.leaves_to_search or self.reorder != 400):
            raise ValueError(
                "leaves_to_search and reorder follow from target_recall or maximum_milliseconds. "
                "Leave out the former or the latter"
            )
        return self

    @property
    def _tunes(self) -> bool:
        return self.target_recall is not None or self.maximum_milliseconds is not None

    def choose(self, rows: int) -> Index:
        return Exact() if rows < _MINIMUM_ROWS else self

    def build(self, vectors: np.ndarray, folder: str) -> None:
        leaves = self.leaves or round(math.sqrt(len(vectors)))
        to_search = min(leaves, self.leaves_to_search or _leaves_to_search(leaves))
        count, dimension = vectors.shape
        tuned = Tuned(*self._fitting(count, dimension, leaves), to_search, self.reorder)
        searcher = self._train(vectors, leaves, tuned)
        if self._tunes:

            def search(setting: Setting) -> TopK:
                return searching(searcher.searcher, vectors, _with(tuned, setting))

            best = tune(search, vectors, leaves, self.target_recall, self.maximum_milliseconds)
            tuned = _with(tuned, best.setting)._replace(
                recall=best.recall, milliseconds=best.milliseconds
            )
        index = os.path.join(folder, "scann")
        os.mkdir(index)
        searcher.serialize(index, relative_path=True)
        with open(os.path.join(folder, "tuned.json"), "w") as file:
            json.dump(tuned._asdict(), file)

    def open(self, vectors: np.ndarray, folder: str) -> TopK:
        searcher, tuned = load(folder)
        return searching(searcher, vectors, tuned)

    def _fitting(self, count: int, dimension: int, leaves: int) -> tuple[ReorderDtype, int]:
        """The most precise reorder_dtype and dimensions_per_block within maximum_bytes."""
        dtypes = list(REORDER_BYTES)[list(REORDER_BYTES).index(self.reorder_dtype) :]
        for per_block in (self.dimensions_per_block * factor for factor in (1, 2, 4)):
            for dtype in dtypes:
                # As ScaNN writes it: of each row the vector, a byte a block and its leaf.
                row = dimension * REORDER_BYTES[dtype] + math.ceil(dimension / per_block) + 4
                size = count * row + leaves * dimension * 8
                if self.maximum_bytes is None or size <= self.maximum_bytes:
                    return dtype, per_block
        raise VisualMemoryError(
            f"index.maximum_bytes = {self.maximum_bytes:,}: the smallest ScaNN index of {count:,} "
            f"rows of {dimension} dimensions takes {size:,} bytes (reorder_dtype={dtype}, "
            f"dimensions_per_block={per_block}). Allow more, or make smaller partitions"
        )

    def _train(self, vectors: np.ndarray, leaves: int, tuned: Tuned) -> Any:
        scann = _scann()
        dtype = scann.scann_builder.ReorderType[tuned.reorder_dtype.upper()]
        # Learning the codebook is most of the work, and more rows do not make it better:
        # of 100,000 rows a fifth gave the same recall in half the time.
        codebook_sample = min(len(vectors), CODEBOOK_SAMPLE)
        return (
            scann.builder(np.ascontiguousarray(vectors, np.float32), 10, "dot_product")
            .set_n_training_threads(self.training_threads or os.cpu_count() or 1)
            .tree(
                num_leaves=leaves,
                num_leaves_to_search=tuned.leaves_to_search,
                training_sample_size=min(len(vectors), max(LEAF_SAMPLE * leaves, CODEBOOK_SAMPLE)),
            )
            .score_ah(
                tuned.dimensions_per_block,
                anisotropic_quantization_threshold=self.anisotropic_threshold,
                training_sample_size=codebook_sample,
            )
            .reorder(tuned.reorder, dtype)
            .build()
        )


def _leaves_to_search(leaves: int) -> int:
    # Few leaves need a larger share of them: recall@10 was 0.82 with 6 of 55 leaves over
    # 3,000 CIFAR-10 images, 0.99 with 25.
    return max(25, math.ceil(2 * math.sqrt(leaves)))


def _with(tuned: Tuned, setting: Setting) -> Tuned:
    return tuned._replace(leaves_to_search=setting.leaves, reorder=setting.reorder)


def load(folder: str) -> tuple[Any, Tuned]:
    """ScaNN's index (its ``ScannNumpy``) and how a build chose to search it.

    Raises DamagedError for files that ScaNN would not have written. Its extension opens
    whatever the list of assets names, so that names files of the folder only.
    """
    path = os.path.join(folder, "tuned.json")
    with open(path) as file:
        try:
            tuned = TypeAdapter(Tuned).validate_python(parse_json(file.read()))
        except (ValueError, TypeError) as error:
            raise DamagedError(f"{path} is damaged: {error}. Build the memory again") from error
    index = os.path.join(folder, "scann")
    path = os.path.join(index, "scann_assets.pbtxt")
    with open(path) as file:
        assets = file.read()
    names = _ASSET.findall(assets)
    if _ASSET.sub("", assets).strip() or not all(_is_file_of(index, name) for name in names):
        raise DamagedError(f"{path} names other files than ScaNN's own. Build the memory again")
    return _extension().ScannNumpy(index, assets), tuned


_ASSET = re.compile(r'assets \{\s+asset_type: [A-Z0-9_]+\s+asset_path: "([\w.]+)"\s+\}\s*')


def _is_file_of(folder: str, name: str) -> bool:
    path = os.path.join(folder, name)
    return name.strip(".") != "" and os.path.isfile(path) and not os.path.islink(path)


def searching(scann: Any, vectors: np.ndarray, tuned: Tuned) -> TopK:
    """Searches so many leaves of a ``ScannNumpy`` and re-ranks so many as ``tuned`` says."""
    exact = tuned.reorder_dtype == "float32"

    def search(queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        rows = np.full((len(queries), k), -1, np.int64)
        distances = np.full((len(queries), k), np.inf, np.float32)
        found = min(k, len(vectors))
        if not found or not len(queries):
            return rows, distances
        # Rough distances may put the last ones in the wrong order: some more are taken.
        fetched = found if exact else min(found + max(28, found // 4), len(vectors))
        reorder = max(math.ceil(tuned.reorder * max(1, k / _DEPTH)), fetched)
        neighbors, products = scann.search_batched(
            queries,
            fetched,
            min(reorder, len(vectors)),
            tuned.leaves_to_search,
            True,  # in parallel
            _BATCH,
        )
        # Where the searched leaves hold fewer rows ScaNN fills up with row 0 and NaN.
        valid = ~np.isnan(products)
        if not exact:
            products = _products(queries, vectors, neighbors)
        check_products(products[valid])
        near = np.maximum(1.0 - products, 0.0, dtype=np.float32)
        which = neighbors.astype(np.int64)
        if not valid.all():
            near, which = np.where(valid, near, np.float32(np.inf)), np.where(valid, which, -1)
        # Rows are in the order of ids: sorting by row, then by distance, breaks ties by id.
        # Most lists come sorted and without ties, and sorting is slow.
        (some,) = np.nonzero((near[:, 1:] <= near[:, :-1]).any(axis=1))
        order = np.lexsort((which[some], near[some]), axis=1)
        which[some] = np.take_along_axis(which[some], order, axis=1)
        near[some] = np.take_along_axis(near[some], order, axis=1)
        rows[:, :found], distances[:, :found] = which[:, :found], near[:, :found]
        return rows, distances

    return search


def _products(queries: np.ndarray, vectors: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """(Q, R) float32 products of each query with its rows (Q, R)."""
    products = np.empty(rows.shape, np.float32)
    size = max(1, _VALUES // (rows.shape[1] * vectors.shape[1]))
    for start in range(0, len(queries), size):
        part = slice(start, start + size)
        near = vectors[rows[part]].astype(np.float32, copy=False)
        np.vecdot(queries[part, None], near, out=products[part])
    return products


def _scann() -> Any:
    try:
        from scann import scann_ops_pybind
    except ImportError as error:
        raise _not_importable(error) from error
    return scann_ops_pybind


def _extension() -> Any:
    """ScaNN's extension module alone, which is all that searching takes.

    ``import scann`` imports TensorFlow too, where there is one: seconds of each process. The
    extension is found as ScaNN itself finds it, so both get the same module.
    """
    package = importlib.util.find_spec("scann")
    if package is None or not package.submodule_search_locations:
        raise _not_importable("there is no such package")
    folder = os.path.join(package.submodule_search_locations[0], "scann_ops", "cc", "python")
    if folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module("scann_pybind")
    except ImportError as error:
        raise _not_importable(error) from error


def _not_importable(cause: object) -> VisualMemoryError:
    return VisualMemoryError(
        f"cannot import scann ({cause}). scann 1.4.2 goes with TensorFlow 2.20. Run: "
        "pip install 'scann[tf]==1.4.2' 'tensorflow==2.20.*', or use index.kind = exact"
    )
