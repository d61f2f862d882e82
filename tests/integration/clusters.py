"""Runners that are programs of their own; a test that cannot have one is skipped."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.harness import REPOSITORY

_POOL = "apache_beam.runners.worker.worker_pool_main"
_TOOLS = {"VIRTUAL_ENV": sys.prefix}


def prism() -> list[str]:
    """Options for Prism, which Go builds where it was not built yet."""
    if not shutil.which("go") and "PRISM" not in os.environ:
        pytest.skip("Prism needs Go to be built, and there is no go on PATH")
    done = _run("scripts/prism", "--path", timeout=900)
    if done.returncode:
        pytest.skip(f"Prism is not to be had: {done.stderr.strip()}")
    return ["--runner=PrismRunner", f"--prism_location={done.stdout.strip()}"]


def flink(port: int, parallelism: int = 2) -> list[str]:
    """Options for a cluster of ``flink_cluster``."""
    done = _run("scripts/flink", "job-server", timeout=600)
    if done.returncode:
        pytest.skip(f"Beam's job server for Flink is not to be had: {done.stderr.strip()}")
    return [
        "--runner=FlinkRunner",
        f"--flink_master=localhost:{port}",
        "--flink_version=1.20",
        f"--flink_job_server_jar={done.stdout.strip()}",
        f"--parallelism={parallelism}",
    ]


@contextlib.contextmanager
def flink_cluster(folder: Path, managers: int = 2) -> Iterator[dict[str, str]]:
    """A cluster with a pool of Python workers; yields the environment of scripts/flink."""
    if not shutil.which("java"):
        pytest.skip("Flink needs Java, and there is no java on PATH")
    environment = {
        **_TOOLS,
        "FLINK_STATE": str(folder),
        "REST_PORT": str(free_port()),
        "POOL_PORT": str(free_port()),
        "RPC_PORT": str(free_port()),
    }
    try:
        started = _run("scripts/flink", "start", str(managers), timeout=600, **environment)
        if "cannot fetch" in started.stderr:
            pytest.skip(f"Flink is not to be had: {started.stderr.strip()}")
        assert started.returncode == 0, started.stderr
        yield environment
    finally:
        _run("scripts/flink", "stop", timeout=60, **environment)


class WorkerPool:
    """Starts Python workers, each a process of its own, for runners that ask for some."""

    def __init__(self) -> None:
        self.port = free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", _POOL, f"--service_port={self.port}"],
            cwd=REPOSITORY,
            # It starts the first python on PATH.
            env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            stderr=subprocess.DEVNULL,
        )
        wait_for(lambda: _listens(self.port), "the pool of workers to listen")

    @property
    def options(self) -> list[str]:
        return ["--environment_type=EXTERNAL", f"--environment_config=localhost:{self.port}"]

    def workers(self) -> list[int]:
        """Process ids of the workers that run."""
        return children(self._process.pid)

    def close(self) -> None:
        for worker in self.workers():
            os.kill(worker, signal.SIGKILL)
        self._process.kill()
        self._process.wait()


def children(process: int) -> list[int]:
    """Process ids of what a process has started and what still runs."""
    found = subprocess.run(["pgrep", "-P", str(process)], capture_output=True, text=True)
    return [int(line) for line in found.stdout.split()]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def wait_for(condition, what: str, seconds: float = 120, every: float = 0.02) -> None:
    """Waits until a condition holds; fails the test if it never does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(f"waited {seconds} s for {what}")
        time.sleep(every)


def _listens(port: int) -> bool:
    with socket.socket() as one:
        return one.connect_ex(("localhost", port)) == 0


def _run(*command: str, timeout: float, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**os.environ, **_TOOLS, **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
