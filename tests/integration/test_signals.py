"""Ctrl-C and SIGTERM, at any time: one line, the right status, nothing half done."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.integration.harness import build_memory, configuration
from vm_core.memory import Memory

LINE = "stopped; a rerun goes on where this one was"
COMMAND = Path(sys.executable).with_name("visual-memory")


@pytest.fixture(scope="module")
def undisturbed(few_photos, small_encoder, tmp_path_factory) -> Memory:
    root = tmp_path_factory.mktemp("undisturbed") / "memory"
    return build_memory(
        configuration(str(root), small_encoder, {"kind": "folder", "path": few_photos})
    )


def run(arguments: list[str], seconds: float, number: int) -> subprocess.CompletedProcess:
    """A command that gets a signal after so many seconds, if it still runs."""
    process = subprocess.Popen(
        [str(COMMAND), *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def check(result: subprocess.CompletedProcess, number: int) -> bool:
    """Whether the signal came in time; then asserts how the command ended."""
    if result.returncode == 0:
        return False
    assert result.returncode == 128 + number, result.stderr
    assert result.stderr.strip().splitlines()[-1].endswith(LINE)
    assert "Traceback" not in result.stderr and "Error" not in result.stderr
    return True


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_that_is_stopped(undisturbed, few_photos, small_encoder, tmp_path, number):
    root = tmp_path / "memory"
    settings = configuration(str(root), small_encoder, {"kind": "folder", "path": few_photos})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings))
    times = random.Random(number)
    stopped = 0
    # The first ones come while the interpreter imports.
    for seconds in (0.15, 0.6, *(times.uniform(1, 8) for _ in range(2))):
        stopped += check(run(["build", "--config", str(path)], seconds, number), number)
        assert not list(tmp_path.rglob("*.incomplete-*"))
    assert stopped >= 2
    subprocess.run([str(COMMAND), "build", "--config", str(path)], check=True, timeout=120)
    rerun = Memory(str(root))
    assert rerun.manifest.content_digest == undisturbed.manifest.content_digest
    assert not (root / "work").exists() or not os.listdir(root / "work")


@pytest.mark.parametrize("seconds", [0.3, 4])
def test_other_commands_that_are_stopped(undisturbed, tmp_path, seconds):
    root = shutil.copytree(undisturbed.root, tmp_path / "memory")
    output = str(tmp_path / "out")
    for arguments in (
        ["evaluate", "--memory", str(root), "--leave-one-out", "--out", output],
        ["score", "--memory", str(root)],
        ["inspect", str(root), "--verify"],
    ):
        check(run(arguments, seconds, signal.SIGINT), signal.SIGINT)
        assert not list(tmp_path.rglob("*.incomplete-*"))


def test_what_reads_the_output_may_stop_reading(undisturbed):
    command = f"{COMMAND} inspect {undisturbed.root} --json | head -c 10 > /dev/null"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=60)
    assert done.stderr == ""
