"""A memory, and a folder of images where only its names count."""

import fsspec
import pytest

from tests.integration.harness import build_memory, configuration


@pytest.fixture(scope="session")
def memory(few_photos, small_encoder, tmp_path_factory):
    """32 photos of 4 species in three shards. Read only."""
    root = tmp_path_factory.mktemp("deploy") / "memory"
    return build_memory(configuration(root, small_encoder, few_photos))


@pytest.fixture
def bucket(few_photos):
    """A URL with the photos below it, in storage that is not this machine's disk."""
    files = fsspec.filesystem("memory")
    files.put(few_photos + "/", "/bucket/few/", recursive=True)
    yield "memory://bucket"
    files.rm("/bucket", recursive=True)
