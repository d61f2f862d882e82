"""Progress from the workers to the terminal that started them.

Beam shows a local run's counters when it is over. So workers on this machine, threads
or processes, also send a datagram for every batch to the terminal's socket, whose
address they find in the environment. Elsewhere there is no address and nothing is sent.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Iterator, Mapping

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

_VARIABLE = "VISUAL_MEMORY_PROGRESS"


def report(stage: str, count: int) -> None:
    """Tells the terminal, if one listens, that a stage has done ``count`` more items."""
    address = os.environ.get(_VARIABLE)
    if not address:
        return
    host, port = address.split(":")
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(json.dumps([stage, count]).encode(), (host, int(port)))


def is_heard() -> bool:
    """Whether this process works for a command that runs on this machine and shows progress."""
    return bool(os.environ.get(_VARIABLE))


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        elapsed = task.finished_time or task.elapsed or 0.0
        known = elapsed >= 1  # the clock starts when the first items are done
        return Text(f"{task.completed / elapsed:,.0f}/s" if known else "", style="cyan")


@contextlib.contextmanager
def display(stages: Mapping[str, int | None], console: Console | None = None) -> Iterator[None]:
    """Shows a bar per stage while the block runs.

    stages: the stage's name and its total number of items, None if not known.
    """
    console = console or Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description:<8}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        refresh_per_second=4,
    )
    tasks = {
        stage: progress.add_task(stage, total=total, start=False) for stage, total in stages.items()
    }
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    receiver.settimeout(0.05)
    finished = threading.Event()

    def listen() -> None:
        while True:
            try:
                stage, count = json.loads(receiver.recv(1024))
                task = tasks[stage]
                if not progress.tasks[task].started:
                    progress.start_task(task)
                progress.advance(task, count)
            except TimeoutError:
                if finished.is_set():
                    return
            except (ValueError, TypeError, KeyError):
                continue  # not from a worker of this run

    os.environ[_VARIABLE] = f"127.0.0.1:{receiver.getsockname()[1]}"
    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        with progress:
            try:
                yield
            finally:
                del os.environ[_VARIABLE]
                finished.set()
                listener.join()
            for task in progress.tasks:  # totals are estimates until all is done
                progress.update(task.id, total=task.completed)
    finally:
        receiver.close()
