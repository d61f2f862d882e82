"""Looks at what a run needs from its surroundings, and says what to do about what is amiss.

Each check returns what it found; ``examine`` runs them, and one that fails itself is a
problem like any other. Libraries that are slow to import, or may end the process, are tried in
a process of their own.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import locale
import os
import platform
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import textwrap
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from packaging.requirements import Requirement
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from vm_core import storage
from vm_core.errors import StorageError, VisualMemoryError
from vm_core.planning import calibration, worker_types
from vm_core.planning.estimates import Estimate
from vm_core.planning.planner import plan
from vm_core.planning.workload import Workload
from vm_core.units import size

_WHY = {
    "scann": "its TensorFlow operators are built against one minor release",
    "tensorflow": "scann 1.4.2 needs this release",
    "tensorflow-hub": "later releases were not tested",
    "setuptools": "tensorflow-hub imports pkg_resources, which setuptools 81 removed",
    "tensorflow-text": "it must be of TensorFlow's release",
    "apache-beam": "Flink's job server and worker images must be of the same release",
}
_SCARCE_DISK = 2e9
_SCARCE_MEMORY = 2e9
_FILES = 1024
_JAVA = 11


@dataclass(frozen=True)
class Check:
    """What one check found. remedy: what to do, empty where all is well."""

    name: str
    state: Literal["ok", "warning", "problem"]
    found: str
    remedy: str = ""


Checks = Mapping[str, Callable[[], Check]]


def examine(checks: Checks) -> list[Check]:
    """The results of named checks; one that raises is a problem with what it said."""
    results = []
    for name, check in checks.items():
        try:
            results.append(dataclasses.replace(check(), name=name))
        except Exception as error:  # whatever is broken here is what the doctor was called for
            found = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
            if isinstance(error, VisualMemoryError):
                found = str(error)
            results.append(Check(name, "problem", found, "mend what it says, and look again"))
    return results


def has_problem(results: Sequence[Check]) -> bool:
    return any(check.state == "problem" for check in results)


def of_checks(results: Sequence[Check]) -> RenderableType:
    """A line a check, and a sum."""
    styles = {"ok": "green", "warning": "yellow", "problem": "bold red"}
    table = Table("check", "state", "found", "what to do", box=box.SIMPLE_HEAD, pad_edge=False)
    for check in results:
        state = Text(check.state, styles[check.state])
        table.add_row(check.name, state, Text(check.found), Text(check.remedy))
    counts = [sum(c.state == state for c in results) for state in ("problem", "warning")]
    return Group(table, Text(f"{counts[0]} problems, {counts[1]} warnings"))


def as_json(results: Sequence[Check]) -> list[dict[str, Any]]:
    return [dataclasses.asdict(check) for check in results]


# This machine -----------------------------------------------------------------------


def python() -> Check:
    """Python's release and the system: what ScaNN and TensorFlow have wheels for."""
    found = f"Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    if sys.version_info[:2] != (3, 11):
        return Check("", "problem", found, "use Python 3.11: python3.11 -m venv .venv")
    if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
        return Check("", "problem", found, "use Linux on x86-64: ScaNN has no other wheels")
    return Check("", "ok", found)


def versions(requirements: Sequence[str] | None = None) -> Check:
    """Installed releases against what setup.py asks for; of extras, what is installed.

    requirements: as in setup.py; those of the installed package if None.
    """
    if requirements is None:
        requirements = importlib.metadata.requires("visual-memory") or []
    wrong, remedies, shown = [], [], []
    for requirement in map(Requirement, requirements):
        extra = requirement.marker is not None and "extra" in str(requirement.marker)
        name = requirement.name
        asked = f"{name}{requirement.specifier}"
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            if not extra:
                wrong.append(f"{name} is not installed")
                remedies.append(asked)
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            why = f": {_WHY[name]}" if name in _WHY else ""
            wrong.append(f"{name} {version}, not {requirement.specifier}{why}")
            remedies.append(asked)
        elif name in _WHY and f"{name} {version}" not in shown:
            shown.append(f"{name} {version}")
    if wrong:
        quoted = " ".join(f"'{each}'" for each in dict.fromkeys(remedies))
        return Check("", "problem", "; ".join(dict.fromkeys(wrong)), f"pip install {quoted}")
    return Check("", "ok", ", ".join(shown))


