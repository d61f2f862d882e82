"""Says what a memory of some size will take: bytes, hours, workers. Makes nothing.

python -m pipelines.plan --items 1e9 --dim 1024
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from pipelines import commands
from vm_core import plugins
from vm_core.index.scann import REORDER_BYTES
from vm_core.partitioning import Partitioning
from vm_core.planning import calibration, dataflow_options, worker_types
from vm_core.planning import summary as plan_summary
from vm_core.planning.planner import plan
from vm_core.planning.workload import ITEM_BYTES, Workload
from vm_core.terminal import console


def whole(text: str) -> int:
    """A whole number, also as 1e9."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise argparse.ArgumentTypeError(f"{text} is no whole number") from None
        return int(number)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="visual-memory plan",
        description="Bytes, memory, hours and workers of a memory before it is made.",
    )
    add = parser.add_argument
    add("--items", type=whole, required=True, help="images in the memory, such as 1e9")
    add("--dim", type=whole, required=True, help="numbers in an embedding")
    add("--dtype", default="float32", help=f"of the shards: {', '.join(ITEM_BYTES)}")
    add("--reorder", default="float32", help=f"ScaNN's vectors: {', '.join(REORDER_BYTES)}")
    add("--encoder", metavar="NAME", help="an encoder of the calibration, or a known one")
    add("--encoder-images-per-s", type=float, metavar="X", help="of an accelerator, or of a core")
    add("--queries", type=whole, default=50_000, help="of the evaluation (default 50,000)")
    add("--k", type=whole, default=100, help="neighbours per query (default 100)")
    add("--rows-per-partition", type=whole, default=1_000_000, help="at most (default 1e6)")
    add("--spill", default="none", choices=("none", "nearest", "soar"), help="second cells")
    add("--probes", type=whole, default=3, help="partitions a query visits (default 3)")
    add("--leaves-to-search", type=whole, default=0, help="of ScaNN (default: as the index)")
    add("--worker", default="n1-standard-8", help="local or a machine type (n1-standard-8)")
    add("--accelerator", help=f"each worker has: {', '.join(worker_types.ACCELERATORS)}")
    add("--accelerators", type=whole, default=1, help="how many of it (default 1)")
    add("--deadline-hours", type=float, default=24, help="0: none (default 24)")
    add("--calibration", metavar="FILE", help="of benchmarks.calibrate (default: built in)")
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--json", action="store_true", help="print the plan as JSON")
    shown.add_argument(
        "--dataflow-options",
        action="store_true",
        help="print it as options of a command on Dataflow, one a line",
    )
    return parser


def command(arguments: Sequence[str]) -> None:
    """visual-memory plan"""
    options = _parser().parse_args(arguments)
    workload = Workload(
        items=options.items,
        dimension=options.dim,
        dtype=options.dtype,
        reorder=options.reorder,
        encoder=options.encoder,
        images_per_s=options.encoder_images_per_s,
        queries=options.queries,
        k=options.k,
        partitioning=plugins.validate(
            Partitioning, {"rows": options.rows_per_partition, "spill": options.spill}, "partitions"
        ),
        probes=options.probes,
        leaves_to_search=options.leaves_to_search,
        deadline_hours=options.deadline_hours or None,
    )
    constants = calibration.DEFAULT
    if options.calibration:
        constants = calibration.load(options.calibration)
    worker = worker_types.find(options.worker, options.accelerator, options.accelerators)
    result = plan(workload, constants, worker)
    if options.json:
        print(json.dumps(plan_summary.as_json(result), indent=1))
    elif options.dataflow_options:
        print("\n".join(dataflow_options.of_plan(result)))
    else:
        console().print(plan_summary.of_plan(result))


if __name__ == "__main__":
    sys.exit(commands.main(command))
