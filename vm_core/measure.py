"""What a stage does, recorded where it happens: counts, times and sizes.

A function that decodes, searches or writes records under a short name (``decode_ms``).
Whoever runs the stage opens a Recorder around the call and passes on what it holds under
the stage's name (``embed_decode_ms``). Where nobody listens, nothing is recorded.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")


class Recorder:
    """What one call of a stage records, from all of its threads.

    stage: one lower-case word. shard: of which shard, partition or split the call is, for
    logs. counters: sums by name. values: every value of a distribution, by name. seconds:
    how long the recorder was active.
    """

    def __init__(self, stage: str, shard: int | str | None = None):
        self.stage, self.shard = stage, shard
        self.counters: Counter[str] = Counter()
        self.values: dict[str, list[int]] = {}
        self.seconds = 0.0
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """What this thread records meanwhile comes here; then again to whom it went before."""
        token, start = _CURRENT.set(self), time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - start
            _CURRENT.reset(token)

    def count(self, name: str, number: float) -> None:
        with self._lock:
            self.counters[name] += number  # type: ignore[assignment]  # times are floats

    def observe(self, name: str, value: int) -> None:
        with self._lock:
            self.values.setdefault(name, []).append(value)


_CURRENT: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def current() -> Recorder | None:
    """The recorder of the stage that this thread works for."""
    return _CURRENT.get()


def count(name: str, number: float = 1) -> None:
    """Adds to a counter of the current stage. The name ends in the unit: ``read_bytes``."""
    if recorder := _CURRENT.get():
        recorder.count(name, number)


def count_reuse(what: str, is_reused: bool) -> None:
    """Counts something that an earlier run, or a cache, had or had not: ``what``, in plural."""
    count(f"reused_{what}", int(is_reused))
    count(f"fresh_{what}", int(not is_reused))


def observe(name: str, value: int) -> None:
    """Adds a value to a distribution of the current stage; some per call, not per image."""
    if recorder := _CURRENT.get():
        recorder.observe(name, value)


@contextlib.contextmanager
def timed(name: str) -> Iterator[None]:
    """Adds the milliseconds that the block takes to a counter of the current stage."""
    recorder = _CURRENT.get()
    if recorder is None:
        yield
        return
    start = time.perf_counter()
    try:
        yield
    finally:
        recorder.count(name, 1e3 * (time.perf_counter() - start))


def carried(function: Callable[..., T]) -> Callable[..., T]:
    """The function as other threads may call it: what it records comes to this stage."""
    recorder = _CURRENT.get()

    def call(*arguments: object) -> T:
        token = _CURRENT.set(recorder)
        try:
            return function(*arguments)
        finally:
            _CURRENT.reset(token)

    return call
