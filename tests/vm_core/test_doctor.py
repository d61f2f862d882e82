"""The doctor's checks, each with what it is meant to find really there."""

from __future__ import annotations

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from vm_core import doctor, encoders, storage
from vm_core.errors import VisualMemoryError
from vm_core.planning.workload import Workload


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Puts a program on an otherwise empty PATH that prints some text on standard error."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.delenv("JAVA_HOME", raising=False)

    def put(name: str, text: str, stream: int = 2) -> None:
        path = folder / name
        path.write_text(f"#!/bin/sh\n/bin/cat >&{stream} <<'END'\n{text}\nEND\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return put


def installed(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_this_environment_is_fit():
    for check in (doctor.python(), doctor.versions(), doctor.limits()):
        assert check.state == "ok", check
    assert "scann 1.4.2" in doctor.versions().found


def test_a_check_that_fails_is_a_problem_and_the_others_go_on():
    def broken():
        raise OSError("no such device")

    def unfit():
        raise VisualMemoryError("what is wrong. What to do")

    results = doctor.examine({"one": broken, "two": unfit, "three": doctor.python})
    assert [(check.name, check.state) for check in results] == [
        ("one", "problem"),
        ("two", "problem"),
        ("three", "ok"),
    ]
    assert results[0].found == "OSError: no such device"
    assert results[1].found == "what is wrong. What to do"
    assert doctor.has_problem(results) and not doctor.has_problem(results[2:])


def test_releases_that_do_not_agree(tmp_path, monkeypatch):
    installed(tmp_path, "setuptools", "81.0.0")
    installed(tmp_path, "tensorflow", "2.21.0")
    installed(tmp_path, "tensorflow_text", "2.21.0")
    monkeypatch.syspath_prepend(str(tmp_path))
    check = doctor.versions()
    assert check.state == "problem"
    assert "setuptools 81.0.0, not <81: tensorflow-hub imports pkg_resources" in check.found
    assert "tensorflow 2.21.0, not ==2.20.*: scann 1.4.2 needs" in check.found
    assert check.remedy.startswith("pip install ") and "'setuptools<81'" in check.remedy
    assert "'tensorflow-text==2.20.*'" in check.remedy  # of an extra, and installed


def test_packages_that_are_missing():
    check = doctor.versions(["no-such-package>=2", 'none-either; extra == "dev"'])
    assert check.state == "problem"
    assert check.found == "no-such-package is not installed"
    assert check.remedy == "pip install 'no-such-package>=2'"


@pytest.mark.parametrize(
    "text, found",
    [
        ("raise ImportError('undefined symbol: _ZN10')", "scann: ImportError: undefined symbol"),
        ("import os; os.abort()", "importing it ended the process with status -6"),
    ],
)
def test_a_library_that_cannot_be_imported(tmp_path, monkeypatch, text, found):
    (tmp_path / "scann.py").write_text(text)
    (tmp_path / "tensorflow.py").write_text("raise ImportError('not now')")  # seconds less
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check = doctor.imports(doctor.libraries())
    assert check.state == "problem" and found in check.found and check.remedy


def test_libraries_of_this_environment():
    found = doctor.libraries()
    assert doctor.imports(found).state == "ok"


def test_gpus(program, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    blind = {"errors": {}, "cuda": False, "gpus": []}
    assert doctor.gpu(blind).state == "ok"  # none, and none expected
    assert doctor.gpu({**blind, "gpus": ["H100"]}).found == "H100"
    program("nvidia-smi", "GPU 0: NVIDIA H100 (UUID: GPU-1)\nGPU 1: NVIDIA L4 (UUID: GPU-2)", 1)
    check = doctor.gpu(blind)
    assert check.state == "problem" and "tensorflow[and-cuda]" in check.remedy
    assert check.found.startswith("NVIDIA H100, NVIDIA L4, and TensorFlow sees none: it was built")
    assert "libraries of CUDA" in doctor.gpu({**blind, "cuda": True}).found
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    check = doctor.gpu({**blind, "cuda": True})
    assert check.state == "warning" and "CUDA_VISIBLE_DEVICES is '-1'" in check.found


@pytest.mark.parametrize(
    "said, state, found",
    [
        ('openjdk version "17.0.15" 2025-04-15', "ok", 'version "17.0.15"'),
        ('openjdk version "21" 2023-09-19', "ok", 'version "21"'),
        ('java version "1.8.0_292"', "warning", 'version "1.8.0_292"'),
        ("Unable to locate a Java Runtime.", "warning", "says: Unable to locate"),
    ],
)
def test_java(program, said, state, found):
    program("java", said)
    check = doctor.java()
    assert check.state == state and found in check.found
    assert ("FlinkRunner" in check.remedy) == (state == "warning")


def test_no_java(program):
    check = doctor.java()
    assert (check.state, "FlinkRunner" in check.remedy) == ("warning", True)


def test_too_few_open_files():
    script = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (256, 4096));"
        "from vm_core import doctor; print(doctor.limits())"
    )
    said = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    assert "state='warning'" in said and "256 open files" in said and "ulimit -n 4096" in said
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] != 256


