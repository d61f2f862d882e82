"""Which memory items mislead, and the pruning that this leads to.

Every memory item is a query against the memory it stands in. An item that often
turns up among the neighbours of items with another label is removed (hard pruning)
or loses weight (soft pruning). arXiv 2408.08172, section 4.3.

First the counts of the paper, by id, for a table of neighbours; then the pruning of a
memory: scores of its items, weights from them, a version that has the weights.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import csv
from pydantic import Field, model_validator

from vm_core import memory as versions
from vm_core import plugins, storage
from vm_core.errors import VisualMemoryError
from vm_core.memory import Manifest, Memory
from vm_core.neighbors import Neighbors
from vm_core.records import unit_interval
from vm_core.tables import write_table
from vm_core.weights import WEIGHTS_SCHEMA, WeightsEntry, file_name

HARD_THRESHOLD = 128
SOFT_SCALE = 1.75

SCORES_SCHEMA = pa.schema([("row", pa.int64()), ("score", pa.float64())])
"""Items by their row's number in the memory: ids of very many are too large to join by."""

TIES_SCHEMA = pa.schema([("shapley", pa.float64()), ("order", pa.float64())])
"""What decides between items of one score: the lower Shapley value, then a hash of the id."""

ROW_WEIGHTS_SCHEMA = pa.schema([("row", pa.int64()), ("weight", pa.float64())])


def without_self(block: Neighbors) -> Neighbors:
    """The (Q, K) block, whose queries are memory items, as (Q, K - 1) without the items themselves.

    The item is removed by id wherever it stands; where the search did not return it,
    the row's last neighbour goes, so that every row has as many neighbours left.
    """
    removed = block.ids == block.query_ids[:, None]
    (absent,) = np.nonzero(~removed.any(axis=1))
    lengths = (block.labels[absent] >= 0).sum(axis=1)
    removed[absent[lengths > 0], lengths[lengths > 0] - 1] = True
    return block.remove(removed).first(max(0, block.k - 1))


def with_self(block: Neighbors) -> Neighbors:
    """The (Q, K) block as (Q, K + 1), every query its own first neighbour, at distance 0."""
    return replace(
        block,
        ids=np.column_stack([block.query_ids, block.ids]),
        labels=np.column_stack([block.query_labels, block.labels]),
        distances=np.pad(block.distances, ((0, 0), (1, 0))),
    )


@dataclass
class LeaveOneOutCounts:
    """How often each item is a neighbour of another item with another, or the same, label.

    Counts by item id, over the first 10 neighbours and over all of them; an item
    never counted has no entry. ``add`` and ``merge`` in any order and grouping give
    the same counts.
    """

    wrong_at_10: Counter[str] = field(default_factory=Counter)
    correct_at_10: Counter[str] = field(default_factory=Counter)
    wrong_at_max: Counter[str] = field(default_factory=Counter)

    def add(self, block: Neighbors) -> None:
        """Counts a block of leave-one-out queries, the items themselves still among them."""
        block = without_self(block)
        correct = block.is_correct(block.labels)
        wrong = ~correct & (block.labels >= 0)
        self.wrong_at_10.update(block.ids[:, :10][wrong[:, :10]])
        self.correct_at_10.update(block.ids[:, :10][correct[:, :10]])
        self.wrong_at_max.update(block.ids[wrong])

    def merge(self, other: LeaveOneOutCounts) -> None:
        self.wrong_at_10.update(other.wrong_at_10)
        self.correct_at_10.update(other.correct_at_10)
        self.wrong_at_max.update(other.wrong_at_max)


def hard_excluded(counts: LeaveOneOutCounts, threshold: int = HARD_THRESHOLD) -> set[str]:
    """Ids of the items that were a wrong neighbour at least ``threshold`` times."""
    if threshold < 1:
        raise VisualMemoryError(
            f"hard pruning threshold {threshold} would remove every item. Use 1 or more "
            f"(the paper's is {HARD_THRESHOLD})"
        )
    return {id for id, count in counts.wrong_at_max.items() if count >= threshold}