def libraries() -> dict[str, Any]:
    """What a fresh process finds when it imports TensorFlow and what is built upon it.

    errors: by module that cannot be imported. cuda: whether TensorFlow was built with it.
    gpus: the names of those it sees.
    """
    script = textwrap.dedent(
        """
        import importlib, importlib.util, json
        said = {"errors": {}, "cuda": False, "gpus": []}
        for name in ("tensorflow", "scann", "tensorflow_hub", "keras_hub"):
            if name == "keras_hub" and importlib.util.find_spec(name) is None:
                continue
            try:
                importlib.import_module(name)
            except BaseException as error:
                said["errors"][name] = f"{type(error).__name__}: {error}"
        if "tensorflow" not in said["errors"]:
            import tensorflow as tf
            said["cuda"] = tf.test.is_built_with_cuda()
            for gpu in tf.config.list_physical_devices("GPU"):
                details = tf.config.experimental.get_device_details(gpu)
                said["gpus"].append(details.get("device_name", gpu.name))
        print("\\n" + json.dumps(said))
        """
    )
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3", **os.environ}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        error = f"importing it ended the process with status {done.returncode}: {last}"
        return {"errors": {"tensorflow or scann": error}, "cuda": False, "gpus": []}
    return dict(json.loads(done.stdout.splitlines()[-1]))


def imports(found: Mapping[str, Any]) -> Check:
    """found: of ``libraries``."""
    if not found["errors"]:
        return Check("", "ok", "TensorFlow, ScaNN and TensorFlow Hub can be imported")
    listed = "; ".join(
        f"{name}: {error.splitlines()[0][:300]}" for name, error in found["errors"].items()
    )
    return Check("", "problem", listed, "install what is locked: make venv")


def gpu(found: Mapping[str, Any]) -> Check:
    """Whether TensorFlow sees the GPUs that the driver sees. found: of ``libraries``."""
    if found["gpus"]:
        return Check("", "ok", ", ".join(found["gpus"]))
    there = _driver_gpus()
    if not there:
        return Check("", "ok", "none; images are encoded on the CPU")
    text = f"{', '.join(there)}, and TensorFlow sees none"
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        text += f": CUDA_VISIBLE_DEVICES is {hidden!r}"
        return Check("", "warning", text, "unset CUDA_VISIBLE_DEVICES, to encode on the GPU")
    if not found["cuda"]:
        text += ": it was built without CUDA"
        return Check("", "problem", text, "pip install 'tensorflow[and-cuda]==2.20.*'")
    text += ": it cannot load the libraries of CUDA"
    return Check("", "problem", text, "pip install 'tensorflow[and-cuda]==2.20.*'")


def _driver_gpus() -> list[str]:
    program = shutil.which("nvidia-smi")
    if program is None:
        return []
    done = subprocess.run([program, "-L"], capture_output=True, text=True, timeout=60)
    return re.findall(r"^GPU \d+: (.*?)(?: \(UUID.*)?$", done.stdout, re.MULTILINE)


def java() -> Check:
    """Flink's job server is a Java program; nothing else needs it."""
    remedy = f"for --runner=FlinkRunner install Java {_JAVA} or later; other runners need none"
    home = os.environ.get("JAVA_HOME")
    program = shutil.which(os.path.join(home, "bin", "java")) if home else None
    program = program or shutil.which("java")
    if program is None:
        return Check("", "warning", "no java on the PATH, nor in JAVA_HOME", remedy)
    done = subprocess.run([program, "-version"], capture_output=True, text=True, timeout=60)
    said = done.stderr + done.stdout
    match = re.search(r'version "(?:1\.)?(\d+)[^"]*"', said)
    if done.returncode or match is None:
        first = (said.strip().splitlines() or ["nothing"])[0]
        return Check("", "warning", f"{program} -version says: {first}", remedy)
    state: Literal["ok", "warning"] = "ok" if int(match[1]) >= _JAVA else "warning"
    return Check("", state, f"{program}, {match[0]}", "" if state == "ok" else remedy)


