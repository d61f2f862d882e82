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
        *(
            "CURRENT",
            "builds/0000000000000001/a",
            "builds/abadcafe00000001/shard",
            "weights/000000000000000a/p.parquet",
        ),
        *(
            "work/0000000000000002/split.arrow",
            "work/index-00000000000f/a.arrow",
            "builds/0000000000000001/b.incomplete-000000000001",
        ),
        *(
            "builds/abadcafe00000001/c.incomplete-000000000002",
            ".writable.incomplete-000000000003",
            "scores/s/scores.json",
        ),
    ]
    for name in names:
        storage.write_bytes(str(tmp_path / name), b"12345")
    storage.write_bytes(
        str(tmp_path / "versions" / "000001.json"), b'{"x": "builds/0000000000000001/a"}'
    )
    old = time.time() - 48 * 3600
    for folder, _, files in os.walk(tmp_path, topdown=False):
        for path in [*(os.path.join(folder, file) for file in files), folder]:
            os.utime(path, (old, old))
    return str(tmp_path)


DONE, INDEX = "work/0000000000000002", "work/index-00000000000f"
LEFT = [
    ".writable.incomplete-000000000003",
    "builds/0000000000000001/b.incomplete-000000000001",
    "builds/abadcafe00000001",
    "weights/000000000000000a",
    DONE,
    INDEX,
]


def test_what_no_version_and_no_run_needs_is_found_and_removed(memory):
    found = leftovers.find(memory)
    assert [left.path.removeprefix(f"{memory}/") for left in found] == LEFT
    assert [left.bytes for left in found] == [5, 5, 10, 5, 5, 5]
    assert all(47 < left.hours < 49 for left in found)
    assert leftovers.find(memory, grace_hours=49) == []
    leftovers.remove(found)
    kept = [file.path.removeprefix(f"{memory}/") for file in storage.walk(memory)]
    assert kept == [
        "CURRENT",
        "builds/0000000000000001/a",
        "scores/s/scores.json",
        "versions/000001.json",
    ]
    assert leftovers.find(memory, 0) == []


def test_what_was_written_to_lately_is_not_left(memory):
    storage.write_bytes(f"{memory}/{DONE}/new", b"x")
    paths = [left.path for left in leftovers.find(memory, 1)]
    assert f"{memory}/{DONE}" not in paths and f"{memory}/{INDEX}" in paths


def test_what_a_run_holds_is_not_left(memory):
    with storage.exclusive(f"{memory}/{DONE}.lock", "at it"):
        paths = [left.path for left in leftovers.find(memory)]
    assert f"{memory}/{DONE}" not in paths and f"{memory}/{INDEX}" in paths
    assert len(leftovers.find(memory)) == len(LEFT)


def test_what_is_not_the_memory_s_own_is_left_alone(memory, tmp_path):
    """A folder of a project, given by mistake, has such names, too."""
    for name in ("builds/debug/a.o", "work/thesis/text", "weights/resnet/w", "a.incomplete-draft"):
        storage.write_bytes(f"{memory}/{name}", b"important")
        for path in (f"{memory}/{name}", f"{memory}/{os.path.dirname(name)}"):
            os.utime(path, (1, 1))
    (tmp_path / "work" / "00000000000000aa").symlink_to(tmp_path / "scores")
    assert [left.path.removeprefix(f"{memory}/") for left in leftovers.find(memory, 0)] == LEFT


def test_looking_for_leftovers_changes_nothing(memory):
    before = [(file, os.stat(file.path).st_mtime_ns) for file in storage.walk(memory)]
    leftovers.find(memory, 0)
    assert [(file, os.stat(file.path).st_mtime_ns) for file in storage.walk(memory)] == before


def test_errors_inside_the_block_are_not_about_the_lock(tmp_path):
    with pytest.raises(OSError, match="^disk$"), storage.exclusive(str(tmp_path / "l"), "at it"):
        raise OSError("disk")
    assert os.listdir(tmp_path) == []


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
        assert storage.is_locked(path)
    assert os.listdir(tmp_path / "a") == []


def test_the_lock_of_a_killed_run_is_free(tmp_path):
    path = str(tmp_path / "lock")
    process = holder(path, 60)
    process.kill()
    process.wait()
    assert not storage.is_locked(path)
    with storage.exclusive(path, "at it"):
        pass
    assert os.listdir(tmp_path) == []


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