def soft_weights(counts: LeaveOneOutCounts) -> dict[str, float]:
    """1.75 / (1 + wrong count at 10) of every item counted; any other item's weight is 1."""
    return {id: SOFT_SCALE / (1 + count) for id, count in counts.wrong_at_10.items()}


def multipliers(ids: np.ndarray, weights: Mapping[str, float]) -> np.ndarray:
    """Float64 array of the shape of ``ids``: the weight of each, 1 where it has none."""
    found = map(weights.get, ids.ravel(), itertools.repeat(1.0))
    return np.fromiter(found, dtype=np.float64, count=ids.size).reshape(ids.shape)


def scores_of(tables: Iterable[pa.Table], column: str, ties: bool = False) -> pa.Table:
    """A table of SCORES_SCHEMA, and of TIES_SCHEMA where ``ties``, from one column of others.

    tables: items with row, id, shapley and ``column``; an empty score is left out. Some 16
    bytes an item are in memory, 32 with ties, whatever else the tables hold.
    """
    parts = [_schema(ties).empty_table()]
    for table in tables:
        shapley = table["shapley"] if ties else None
        part = _scores(table["row"], table[column], table["id"], shapley)
        parts.append(part.filter(pc.is_valid(part["score"])))
    return pa.concat_tables(parts)


def _schema(ties: bool) -> pa.Schema:
    return pa.schema([*SCORES_SCHEMA, *(TIES_SCHEMA if ties else ())])


def _scores(
    rows: np.ndarray | pa.ChunkedArray,
    scores: pa.ChunkedArray,
    ids: pa.ChunkedArray,
    shapley: Any = None,
) -> pa.Table:
    """A table of SCORES_SCHEMA, and of TIES_SCHEMA where there are Shapley values."""
    columns = [rows, scores.cast(pa.float64())]
    if shapley is not None:
        hashes = (unit_interval(id.as_py(), "prune") for id in ids)
        columns += [shapley, np.fromiter(hashes, np.float64, len(ids))]
    return pa.table(columns, schema=_schema(shapley is not None))


def read_scores(path: str, column: str) -> pa.Table:
    """Items of a file, CSV or Parquet, with the columns id and ``column``; and maybe shapley.

    Returns id large_string, score float64 and shapley float64 (0 where the file has none).
    Raises VisualMemoryError for a missing column, an empty score, one that is not a
    number, and an id that comes twice.
    """
    if not storage.exists(path):
        raise VisualMemoryError(f"the scores {path!r} do not exist. Give a CSV or Parquet file")
    data = pa.BufferReader(storage.read_bytes(path))
    try:
        if path.endswith(".parquet"):
            table = pq.read_table(data)
        else:
            # Ids stay as they are written: 0012 is not 12, and NA may be an item's name.
            options = csv.ConvertOptions(
                column_types={"id": pa.string()}, strings_can_be_null=False
            )
            table = csv.read_csv(data, convert_options=options)
    except pa.ArrowInvalid as error:
        reason = str(error).partition("\n")[0]
        raise VisualMemoryError(
            f"the scores {path!r} cannot be read: {reason}. Give a Parquet file with the ending "
            ".parquet, or CSV with a line of column names"
        ) from error
    for name in ("id", column):
        if table.schema.names.count(name) != 1:
            raise VisualMemoryError(
                f"the scores {path!r} have {table.schema.names.count(name)} columns {name!r}, not "
                f"one; their columns are {', '.join(table.schema.names)}. Name the scores' with "
                "--score-column and the items' id"
            )
    shapley = pa.chunked_array([np.zeros(len(table))])
    if table.schema.names.count("shapley") == 1 and pa.types.is_floating(
        table.schema.field("shapley").type
    ):
        shapley = table["shapley"].cast(pa.float64())
    table = table.select(["id", column]).rename_columns(["id", "score"])
    try:
        # Ids of 64-bit lengths: all together may exceed 2 GB.
        table = table.cast(pa.schema([("id", pa.large_string()), ("score", pa.float64())]))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise VisualMemoryError(
            f"column {column!r} of the scores {path!r} holds {table.schema.field('score').type}, "
            "not numbers. Choose another with --score-column"
        ) from error
    bad = pc.or_kleene(pc.is_null(table["score"], nan_is_null=True), pc.is_null(table["id"]))
    if pc.any(bad).as_py():
        rows = table.filter(bad)
        raise VisualMemoryError(
            f"{len(rows):,} rows of the scores {path!r} have no number in {column!r} or no id, the "
            f"first of them that of item {rows['id'][0].as_py()!r}. Correct or remove them"
        )
    counts = pc.value_counts(table["id"])
    repeated = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")
    if len(repeated):
        raise VisualMemoryError(
            f"{len(repeated):,} ids come more than once in the scores {path!r}, such as "
            f"{repeated[0].as_py()!r}. Keep one score for each item"
        )
    return table.append_column("shapley", shapley)


