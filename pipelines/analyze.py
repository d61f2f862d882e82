"""Analyses neighbour tables in the paper's JSON: votes, pruning, reliability.

python -m pipelines.analyze QUERIES.json [--leave-one-out MEMORY.json] --out DIR
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pipelines import commands
from vm_core import storage, summary
from vm_core.analysis import analyze
from vm_core.errors import VisualMemoryError
from vm_core.pruning import HARD_THRESHOLD
from vm_core.terminal import console


def command(arguments: Sequence[str]) -> None:
    """visual-memory analyze"""
    parser = argparse.ArgumentParser(
        prog="visual-memory analyze",
        description="Everything that needs only neighbours, from a table of them. The table is "
        "streamed and never in memory as a whole.",
    )
    parser.add_argument("queries", metavar="QUERIES.json", help="neighbours of the queries")
    parser.add_argument(
        "--leave-one-out",
        metavar="MEMORY.json",
        help="neighbours of the memory's own items: adds soft and hard pruning",
    )
    parser.add_argument(
        "--hard-threshold",
        type=int,
        default=HARD_THRESHOLD,
        metavar="N",
        help="hard pruning removes items that were a wrong neighbour N times or more "
        f"(default {HARD_THRESHOLD})",
    )
    parser.add_argument(
        "--paper-exact",
        action="store_true",
        help="reproduce the published notebook, with its faults",
    )
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="for metrics.json and predictions.parquet"
    )
    options = parser.parse_args(arguments)
    for path in (options.queries, options.leave_one_out):
        if path is not None and not storage.exists(path):
            raise VisualMemoryError(f"neighbour table {path!r} does not exist. Give a JSON file")
    results = analyze(
        options.queries,
        options.leave_one_out,
        options.hard_threshold,
        options.paper_exact,
        out_dir=options.out,
    )
    console().print(summary.of_analysis(results, options.out))


if __name__ == "__main__":
    sys.exit(commands.main(command))
