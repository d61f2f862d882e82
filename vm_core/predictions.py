"""The table of predictions: one row per query, voter and k."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

PREDICTIONS_SCHEMA = pa.schema(
    [
        ("query_id", pa.string()),
        ("voter", pa.dictionary(pa.int32(), pa.string())),
        ("k", pa.int32()),
        ("label", pa.int64()),
    ]
)


def predictions_table(query_ids: np.ndarray, predictions: Mapping[str, np.ndarray]) -> pa.Table:
    """One row per query, voter and k, in that order, from (Q, K) predictions by voter."""
    labels = np.stack(list(predictions.values()), axis=1)
    queries, voters, k = labels.shape
    query_rows = pa.array(np.repeat(np.arange(queries, dtype=np.int32), voters * k))
    voter_rows = pa.array(np.tile(np.repeat(np.arange(voters, dtype=np.int32), k), queries))
    return pa.Table.from_arrays(
        [
            pa.array(query_ids, pa.string()).take(query_rows),
            pa.DictionaryArray.from_arrays(voter_rows, pa.array(list(predictions), pa.string())),
            pa.array(np.tile(np.arange(1, k + 1, dtype=np.int32), queries * voters)),
            pa.array(labels.ravel()),
        ],
        schema=PREDICTIONS_SCHEMA,
    )
