"""A Flink cluster on this machine: it starts, says what runs, notices a loss, and ends."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest

from tests.integration import clusters
from tests.integration.harness import REPOSITORY


def flink(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["scripts/flink", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.cluster
def test_a_cluster_from_start_to_stop(tmp_path):
    with clusters.flink_cluster(tmp_path, managers=2) as environment:
        said = flink("status", **environment).stdout
        assert "2 TaskManagers, 2 of 2 slots free, 0 jobs running" in said
        for name in ("jobmanager", "taskmanager-1", "taskmanager-2", "workers"):
            assert f"{name}: process " in said
        again = flink("start", **environment)
        assert again.returncode == 2 and "a cluster is running already" in again.stderr
        lost = int((tmp_path / "taskmanager-1.pid").read_text())
        os.kill(lost, signal.SIGKILL)
        clusters.wait_for(
            lambda: "taskmanager-1: ended" in flink("status", **environment).stdout,
            "the lost TaskManager to be noticed",
            every=0.5,
        )
        assert "taskmanager-2: process" in flink("status", **environment).stdout
        stopped = flink("stop", **environment)
        assert "stopped jobmanager" in stopped.stdout
        gone = flink("status", **environment)
        assert gone.returncode == 1 and "nothing runs" in gone.stdout


def test_what_cannot_be_done_is_said(tmp_path):
    state = {"FLINK_STATE": str(tmp_path)}
    refused = flink("start", "none", **state)
    assert refused.returncode == 2 and "none TaskManagers cannot be started" in refused.stderr
    idle = flink("submit", "build", **state)
    assert idle.returncode == 2
    assert "no cluster runs" in idle.stderr or "no java" in idle.stderr
    missing = flink("job-server", JOB_SERVER="/nowhere/jar", **state)
    assert missing.returncode == 2 and "JOB_SERVER=/nowhere/jar does not exist" in missing.stderr
    assert "scripts/flink start [N]" in flink("--help").stdout
