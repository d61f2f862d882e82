"""Memories of any size without images: a mixture's vectors through the build's own stages."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import apache_beam as beam
import numpy as np

from benchmarks.mixture import FINGERPRINT, HELD_OUT, Mixture
from pipelines import index, running
from vm_core import building, storage
from vm_core.building import BuildConfig, BuildPlan
from vm_core.classes import ClassTable
from vm_core.memory import Memory, ShardEntry
from vm_core.records import Embedded, EmbeddingBlock, strings

ROWS_PER_SHARD = 50_000


def write_memory(
    root: str,
    rows: int,
    dimension: int,
    dtype: str = "float32",
    beam_arguments: Sequence[str] = (),
    **settings: Any,
) -> Memory:
    """Writes and publishes a memory of ``rows``; settings as of BuildConfig."""
    plan = plan_memory(root, rows, dtype, **settings)
    write_shards(plan, rows, dimension, beam_arguments)
    return write_index(plan, beam_arguments)


def plan_memory(root: str, rows: int, dtype: str = "float32", **settings: Any) -> BuildPlan:
    """The plan of such a build; its sources and its encoder are never read."""
    config = BuildConfig.model_validate(
        {
            "memory": root,
            "sources": [{"kind": "folder", "path": "mixture"}],
            "encoder": {"kind": "saved_model", "path": "mixture"},
            "shards": -(-rows // ROWS_PER_SHARD),
            "dtype": dtype,
            "images": {"thumbnail_pixels": 0},
            **settings,
        }
    )
    return BuildPlan(storage.absolute(root), config, FINGERPRINT, ClassTable(), f"mixture-{rows}")


def write_shards(
    plan: BuildPlan, rows: int, dimension: int, beam_arguments: Sequence[str] = ()
) -> None:
    """Generates the shards, one a task."""
    write = partial(_write_shard, plan, Mixture(dimension), rows)

    def define(root: beam.Pipeline) -> None:
        _ = root | beam.Create(range(plan.config.shards)) | beam.Map(write)

    running.run(define, beam_arguments, {"write": plan.config.shards})


def write_index(plan: BuildPlan, beam_arguments: Sequence[str] = ()) -> Memory:
    """Indexes the shards that are there, and publishes."""
    finished = list(building.finished_shards(plan).values())

    def define(root: beam.Pipeline) -> None:
        entries = root | beam.Create([finished])
        plans = entries | beam.Map(partial(building.plan_index, plan))
        index.define_pipeline(root, plans, partial(building.publish, plan), entries)

    running.run(define, beam_arguments, {"index": None})
    return Memory(plan.root)


def queries(rows: int, dimension: int) -> EmbeddingBlock:
    """Queries from the same mixture that are rows of no memory."""
    vectors, labels = Mixture(dimension).block(HELD_OUT, rows)
    ids = strings([f"query/{i:07d}" for i in range(rows)])
    return EmbeddingBlock(ids, labels, strings(["mixture"] * rows), vectors)


def _write_shard(plan: BuildPlan, mixture: Mixture, rows: int, shard: int) -> ShardEntry:
    start = shard * ROWS_PER_SHARD
    vectors, labels = mixture.block(shard, min(ROWS_PER_SHARD, rows - start))
    ids = strings([f"{shard:05d}/{i:07d}" for i in range(len(labels))])
    block = EmbeddingBlock(ids, labels, strings(["mixture"] * len(ids)), np.asarray(vectors))
    return building.write_shard_files(plan, shard, [Embedded(block)])
