"""The types that travel: an image on its way in, a block of embeddings from then on.

After encoding nothing travels row by row. One element of a Beam collection is one
block: in Beam's Python SDK an element costs tens of microseconds at every shuffle,
whether it holds one embedding or a thousand.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

PADDING = -1
"""Label of a neighbour that is not there; its distance is +inf, its id empty."""

UNKNOWN = -2
"""Label of a query whose class the memory does not know; equal to no neighbour's label."""


class ImageRecord(NamedTuple):
    """One labelled image: its encoded bytes, or the path of the file that holds them."""

    id: str
    label: int
    source: str
    data: bytes | str


class Rejected(NamedTuple):
    """What went to quarantine, and why. images: how many inputs it stands for, at least 1.

    Of a file that breaks off, all that it was expected to hold.
    """

    id: str
    source: str
    reason: str
    images: int = 1


def count_images(rejected: Iterable[Rejected]) -> int:
    """How many inputs went to quarantine."""
    return sum(item.images for item in rejected)


@dataclass(frozen=True, eq=False)
class EmbeddingBlock:
    """N embeddings with what is known of each row.

    ids: (N,) object array of str. labels: (N,) int64. sources: (N,) object array
    of str, the data set each row came from. vectors: (N, D) float32, unit length.
    thumbnails: (N,) object array of JPEG bytes, or None when none are kept. contents: (N,)
    object array, the first 16 bytes of the SHA-256 of what was encoded, or None where that is
    not known.
    """

    ids: np.ndarray
    labels: np.ndarray
    sources: np.ndarray
    vectors: np.ndarray
    thumbnails: np.ndarray | None = None
    contents: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> EmbeddingBlock:
        """The block of the given rows (indices or a mask), in that order."""
        return EmbeddingBlock(
            self.ids[rows],
            self.labels[rows],
            self.sources[rows],
            self.vectors[rows],
            None if self.thumbnails is None else self.thumbnails[rows],
            None if self.contents is None else self.contents[rows],
        )

    @staticmethod
    def empty() -> EmbeddingBlock:
        """No rows; their width is not known and given as 1."""
        return EmbeddingBlock(
            strings([]),
            np.empty(0, np.int64),
            strings([]),
            np.empty((0, 1), np.float32),
            strings([]),
            strings([]),
        )

    @staticmethod
    def concatenate(blocks: Sequence[EmbeddingBlock]) -> EmbeddingBlock:
        """One block of all rows, in order. Needs at least one block."""
        thumbnails = contents = None
        if all(block.thumbnails is not None for block in blocks):
            thumbnails = np.concatenate([block.thumbnails for block in blocks])
        if all(block.contents is not None for block in blocks):
            contents = np.concatenate([block.contents for block in blocks])
        return EmbeddingBlock(
            np.concatenate([block.ids for block in blocks]),
            np.concatenate([block.labels for block in blocks]),
            np.concatenate([block.sources for block in blocks]),
            np.concatenate([block.vectors for block in blocks]),
            thumbnails,
            contents,
        )


@dataclass(frozen=True, eq=False)
class Embedded:
    """What became of some images: their embeddings, and those that failed with the reason.

    batch_size: the smallest number of images that was encoded at a time, padding included; 0
    if nothing was encoded.
    """

    block: EmbeddingBlock
    rejected: tuple[Rejected, ...] = ()
    batch_size: int = 0

    @staticmethod
    def nothing() -> Embedded:
        return Embedded(EmbeddingBlock.empty())


def strings(values: Sequence[str | bytes | None]) -> np.ndarray:
    """(N,) object array of the values; NumPy's own string arrays pad every id to the longest."""
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def unit_interval(id: str, salt: str) -> float:
    """A number in [0, 1) that depends on the id and the salt alone: for splits and shards."""
    digest = hashlib.blake2b(id.encode(), digest_size=8, key=salt.encode()).digest()
    return (int.from_bytes(digest, "big") >> 11) / (1 << 53)


def shard_of(id: str, shards: int) -> int:
    """Which of ``shards`` shards a row is in: a hash of its id, the same everywhere."""
    return int(unit_interval(id, "shard") * shards)
