"""Finds by measuring how much of an index to search, for a recall or a time that is asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import NamedTuple

import numpy as np

from vm_core.errors import VisualMemoryError
from vm_core.exact import top_k
from vm_core.held_out import beside
from vm_core.index import TopK

_DEPTH = 100
_QUERIES = 500
_REORDERS = (150, 400, 1000)
_RUNS, _ROUNDS = 3, 5


class Setting(NamedTuple):
    leaves: int
    reorder: int


class Measured(NamedTuple):
    """recall: of the 100 nearest, error: its standard error, milliseconds: a query."""

    setting: Setting
    recall: float
    error: float
    milliseconds: float

    def __str__(self) -> str:
        return (
            f"recall@{_DEPTH} {self.recall:.4f} (standard error {self.error:.4f}) in "
            f"{self.milliseconds:.3f} ms a query with leaves_to_search={self.setting.leaves}, "
            f"reorder={self.setting.reorder}"
        )


def tune(
    search: Callable[[Setting], TopK],
    vectors: np.ndarray,
    leaves: int,
    target: float | None,
    limit: float | None,
) -> Measured:
    """The fastest setting that surely reaches a target recall, within a limit of milliseconds;
    without a target the one that finds most within the limit.

    The ladder of settings goes up by half at a time, to all leaves. Raises
    VisualMemoryError if no setting will do.
    """
    chosen = np.random.default_rng(0).choice(
        len(vectors), min(_QUERIES, len(vectors)), replace=False
    )
    queries = beside(vectors, np.sort(chosen))
    farthest = top_k(queries, vectors, _DEPTH)[1][:, -1:]

    def run(setting: Setting) -> tuple[np.ndarray, float]:
        start = time.perf_counter()
        _, distances = search(setting)(queries, _DEPTH)
        return distances, (time.perf_counter() - start) * 1000 / len(queries)

    def measure(setting: Setting) -> Measured:
        runs = [run(setting) for _ in range(_RUNS)]
        # By distance, as of equally distant rows either will do; they are rounded apart.
        recalls = (runs[0][0] <= farthest + 1e-6).mean(axis=1)
        error = float(recalls.std() / np.sqrt(len(recalls)))
        return Measured(setting, float(recalls.mean()), error, median(ms for _, ms in runs))

    tried, good = [], []
    for reorder in _REORDERS:
        for step in _ladder(leaves):
            tried.append(measure(Setting(step, reorder)))
            if limit is not None and tried[-1].milliseconds > limit:
                break
            if target is None or tried[-1].recall - tried[-1].error >= target:
                good.append(tried[-1])
                if target is not None:
                    break
    if not good:
        raise VisualMemoryError(_failure(tried, target, limit))
    if target is None:
        return max(good, key=lambda each: (each.recall, -each.milliseconds))
    # In turn, so that a load from outside slows all of them.
    rounds = [[run(each.setting)[1] for each in good] for _ in range(_ROUNDS)]
    times = [median(of_one) for of_one in zip(*rounds, strict=True)]
    timed = [each._replace(milliseconds=ms) for each, ms in zip(good, times, strict=True)]
    return min(timed, key=lambda each: each.milliseconds)


def _ladder(leaves: int) -> Iterator[int]:
    step = 1
    while step < leaves:
        yield step
        step += -(-step // 2)
    yield leaves


def _failure(tried: list[Measured], target: float | None, limit: float | None) -> str:
    if target is None:
        quickest = min(tried, key=lambda each: each.milliseconds)
        return (
            f"index.maximum_milliseconds = {limit}: the quickest search found has {quickest}. "
            "Allow more time, or make smaller partitions"
        )
    best = max(tried, key=lambda each: each.recall)
    within = "" if limit is None else f" within maximum_milliseconds = {limit}"
    return (
        f"index.target_recall = {target} is not reached by a standard error{within}; the best "
        f"found has {best}. Lower the target, allow more time or bytes (reorder_dtype=float32, "
        "fewer dimensions_per_block), or use index.kind = exact"
    )
