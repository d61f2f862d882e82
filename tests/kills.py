"""Kills commands at random times, and runs two at the same time, on copies of one memory.

python -m tests.kills --memory MEMORY --config CONFIG [--kills 100] [--pairs 50] [--seed 1]

CONFIG is that of MEMORY's build. After a kill the command is started again: its result must be
that of an undisturbed run. Of two at the same time each must end with a result or with one
line that says why not, and the memory must verify.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from vm_core import storage
from vm_core.memory import Memory

COMMAND = str(Path(sys.executable).with_name("visual-memory"))
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
SECONDS = 120


def commands(root: Path, config: str) -> dict[str, list[str]]:
    memory = str(root / "memory")
    out = str(root / "out")
    return {
        "build": ["build", "--config", config, "--set", f"memory={root}/fresh"],
        "evaluate": ["evaluate", "--memory", memory, "--leave-one-out", "--out", out],
        "score": ["score", "--memory", memory],
        "prune": ["prune", "--memory", memory, "--method", "hard", "--share", "0.1"],
        "verify": ["inspect", memory, "--verify"],
        "other build": [
            *("build", "--config", config, "--set", f"memory={root}/fresh"),
            *("--set", "partitioning.rows=20", "--set", "minimum_recall=0.1"),
        ],
    }


def result(name: str, root: Path) -> str:
    """What a command has made, without times and paths."""
    if "build" in name:
        return Memory(str(root / "fresh")).manifest.content_digest
    if name == "evaluate":
        return json.dumps(json.loads((root / "out" / "metrics.json").read_text())["test"])
    if name == "score":
        (path,) = (root / "memory" / "scores").glob("*/items-00000-*")
        return storage.sha256_file(str(path))
    return Memory(str(root / "memory")).manifest.content_digest


def start(arguments: list[str]) -> subprocess.Popen:
    return subprocess.Popen(
        [COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def ended(process: subprocess.Popen) -> tuple[int, str]:
    try:
        _, said = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        return -999, "HANG"
    return process.returncode, said


def kill(name: str, config: str, memory: str, expected: str, most: float, chance) -> str:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(memory, root / "memory")
        arguments = commands(root, config)[name]
        process = start(arguments)
        time.sleep(chance.uniform(0.05, most))
        number = chance.choice(SIGNALS)
        process.send_signal(number)
        status, said = ended(process)
        # SIGINT before the interpreter's first line is Python's own.
        if status not in (0, -number, 128 + number) or "Traceback" in said:
            return f"{number.name}: status {status}: {said[-300:]}"
        left = list(root.rglob("*.incomplete-*"))
        if left and number != signal.SIGKILL:
            return f"{number.name} leaves {left[0]}"
        status, said = ended(start(arguments))
        if status != 0:
            return f"rerun after {number.name}: status {status}: {said[-300:]}"
        if result(name, root) != expected:
            return f"another result after {number.name}"
        return "ended before" if process.returncode == 0 else "same result"


def pair(names: tuple[str, str], config: str, memory: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copytree(memory, root / "memory")
        both = [start(commands(root, config)[name]) for name in names]
        outcomes = []
        for process in both:
            status, said = ended(process)
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            if "Traceback" in said or status not in (0, 2) or (status == 2 and len(errors) != 1):
                return f"status {status}: {said[-400:]}"
            outcomes.append("result" if status == 0 else "error")
        if any("build" in name for name in names):
            Memory(str(root / "fresh")).check_files()
        Memory(str(root / "memory")).check_files()
        return " and ".join(sorted(outcomes))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--memory", required=True)
    parser.add_argument("--config", required=True)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    expected, most = {}, {}
    for name in ("build", "evaluate", "score", "prune", "verify"):
        with tempfile.TemporaryDirectory() as folder:
            root = Path(folder)
            shutil.copytree(options.memory, root / "memory")
            began = time.monotonic()
            status, said = ended(start(commands(root, options.config)[name]))
            assert status == 0, said
            expected[name], most[name] = result(name, root), time.monotonic() - began
    found: Counter[str] = Counter()
    for number in range(options.kills):
        name = list(expected)[number % len(expected)]
        arguments = name, options.config, options.memory, expected[name], most[name]
        what = kill(*arguments, chance)
        found[f"kill {name}: {what}"] += 1
        print(f"kill {number} {name}: {what}", flush=True)
    pairs = [
        *(("build", "build"), ("build", "other build"), ("evaluate", "evaluate")),
        *(("score", "score"), ("prune", "prune"), ("score", "prune"), ("evaluate", "prune")),
        *(("score", "evaluate"), ("prune", "verify"), ("build", "evaluate")),
    ]
    for number in range(options.pairs):
        names = pairs[number % len(pairs)]
        what = pair(names, options.config, options.memory)
        found[f"pair {' and '.join(names)}: {what}"] += 1
        print(f"pair {number} {names}: {what}", flush=True)
    for what, count in sorted(found.items()):
        print(f"{count:>4} {what}")
    return int(any("status" in what or "another" in what or "leaves" in what for what in found))


if __name__ == "__main__":
    sys.exit(main())
