import os
import subprocess
import sys
import time

import pytest

from vm_core import leftovers, storage


@pytest.fixture
def memory(tmp_path) -> str:
    """A memory with what runs may leave behind; everything is two days old."""
    names = [
        *("CURRENT", "builds/named/a", "builds/abandoned/shard", "weights/old/p.parquet"),
        *("work/done/split.arrow", "work/index-1/a.arrow", "builds/named/b.incomplete-1"),
        *("builds/abandoned/c.incomplete-2", ".writable.incomplete-3", "scores/s/scores.json"),
    ]
    for name in names:
        storage.write_bytes(str(tmp_path / name), b"12345")
    storage.write_bytes(str(tmp_path / "versions" / "000001.json"), b'{"x": "builds/named/a"}')
    old = time.time() - 48 * 3600
    for folder, _, files in os.walk(tmp_path, topdown=False):
        for path in [*(os.path.join(folder, file) for file in files), folder]:
            os.utime(path, (old, old))
    return str(tmp_path)


LEFT = [
    *(".writable.incomplete-3", "builds/abandoned", "builds/named/b.incomplete-1"),
    *("weights/old", "work/done", "work/index-1"),
]


def test_what_no_version_and_no_run_needs_is_found_and_removed(memory):
    found = leftovers.find(memory)
    assert [left.path.removeprefix(f"{memory}/") for left in found] == LEFT
    assert [left.bytes for left in found] == [5, 10, 5, 5, 5, 5]
    assert all(47 < left.hours < 49 for left in found)
    assert leftovers.find(memory, grace_hours=49) == []
    leftovers.remove(found)
    kept = [file.path.removeprefix(f"{memory}/") for file in storage.walk(memory)]
    assert kept == ["CURRENT", "builds/named/a", "scores/s/scores.json", "versions/000001.json"]
    assert leftovers.find(memory, 0) == []


def test_what_was_written_to_lately_is_not_left(memory):
    storage.write_bytes(f"{memory}/work/done/new", b"x")
    paths = [left.path for left in leftovers.find(memory, 1)]
    assert f"{memory}/work/done" not in paths and f"{memory}/work/index-1" in paths


def test_what_a_run_holds_is_not_left(memory):
    with storage.exclusive(f"{memory}/work/done.lock", "at it"):
        paths = [left.path for left in leftovers.find(memory)]
    assert f"{memory}/work/done" not in paths and f"{memory}/work/index-1" in paths
    assert len(leftovers.find(memory)) == len(LEFT)


def test_stores_without_folders_have_none(bucket, tmp_path):
    assert leftovers.find(f"{bucket}/memory") == []
    assert leftovers.find(str(tmp_path / "none")) == []


HOLD = """
import sys, time
from vm_core import storage
with storage.exclusive(sys.argv[1], "at it"):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def holder(path: str, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", HOLD, path, str(seconds)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_one_run_at_a_time(tmp_path, caplog):
    path = str(tmp_path / "a" / "lock")
    process = holder(path, 1)
    start = time.monotonic()
    with storage.exclusive(path, "at it"):
        assert time.monotonic() - start > 0.5
        assert "another run is at it: waiting for it to end" in caplog.text
        assert process.wait(10) == 0
        with storage.try_lock(path) as free:
            assert not free
    assert os.listdir(tmp_path / "a") == []


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    path = str(tmp_path / "lock")
    process = holder(path, 60)
    process.kill()
    process.wait()
    with storage.try_lock(path) as free:
        assert free


def test_many_at_the_same_time(tmp_path):
    """Each adds one to a file; the lock file comes and goes."""
    code = """
import sys
from vm_core import storage
for _ in range(30):
    with storage.exclusive(sys.argv[1] + "/lock", "adding"):
        number = int(storage.read_if_exists(sys.argv[1] + "/n") or 0)
        storage.write_bytes(sys.argv[1] + "/n", str(number + 1).encode())
"""
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path)]) for _ in range(4)]
    assert [process.wait(60) for process in running] == [0] * 4
    assert storage.read_bytes(str(tmp_path / "n")) == b"120"
    assert os.listdir(tmp_path) == ["n"]
