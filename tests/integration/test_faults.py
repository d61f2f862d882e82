"""A worker or the runner is killed in the middle: a clear error, and a rerun that goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration import clusters
from tests.integration.harness import REPOSITORY, configuration, write_config
from vm_core.memory import Memory

SOURCES = 8
TRIGGERS = {
    "embed": ("build", "work/*/*.arrow"),
    "index": ("build", "builds/*/index-*/partition-00000.json"),
    "home": ("score", "work/scores-*/home-*.json"),
}
"""By the stage that is hit: the command, and the first file that says it is under way."""


@pytest.fixture(scope="module")
def settings(photos, encoder_path, tmp_path_factory) -> dict:
    """Photos in so many sources, each a piece of work; a partition for every twenty."""
    folder = tmp_path_factory.mktemp("sources")
    for number, photo in enumerate(sorted(Path(photos).glob("*/*"))):
        place = folder / f"{number % SOURCES}" / photo.parent.name
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, place)
    settings = configuration(
        "",
        encoder_path,
        *(folder / f"{number}" for number in range(SOURCES)),
        index={"kind": "exact"},
        partitioning={"rows": 30, "probes": 3},
        minimum_recall=0.5,
    )
    settings["encoder"] = {"kind": "saved_model", "path": encoder_path, "batch_size": 16}
    return settings


def start(command: str, config: str, root: Path, *options: str) -> subprocess.Popen[str]:
    """A command as its user runs it."""
    own = ["--config", config] if command == "build" else ["--memory", str(root / "memory")]
    return subprocess.Popen(
        [sys.executable, "-m", f"pipelines.{command}", *own, *options],
        cwd=REPOSITORY,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(command: str, config: str, root: Path, *options: str) -> dict:
    """Runs a command to its good end; its metrics."""
    metrics = root / f"{command}.json"
    process = start(command, config, root, *options, f"--metrics-out={metrics}")
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return json.loads(metrics.read_text())[command]


def results(root: Path) -> dict[str, bytes]:
    memory = root / "memory"
    found = {path.name: path.read_bytes() for path in memory.glob("scores/*/items-*")}
    return {**found, "digest": Memory(str(memory)).manifest.content_digest.encode()}


@pytest.fixture(scope="module")
def reference(settings, tmp_path_factory) -> dict[str, bytes]:
    root = tmp_path_factory.mktemp("reference")
    config = write_config(root / "config.yaml", {**settings, "memory": str(root / "memory")})
    for command in ("build", "score"):
        run(command, config, root)
    return results(root)


@pytest.mark.cluster
@pytest.mark.parametrize("victim", ["worker", "runner"])
@pytest.mark.parametrize("stage", TRIGGERS)
def test_killed_in_the_middle(stage, victim, settings, reference, pool, tmp_path):
    options = [*clusters.prism(), *pool.options]
    config = write_config(
        tmp_path / "config.yaml", {**settings, "memory": str(tmp_path / "memory")}
    )
    command, trigger = TRIGGERS[stage]
    if command == "score":
        run("build", config, tmp_path)
    process = start(command, config, tmp_path, *options)
    clusters.wait_for(lambda: list((tmp_path / "memory").glob(trigger)), trigger, every=0.002)
    victims = pool.workers() if victim == "worker" else clusters.children(process.pid)
    assert victims
    for each in victims:
        os.kill(each, signal.SIGKILL)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2, said
    assert "error: the runner gave up" in said and "Start the same command again" in said
    if victim == "worker":  # Beam's own threads complain where the runner is gone
        assert "Traceback" not in said
    memory = tmp_path / "memory"
    assert (memory / "CURRENT").exists() == (command == "score")  # nothing half is published
    metrics = run(command, config, tmp_path, *options)
    assert metrics[f"{stage}_reused_{'splits' if stage == 'embed' else 'partitions'}"] >= 1
    if command == "build":
        run("score", config, tmp_path)
    assert results(tmp_path) == reference
    assert not list(memory.glob("**/*incomplete*"))
    assert not list(memory.glob("work/*"))
