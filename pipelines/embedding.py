"""Images to embeddings, for the memory and for its queries alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import apache_beam as beam
from apache_beam.utils.shared import Shared

from pipelines.measuring import measured
from vm_core.embedding import BatchedEncoder, EmbedPlan, by_shard, embed_split
from vm_core.encoders import Encoder
from vm_core.records import Embedded
from vm_core.sources import Split


class LazyEncoder:
    """An encoder that is loaded when first called for, once per process."""

    def __init__(self, settings: Encoder):
        self._settings = settings
        self._shared = Shared()

    def __call__(self) -> BatchedEncoder:
        return self._shared.acquire(
            lambda: BatchedEncoder(self._settings.load(), self._settings.batch_size)
        )


class EmbedSplits(beam.DoFn):
    """(source number, Split) -> (shard, Embedded): reads, decodes and encodes a split.

    ``wanted`` tells by id which images to encode; all of them if it is None.
    """

    def __init__(self, plan: EmbedPlan, shards: int, wanted: Callable[[str], bool] | None = None):
        self._plan = plan
        self._shards = shards
        self._embed = measured("embed", embed_split, lambda _, split, *more: split[1].version[:12])
        self._wanted = wanted
        self._encoder = LazyEncoder(plan.encoder)

    def process(self, split: tuple[int, Split]) -> Iterator[tuple[int, Embedded]]:
        embedded = self._embed(self._plan, split, self._encoder, self._wanted)
        yield from by_shard(embedded, self._shards)
