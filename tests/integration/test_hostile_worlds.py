"""Full disks, missing rights, things that are no files: one line that says what to do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.integration.harness import build_memory, configuration
from vm_core.memory import Memory

COMMAND = Path(sys.executable).with_name("visual-memory")


def run(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [str(COMMAND), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def is_one_error(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in done.stderr, done.stderr
    for part in parts:
        assert part in done.stderr, done.stderr


@pytest.fixture(scope="module")
def memory(few_photos, small_encoder, tmp_path_factory) -> Memory:
    root = tmp_path_factory.mktemp("worlds") / "memory"
    source = {"kind": "folder", "path": few_photos}
    return build_memory(configuration(str(root), small_encoder, source))


@pytest.fixture
def config(few_photos, small_encoder, tmp_path) -> Path:
    source = {"kind": "folder", "path": few_photos}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(configuration("unset", small_encoder, source)))
    return path


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of a few kilobytes; skips where that is not allowed."""
    mounted = []

    def make(kilobytes: int) -> Path:
        folder = tmp_path / f"disk-{kilobytes}"
        folder.mkdir()
        options = ["-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
        if subprocess.run(["mount", *options], capture_output=True).returncode:
            pytest.skip("no right to mount")
        mounted.append(folder)
        return folder

    yield make
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("kilobytes", [8, 48, 96])
def test_a_disk_that_is_full(config, small_disk, kilobytes):
    disk = small_disk(kilobytes)
    done = run("build", "--config", config, "--set", f"memory={disk}/memory")
    is_one_error(done, "No space left on device", "Free some space")
    assert not list(disk.rglob("*.incomplete-*"))
    subprocess.run(["mount", "-o", "remount,size=50m", str(disk)], check=True)
    assert run("build", "--config", config, "--set", f"memory={disk}/memory").returncode == 0


def test_a_disk_that_fills_up_with_results(memory, small_disk):
    disk = small_disk(32)
    done = run("evaluate", "--memory", memory.root, "--leave-one-out", "--out", disk / "out")
    is_one_error(done, "No space left on device")


def test_a_disk_that_is_read_only(config, small_disk, memory):
    disk = small_disk(5_000)
    shutil.copytree(memory.root, disk / "memory")
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    done = run("build", "--config", config, "--set", f"memory={disk}/other")
    is_one_error(done, "Read-only file system")
    is_one_error(run("score", "--memory", disk / "memory"), "Read-only file system")
    done = run("inspect", disk / "memory", "--verify")
    assert done.returncode == 0 and "are as they were written" in done.stdout


@pytest.mark.parametrize(
    "arguments, cause",
    [
        (["--k", "1000000000"], "k = 1000000000 is not from 1 to 10000"),
        (["--k", "-1"], "k = -1 is not from 1 to 10000"),
        (["--k", "0"], "k = 0 is not from 1 to 10000"),
    ],
)
def test_numbers_of_neighbours(memory, few_photos, arguments, cause):
    image = next(Path(few_photos).glob("*/*"))
    is_one_error(run("classify", image, "--memory", memory.root, *arguments), cause)


def test_things_that_are_no_files(memory, config, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    is_one_error(run("build", "--config", tmp_path / "pipe"), "not a regular file")
    is_one_error(run("build", "--config", tmp_path), "does not exist")
    rows = f"path,label\n{tmp_path}/pipe,a\n/dev/zero,b\nhttp://127.0.0.1:9/x,c\n"
    (tmp_path / "list.csv").write_text(rows)
    source = {"kind": "manifest", "path": str(tmp_path / "list.csv")}
    done = run(
        *("build", "--config", config, "--set", f"memory={tmp_path}/memory"),
        *("--set", f"sources=[{source}]"),
    )
    is_one_error(done, "3 of 3 images (100.0%) are unusable", "not a regular file", "only local")


def test_names_that_steer_a_terminal(small_encoder, few_photos, tmp_path):
    images = tmp_path / "images" / "\x1b[2Jclear\x07"
    images.mkdir(parents=True)
    for number, photo in enumerate(sorted(Path(few_photos).glob("*/*"))[:4]):
        shutil.copy(photo, images / f"=cmd{number}\x1b]0;x.png")
    (images / "b\xff\x1b[31m.png").write_bytes(b"broken")
    path = tmp_path / "config.yaml"
    source = {"kind": "folder", "path": str(tmp_path / "images")}
    settings = configuration(str(tmp_path / "memory"), small_encoder, source)
    path.write_text(yaml.safe_dump({**settings, "max_failure_share": 0.5}))
    done = run("build", "--config", path)
    assert done.returncode == 0, done.stderr
    shown = run("inspect", tmp_path / "memory")
    assert r"\x1b[2Jc" in shown.stdout
    for output in (done, shown):
        assert "\x1b[2J" not in output.stdout + output.stderr
        assert "\x07" not in output.stdout + output.stderr