def hard(scores: pa.Table, threshold: float, highest: bool = True) -> pa.Table:
    """Weight 0 for every item whose score is ``threshold`` or more; or less, not ``highest``.

    Like ``worst_share`` and ``soft``, takes SCORES_SCHEMA and returns ROW_WEIGHTS_SCHEMA: the
    items whose weight is not 1.
    """
    worse = pc.greater_equal if highest else pc.less_equal
    return _removed(scores.filter(worse(scores["score"], float(threshold))))


def worst_share(scores: pa.Table, share: float, highest: bool = True) -> pa.Table:
    """Weight 0 for a share of the items: those of the highest scores, or of the lowest.

    Exactly the rounded number of items. Of those with equal scores the ones of the lowest
    Shapley values go, and of those that are equal in that too, some by a hash of the id, so
    that no class loses more because its ids come first. scores: with TIES_SCHEMA as well.
    """
    if not 0 < share < 1:
        raise VisualMemoryError(
            f"share {share} of the items cannot be removed. Use a number between 0 and 1, "
            "such as 0.05"
        )
    keys = [("score", "descending" if highest else "ascending")]
    keys += [(name, "ascending") for name in (*TIES_SCHEMA.names, "row")]
    order = pc.sort_indices(scores, keys)
    return _removed(scores.take(order[: round(share * len(scores))]))


def _removed(items: pa.Table) -> pa.Table:
    return pa.table([items["row"], np.zeros(len(items), np.float32)], schema=ROW_WEIGHTS_SCHEMA)


def soft(counts: pa.Table, gamma_scale: float = SOFT_SCALE) -> pa.Table:
    """Weight ``gamma_scale`` / (1 + count) for every item whose count is not 0; see ``hard``."""
    counted = counts.filter(pc.not_equal(counts["score"], 0.0))
    weights = (gamma_scale / (1 + counted["score"].to_numpy())).astype(np.float64)
    return pa.table([counted["row"], weights], schema=ROW_WEIGHTS_SCHEMA)


