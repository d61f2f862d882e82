"""Shows what is in a visual memory.

python -m pipelines.inspect MEMORY [--verify]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipelines import commands
from vm_core import summary
from vm_core.memory import Memory
from vm_core.terminal import console


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
    parser.add_argument(
        "--trust-encoder",
        action="store_true",
        help="lets commands run the encoder that the memory names; an encoder is a program",
    )
    options = parser.parse_args(arguments)
    memory = Memory(options.memory, options.version)
    if options.trust_encoder:
        encoder = memory.manifest.encoder
        memory.encoder(encoder.path)
        print(f"{encoder.path} (fingerprint {encoder.fingerprint()}) is trusted")
    elif options.verify:
        count, version = memory.check_files(), memory.manifest.version
        print(f"{count:,} files of version {version} are as they were written")
    elif options.json:
        print(memory.manifest.model_dump_json(indent=1))
    else:
        console().print(summary.of_memory(memory, options.classes))


if __name__ == "__main__":
    sys.exit(commands.main(command))