def limits() -> Check:
    """How many files may be open, and whether names of files can be any text."""
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    encoding = sys.getfilesystemencoding()
    found = f"{files:,} open files, {encoding}, locale {locale.setlocale(locale.LC_CTYPE)}"
    if 0 <= files < _FILES:
        return Check("", "warning", found, f"ulimit -n {min(65536, most) if most > 0 else 65536}")
    if encoding.lower() not in ("utf-8", "utf8"):
        return Check("", "warning", found, "export LC_ALL=C.UTF-8")
    return Check("", "ok", found)


# Memory and disk ----------------------------------------------------------------------


def memory_limit() -> int:
    """Bytes of the machine, or of the container where that has fewer."""
    limit = int(worker_types.this_machine().memory_bytes)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if os.path.exists(path):
            with open(path) as file:
                text = file.read().strip()
            limit = min(limit, int(text)) if text.isdigit() else limit
    return limit


def available_memory() -> int:
    """Bytes that are free now, or would be if asked for."""
    with open("/proc/meminfo") as file:
        lines = dict(line.split(":", 1) for line in file)
    return min(memory_limit(), 1024 * int(lines["MemAvailable"].split()[0]))


def memory_against_plan(workload: Workload | None) -> Check:
    """Whether every stage of a memory of that size finds room on this machine."""
    limit, free = memory_limit(), available_memory()
    found = f"{size(limit)}, of which {size(free)} are free"
    if workload is None:
        if free < _SCARCE_MEMORY:
            return Check("", "warning", found, f"have {size(_SCARCE_MEMORY)} free")
        return Check("", "ok", f"{found}; --items and --dim hold it against a plan")
    lacking = _lacking(workload, limit)
    if lacking:
        return Check("", "problem", f"{found}; {lacking}", _fewer_rows(workload, limit))
    lacking = _lacking(workload, free)
    if lacking:
        remedy = f"end other programs, or {_fewer_rows(workload, free)}"
        return Check("", "warning", f"{found}; {lacking}", remedy)
    estimate = _estimate(workload)
    need = max(estimate.build_memory(), estimate.search_memory())
    return Check("", "ok", f"{found}; one task needs up to {size(need)}")


def _lacking(workload: Workload, memory_bytes: float) -> str:
    """What the planner says that there is no room for; empty if there is."""
    worker = dataclasses.replace(worker_types.this_machine(), memory_bytes=memory_bytes)
    try:
        plan(dataclasses.replace(workload, deadline_hours=None), calibration.DEFAULT, worker)
    except VisualMemoryError as error:
        return str(error).partition(";")[0]
    return ""


def _fewer_rows(workload: Workload, memory_bytes: float) -> str:
    rows = min(workload.partitioning.rows, workload.items) // 2
    while rows >= 10_000:
        fewer = workload.partitioning.model_copy(update={"rows": rows})
        if not _lacking(dataclasses.replace(workload, partitioning=fewer), memory_bytes):
            return f"build with --set partitioning.rows={rows}"
        rows //= 2
    return "take a machine with more memory; see visual-memory plan"


def _estimate(workload: Workload) -> Estimate:
    return Estimate(workload, calibration.DEFAULT, worker_types.this_machine())


def disk(path: str | None, workload: Workload | None) -> Check:
    """Room for temporary files, and for the memory where it is on this machine's disk."""
    temporary = tempfile.gettempdir()
    needs: dict[str, float] = {temporary: _SCARCE_DISK}
    if path is not None and storage.is_local(path):
        needed = _SCARCE_DISK
        if workload is not None:
            sizes = _estimate(workload).sizes()
            needed = sizes.shards[workload.dtype] + sizes.index + sizes.work
        folder = _existing(path)
        needs[folder] = max(needs.get(folder, 0.0), needed)
    found, short = [], []
    for folder, needed in needs.items():
        free = shutil.disk_usage(folder).free
        found.append(f"{size(free)} free in {folder}")
        if free < needed:
            short.append(f"free {size(needed)} in {folder}, or take another place")
    if not short:
        return Check("", "ok", ", ".join(found))
    remedy = "; ".join(short)
    if temporary in remedy:
        remedy += " (TMPDIR says where temporary files go)"
    return Check("", "problem" if workload else "warning", ", ".join(found), remedy)


