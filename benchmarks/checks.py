"""What checking and syncing cost: opening a partition, and writing files.

    python -m benchmarks.checks        (about a minute on 2 cores)

Opens an exact partition of 1,000,000 x 384 float32 in fresh processes with and without comparing
its files with their SHA-256, all in the page cache. Limit: hashing the same bytes with OpenSSL
through ``hashlib.file_digest``, a thread for each file. Then writes 500 files of 100 kB with and
without ``fsync`` of file and folder.

Expected: hashing takes as long as the limit, about a second for 1.5 GB with SHA instructions.
"""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import numpy as np
import pyarrow as pa

from vm_core import index, partitions, storage
from vm_core.index_files import PartitionEntry
from vm_core.partitions import Members

ROWS, DIMENSION, REPEATS = 1_000_000, 384, 3
FILES, FILE_BYTES = 500, 100_000

OPEN = """
import sys, time
from vm_core import indexing
entry = indexing.PartitionEntry.model_validate_json(sys.stdin.read())
start = time.perf_counter()
indexing.open_partition(sys.argv[1], entry, trust_files=sys.argv[2] == "trusted")
print(time.perf_counter() - start)
"""


def make_partition(root: str) -> PartitionEntry:
    folder = os.path.join(root, "partition")
    os.mkdir(folder)
    random = np.random.default_rng(0)
    vectors = random.standard_normal((ROWS, DIMENSION), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    rows = np.arange(ROWS)
    names = pa.array([f"set/class/{row:09d}.jpg" for row in range(ROWS)])
    members = Members(rows, names, rows % 1000, np.ones(ROWS, bool), vectors)
    partitions.write(folder, members)
    files = {name: storage.sha256_file(os.path.join(folder, name)) for name in os.listdir(folder)}
    return PartitionEntry(
        folder="partition",
        cell=0,
        count=ROWS,
        home=ROWS,
        bytes=sum(os.path.getsize(os.path.join(folder, name)) for name in files),
        index=index.parse({"kind": "exact"}),
        files=files,
    )


def seconds_to_open(root: str, entry: PartitionEntry, how: str) -> float:
    command = [sys.executable, "-c", OPEN, root, how]
    done = subprocess.run(
        command, input=entry.model_dump_json(), capture_output=True, text=True, check=True
    )
    return float(done.stdout)


def seconds_to_hash(root: str, entry: PartitionEntry) -> float:
    def digest(name: str) -> str:
        with open(os.path.join(root, entry.folder, name), "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    start = time.perf_counter()
    with ThreadPoolExecutor() as pool:
        assert list(pool.map(digest, entry.files)) == list(entry.files.values())
    return time.perf_counter() - start


def seconds_to_write(root: str) -> float:
    data = os.urandom(FILE_BYTES)
    with tempfile.TemporaryDirectory(dir=root) as folder:
        start = time.perf_counter()
        for number in range(FILES):
            storage.write_bytes(f"{folder}/{number % 10}/{number}", data)
        return time.perf_counter() - start


def median(call: Callable[[], float]) -> float:
    return statistics.median(call() for _ in range(REPEATS))


def main() -> None:
    with tempfile.TemporaryDirectory(dir=".") as folder:
        root = os.path.abspath(folder)
        entry = make_partition(root)
        seconds_to_hash(root, entry)  # into the page cache
        limit = median(lambda: seconds_to_hash(root, entry))
        trusted = median(lambda: seconds_to_open(root, entry, "trusted"))
        checked = median(lambda: seconds_to_open(root, entry, "checked"))
        synced = median(lambda: seconds_to_write(root))
        with mock.patch("os.fsync"):
            unsynced = median(lambda: seconds_to_write(root))
    print(f"open {entry.bytes / 1e9:.2f} GB: {trusted:.2f} s trusted, {checked:.2f} s checked")
    print(f"write {FILES} files: {synced:.2f} s with fsync, {unsynced:.2f} s without")
    print(
        json.dumps(
            {
                "name": "checks",
                "ratio": round(limit / (checked - trusted), 2),
                "peer": "hashlib.file_digest (OpenSSL) of the same files in threads",
                "open_trusted_s": round(trusted, 3),
                "open_checked_s": round(checked, 3),
                "hash_limit_s": round(limit, 3),
                "write_synced_ms_a_file": round(synced / FILES * 1e3, 2),
                "write_unsynced_ms_a_file": round(unsynced / FILES * 1e3, 2),
            }
        )
    )


if __name__ == "__main__":
    main()
