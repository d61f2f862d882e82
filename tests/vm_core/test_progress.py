"""Progress: what workers report arrives at the terminal."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import threading

import pytest
from rich.console import Console

from vm_core import progress


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=120)


def test_threads_and_processes_are_counted(console):
    with progress.display({"encode": 1000, "write": 7}, console):
        workers = [
            threading.Thread(target=lambda: [progress.report("encode", 5) for _ in range(20)])
            for _ in range(4)
        ]
        for worker in workers:
            worker.start()
        script = "from vm_core.progress import report; report('encode', 3); report('write', 7)"
        subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
        for worker in workers:
            worker.join()
    shown = console.file.getvalue()
    assert "403/403" in shown  # the total was an estimate, and ends as what was done
    assert "7/7" in shown


def test_other_senders_do_no_harm(console):
    with progress.display({"encode": None}, console):
        host, port = os.environ["VISUAL_MEMORY_PROGRESS"].split(":")
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            for data in (
                b"",
                b"\xff",
                b"5",
                b"[1]",
                b"[[], 1]",
                b'["encode", "x"]',
                b'["what", 1]',
            ):
                sender.sendto(data, (host, int(port)))
        progress.report("encode", 11)
        progress.report("unheard of", 1)
    assert "11/11" in console.file.getvalue()


def test_nobody_listens():
    assert "VISUAL_MEMORY_PROGRESS" not in os.environ
    progress.report("encode", 1)


def test_a_terminal_that_is_gone_stops_no_worker(monkeypatch):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    monkeypatch.setenv("VISUAL_MEMORY_PROGRESS", f"127.0.0.1:{port}")
    for _ in range(3):
        progress.report("encode", 1)


def test_an_error_passes_and_nothing_stays(console):
    before = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError), progress.display({"encode": 10}, console):
        progress.report("encode", 1)
        1 / 0  # noqa: B018
    assert "VISUAL_MEMORY_PROGRESS" not in os.environ
    # Threads of other tests may end meanwhile; none may have come.
    for thread in set(threading.enumerate()) - before:
        thread.join(timeout=10)
        assert not thread.is_alive(), f"{thread.name} is still running"
