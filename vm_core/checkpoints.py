"""What became of one split, kept until its build is published: no image is encoded twice."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa

from vm_core import sealed
from vm_core.records import Embedded, EmbeddingBlock, Rejected, strings


def write(path: str, embedded: Embedded) -> None:
    """Writes a sealed Arrow file."""
    block = embedded.block
    columns = {
        "id": pa.array(block.ids, pa.string()),
        "label": pa.array(block.labels, pa.int64()),
        "source": pa.array(block.sources, pa.string()),
        "vector": pa.FixedSizeListArray.from_arrays(block.vectors.ravel(), block.vectors.shape[1])
        if len(block)
        else pa.array([], pa.list_(pa.float32(), 1)),
    }
    if block.thumbnails is not None:
        columns["thumbnail"] = pa.array(block.thumbnails, pa.binary())
    if block.contents is not None:
        columns["content"] = pa.array(block.contents, pa.binary())
    facts = {"rejected": embedded.rejected, "batch_size": embedded.batch_size}
    table = pa.table(columns).replace_schema_metadata({"facts": json.dumps(facts)})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    sealed.write(path, sink.getvalue())


def read(path: str) -> Embedded | None:
    """What was written, None if nothing was or the file is damaged."""
    data = sealed.read(path)
    if data is None:
        return None
    table = pa.ipc.open_file(data).read_all().combine_chunks()
    vectors = table["vector"].combine_chunks()

    def binary(name: str) -> np.ndarray | None:
        return strings(table[name].to_pylist()) if name in table.column_names else None

    block = EmbeddingBlock(
        ids=strings(table["id"].to_pylist()),
        labels=table["label"].to_numpy(),
        sources=strings(table["source"].to_pylist()),
        vectors=vectors.flatten().to_numpy().reshape(len(table), -1 if len(table) else 1),
        thumbnails=binary("thumbnail"),
        contents=binary("content"),
    )
    facts = json.loads(table.schema.metadata[b"facts"])
    rejected = tuple(Rejected(*item) for item in facts["rejected"])
    return Embedded(block, rejected, facts["batch_size"])