def _existing(path: str) -> str:
    """The nearest folder above a local path that exists, itself perhaps."""
    path = storage.absolute(path).removeprefix("file://").removeprefix("local://")
    while not os.path.isdir(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path


# The memory and its encoder -----------------------------------------------------------


def credentials(path: str) -> Check:
    """Whether Google's libraries find credentials; other storage is not asked."""
    if not path.startswith(("gs://", "gcs://")):
        return Check("", "ok", f"none needed for {path}")
    if os.environ.get("STORAGE_EMULATOR_HOST"):
        return Check("", "ok", f"none: emulator at {os.environ['STORAGE_EMULATOR_HOST']}")
    remedy = (
        "gcloud auth application-default login, or set GOOGLE_APPLICATION_CREDENTIALS to a "
        "service account's key file"
    )
    try:
        import google.auth  # type: ignore[import-untyped, unused-ignore]
        import google.auth.exceptions
    except ImportError as error:
        return Check("", "problem", str(error), "pip install 'visual-memory[gcs]'")
    try:
        found, project = google.auth.default()
    except google.auth.exceptions.GoogleAuthError as error:
        return Check("", "problem", str(error).splitlines()[0], remedy)
    account = getattr(found, "service_account_email", None) or type(found).__module__
    return Check("", "ok", f"{account}, project {project}")


def access(path: str) -> Check:
    """Creates a small file, reads it, lists it, removes it; and says which of that failed.

    A local folder that does not exist is tried where it would be made.
    """
    root = _existing(path) if storage.is_local(path) else path
    probe = storage.join(root, f".doctor-{uuid.uuid4().hex[:12]}", "probe")
    folder = probe.rpartition("/")[0]

    def is_read() -> bool:
        return storage.read_bytes(probe) == b"probe"

    def is_listed() -> bool:
        return any(file.path.endswith("/probe") for file in storage.walk(folder))

    def is_removed() -> bool:
        storage.remove_directory(folder)
        return not storage.exists(probe)

    def is_written() -> bool:
        storage.write_bytes(probe, b"probe")
        return True

    steps = {"create": is_written, "get": is_read, "list": is_listed, "delete": is_removed}
    failed: dict[str, str] = {}
    for right, step in steps.items():
        try:
            if not step():
                failed[right] = "it seemed to work, and did not"
        except Exception as error:  # each store has its own
            cause = error.__cause__ if isinstance(error, StorageError) else error
            failed[right] = (str(cause) or type(cause).__name__).splitlines()[0][:300]
        if right == "create" and failed:
            break  # there is nothing to try the other rights on
    place = path if root == path else f"{path} (would be made in {root})"
    if not failed:
        return Check("", "ok", f"{place}: create, get, list and delete work")
    found = "; ".join(f"cannot {right}: {error}" for right, error in failed.items())
    return Check("", "problem", f"{place}: {found}", _rights(path, failed))


def _rights(path: str, failed: Mapping[str, str]) -> str:
    if path.startswith(("gs://", "gcs://")):
        named = ", ".join(f"storage.objects.{right}" for right in failed)
        return (
            f"grant {named} on the bucket, as the role roles/storage.objectAdmin does; check that "
            "the bucket exists"
        )
    return f"give this user the right to {', '.join(failed)} files there, or another place"


def encoder(load: Callable[[], Any]) -> Check:
    """Loads an encoder and embeds a batch of grey images. load: gives the settings."""
    import numpy as np

    settings = load()
    if settings is None:
        return Check("", "ok", "none was named; give --config or --memory to try one")
    crop = settings.effective_preprocessing().crop
    pixels = np.full((settings.batch_size, crop, crop, 3), 128, np.uint8)
    vectors = settings.load()(pixels)
    found = f"{settings.path}: {vectors.shape[1]} numbers, batches of {settings.batch_size}"
    if not np.isfinite(vectors).all() or not np.linalg.norm(vectors, axis=1).all():
        text = f"{found}; of a grey image it makes no usable vector"
        return Check("", "warning", text, "see whether the preprocessing is the model's own")
    return Check("", "ok", found)
