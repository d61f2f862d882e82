"""What the integration tests share: small builds, and what is on disk afterwards."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.build import build
from vm_core import sealed
from vm_core.building import BuildConfig
from vm_core.embedding import BatchedEncoder
from vm_core.memory import Memory
from vm_core.records import EmbeddingBlock
from vm_core.shards import read_shard

REPOSITORY = Path(__file__).parents[2]
SHARDS = 3


def configuration(memory: Any, encoder: str, *sources: Any, **settings: Any) -> dict[str, Any]:
    """A build in three shards with small crops. Sources are folders or settings."""
    return {
        "memory": str(memory),
        "sources": [
            source if isinstance(source, dict) else {"kind": "folder", "path": str(source)}
            for source in sources
        ],
        "encoder": {
            "kind": "saved_model",
            "path": encoder,
            "preprocessing": {"resize": 40, "crop": 32},
            "batch_size": 8,
        },
        "shards": SHARDS,
        **settings,
    }


def build_memory(settings: dict[str, Any], *beam_arguments: str) -> Memory:
    return build(BuildConfig.model_validate(settings), beam_arguments)


def shard_contents(memory: Memory) -> dict[str, bytes]:
    """Name to bytes of every shard, side table, marker and class table of a memory.

    The marker names files by the build's folder, which covers how the inputs are split.
    """
    folder = Path(memory.path(f"builds/{memory.manifest.build}"))
    return {
        file.name: _unsealed(file).replace(memory.manifest.build.encode(), b"BUILD")
        for file in folder.iterdir()
        if file.is_file()
    }


def _unsealed(file: Path) -> bytes:
    data = file.read_bytes()
    return sealed.unseal(data) or data


def rows_of(memory: Memory) -> EmbeddingBlock:
    """All rows of a memory in the order of their ids."""
    block = EmbeddingBlock.concatenate(
        [read_shard(memory.path(s.embeddings)) for s in memory.manifest.shards if s.embedded]
    )
    return block.take(np.argsort(block.ids))


def table(pattern: str) -> pa.Table:
    """The rows of all Parquet files that match a pattern."""
    folder, _, name = pattern.rpartition("/")
    return pa.concat_tables([pq.read_table(path) for path in sorted(Path(folder).glob(name))])


def files_below(folder: Any) -> dict[str, tuple[int, int]]:
    """Relative path to inode and time of change of every file."""
    return {
        str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in Path(folder).rglob("*")
        if path.is_file()
    }


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the number of images of every call of an encoder here."""
    calls: list[int] = []
    encode = BatchedEncoder.__call__

    def counted(self: BatchedEncoder, pixels: np.ndarray) -> np.ndarray:
        calls.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(BatchedEncoder, "__call__", counted)
    return calls


def write_config(path: Path, settings: dict[str, Any]) -> str:
    path.write_text(json.dumps(settings))  # JSON is YAML
    return str(path)


def run_python(
    *arguments: str, timeout: float = 240, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the interpreter in a process of its own, stopped after ``timeout`` seconds."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