def test_a_plan_that_is_too_large_for_the_machine():
    small = doctor.memory_against_plan(Workload(items=1000, dimension=64))
    assert small.state == "ok" and "one task needs up to" in small.found
    large = Workload(items=10**9, dimension=1024)
    rows = large.partitioning.model_copy(update={"rows": 10**9})
    large = Workload(items=10**9, dimension=1024, partitioning=rows)
    check = doctor.memory_against_plan(large)
    assert check.state == "problem" and "for one task" in check.found
    fewer = int(check.remedy.removeprefix("build with --set partitioning.rows="))
    halved = rows.model_copy(update={"rows": fewer})
    smaller = Workload(items=10**9, dimension=1024, partitioning=halved)
    assert doctor.memory_against_plan(smaller).state in ("ok", "warning")  # it fits the machine


def test_a_plan_that_is_too_large_for_the_disk(tmp_path):
    assert doctor.disk(str(tmp_path), Workload(items=1000, dimension=64)).state == "ok"
    check = doctor.disk(str(tmp_path / "not" / "yet"), Workload(items=10**12, dimension=1024))
    assert check.state == "problem" and f"PB in {tmp_path}" in check.remedy


def test_credentials(monkeypatch, tmp_path):
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    assert doctor.credentials(str(tmp_path)).state == "ok"
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    check = doctor.credentials("gs://bucket/memory")
    assert check.state == "problem" and "none.json" in check.found
    assert "gcloud auth application-default login" in check.remedy
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://localhost:9")
    assert doctor.credentials("gs://bucket/memory").state == "ok"


@pytest.mark.parametrize("root", ["{}", "{}/not/yet", "memory://doctor-test/memory"])
def test_storage_that_can_be_used_is_left_as_it_was(root, tmp_path):
    check = doctor.access(root.format(tmp_path))
    assert check.state == "ok", check
    assert list(tmp_path.iterdir()) == []
    if "://" in root:
        assert not storage.exists(root) or storage.walk(root) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o555)
    check = doctor.access(str(tmp_path))
    assert check.state == "problem" and "cannot create" in check.found


def test_a_place_where_nobody_may_write():
    check = doctor.access("/proc/memory")
    assert check.state == "problem" and "/proc" in check.found
    assert "cannot create" in check.found and "create files there" in check.remedy


@pytest.mark.parametrize(
    "operation, right",
    [("pipe_file", "create"), ("cat_file", "get"), ("find", "list"), ("rm_file", "delete")],
)
def test_the_missing_right_is_named(monkeypatch, operation, right):
    """On a store that does everything but one thing."""

    def refused(self, path, *arguments, **named):
        raise PermissionError("403: the caller does not have permission")

    monkeypatch.setattr(MemoryFileSystem, operation, refused)
    check = doctor.access("memory://doctor-rights/memory")
    assert check.state == "problem" and f"cannot {right}: 403" in check.found
    assert right in check.remedy
    # What cannot be listed, a folder is not removed either.
    assert check.found.count("cannot") == (2 if right == "list" else 1)


def test_rights_on_a_bucket_are_named_as_google_does():
    text = doctor._rights("gs://bucket/memory", {"delete": "403", "list": "403"})
    assert "storage.objects.delete, storage.objects.list" in text


def test_the_encoder_is_loaded_and_tried(small_encoder, tmp_path):
    def settings(path):
        preprocessing = {"resize": 40, "crop": 32}
        given = {"kind": "saved_model", "path": str(path), "preprocessing": preprocessing}
        return lambda: encoders.parse(given)

    assert doctor.encoder(settings(small_encoder)).found.endswith("16 numbers, batches of 32")
    assert doctor.encoder(lambda: None).state == "ok"
    (check,) = doctor.examine({"encoder": lambda: doctor.encoder(settings(tmp_path / "none"))})
    assert check.state == "problem" and "none" in check.found
