"""Shows what is in a visual memory.

python -m pipelines.inspect MEMORY
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console

from pipelines import commands
from vm_core import summary
from vm_core.memory import Memory


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
    options = parser.parse_args(arguments)
    memory = Memory(options.memory, options.version)
    if options.json:
        print(memory.manifest.model_dump_json(indent=1))
    else:
        Console().print(summary.of_memory(memory, options.classes))


if __name__ == "__main__":
    sys.exit(commands.main(command))
