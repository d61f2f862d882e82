"""Ctrl-C and SIGTERM end a command at once: one line, and nothing half done is left.

Imports only what a fresh interpreter has, so that it is there before the slow imports.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_LINE = "stopped; a rerun goes on where this one was\n"


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Handles the signals during the block. Outside of the main thread nothing is changed."""
    try:
        before = [(number, signal.signal(number, _stop)) for number in _SIGNALS]
    except ValueError:
        before = []
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)


def _stop(number: int, frame: FrameType | None) -> None:
    for each in _SIGNALS:  # a second one ends what this one is about to do
        signal.signal(each, lambda number, _: os._exit(128 + number))
    for process in _descendants(os.getpid()):
        with contextlib.suppress(OSError):
            os.kill(process, signal.SIGKILL)
    # Only if it was imported: there is nothing to remove otherwise.
    local = sys.modules.get("vm_core.stores.local")
    if local is not None:
        local.remove_temporaries()
    with contextlib.suppress(OSError):
        if sys.stderr is not None and os.isatty(2):
            os.write(2, b"\r\x1b[0J\x1b[?25h")  # a progress bar hides the cursor
        os.write(2, _LINE.encode())
    os._exit(128 + number)


def _descendants(process: int) -> list[int]:
    """All processes below one, children first; empty where the system does not tell."""
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{process}/task"):
            with open(f"/proc/{process}/task/{thread}/children") as file:
                for child in map(int, file.read().split()):
                    found += [child, *_descendants(child)]
    return found
