"""The global partitioner: which partition a row goes to, and which ones a query visits.

Spherical k-means over a seeded sample gives one centroid a cell; a row belongs to the
cell of its nearest centroid, a query visits the cells of its nearest few. Everything here
gives the same bits on any number of workers: ranking is that of exact search, sums run in
float64 in the order of the rows.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np
from pydantic import Field

from vm_core import plugins
from vm_core.exact import top_k
from vm_core.records import unit_interval

_SAMPLES_PER_CELL = 256
_MINIMUM_SAMPLE = 20_000
ITERATIONS = 20
_SOAR_CANDIDATES = 8
_SOAR_WEIGHT = 1.0


class Partitioning(plugins.Settings):
    """How a memory is divided.

    rows: at most so many in a partition; up to as many in all make one partition.
    spill: whether each row is also kept in a second cell, so that queries near a border
    need to visit fewer: the next nearest one, or the one whose residual is least parallel
    to the first (SOAR, arXiv 2404.00774). probes: cells that a query visits; 0 takes the
    fewest that find a ``coverage`` of what all of them find, measured on held-out queries.
    """

    rows: int = Field(1_000_000, ge=1)
    spill: Literal["none", "nearest", "soar"] = "none"
    probes: int = Field(0, ge=0)
    coverage: float = Field(0.99, gt=0, le=1)
    seed: int = 0

    @property
    def copies(self) -> int:
        """In how many cells a row is kept."""
        return 1 if self.spill == "none" else 2

    def cells(self, rows: int) -> int:
        """Cells for so many rows: on average two thirds full, so that uneven ones still fit."""
        return 1 if rows <= self.rows else math.ceil(1.5 * rows * self.copies / self.rows)


def sample_rows(rows: int, cells: int) -> int:
    """How many of a memory's rows train the centroids, on average."""
    return min(rows, max(_MINIMUM_SAMPLE, _SAMPLES_PER_CELL * cells))


def sample(ids: np.ndarray, vectors: np.ndarray, rows: int, cells: int, seed: int) -> np.ndarray:
    """The vectors, out of a memory of ``rows``, that train the centroids: chosen by their ids."""
    share = sample_rows(rows, cells) / rows
    chosen = [unit_interval(id, f"sample-{seed}") < share for id in ids]
    return vectors[np.array(chosen, bool)]


def train(vectors: np.ndarray, cells: int, seed: int) -> np.ndarray:
    """Centroids (C, D) float32, unit length, of a sample (S, D) of unit vectors.

    C is ``cells``, or S where the sample is smaller. Small cells' centroids are moved into
    large cells while the largest holds more than 1.5 times the mean.
    """
    generator = np.random.default_rng(seed)
    cells = min(cells, len(vectors))
    centroids = vectors[np.sort(generator.choice(len(vectors), cells, replace=False))]
    for iteration in range(ITERATIONS):
        owner = top_k(vectors, centroids, 1)[0][:, 0]
        counts = np.bincount(owner, minlength=cells)
        order = np.argsort(owner, kind="stable")
        filled = np.flatnonzero(counts)
        starts = np.searchsorted(owner[order], filled)
        sums = np.add.reduceat(vectors[order].astype(np.float64), starts, axis=0)
        centroids = centroids.copy()
        centroids[filled] = _unit(sums)
        if iteration < ITERATIONS - 4:  # the last rounds only settle
            _even_out(centroids, vectors, owner, counts, generator)
    return centroids


def _even_out(
    centroids: np.ndarray,
    vectors: np.ndarray,
    owner: np.ndarray,
    counts: np.ndarray,
    generator: np.random.Generator,
) -> None:
    """Moves the centroids of the smallest cells to random members of the largest, in place."""
    mean = counts.mean()
    ascending = np.argsort(counts, kind="stable")
    for small, large in zip(ascending, ascending[::-1], strict=True):
        if counts[large] <= 1.5 * mean or counts[small] >= mean / 2:
            return
        centroids[small] = vectors[generator.choice(np.flatnonzero(owner == large))]


def assign(vectors: np.ndarray, centroids: np.ndarray, spill: str = "none") -> np.ndarray:
    """(N, copies) int64: the cells of each row, its home first."""
    if spill == "none" or len(centroids) == 1:
        return top_k(vectors, centroids, 1)[0]
    if spill == "nearest":
        return top_k(vectors, centroids, 2)[0]
    near, _ = top_k(vectors, centroids, min(_SOAR_CANDIDATES, len(centroids)))
    rows = vectors.astype(np.float64)[:, None]
    residuals = rows - centroids[near].astype(np.float64)
    first = residuals[:, :1] / np.maximum(
        np.linalg.norm(residuals[:, :1], axis=2, keepdims=True), 1e-12
    )
    others = residuals[:, 1:]
    parallel = np.vecdot(others, first)
    loss = np.vecdot(others, others) + _SOAR_WEIGHT * parallel**2
    second = np.take_along_axis(near[:, 1:], loss.argmin(axis=1)[:, None], axis=1)
    return np.concatenate([near[:, :1], second], axis=1)


def _unit(rows: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return (rows / np.where(norms > 0, norms, 1)).astype(np.float32)
