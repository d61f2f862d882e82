"""Shows what is in a visual memory.

python -m pipelines.inspect MEMORY [--verify]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from pipelines import commands
from vm_core import storage, summary
from vm_core.errors import VisualMemoryError
from vm_core.memory import Memory


def verify(memory: Memory) -> None:
    """Says that all files are as they were written. Raises VisualMemoryError if they are not."""
    files = memory.files()
    damaged = storage.damaged(memory.root, files)
    if damaged:
        some = "".join(f"\n  {name} {what}" for name, what in list(damaged.items())[:20])
        raise VisualMemoryError(
            f"{len(damaged):,} of {len(files):,} files of {memory.root}, version "
            f"{memory.manifest.version}, are missing or damaged:{some}\n"
            "Restore them from a copy, or remove them and start the build again"
        )
    print(f"{len(files):,} files of version {memory.manifest.version} are as they were written")


def command(arguments: Sequence[str]) -> None:
    """visual-memory inspect"""
    parser = argparse.ArgumentParser(
        prog="visual-memory inspect",
        description="Counts per class and source, encoder, shards, index, sizes, recall.",
    )
    parser.add_argument("memory", help="folder or bucket prefix of the memory")
    parser.add_argument("--version", help="a version other than the current one")
    parser.add_argument("--classes", type=int, default=20, help="how many to list (default 20)")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON")
    parser.add_argument(
        "--verify", action="store_true", help="read every file and compare it with its SHA-256"
    )
    options = parser.parse_args(arguments)
    memory = Memory(options.memory, options.version)
    if options.verify:
        verify(memory)
    elif options.json:
        print(memory.manifest.model_dump_json(indent=1))
    else:
        Console().print(summary.of_memory(memory, options.classes))


if __name__ == "__main__":
    sys.exit(commands.main(command))
