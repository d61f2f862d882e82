"""Memories that several tests only read."""

from collections.abc import Iterator

import pytest

from tests.integration import clusters
from tests.integration.harness import build_memory, configuration


@pytest.fixture(scope="session")
def memory(few_photos, small_encoder, tmp_path_factory):
    """32 photos of 4 species in three shards. Read only."""
    root = tmp_path_factory.mktemp("shared") / "memory"
    return build_memory(configuration(root, small_encoder, few_photos))


@pytest.fixture(scope="module")
def pool() -> Iterator[clusters.WorkerPool]:
    """Python workers that are processes of their own."""
    pool = clusters.WorkerPool()
    yield pool
    pool.close()
