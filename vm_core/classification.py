"""Classification of a few images, one process, no pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from vm_core.embedding import BatchedEncoder, ImageSettings, embed_records
from vm_core.errors import VisualMemoryError
from vm_core.gallery import Example, explain
from vm_core.memory import Memory
from vm_core.records import UNKNOWN, ImageRecord, Rejected
from vm_core.voting import VoteParameters


def classify(
    memory: Memory,
    paths: Sequence[str],
    voter: str = "rank",
    k: int = 10,
    encoder_path: str | None = None,
    parameters: VoteParameters | None = None,
) -> tuple[list[Example], tuple[Rejected, ...]]:
    """Classifies image files by their neighbours in a memory.

    Returns the answers, in the order of the paths, and the images that could not be
    read, with reasons. Raises VisualMemoryError if the encoder is not the memory's.
    """
    if not 1 <= k <= 10_000:
        raise VisualMemoryError(f"k = {k} is not from 1 to 10000. Use --k 10")
    settings = memory.encoder(encoder_path)
    encoder = cache(lambda: BatchedEncoder.load(settings))
    records = (ImageRecord(path, UNKNOWN, "", path) for path in paths)
    embedded = embed_records(records, encoder, settings, ImageSettings())
    block = embedded.block
    if not len(block):
        return [], embedded.rejected
    neighbors = memory.searcher()(block, k)
    thumbnails = block.thumbnails if block.thumbnails is not None else [None] * len(block)
    examples = explain(neighbors, thumbnails, voter, k, parameters or VoteParameters())
    return examples, embedded.rejected