class PruneConfig(plugins.Settings):
    """One pruning of a memory.

    method: hard removes items, soft lowers their weight to ``gamma_scale`` / (1 + count).
    by: the leave-one-out score: wrong_at_K, correct_at_K, reliability or shapley; the
    paper's if none is named (wrong_at_100 for hard, wrong_at_10 for soft). Or scores: a CSV
    or Parquet file with columns id and ``score_column``; ``lowest`` if its low scores are
    the bad ones. threshold: hard removes scores that reach it; or share: of the items with
    a score, the worst. leave_one_out: further settings of the leave-one-out run.
    evaluation: settings of the evaluation that compares before with after, such as
    queries; none if empty.
    """

    memory: str
    method: Literal["hard", "soft"]
    by: str | None = None
    scores: str | None = None
    score_column: str = "score"
    lowest: bool = False
    threshold: float | None = Field(None, allow_inf_nan=False)
    share: float | None = Field(None, gt=0, lt=1)
    gamma_scale: float = Field(SOFT_SCALE, gt=0, allow_inf_nan=False)
    leave_one_out: dict[str, Any] = {}
    evaluation: dict[str, Any] = {}

    @model_validator(mode="after")
    def _check(self) -> PruneConfig:
        if self.by and self.scores:
            raise ValueError("give one of by and scores, not both")
        if self.by and not re.fullmatch(
            r"(wrong|correct)_at_[1-9]\d{0,4}|reliability|shapley", self.by
        ):
            raise ValueError("by must be wrong_at_K, correct_at_K, reliability or shapley")
        if self.lowest and not self.scores:
            raise ValueError("lowest is for the scores of a file; leave-one-out scores know it")
        if self.method == "soft":
            if self.threshold is not None or self.share is not None:
                raise ValueError("threshold and share are of method hard; soft removes nothing")
            if self.lowest or (self.by and not self.by.startswith("wrong_")):
                raise ValueError("method soft needs wrong counts, such as by wrong_at_10")
        elif self.threshold is not None and self.share is not None:
            raise ValueError("give one of threshold and share, not both")
        elif self.share is None and self.limit is None:
            raise ValueError(f"give a threshold or a share to prune by {self.by or self.scores}")
        return self

    @property
    def column(self) -> str:
        """The column of the scores, in the file or of the leave-one-out run."""
        if self.scores:
            return self.score_column
        return self.by or ("wrong_at_100" if self.method == "hard" else "wrong_at_10")

    @property
    def highest(self) -> bool:
        """Whether the highest scores are the worst."""
        return not self.lowest if self.scores else self.column.startswith("wrong_")

    @property
    def leave_one_out_settings(self) -> dict[str, Any]:
        """Those given, with the number of neighbours that the score needs."""
        settings = {"ks": (10, 100), **self.leave_one_out}
        k = self.column.rpartition("_")[2]
        if k.isdecimal():
            settings["ks"] = tuple(sorted({*settings["ks"], int(k)}))
        return settings

    @property
    def limit(self) -> float | None:
        """The threshold, or the paper's where it holds."""
        if self.threshold is None and not self.scores and self.column == "wrong_at_100":
            return HARD_THRESHOLD
        return self.threshold

    def weights(self, scores: pa.Table) -> pa.Table:
        """ROW_WEIGHTS_SCHEMA from SCORES_SCHEMA, with TIES_SCHEMA where there is a share."""
        if self.method == "soft":
            return soft(scores, self.gamma_scale)
        if self.share is not None:
            return worst_share(scores, self.share, self.highest)
        assert self.limit is not None
        return hard(scores, self.limit, self.highest)

    @property
    def recipe(self) -> dict[str, Any]:
        """What the manifest keeps of this."""
        recipe: dict[str, Any] = {"method": self.method, "by": self.column}
        if self.scores:
            recipe |= {"scores": self.scores} | ({"lowest": True} if self.lowest else {})
        elif self.leave_one_out:
            recipe["leave_one_out"] = self.leave_one_out
        if self.method == "soft":
            return recipe | {"gamma_scale": self.gamma_scale}
        if self.share is not None:
            return recipe | {"share": self.share}
        return recipe | {"threshold": self.limit}


def scores_of_file(memory: Memory, config: PruneConfig) -> pa.Table:
    """The scores of a file as ``scores_of`` has them.

    Raises VisualMemoryError for scores that ``read_scores`` refuses, for negative ones where
    the method needs counts, and for those of items that are not in the memory.
    """
    assert config.scores is not None
    items = read_scores(config.scores, config.column)
    if config.method == "soft" and (negative := items.filter(pc.less(items["score"], 0.0))):
        raise VisualMemoryError(
            f"soft pruning needs counts, and item {negative['id'][0].as_py()!r} has "
            f"{negative['score'][0].as_py():g}. Use wrong counts, or --method hard"
        )
    rows = rows_of(memory, items["id"])
    if (rows < 0).any():
        raise VisualMemoryError(
            f"{(rows < 0).sum():,} of {len(items):,} ids are not in the memory {memory.root!r}, "
            f"the first of them {items['id'][int(np.argmin(rows))].as_py()!r}. Ids must be those "
            "of the memory, as in its exported tables; leave others out"
        )
    ties = config.share is not None
    return _scores(rows, items["score"], items["id"], items["shapley"] if ties else None)


