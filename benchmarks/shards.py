"""Embedding shards: our writer and block reader against TensorFlow's own.

    python -m benchmarks.shards        (about two minutes on 2 cores)

Peer: ``tf.io.TFRecordWriter`` with ``tf.train.Example``, and ``tf.data`` with batched
``tf.io.parse_example`` and ``tf.io.decode_raw`` in a parallel map with prefetching. Both
sides verify the checksums and give ids, labels, sources and an (N, D) float32 matrix from
a file in the page cache, the same number of rows at a time; ours also decodes the ids to
str and refuses NaN. Each reads the file that it wrote; the columns that come back are
compared. Our writing includes a SHA-256 and an fsync, which the peer's does not.

tf.data's parallelism is fixed, the best of those tried, and its autotuning is off. With
AUTOTUNE one pass takes 0.31 or 0.63 s whatever the file (its tuning thread, it seems, is
waited for), which would flatter us by a factor of up to two.

Expected: a reading ratio near 2 for 384 numbers a row, where the peer's cost per record
counts, and near 1 for 1280, where both wait for memory and the peer has two threads to
our one. Came, medians on 2 quiet cores: 1.25 for 384 float32, 0.97 for 384 float16, 1.47
and 1.37 for 1280; under other load single runs differ by a factor of two. Surprises:
NumPy's float16 conversion was half of our time at 1280, so the reader has a faster one;
blocks over 32 MiB cost up to half more, probably as the allocator maps new pages for each.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from vm_core.records import EmbeddingBlock, strings
from vm_core.shards import read_blocks, write_shard

CONFIGS = ((100_000, 384, "float32"), (100_000, 384, "float16"),
           (40_000, 1280, "float32"), (40_000, 1280, "float16"))  # fmt: skip
HEADLINE = "384_float32"
FINGERPRINT = "9f" * 32
ROWS, PARALLEL_CALLS, BUFFER_BYTES = 4096, 4, 1 << 20  # see above for the last two
WRITES, READS = 3, 15


def make_block(rows: int, dimension: int) -> EmbeddingBlock:
    random = np.random.default_rng(rows + dimension)
    vectors = random.standard_normal((rows, dimension), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    labels = np.sort(random.integers(0, 1000, rows))
    ids = sorted(
        f"train/n{label:08d}/n{label:08d}_{row}.JPEG" for row, label in enumerate(labels.tolist())
    )
    return EmbeddingBlock(strings(ids), labels, strings(["imagenet2012"] * rows), vectors)


def write_tensorflow(path: str, block: EmbeddingBlock, dtype: str) -> None:
    def bytes_feature(value: bytes) -> tf.train.Feature:
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    vectors = block.vectors.astype(dtype)
    with tf.io.TFRecordWriter(path) as writer:
        for id, label, source, vector in zip(
            block.ids, block.labels.tolist(), block.sources, vectors, strict=True
        ):
            feature = {
                "dtype": bytes_feature(dtype.encode()),
                "fingerprint": bytes_feature(FINGERPRINT.encode()),
                "id": bytes_feature(id.encode()),
                "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                "source": bytes_feature(source.encode()),
                "vector": bytes_feature(vector.tobytes()),
            }
            example = tf.train.Example(features=tf.train.Features(feature=feature))
            writer.write(example.SerializeToString(deterministic=True))


def tensorflow_batches(path: str, dtype: str) -> tf.data.Dataset:
    kinds = {"id": tf.string, "label": tf.int64, "source": tf.string, "vector": tf.string}
    features = {key: tf.io.FixedLenFeature([], kind) for key, kind in kinds.items()}

    def parse(records: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = tf.io.parse_example(records, features)
        vectors = tf.cast(tf.io.decode_raw(rows["vector"], dtype), tf.float32)
        return {**rows, "vector": vectors}

    dataset = tf.data.TFRecordDataset(path, buffer_size=BUFFER_BYTES).batch(ROWS)
    dataset = dataset.map(parse, num_parallel_calls=PARALLEL_CALLS).prefetch(PARALLEL_CALLS)
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def alternate(repetitions: int, *functions: Callable[[], object]) -> list[float]:
    """Median seconds of each function, run in turns so that noise hits all alike."""
    times: list[list[float]] = [[] for _ in functions]
    for _ in range(repetitions):
        for function, seconds in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
    return [statistics.median(seconds) for seconds in times]


def verify(ours: str, theirs: str, block: EmbeddingBlock, dtype: str) -> None:
    expected = block.vectors.astype(dtype).astype(np.float32)
    for path in (ours, theirs):  # each side reads what either wrote
        blocks = EmbeddingBlock.concatenate(list(read_blocks(path)))
        batches = list(tensorflow_batches(path, dtype).as_numpy_iterator())
        batch = {key: np.concatenate([part[key] for part in batches]) for key in batches[0]}
        for found in (blocks.vectors, batch["vector"]):
            np.testing.assert_array_equal(found, expected)
        for found in (blocks.labels, batch["label"]):
            np.testing.assert_array_equal(found, block.labels)
        assert blocks.ids.tolist() == [id.decode() for id in batch["id"]] == block.ids.tolist()
        assert blocks.sources.tolist() == block.sources.tolist()


def measure(folder: str, rows: int, dimension: int, dtype: str) -> dict[str, float]:
    block = make_block(rows, dimension)
    ours, theirs = os.path.join(folder, "ours"), os.path.join(folder, "theirs")
    write_ours, write_theirs = alternate(
        WRITES,
        lambda: write_shard(ours, block, FINGERPRINT, dtype),
        lambda: write_tensorflow(theirs, block, dtype),
    )
    verify(ours, theirs, block, dtype)
    dataset = tensorflow_batches(theirs, dtype)
    read_ours, read_theirs = alternate(
        READS,
        lambda: sum(len(part) for part in read_blocks(ours, ROWS)),
        lambda: sum(len(batch["id"]) for batch in dataset.as_numpy_iterator()),
    )
    return {
        "read_ratio": round(read_theirs / read_ours, 3),
        "write_ratio": round(write_theirs / write_ours, 3),
        "read_rows_per_s": round(rows / read_ours),
        "peer_read_rows_per_s": round(rows / read_theirs),
        "write_rows_per_s": round(rows / write_ours),
        "peer_write_rows_per_s": round(rows / write_theirs),
    }


def main() -> None:
    configs = {}
    with tempfile.TemporaryDirectory() as folder:
        for rows, dimension, dtype in CONFIGS:
            name = f"{dimension}_{dtype}"
            configs[name] = measure(folder, rows, dimension, dtype)
            print(name, configs[name], flush=True)
    result = {
        "name": "shards",
        "ratio": configs[HEADLINE]["read_ratio"],
        "peer": "tf.data: TFRecordDataset.batch.map(parse_example, decode_raw).prefetch",
        "write_ratio": configs[HEADLINE]["write_ratio"],
        "configs": configs,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
