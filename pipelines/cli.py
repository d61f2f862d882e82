"""visual-memory: one command, a subcommand a task."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from pipelines import signals

COMMANDS = {
    "build": "read images, encode them, write shards and an index, publish a version",
    "evaluate": "classify labelled queries with a memory: metrics, tables, report",
    "classify": "classify images, and show the neighbours that decided",
    "inspect": "what is in a memory",
    "score": "which items of a memory mislead: leave-one-out scores",
    "prune": "remove or weigh down the items that mislead, as a new version",
    "plan": "bytes, hours and workers that a memory of any size will take",
    "doctor": "what this machine and the storage lack, and what to do",
    "analyze": "votes, pruning and reliability from the paper's neighbour tables",
}
USAGE = "usage: visual-memory COMMAND ...\n\n" + "".join(
    f"  {name:<10} {what}\n" for name, what in COMMANDS.items()
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of the console script; returns the exit status."""
    with signals.handled():
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    name, *rest = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE + "\nvisual-memory COMMAND --help tells more of each.")
        return 0
    if name not in COMMANDS:
        print(f"error: there is no command {name!r}\n\n{USAGE}", end="", file=sys.stderr)
        return 2
    # Each is imported when called: TensorFlow alone takes seconds.
    from pipelines import commands

    command = importlib.import_module(f"pipelines.{name}").command
    return commands.main(command, rest)


if __name__ == "__main__":
    sys.exit(main())