def rows_of(memory: Memory, ids: pa.ChunkedArray) -> np.ndarray:
    """(N,) int64: the number of each id's row in the memory, -1 where it has none.

    ids: of large_string, each once. Reads every partition's rows once, one after another.
    """
    rows = np.full(len(ids), -1)
    schema = pa.schema([("row", pa.int64()), ("id", pa.large_string())])
    batches = (
        batch
        for number in range(len(memory.manifest.partitions))
        for batch in memory.rows(number).select(schema.names).cast(schema).to_batches()
    )
    # One scan, and not a look-up a partition: the table of the ids is made only once.
    place = pc.index_in(ds.field("id"), value_set=ids.combine_chunks())
    scan = ds.Scanner.from_batches(
        pa.RecordBatchReader.from_batches(schema, batches),
        columns={"row": ds.field("row"), "place": place},
    )
    for batch in scan.to_batches():
        found = batch.filter(batch["place"].is_valid())
        rows[found["place"].to_numpy()] = found["row"].to_numpy()
    return rows


def unweighted(manifest: Manifest) -> Manifest:
    """The manifest of the same version without weights."""
    if manifest.weights is None:
        return manifest
    digest, name = manifest.weights.base_digest, manifest.weights.base_version
    return manifest.model_copy(update={"weights": None, "content_digest": digest, "version": name})


def stage(memory: Memory, weights: pa.Table, settings: Mapping[str, Any]) -> Memory:
    """Writes weights beside a memory; returns it as it will be once they are published.

    weights: of ROW_WEIGHTS_SCHEMA, any order, each row once; they take the place of weights
    that the memory has already. settings: how they came about, for the manifest. Raises
    VisualMemoryError if nothing is left.
    """
    base = unweighted(memory.manifest)
    of_rows = np.ones(base.total("embedded"), np.float32)
    of_rows[weights["row"].to_numpy()] = weights["weight"].to_numpy()
    removed = int((of_rows == 0).sum())
    if removed == len(of_rows):
        raise VisualMemoryError(
            f"all {removed:,} items would be removed and nothing could be recognised. Remove "
            "fewer: another threshold, or a share"
        )
    identity = hashlib.sha256(of_rows.tobytes())
    layout = [base.content_digest, base.build, [entry.folder for entry in base.partitions]]
    identity.update(json.dumps(layout).encode())
    folder = f"weights/{identity.hexdigest()[:16]}"
    files = {}
    for number in range(len(base.partitions)):
        members = memory.rows(number)
        values = of_rows[members["row"].to_numpy()]
        changed = np.flatnonzero(values != 1)
        table = pa.table([members["id"].take(changed), values[changed]], schema=WEIGHTS_SCHEMA)
        name = file_name(folder, number)
        files[name] = write_table(memory.path(name), table)
    entry = WeightsEntry(
        folder=folder,
        files=files,
        settings=dict(settings),
        removed=removed,
        weighted=int((of_rows != 1).sum()) - removed,
        base_version=base.version,
        base_digest=base.content_digest,
    )
    digest = json.dumps([base.content_digest, sorted(files.values())])
    manifest = base.model_copy(
        update={
            "weights": entry,
            "content_digest": hashlib.sha256(digest.encode()).hexdigest(),
            "version": f"not published, {folder}",
        }
    )
    return memory.with_manifest(manifest)


def undo(memory: Memory) -> Manifest:
    """Publishes the memory without its weights, with the content digest that it had before."""
    if memory.manifest.weights is None:
        raise VisualMemoryError(
            f"version {memory.manifest.version} of {memory.root!r} has no weights: there is "
            "nothing to undo"
        )
    bare = memory.with_manifest(unweighted(memory.manifest))
    return publish_staged(bare, memory.manifest.version)


def publish_staged(memory: Memory, base: str) -> Manifest:
    """Publishes what is staged, unless the memory has gone on from the version ``base``."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    manifest = memory.manifest.model_copy(update={"created": created})
    return versions.publish(memory.root, manifest, base)
