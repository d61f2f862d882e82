"""From image records to a block of embeddings: decode in parallel, encode in batches."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from vm_core import checkpoints, measure, plugins, storage
from vm_core.classes import ClassTable
from vm_core.encoders import Embed, Encoder
from vm_core.errors import UnreachableError, VisualMemoryError
from vm_core.failures import count_kinds
from vm_core.images import DEFAULT_MAX_PIXELS, BadImage, PreparedImage, prepare
from vm_core.progress import report
from vm_core.records import (
    Embedded,
    EmbeddingBlock,
    ImageRecord,
    Rejected,
    shard_of,
    strings,
)
from vm_core.sources import Source, Split, in_groups

_log = logging.getLogger(__name__)

# Most of them wait for a bucket's answer at any time.
_BUCKET_THREADS = 16


class ImageSettings(plugins.Settings):
    """How images are read, whichever encoder sees them.

    max_pixels: larger images are quarantined before they are decoded.
    thumbnail_pixels: longer side of the pictures kept for reports; 0 keeps none.
    """

    max_pixels: int = DEFAULT_MAX_PIXELS
    thumbnail_pixels: int = 96


@dataclass(frozen=True)
class EmbedPlan:
    """Which images to embed, and how. ``checkpoints``: a folder for what is already done."""

    sources: tuple[Source, ...]
    classes: ClassTable
    encoder: Encoder
    images: ImageSettings
    checkpoints: str


class BatchedEncoder:
    """Calls an encoder on batches of one fixed shape.

    A shorter batch is padded, since the last bits of an embedding can depend on the
    shape of its batch but not on the images beside it. When the device runs out of
    memory the shape is halved, once and for all, down to a single image.
    """

    def __init__(self, embed: Embed, batch_size: int):
        self._embed = embed
        self.batch_size = batch_size

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 to (N, D) float32, for any N >= 1."""
        start, parts = 0, []
        while start < len(pixels):
            batch = pixels[start : start + self.batch_size]
            missing = self.batch_size - len(batch)
            padded = np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else batch
            try:
                with measure.timed("model_ms"):
                    parts.append(self._embed(padded)[: len(batch)])
            except MemoryError as error:
                if self.batch_size == 1:
                    raise
                self.batch_size //= 2
                _log.warning(
                    "out of device memory: batch size is now %d (%s)", self.batch_size, error
                )
            else:
                measure.observe("batch_images", len(batch))
                start += len(batch)
        return np.concatenate(parts)


def embed_split(
    plan: EmbedPlan,
    numbered: tuple[int, Split],
    load_encoder: Callable[[], BatchedEncoder],
    wanted: Callable[[str], bool] | None = None,
) -> Embedded:
    """Embeds one split of a numbered source, or takes it from an earlier attempt's checkpoint.

    ``load_encoder`` is called when there is something to encode. ``wanted`` tells by id
    which images to encode; all of them if it is None.
    """
    number, split = numbered
    identity = hashlib.sha256(repr((number, split)).encode()).hexdigest()
    checkpoint = storage.join(plan.checkpoints, f"{identity}.arrow")
    embedded = checkpoints.read(checkpoint)
    measure.count_reuse("splits", embedded is not None)
    if embedded is not None:
        report("encode", len(embedded.block) + len(embedded.rejected))
        _log.info("found a checkpoint of %d images: %s", len(embedded.block), checkpoint)
        _count(embedded)
        return embedded
    records = plan.sources[number].records(split, plan.classes)
    if wanted is not None:
        records = (record for record in records if wanted(record.id))
    threads = None if storage.is_local(plan.sources[number].path) else _BUCKET_THREADS
    embedded = embed_records(records, load_encoder, plan.encoder, plan.images, threads)
    if wanted is None:  # otherwise it is not the whole split
        checkpoints.write(checkpoint, embedded)
    _count(embedded)
    return embedded


def _count(embedded: Embedded) -> None:
    measure.count("done_images", len(embedded.block))
    measure.count("quarantined_images", len(embedded.rejected))
    for kind, images in count_kinds(embedded.rejected).items():
        measure.count(f"quarantined_{kind}_images", images)


def by_shard(embedded: Embedded, shards: int) -> Iterator[tuple[int, Embedded]]:
    """Divides what became of a split among shards, by the ids."""
    row_shard = np.array([shard_of(id, shards) for id in embedded.block.ids], np.int64)
    rejected: dict[int, list[Rejected]] = {}
    for item in embedded.rejected:
        rejected.setdefault(shard_of(item.id, shards), []).append(item)
    for shard in sorted({*row_shard.tolist(), *rejected}):
        rows = np.flatnonzero(row_shard == shard)
        yield shard, Embedded(embedded.block.take(rows), tuple(rejected.get(shard, ())))


def gather(parts: Iterable[Embedded]) -> tuple[Embedded, int]:
    """All parts as one, rows sorted by id and each id once; and the number of duplicates.

    Of rows with one id the first in the order of label, source, vector and thumbnail
    stays, so the result does not depend on the order of the parts.
    """
    parts = list(parts)
    rejected = sorted({item for part in parts for item in part.rejected})
    duplicates = sum(len(part.rejected) for part in parts) - len(rejected)
    blocks = [part.block for part in parts if len(part.block)]
    if not blocks:
        return Embedded(EmbeddingBlock.empty(), tuple(rejected)), duplicates
    block = EmbeddingBlock.concatenate(blocks)

    def priority(row: int) -> tuple:
        thumbnail = b"" if block.thumbnails is None else block.thumbnails[row]
        return int(block.labels[row]), block.sources[row], block.vectors[row].tobytes(), thumbnail

    chosen: dict[str, int] = {}
    for row, id in enumerate(block.ids):
        other = chosen.setdefault(id, row)
        if other != row and priority(row) < priority(other):
            chosen[id] = row
    keep = np.array([chosen[id] for id in sorted(chosen)], np.int64)
    return Embedded(block.take(keep), tuple(rejected)), duplicates + len(block) - len(keep)


def embed_records(
    records: Iterable[ImageRecord | Rejected],
    load_encoder: Callable[[], BatchedEncoder],
    settings: Encoder,
    images: ImageSettings,
    threads: int | None = None,
) -> Embedded:
    """Embeds all records; the rows keep the records' order.

    Images are decoded by a pool of threads that runs ahead of the encoder by a batch.
    A record that cannot be read, decoded or embedded is rejected with its reason and
    harms no other. ``load_encoder`` is called when there is something to encode, and
    returns the same encoder every time.
    """
    good: list[ImageRecord] = []
    thumbnails: list[bytes | None] = []
    vectors: list[np.ndarray] = []
    rejected: list[Rejected] = []

    def usable(pool: ThreadPoolExecutor) -> Iterator[tuple[ImageRecord, PreparedImage]]:
        for outcome in _prepare_ahead(records, pool, settings, images):
            if isinstance(outcome, Rejected):
                rejected.append(outcome)
                report("encode", 1)
            else:
                yield outcome

    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        for batch in in_groups(usable(pool), settings.batch_size):
            with measure.timed("load_ms"):
                encoder = load_encoder()
            embeddings = encoder(np.stack([prepared.pixels for _, prepared in batch]))
            for (record, prepared), vector in zip(batch, embeddings, strict=True):
                norm = np.linalg.norm(vector.astype(np.float64))
                if not np.isfinite(norm) or norm == 0:
                    reason = f"the encoder returned no usable embedding (its norm is {norm})"
                    rejected.append(Rejected(record.id, record.source, reason))
                    continue
                good.append(record)
                thumbnails.append(prepared.thumbnail)
                vectors.append((vector / norm).astype(np.float32))
            report("encode", len(batch))
    block = EmbeddingBlock(
        ids=strings([record.id for record in good]),
        labels=np.array([record.label for record in good], np.int64),
        sources=strings([record.source for record in good]),
        vectors=np.stack(vectors) if vectors else EmbeddingBlock.empty().vectors,
        thumbnails=strings(thumbnails) if images.thumbnail_pixels else None,
    )
    return Embedded(block, tuple(rejected))


def _prepare_ahead(
    records: Iterable[ImageRecord | Rejected],
    pool: ThreadPoolExecutor,
    settings: Encoder,
    images: ImageSettings,
) -> Iterator[Rejected | tuple[ImageRecord, PreparedImage]]:
    """Prepares records in order, at most two batches of them at a time in memory."""
    preprocessing = settings.effective_preprocessing()

    def work(record: ImageRecord | Rejected) -> Rejected | tuple[ImageRecord, PreparedImage]:
        if isinstance(record, Rejected):
            return record
        try:
            data = record.data
            if isinstance(data, str):
                with measure.timed("read_ms"):
                    data = storage.read_bytes(data)
            measure.count("read_bytes", len(data))
            with measure.timed("decode_ms"):
                prepared = prepare(data, preprocessing, images.max_pixels, images.thumbnail_pixels)
            return record._replace(data=b""), prepared
        except UnreachableError:  # no fault of the image's
            raise
        except BadImage as error:
            reason = str(error)
        except OSError as error:
            reason = f"the file cannot be read: {error.strerror or error}"
        except (ValueError, VisualMemoryError) as error:  # a path that no file can have
            reason = f"the file cannot be read: {error}"
        return Rejected(record.id, record.source, reason)

    recorded = measure.carried(work)
    waiting: deque[Future] = deque()
    for record in records:
        waiting.append(pool.submit(recorded, record))
        if len(waiting) > 2 * settings.batch_size:
            yield waiting.popleft().result()
    for future in waiting:
        yield future.result()
