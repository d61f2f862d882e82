"""What things cost: the constants of the planner, where each comes from, and their file.

``python -m benchmarks.calibrate`` measures them and writes a file; DEFAULT has what it
measured on the machine that its ``machine`` describes, and assumptions for the rest.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from vm_core import storage
from vm_core.errors import VisualMemoryError

ENCODER_GFLOP = {
    "efficientnet-lite0": 0.81,
    "dinov2-s14": 11.0,
    "dinov2-b14": 46.0,
    "dinov2-l14": 162.0,
    "dinov2-g14": 580.0,
    "clip-b32": 8.8,
    "clip-b16": 35.0,
    "clip-l14": 162.0,
}
"""Billions of operations for one image of 224 x 224 (two per multiply-add), by encoder."""


@dataclass(frozen=True)
class Constants:
    """Rates and costs. Seconds are those of one core unless said otherwise.

    measured: names of the constants that were measured, on ``machine``; all others are
    assumptions. encoder_images_per_s: of one core, by encoder, without decoding.
    """

    machine: str
    measured: frozenset[str] = frozenset()
    gflops: float = 90.0  # of a float32 matrix product
    scaling: float = 0.6  # what all cores do together, as a share of so many times one alone
    shard_write_s_per_row: float = 2e-6  # serialising
    shard_write_s_per_byte: float = 3e-9  # and hashing
    shard_read_s_per_row: float = 1e-6  # parsing
    shard_read_s_per_byte: float = 1e-9  # and checking
    disk_read_bytes_per_s: float = 1e9  # of the worker: its own disk
    disk_write_bytes_per_s: float = 5e8
    file_hash_bytes_per_s: float = 1e9  # SHA-256 of the finished index
    sample_s_per_row: float = 2e-6  # whether a row trains the partitioner
    assign_s_per_row: float = 3e-5  # to a cell: ranking its candidates
    assign_s_per_cell: float = 5e-9  # to a cell: each centroid compared
    move_s_per_byte: float = 1e-9  # of a row on its way from a shard to its partition
    build_s: float = 0.1  # ScaNN, each partition
    build_s_per_sample_dim: float = 4e-7  # ScaNN, each row that the codebook is learnt from
    build_s_per_row_dim: float = 2e-7  # ScaNN, each row and dimension
    open_s_per_byte: float = 1e-9  # ScaNN, its files into memory
    search_s: float = 3e-5  # ScaNN, each query and partition
    search_s_per_dim: float = 1e-7
    search_s_per_row_dim: float = 3.3e-11  # for each row in the leaves searched
    exact_efficiency: float = 0.7  # of exact search in float32, against the matrix product
    gather_s_per_neighbor: float = 2e-7  # look up, merge and write what a partition found
    score_s_per_neighbor: float = 2.5e-7  # leave-one-out: write, merge, add up what was found
    vote_s: float = 1.4e-5  # each query, four voters, every k up to 100
    decode_bytes_per_s: float = 2e7  # of JPEG, to the encoder's pixels
    encoder_images_per_s: Mapping[str, float] = field(default_factory=dict)
    encoder_efficiency: float = 0.5  # of an encoder on a core, against the matrix product
    accelerator_efficiency: float = 0.3  # of an encoder, against the accelerator's peak
    image_bytes: float = 110_000.0  # an ImageNet photo
    id_bytes: float = 40.0
    record_bytes: float = 150.0  # of a shard's row beside vector and id
    row_bytes: float = 10.0  # of rows.parquet beside the id
    assigned_bytes: float = 24.0  # of a row on its way to its partition, beside vector and id
    neighbor_bytes: float = 13.0
    process_bytes: float = 7e8  # Python, TensorFlow and ScaNN before any data
    working_bytes: float = 5e7  # of such a process: blocks on their way
    python_row_bytes: float = 150.0  # of a row's id, label and number in memory
    build_copies: float = 1.7  # of all vectors as float32 while ScaNN builds
    sample_copies: float = 2.0  # of those of them that ScaNN trains on


_NOT_NUMBERS = {"machine", "measured", "encoder_images_per_s"}
# An intercept may well be zero; what is divided by may not.
_MAY_BE_ZERO = {field.name for field in fields(Constants) if "_s_per_" in field.name} | {
    "build_s",
    "search_s",
}


def save(path: str, constants: Constants) -> None:
    """Writes the measured constants as JSON; what is not measured keeps its default."""
    values = {name: getattr(constants, name) for name in sorted(constants.measured)}
    text = json.dumps({"machine": constants.machine, "measured": values}, indent=1)
    storage.write_bytes(path, (text + "\n").encode())


def load(path: str) -> Constants:
    """The constants of a calibration file. Raises VisualMemoryError if it is not one."""
    if not storage.exists(path):
        raise VisualMemoryError(
            f"calibration {path}: no such file. Measure one with "
            f"python -m benchmarks.calibrate --out {path}, or leave the option out"
        )
    try:
        content = json.loads(storage.read_bytes(path))
        machine, values = str(content["machine"]), dict(content["measured"])
    except (ValueError, KeyError, TypeError) as error:
        raise VisualMemoryError(
            f"calibration {path} is not what benchmarks.calibrate writes ({error!r}). Measure anew"
        ) from None
    return from_measured(machine, values, path)


def from_measured(machine: str, values: Mapping[str, Any], origin: str) -> Constants:
    """Constants with measured values in place of the assumptions. Raises VisualMemoryError."""
    known = {each.name for each in fields(Constants)} - {"machine", "measured"}
    if unknown := sorted(values.keys() - known):
        raise VisualMemoryError(
            f"{origin}: unknown constants {', '.join(unknown)}. Known: {', '.join(sorted(known))}"
        )
    rates = values.get("encoder_images_per_s", {})
    if not isinstance(rates, Mapping):
        raise VisualMemoryError(f"{origin}: encoder_images_per_s = {rates!r} is no table of rates")
    numbers = {name: value for name, value in values.items() if name not in _NOT_NUMBERS}
    for name, value in [*numbers.items(), *rates.items()]:
        is_number = isinstance(value, int | float) and math.isfinite(value)
        if not is_number or value < 0 or (value == 0 and name not in _MAY_BE_ZERO):
            raise VisualMemoryError(f"{origin}: {name} = {value!r} is no positive number")
    # The default's encoders ran on another machine: they are not mixed in.
    base = Constants(machine=machine, measured=frozenset(values))
    return dataclasses.replace(base, **values)


DEFAULT = from_measured(
    "2 virtual cores of a cloud machine (x86-64, AMD EPYC, AVX-512, 25 GB)",
    {
        "assign_s_per_cell": 7.003e-09,
        "assign_s_per_row": 5.002e-07,
        "build_s": 0.0,
        "build_s_per_row_dim": 1.582e-07,
        "build_s_per_sample_dim": 3.083e-07,
        "decode_bytes_per_s": 19500000.0,
        "disk_read_bytes_per_s": 1765000000.0,
        "disk_write_bytes_per_s": 1618000000.0,
        "encoder_images_per_s": {"efficientnet-lite0": 86.52},
        "exact_efficiency": 0.7734,
        "file_hash_bytes_per_s": 1663000000.0,
        "gather_s_per_neighbor": 6.673e-07,
        "gflops": 103.0,
        "move_s_per_byte": 9.479e-10,
        "open_s_per_byte": 1.313e-09,
        "process_bytes": 710500000.0,
        "record_bytes": 140.9,
        "row_bytes": 1.228,
        "sample_s_per_row": 1.686e-06,
        "scaling": 0.9797,
        "score_s_per_neighbor": 1.391e-07,
        "search_s": 2.224e-05,
        "search_s_per_dim": 6.215e-08,
        "search_s_per_row_dim": 2.197e-11,
        "shard_read_s_per_byte": 4.235e-10,
        "shard_read_s_per_row": 1.013e-06,
        "shard_write_s_per_byte": 1.137e-09,
        "shard_write_s_per_row": 3.145e-06,
        "vote_s": 5.949e-06,
    },
    "the built-in calibration",
)
"""What benchmarks.calibrate measured on the machine it names, nothing else running."""
