"""Checks the environment: versions, Java, storage, encoder, GPU, memory, disk. Mends nothing.

python -m pipelines.doctor [--memory MEMORY] [--config CONFIG] [--items 1e9 --dim 1024]
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

from pipelines import commands
from pipelines.plan import whole
from vm_core import config, doctor, leftovers, plugins
from vm_core.building import BuildConfig
from vm_core.doctor import Check
from vm_core.errors import VisualMemoryError
from vm_core.memory import Memory, current_version
from vm_core.partitioning import Partitioning
from vm_core.planning.workload import Workload
from vm_core.terminal import console
from vm_core.units import size


def flink(flink_version: str | None, job_server: str | None) -> Check:
    """Beam's release against those of Flink and of the job server.

    job_server: its jar, whose name has both releases.
    """
    from apache_beam.options.pipeline_options import FlinkRunnerOptions

    beam, known = version("apache-beam"), FlinkRunnerOptions.PUBLISHED_FLINK_VERSIONS
    found = f"Beam {beam}, which runs on Flink {', '.join(known)}"
    if flink_version and ".".join(flink_version.split(".")[:2]) not in known:
        return Check("", "problem", f"{found}, not {flink_version}", "use one of these releases")
    if job_server:
        match = re.search(r"flink-([\d.]+)-job-server-([\d.]+?)(?:\.jar)?$", job_server)
        if match is None:
            remedy = "see that it is of the same release as Beam"
            return Check("", "warning", f"{found}; {job_server} does not name a release", remedy)
        if match[2] != beam:
            name = f"beam-runners-flink-{match[1]}-job-server-{beam}.jar"
            text = f"{found}; the job server is of Beam {match[2]}"
            return Check("", "problem", text, f"take {name} from Maven Central")
    return Check("", "ok", found)


def _leftovers(path: str, grace_hours: float, clean: bool) -> Check:
    """What killed runs have left in a memory; removes it if asked to."""
    found = leftovers.find(path, grace_hours)
    if not found:
        return Check("", "ok", f"none older than {grace_hours:g} hours")
    total = size(sum(left.bytes for left in found))
    listed = "".join(f"\n{left.path} ({size(left.bytes)})" for left in found[:10])
    if clean:
        leftovers.remove(found)
        return Check("", "ok", f"removed {len(found):,}, {total}:{listed}")
    remedy = "start the runs that left them again, or remove them with --clean"
    return Check("", "warning", f"{len(found):,}, {total}:{listed}", remedy)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visual-memory doctor",
        description="Checks what runs need from this machine and from the storage, and says what "
        "to do. Exit status 1 if something must be mended.",
    )
    add = parser.add_argument
    add("--memory", metavar="PATH", help="folder or bucket prefix that a run will write to")
    add("--config", metavar="FILE", help="of a build: its memory and its encoder")
    add("--items", type=whole, help="images of a planned memory, such as 1e9")
    add("--dim", type=whole, help="numbers in an embedding of it")
    add("--rows-per-partition", type=whole, default=1_000_000, help="at most (default 1e6)")
    add("--flink-version", metavar="X.Y", help="of the cluster")
    add("--flink-job-server", metavar="JAR", help="file or URL of the job server")
    add("--clean", action="store_true", help="removes what killed runs have left in the memory")
    add(
        "--grace-hours",
        type=float,
        default=leftovers.GRACE_HOURS,
        metavar="H",
        help="leftovers are what was not written to for so long (default 24)",
    )
    add("--json", action="store_true", help="print JSON")
    return parser


def command(arguments: Sequence[str]) -> int:
    """visual-memory doctor"""
    options = _parser().parse_args(arguments)
    if (options.items is None) != (options.dim is None):
        raise VisualMemoryError("--items and --dim belong together. Give both or neither")
    workload = None
    if options.items is not None:
        settings = {"rows": options.rows_per_partition}
        partitions = plugins.validate(Partitioning, settings, "partitions")
        workload = Workload(options.items, options.dim, partitioning=partitions)
    build = config.load(BuildConfig, options.config) if options.config else None
    path = options.memory or (build.memory if build else None)

    def encoder() -> Any:
        if build is not None:
            return build.encoder
        return Memory(path).encoder() if path and current_version(path) else None

    libraries = functools.cache(doctor.libraries)
    checks: dict[str, Any] = {
        "Python": doctor.python,
        "versions": doctor.versions,
        "libraries": lambda: doctor.imports(libraries()),
        "GPU": lambda: doctor.gpu(libraries()),
        "encoder": lambda: doctor.encoder(encoder),
        "memory": lambda: doctor.memory_against_plan(workload),
        "disk": lambda: doctor.disk(path, workload),
        "limits": doctor.limits,
        "Java": doctor.java,
        "Flink": lambda: flink(options.flink_version, options.flink_job_server),
    }
    if path is not None:
        checks["credentials"] = lambda: doctor.credentials(path)
        checks["storage"] = lambda: doctor.access(path)
        checks["leftovers"] = lambda: _leftovers(path, options.grace_hours, options.clean)
    results = doctor.examine(checks)
    if options.json:
        print(json.dumps(doctor.as_json(results), indent=1))
    else:
        console().print(doctor.of_checks(results))
    return int(doctor.has_problem(results))


if __name__ == "__main__":
    sys.exit(commands.main(command))
