"""The peak of resident memory of any one process below this one."""

from __future__ import annotations

import threading
from types import TracebackType

import psutil


class PeakMemory:
    """Looks at this process and its children several times a second.

    bytes: the largest resident set of any of them so far; file pages that a process has
    mapped, as an opened partition's vectors, count in full.
    """

    def __init__(self, interval: float = 0.1):
        self.bytes = 0
        self._interval = interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        this = psutil.Process()
        while True:
            for process in [this, *this.children(recursive=True)]:
                try:
                    self.bytes = max(self.bytes, process.memory_info().rss)
                except psutil.Error:  # it ended meanwhile
                    continue
            if self._stop.wait(self._interval):
                return
