"""The planner's formulas: bytes, memory and core seconds of every stage of a workload.

Throughout, with N rows of D numbers of I bytes, each kept in S cells:

    shard row        D*I + id_bytes + record_bytes
    cells C          1 up to ``partitioning.rows``, else ceil(1.5*N*S / partitioning.rows)
    rows of a cell   mean N*S/C; the largest is taken to be full: partitioning.rows
    partition row    vectors.npy D*I, rows.parquet id_bytes + row_bytes, and for ScaNN
                     the re-ranked vectors (4D, 2D or D), codes D/2 (a byte for two
                     dimensions; half that once they are loaded), token 4
    leaves           of ScaNN, L = sqrt(rows), of which max(25, 2*sqrt(L)) are searched
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from vm_core import partitioning
from vm_core.batch_files import BUNDLES
from vm_core.errors import VisualMemoryError
from vm_core.index import scann
from vm_core.index.auto import Plugin as Auto
from vm_core.planning.calibration import ENCODER_GFLOP, Constants
from vm_core.planning.worker_types import Worker
from vm_core.planning.workload import ITEM_BYTES, Workload
from vm_core.search import CACHE_BYTES

DEFAULT_ENCODER = "dinov2-l14"

_LEAF_ITERATIONS = 10  # of ScaNN's own k-means


@dataclass(frozen=True)
class Sizes:
    """Bytes, all rows together, copies in second cells included.

    shards, vectors: by dtype. reorder: by how ScaNN keeps the vectors it re-ranks by.
    codes, other: of ScaNN's files. rows: the tables of ids and labels. index: all files of
    the partitions as configured. work: written between shards and partitions, then removed.
    """

    shards: Mapping[str, float]
    vectors: Mapping[str, float]
    reorder: Mapping[str, float]
    codes: float
    other: float
    rows: float
    index: float
    work: float


@dataclass(frozen=True)
class Stage:
    """One step of the work.

    core_seconds: on the calibrated machine. accelerator_seconds: of one accelerator.
    tasks: independent pieces. memory_bytes: that one of them needs. shares_cores: whether
    one task uses all the worker's cores, and the memory is needed once. constants: names of
    those that the time follows from.
    """

    name: str
    core_seconds: float
    tasks: int
    memory_bytes: float
    constants: tuple[str, ...]
    accelerator_seconds: float = 0.0
    read_bytes: float = 0.0
    written_bytes: float = 0.0
    shuffle_bytes: float = 0.0
    files_opened: float = 0.0
    shares_cores: bool = False


def rows_scored(rows: float, to_search: int = 0) -> float:
    """Rows in the leaves that ScaNN searches for one query of a partition of so many rows.

    to_search: leaves, 0 for as many as ScaNN's index takes by itself.
    """
    leaves = max(1.0, math.sqrt(rows))
    return rows * min(1.0, (to_search or max(25.0, 2 * math.sqrt(leaves))) / leaves)


class Estimate:
    """The formulas for one workload, with the symbols above as attributes."""

    def __init__(self, workload: Workload, constants: Constants, worker: Worker):
        self.w, self.c, self.worker = workload, constants, worker
        self.n, self.d = workload.items, workload.dimension
        self.item_bytes = ITEM_BYTES[workload.dtype]
        self.cells = workload.partitioning.cells(self.n)
        self.copies = workload.partitioning.copies if self.cells > 1 else 1
        self.kept = self.n * self.copies
        self.mean_rows = self.kept / self.cells
        self.largest_rows = min(self.n, workload.partitioning.rows)
        self.probes = min(workload.probes, self.cells)
        self.shards = math.ceil(self.n / workload.rows_per_shard)
        self.bundles = min(self.shards, BUNDLES)
        self.sampled = partitioning.sample_rows(self.n, self.cells)
        self.scann = Auto().choose(round(self.mean_rows)).kind == "scann"
        self.images_per_s, self.encoder_constants = self._encoder_rate()

    # Bytes ---------------------------------------------------------------------------

    def shard_bytes(self, item_bytes: int) -> float:
        return self.n * (self.d * item_bytes + self.c.id_bytes + self.c.record_bytes)

    @property
    def stored(self) -> float:
        return self.shard_bytes(self.item_bytes)

    @property
    def assigned(self) -> float:
        """Rows on their way from shards to partitions; one cell takes them from the shards."""
        row = self.d * self.item_bytes + self.c.id_bytes + self.c.assigned_bytes
        return self.kept * row if self.cells > 1 else 0.0

    def partition_bytes(self, rows: float) -> float:
        """Files of a partition of so many rows."""
        total = rows * (self.d * self.item_bytes + self.c.id_bytes + self.c.row_bytes)
        return total + self.scann_bytes(rows)

    def scann_bytes(self, rows: float) -> float:
        """Those of them that ScaNN writes, and copies into memory when they are opened."""
        if not self.scann:
            return 0.0
        row = self.d * (scann.REORDER_BYTES[self.w.reorder] + 0.5) + 4
        return rows * row + self.leaf_bytes(rows)

    def opening_seconds(self, partitions: float) -> float:
        return partitions * self.scann_bytes(self.mean_rows) * self.c.open_s_per_byte

    def leaf_bytes(self, rows: float) -> float:
        """The centroids of ScaNN's leaves, kept twice."""
        return 2 * 4 * self.d * math.sqrt(rows)

    def sizes(self) -> Sizes:
        approximate = 1 if self.scann else 0
        return Sizes(
            shards={dtype: self.shard_bytes(item) for dtype, item in ITEM_BYTES.items()},
            vectors={dtype: self.kept * self.d * item for dtype, item in ITEM_BYTES.items()},
            reorder={
                kind: approximate * self.kept * self.d * item
                for kind, item in scann.REORDER_BYTES.items()
            },
            codes=approximate * self.kept * self.d * 0.5,
            other=approximate * (4 * self.kept + self.cells * self.leaf_bytes(self.mean_rows)),
            rows=self.kept * (self.c.id_bytes + self.c.row_bytes),
            index=self.cells * self.partition_bytes(self.mean_rows),
            work=self.assigned + self.checkpoints,
        )

    @property
    def checkpoints(self) -> float:
        """Encoded splits, kept until the build is published."""
        return self.shard_bytes(4)

    # Memory --------------------------------------------------------------------------

    def in_python(self, rows: float) -> float:
        return rows * (self.c.python_row_bytes + self.c.id_bytes)

    def build_memory(self) -> float:
        """One process that builds the largest partition: gathering rows, then ScaNN.

        Gathering holds them twice. ScaNN has the vectors as they are stored, as float32, and
        some copies: of all, and of those that it trains on.
        """
        rows = self.largest_rows
        held = 2.0 * rows * self.d * self.item_bytes
        if self.scann:
            copies = self.c.build_copies * rows
            copies += self.c.sample_copies * self.leaf_sample(rows)
            copies += 0 if self.item_bytes == 4 else rows
            held = max(held, rows * self.d * self.item_bytes + 4 * self.d * copies)
        return self.c.process_bytes + self.c.working_bytes + held + self.in_python(rows)

    def search_memory(self) -> float:
        """One process that searches, with the largest partition open, or all up to 4 GiB.

        ScaNN's vectors, its codes as stored and as packed for searching, and the rows. For
        exact search, which maps the stored vectors, these.
        """
        each = float(self.d * self.item_bytes)
        if self.scann:
            each = self.d * (scann.REORDER_BYTES[self.w.reorder] + 0.75) + 4
        each += self.in_python(1)
        opened = max(self.largest_rows * each, min(self.kept * each, CACHE_BYTES))
        return self.c.process_bytes + self.c.working_bytes + opened

    def shard_memory(self) -> float:
        """One process that has a shard: its rows as float32, as stored, and sorted."""
        rows = min(self.n, self.w.rows_per_shard)
        return self.c.process_bytes + rows * self.d * (8 + self.item_bytes) + self.in_python(rows)

    # Seconds -------------------------------------------------------------------------

    def _encoder_rate(self) -> tuple[float, tuple[str, ...]]:
        """Images/s of one accelerator or core, and the constants behind it.

        A rate that is given counts as it is; a measured one is of a core. Others follow from
        the encoder's operations: the accelerator's peak, or the core's matrix product, times
        an efficiency.
        """
        if self.w.images_per_s is not None:
            return self.w.images_per_s, ()
        name = self.w.encoder or DEFAULT_ENCODER
        measured = self.c.encoder_images_per_s
        accelerator = self.worker.accelerator
        if accelerator is None and name in measured:
            return measured[name], ("encoder_images_per_s",)
        if name not in ENCODER_GFLOP:
            remedy = "or give its images per second instead"
            if name in measured:
                remedy = "it is measured on a core only: give its rate on the accelerator instead"
            raise VisualMemoryError(
                f"encoder {name!r} is unknown. Known: "
                f"{', '.join(sorted({*ENCODER_GFLOP, *measured}))}; {remedy}"
            )
        if accelerator is None:
            rate = self.c.gflops * self.c.encoder_efficiency / ENCODER_GFLOP[name]
            return rate, ("gflops", "encoder_efficiency")
        rate = accelerator.teraflops * 1e3 * self.c.accelerator_efficiency / ENCODER_GFLOP[name]
        return rate, ("accelerator_efficiency",)

    def encode(self, name: str, images: int) -> Stage:
        """Read, decode, encode; what is encoded is kept as a checkpoint, then shuffled."""
        kept = images * (4 * self.d + self.c.id_bytes + self.c.record_bytes)
        core_seconds = images * self.c.image_bytes / self.c.decode_bytes_per_s
        core_seconds += self.write_seconds(images, kept)
        accelerator_seconds = 0.0
        if self.worker.accelerator is None:
            # A rate that is given is of the planned worker's core, not the calibrated one's.
            given = self.w.images_per_s is not None
            core_seconds += images / self.images_per_s * (self.worker.speed if given else 1)
        else:
            accelerator_seconds = images / self.images_per_s
        return Stage(
            name,
            core_seconds,
            tasks=math.ceil(images / 512),
            memory_bytes=self.c.process_bytes * 2,
            constants=("decode_bytes_per_s", "image_bytes", *self.encoder_constants),
            accelerator_seconds=accelerator_seconds,
            read_bytes=images * self.c.image_bytes,
            written_bytes=kept,
            shuffle_bytes=kept,
            files_opened=images,
        )

    def write_seconds(self, rows: float, stored: float) -> float:
        return rows * self.c.shard_write_s_per_row + stored * self.c.shard_write_s_per_byte

    def read_seconds(self) -> float:
        """Of all shards."""
        return self.n * self.c.shard_read_s_per_row + self.stored * self.c.shard_read_s_per_byte

    def exact_seconds(self, queries: float, rows: float) -> float:
        flops = 2.0 * queries * rows * self.d
        return flops / (self.c.gflops * 1e9 * self.c.exact_efficiency)

    def assign_seconds(self, rows: float) -> float:
        compare = 2e-9 * self.d / (self.c.gflops * self.c.exact_efficiency)
        return rows * (self.c.assign_s_per_row + self.cells * (self.c.assign_s_per_cell + compare))

    def search_seconds(self, queries: float) -> float:
        """Of queries times the partitions that each visits."""
        if not self.scann:
            return queries * self.c.assign_s_per_row + self.exact_seconds(queries, self.mean_rows)
        scored = rows_scored(self.mean_rows, self.w.leaves_to_search)
        scored *= self.c.search_s_per_row_dim
        each = self.c.search_s + self.d * (self.c.search_s_per_dim + scored)
        return queries * each

    def answer_seconds(self, queries: float) -> float:
        """Route, search, merge and vote."""
        visits = queries * self.probes
        seconds = self.search_seconds(visits) + queries * self.c.vote_s
        seconds += visits * self.w.k * self.c.gather_s_per_neighbor
        return seconds + (self.assign_seconds(queries) if self.cells > 1 else 0.0)

    @property
    def search_constants(self) -> tuple[str, ...]:
        return (*self.index_constants, "gather_s_per_neighbor", "vote_s")

    @property
    def index_constants(self) -> tuple[str, ...]:
        if self.scann:
            return ("search_s", "search_s_per_dim", "search_s_per_row_dim", "open_s_per_byte")
        return ("gflops", "exact_efficiency", "assign_s_per_row")

    def stages(self) -> list[Stage]:
        found = [self.encode("encode", self.n), self.write_shards()]
        if self.cells > 1:
            found += [self.sample(), self.train(), self.assign()]
        found.append(self.build())
        if self.w.recall_queries and (self.cells > 1 or self.scann):
            found.append(self.recall())
        found.append(self.encode("encode queries", self.w.queries))
        return [*found, self.evaluate(), self.leave_one_out()]

    def write_shards(self) -> Stage:
        return Stage(
            "write shards",
            self.write_seconds(self.n, self.stored),
            tasks=self.shards,
            memory_bytes=self.shard_memory(),
            constants=(
                "shard_write_s_per_row",
                "shard_write_s_per_byte",
            ),
            written_bytes=self.stored,
            files_opened=self.shards,
        )

    def sample(self) -> Stage:
        """Every shard is read; a hash of the id says whether a row is chosen, and written."""
        return Stage(
            "sample",
            self.read_seconds() + self.n * self.c.sample_s_per_row,
            tasks=self.bundles,
            memory_bytes=self.shard_memory(),
            constants=("shard_read_s_per_row", "shard_read_s_per_byte", "sample_s_per_row"),
            read_bytes=self.stored,
            written_bytes=self.sampled * self.d * 4,
            files_opened=self.shards + 2 * self.bundles,
        )

    def train(self) -> Stage:
        """k-means on one worker: 20 rounds over 256 rows a cell, at least 20,000 in all."""
        return Stage(
            "train partitioner",
            partitioning.ITERATIONS * self.assign_seconds(self.sampled),
            tasks=1,
            memory_bytes=self.c.process_bytes + 16 * self.sampled * self.d,
            constants=("gflops", "exact_efficiency", "assign_s_per_row", "assign_s_per_cell"),
            read_bytes=self.sampled * self.d * 4,
            files_opened=2 * self.bundles,
        )

    def assign(self) -> Stage:
        """N*C*D*2 operations, and every row is written once more, cell by cell."""
        seconds = self.read_seconds() + self.assign_seconds(self.n)
        return Stage(
            "assign",
            seconds + self.assigned * self.c.move_s_per_byte,
            tasks=self.bundles,
            memory_bytes=self.shard_memory(),
            constants=("gflops", "exact_efficiency", "assign_s_per_row", "assign_s_per_cell"),
            read_bytes=self.stored,
            written_bytes=self.assigned,
            files_opened=self.shards + 2 * self.bundles,
        )

    def build(self) -> Stage:
        """Each partition by one core. It opens a file of every bundle of shards."""
        moved = self.assigned or self.stored
        index = self.cells * self.partition_bytes(self.mean_rows)
        seconds = moved * self.c.move_s_per_byte + index / self.c.file_hash_bytes_per_s
        names: tuple[str, ...] = ("move_s_per_byte", "file_hash_bytes_per_s")
        if self.cells == 1:
            seconds += self.read_seconds()
            names += (
                "shard_read_s_per_row",
                "shard_read_s_per_byte",
            )
        if self.scann:
            seconds += self.cells * self.scann_seconds(self.mean_rows)
            names += ("build_s", "build_s_per_sample_dim", "build_s_per_row_dim", "gflops")
        return Stage(
            "build index",
            seconds,
            tasks=self.cells,
            memory_bytes=self.build_memory(),
            constants=names,
            read_bytes=moved,
            written_bytes=index,
            files_opened=2 * self.cells * self.bundles if self.cells > 1 else self.shards,
        )

    def scann_seconds(self, rows: float) -> float:
        """A partition's codebook, from a sample; its leaves; each row's leaf and code."""
        leaves = math.sqrt(rows)
        looked_at = rows + _LEAF_ITERATIONS * self.leaf_sample(rows)
        seconds = self.c.build_s + self.exact_seconds(looked_at, leaves)
        seconds += min(rows, scann.CODEBOOK_SAMPLE) * self.d * self.c.build_s_per_sample_dim
        return seconds + rows * self.d * self.c.build_s_per_row_dim

    def leaf_sample(self, rows: float) -> float:
        """Rows that ScaNN's leaves are trained on."""
        return min(rows, max(scann.CODEBOOK_SAMPLE, scann.LEAF_SAMPLE * math.sqrt(rows)))

    def recall(self) -> Stage:
        """Every partition is searched for the same held-out queries, exactly and by its index."""
        visits = self.w.recall_queries * self.cells
        seconds = self.search_seconds(visits) + self.exact_seconds(visits, self.mean_rows)
        seconds += 2 * visits * self.c.assign_s_per_row + self.opening_seconds(self.cells)
        return Stage(
            "measure recall",
            seconds,
            tasks=self.cells,
            memory_bytes=self.search_memory(),
            constants=("gflops", "exact_efficiency", *self.index_constants),
            read_bytes=self.cells * self.partition_bytes(self.mean_rows),
            files_opened=10 * self.cells,
            shares_cores=True,
        )

    def evaluate(self) -> Stage:
        """Each partition that a query visits is opened by one worker."""
        touched = min(self.cells, self.w.queries * self.probes)
        return Stage(
            f"evaluate {self.w.queries:,} queries",
            self.answer_seconds(self.w.queries) + self.opening_seconds(touched),
            tasks=touched,
            memory_bytes=self.search_memory(),
            constants=self.search_constants,
            read_bytes=touched * self.partition_bytes(self.mean_rows),
            shuffle_bytes=self.visiting(self.w.queries),
            files_opened=10 * touched,
            shares_cores=True,
        )

    def leave_one_out(self) -> Stage:
        """Every partition for its own rows, then for the rows of others that visit it.

        N*P searches. What the visitors find is written, and read to be merged; so are
        the vectors that they bring along.
        """
        partial = 0.0
        visitors = 0.0
        index = self.cells * self.partition_bytes(self.mean_rows)
        if self.probes > 1:
            partial = self.n * self.probes * self.w.k * self.c.neighbor_bytes
            visitors = self.n * (self.probes - 1) * self.d * self.item_bytes
            index *= 2
        searches = self.n * self.probes
        seconds = self.search_seconds(searches)
        seconds += searches * self.w.k * self.c.score_s_per_neighbor
        seconds += self.opening_seconds(self.cells * (2 if self.probes > 1 else 1))
        seconds += self.assign_seconds(self.n) if self.cells > 1 else 0.0
        return Stage(
            "leave-one-out",
            seconds,
            tasks=self.cells,
            memory_bytes=self.search_memory(),
            constants=(*self.index_constants, "score_s_per_neighbor", "neighbor_bytes"),
            read_bytes=index + visitors + partial,
            written_bytes=visitors + partial,
            files_opened=20 * self.cells,
            shares_cores=True,
        )

    def visiting(self, queries: int) -> float:
        """Queries on their way to the partitions they visit, as float32, and the answers back.

        A neighbour is its id at four bytes a letter, a label and a distance.
        """
        answer = self.w.k * (4 * self.c.id_bytes + 12)
        return queries * self.probes * (4 * self.d + self.c.id_bytes + answer)
