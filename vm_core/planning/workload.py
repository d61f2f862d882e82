"""What a plan is asked for: how many items of what kind, indexed and searched how."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, field

from vm_core.errors import VisualMemoryError
from vm_core.index.scann import REORDER_BYTES, ReorderDtype
from vm_core.partitioning import Partitioning

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class Workload:
    """What is asked for.

    reorder: how ScaNN keeps the vectors that it re-ranks by. images_per_s: of the encoder,
    on one accelerator, or on one core if the worker has none; None: by ``encoder``.
    probes: cells that a query visits. leaves_to_search: of ScaNN, as its setting of that name.
    deadline_hours: for everything; None for none.
    """

    items: int
    dimension: int
    dtype: str = "float32"
    reorder: ReorderDtype = "float32"
    encoder: str | None = None
    images_per_s: float | None = None
    queries: int = 50_000
    k: int = 100
    partitioning: Partitioning = field(default_factory=Partitioning)
    probes: int = 3
    leaves_to_search: int = 0
    rows_per_shard: int = 50_000
    recall_queries: int = 1_000
    deadline_hours: float | None = None

    def __post_init__(self) -> None:
        for name in ("items", "dimension", "queries", "k", "probes", "rows_per_shard"):
            if not 1 <= getattr(self, name) < math.inf:
                raise VisualMemoryError(
                    f"{name} = {getattr(self, name)}: give a number of at least 1"
                )
        for name in ("recall_queries", "leaves_to_search"):
            if getattr(self, name) < 0:
                raise VisualMemoryError(f"{name} = {getattr(self, name)}: give 0 or more")
        for name, value in (
            ("images_per_s", self.images_per_s),
            ("deadline_hours", self.deadline_hours),
        ):
            if value is not None and not 0 < value < math.inf:
                raise VisualMemoryError(f"{name} = {value}: give a positive number")
        _check_name("dtype", self.dtype, ITEM_BYTES)
        _check_name("reorder", self.reorder, REORDER_BYTES)
        if self.encoder is not None and self.images_per_s is not None:
            raise VisualMemoryError(
                f"encoder {self.encoder!r} and images_per_s {self.images_per_s} both say how fast "
                "images are encoded. Give one of them"
            )


def _check_name(what: str, name: str, known: Collection[str]) -> None:
    if name not in known:
        raise VisualMemoryError(f"{what} {name!r} is unknown. Known: {', '.join(known)}")
