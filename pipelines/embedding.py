"""Images to embeddings, for the memory and for its queries alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import apache_beam as beam
from apache_beam.utils.shared import Shared

from pipelines import hints
from pipelines.measuring import measured
from pipelines.reporting import reported
from vm_core import split_files
from vm_core.embedding import BatchedEncoder, EmbedPlan, by_shard, embed_split
from vm_core.encoders import Encoder
from vm_core.records import Embedded, shard_of
from vm_core.sources import Split


class LazyEncoder:
    """An encoder that is loaded when first called for, once per process.

    Every copy of it in a process, in whatever thread, has the same one. So where workers
    are threads of one process, an accelerator holds one model; see running.pipeline_options.
    """

    def __init__(self, settings: Encoder):
        self._settings = settings
        self._shared = Shared()

    def __call__(self) -> BatchedEncoder:
        return self._shared.acquire(lambda: BatchedEncoder.load(self._settings))


class EmbedSplits(beam.DoFn):
    """(source number, Split) -> (shard, Embedded): reads, decodes and encodes a split.

    ``missing``: the shards that are to be made; all of them if it is None.
    """

    def __init__(self, plan: EmbedPlan, shards: int, missing: frozenset[int] | None = None):
        self._plan = plan
        self._shards = shards
        self._missing = missing
        self._embed = measured("embed", embed_split, lambda _, split, *more: split[1].version[:12])
        self._encoder = LazyEncoder(plan.encoder)

    def process(self, split: tuple[int, Split]) -> Iterator[tuple[int, Embedded]]:
        wanted = None if self._missing is None else self._wanted
        embedded = self._embed(self._plan, split, self._encoder, wanted)
        for shard, part in by_shard(embedded, self._shards):
            if self._missing is None or shard in self._missing:
                yield shard, part

    def _wanted(self, id: str) -> bool:
        return self._missing is None or shard_of(id, self._shards) in self._missing


def embed(
    root: beam.Pipeline,
    files: Sequence[str],
    plan: EmbedPlan,
    shards: int,
    missing: frozenset[int] | None = None,
) -> beam.PCollection[tuple[int, Embedded]]:
    """Embeds the images behind the splits in some files (of vm_core.split_files), by shard."""
    return (
        root
        | "SplitFiles" >> beam.Create(files)
        | "Splits" >> beam.FlatMap(reported(split_files.read))
        | "SpreadSplits" >> beam.Reshuffle()
        | "Embed"
        >> beam.ParDo(EmbedSplits(plan, shards, missing)).with_resource_hints(
            **hints.of_encoding(root)
        )
    )
