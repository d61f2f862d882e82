"""Made-up embeddings that are about as hard to search as those of real images.

Classes lie around 50 super-classes; each spreads, by a decaying spectrum, along a few
directions of its own out of 512 shared ones, with a little noise in all directions. So
near a point the data has far fewer dimensions than its vectors: by the maximum-likelihood
estimator below, 9.4 among 100,000 rows of 384 dimensions and 7.7 among 10,000. The
estimate grows with the rows, as closer neighbours show more of the noise.
"""

from __future__ import annotations

import numpy as np

from vm_core.exact import top_k

FINGERPRINT = "mixture"

HELD_OUT = 1 << 30
"""The number of a block that is no shard's: for queries."""

_SUPERCLASSES, _DIRECTIONS, _SPREAD, _NOISE = 50, 512, 0.9, 0.15


class Mixture:
    """Unit vectors of ``classes`` classes, block by block.

    A block follows from the settings, its number and its rows alone, so blocks can be
    made in any order and by any process.
    """

    def __init__(self, dimension: int, classes: int = 1000, intrinsic: int = 24, seed: int = 0):
        self.seed = seed
        rng = np.random.default_rng([seed, 0])
        groups = rng.standard_normal((_SUPERCLASSES, dimension), np.float32)
        own = rng.standard_normal((classes, dimension), np.float32)
        self.centres = _unit(groups[rng.integers(0, _SUPERCLASSES, classes)] + own)
        self.directions = _unit(rng.standard_normal((_DIRECTIONS, dimension), np.float32))
        self.used = np.stack(
            [rng.choice(_DIRECTIONS, intrinsic, replace=False) for _ in range(classes)]
        )
        spectrum = 1 / np.sqrt(np.arange(1, intrinsic + 1))
        self.spectrum = (_SPREAD * spectrum / np.linalg.norm(spectrum)).astype(np.float32)

    def block(self, number: int, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """Vectors (rows, D) float32 of unit length and their labels (rows,) int64."""
        rng = np.random.default_rng([self.seed, 1, number])
        classes, dimension = self.centres.shape
        labels = rng.integers(0, classes, rows)
        order = np.argsort(labels, kind="stable")
        starts = np.searchsorted(labels[order], np.arange(classes + 1))
        along = rng.standard_normal((rows, len(self.spectrum)), np.float32) * self.spectrum
        vectors = rng.standard_normal((rows, dimension), np.float32)
        vectors *= _NOISE / np.sqrt(dimension)
        for label in range(classes):
            mine = order[starts[label] : starts[label + 1]]
            spread = along[mine] @ self.directions[self.used[label]]
            vectors[mine] += self.centres[label] + spread
        return _unit(vectors), labels


def intrinsic_dimension(
    vectors: np.ndarray, neighbours: int = 20, sample: int = 500, seed: int = 0
) -> float:
    """The dimension of the data near its points, by maximum likelihood.

    Levina & Bickel 2004, averaged over the points as MacKay & Ghahramani 2005 correct it.
    vectors: (N, D) float32, unit length, N > neighbours > 2.
    """
    rng = np.random.default_rng(seed)
    chosen = rng.choice(len(vectors), min(sample, len(vectors)), replace=False)
    _, distances = top_k(vectors[np.sort(chosen)], vectors, neighbours + 1)
    # The Euclidean distance of unit vectors is sqrt(2 * cosine distance). Column 0 is
    # the point itself.
    squared = np.maximum(distances[:, 1:].astype(np.float64), 1e-12)
    logarithms = np.log(squared[:, -1:] / squared[:, :-1]) / 2
    inverse = logarithms.sum(axis=1) / (neighbours - 2)
    return float(1 / inverse.mean())


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors
