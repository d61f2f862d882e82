"""From image records to a block of embeddings: decode in parallel, encode in batches."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from pydantic import Field

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
    count_images,
    shard_of,
    strings,
)
from vm_core.sources import Source, Split, in_groups

_log = logging.getLogger(__name__)

# Most of them wait for a bucket's answer at any time.
_BUCKET_THREADS = 16


class ImageSettings(plugins.Settings):
    """How images are read, whichever encoder sees them.

    max_pixels: larger images are quarantined before they are decoded. max_bytes: of an
    encoded image; longer files are quarantined without being read to their end.
    thumbnail_pixels: longer side of the pictures kept for reports; 0 keeps none.
    """

    max_pixels: int = Field(DEFAULT_MAX_PIXELS, ge=1)
    max_bytes: int = Field(256 << 20, ge=1)
    thumbnail_pixels: int = Field(96, ge=0, le=4096)


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
    memory the shape is halved, once and for all, down to a single image: ``batch_size`` is
    the present one. name: of the encoder, for errors.
    """

    def __init__(self, embed: Embed, batch_size: int, name: str = "the encoder"):
        self._embed = embed
        self._name = name
        self._dimension: int | None = None
        self.batch_size = batch_size

    @staticmethod
    def load(settings: Encoder) -> BatchedEncoder:
        """Loads the encoder that settings describe."""
        return BatchedEncoder(
            settings.load(), settings.batch_size, f"the encoder {settings.path!r}"
        )

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """(N, H, W, 3) uint8 to (N, D) float32, for any N >= 1.

        Raises VisualMemoryError if the encoder returns anything else.
        """
        start, parts = 0, []
        while start < len(pixels):
            size = self.batch_size  # another thread may halve it meanwhile
            batch = pixels[start : start + size]
            missing = size - len(batch)
            padded = np.pad(batch, [(0, missing), (0, 0), (0, 0), (0, 0)]) if missing else batch
            try:
                with measure.timed("model_ms"):
                    parts.append(self._checked(self._embed(padded), size)[: len(batch)])
            except MemoryError as error:
                if size == 1:
                    raise
                self.batch_size = min(self.batch_size, size // 2)
                _log.warning(
                    "out of device memory: batch size is now %d (%s)", self.batch_size, error
                )
            else:
                measure.observe("batch_images", len(batch))
                start += len(batch)
        return np.concatenate(parts)

    def _checked(self, found: np.ndarray, size: int) -> np.ndarray:
        """What the encoder has returned for ``size`` images, if it is a row of numbers each."""
        found = np.asarray(found)
        rows = found.shape[0] if found.ndim == 2 else None
        if rows != size or not found.shape[1] or found.dtype.kind not in "fiu":
            raise VisualMemoryError(
                f"{self._name} returned an array of shape {found.shape} and type {found.dtype} for "
                f"{size} images: give an encoder that returns ({size}, D) floats"
            )
        if self._dimension not in (None, found.shape[1]):
            raise VisualMemoryError(
                f"{self._name} returned {found.shape[1]} dimensions, and {self._dimension} before: "
                "give an encoder that returns as many for every batch"
            )
        self._dimension = found.shape[1]
        return found.astype(np.float32, copy=False)


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
    measure.count("quarantined_images", count_images(embedded.rejected))
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
        part = embedded.block.take(rows), tuple(rejected.get(shard, ()))
        yield shard, Embedded(*part, embedded.batch_size if len(rows) else 0)


def gather(parts: Iterable[Embedded]) -> tuple[Embedded, int]:
    """All parts as one, rows sorted by id and each id once; and the number of duplicates.

    Duplicates have the same id, label and content. All rows of an id that names different
    contents are rejected: which of them is right is not known. The result does not depend on
    the order of the parts.
    """
    parts = list(parts)
    rejected = {item for part in parts for item in part.rejected}
    duplicates = sum(count_images(part.rejected) for part in parts) - count_images(rejected)
    batch_size = min((part.batch_size for part in parts if part.batch_size), default=0)
    blocks = [part.block for part in parts if len(part.block)]
    if not blocks:
        nothing = Embedded(EmbeddingBlock.empty(), tuple(sorted(rejected)), batch_size)
        return nothing, duplicates
    block = EmbeddingBlock.concatenate(blocks)

    def content(row: int) -> tuple:
        known = block.vectors[row].tobytes() if block.contents is None else block.contents[row]
        return int(block.labels[row]), known

    by_id: dict[str, list[int]] = {}
    for row, id in enumerate(block.ids):
        by_id.setdefault(id, []).append(row)
    keep = []
    for id in sorted(by_id):
        rows = by_id[id]
        if len(rows) > 1 and len({content(row) for row in rows}) > 1:
            sources = Counter(block.sources[row] for row in rows)
            reason = f"the id has {len(rows)} images or labels that differ: give each its own id"
            rejected |= {Rejected(id, source, reason, count) for source, count in sources.items()}
        else:
            keep.append(min(rows, key=lambda row: block.sources[row]))
            duplicates += len(rows) - 1
    chosen = block.take(np.array(keep, np.int64))
    return Embedded(chosen, tuple(sorted(rejected)), batch_size), duplicates


def embed_records(
    records: Iterable[ImageRecord | Rejected],
    load_encoder: Callable[[], BatchedEncoder],
    settings: Encoder,
    images: ImageSettings,
    threads: int | None = None,
) -> Embedded:
    """Embeds all records; the rows keep the records' order.

    Images are decoded by a pool of threads that runs ahead of the encoder by a batch. What
    was encoded is kept as the rows' ``contents``.
    A record that cannot be read, decoded or embedded is rejected with its reason and
    harms no other. ``load_encoder`` is called when there is something to encode, and
    returns the same encoder every time.
    """
    good: list[ImageRecord] = []
    thumbnails: list[bytes | None] = []
    contents: list[bytes] = []
    vectors: list[np.ndarray] = []
    rejected: list[Rejected] = []
    batch_size = 0

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
            batch_size = encoder.batch_size
            for (record, prepared), vector in zip(batch, embeddings, strict=True):
                norm = np.linalg.norm(vector.astype(np.float64))
                if not np.isfinite(norm) or norm == 0:
                    reason = f"the encoder returned no usable embedding (its norm is {norm})"
                    rejected.append(Rejected(record.id, record.source, reason))
                    continue
                good.append(record)
                thumbnails.append(prepared.thumbnail)
                contents.append(record.data)
                vectors.append((vector / norm).astype(np.float32))
            report("encode", len(batch))
    block = EmbeddingBlock(
        ids=strings([record.id for record in good]),
        labels=np.array([record.label for record in good], np.int64),
        sources=strings([record.source for record in good]),
        vectors=np.stack(vectors) if vectors else EmbeddingBlock.empty().vectors,
        thumbnails=strings(thumbnails) if images.thumbnail_pixels else None,
        contents=strings(contents),
    )
    return Embedded(block, tuple(rejected), batch_size)


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
                    data = storage.read_bytes(data, images.max_bytes)
            measure.count("read_bytes", len(data))
            with measure.timed("decode_ms"):
                prepared = prepare(data, preprocessing, images.max_pixels, images.thumbnail_pixels)
            return record._replace(data=hashlib.sha256(data).digest()[:16]), prepared
        except UnreachableError:  # no fault of the image's
            raise
        except BadImage as error:
            reason = str(error)
        except OSError as error:
            if error.errno == errno.EFBIG:
                reason = f"too large: more than {images.max_bytes:,} bytes, the limit max_bytes"
            elif error.errno == errno.EINVAL:  # no regular file
                reason = f"the file cannot be read: {error}"
            else:
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
