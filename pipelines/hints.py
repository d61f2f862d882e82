"""What some steps need of a worker: an accelerator, memory.

A runner that can choose workers step by step gives them just these; Dataflow calls it
right fitting. Other runners take no notice.
"""

from __future__ import annotations

import argparse
import re

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.transforms.resources import MinRamHint

from vm_core.errors import VisualMemoryError

ONE_ACCELERATOR = re.compile(r"type:[\w-]+;count:1(;[\w:.-]+)*")


class HintOptions(PipelineOptions):
    """Beam's options, and ours for the steps that need more than others."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--encode_accelerator",
            metavar="HINT",
            help="accelerator of the workers that encode images, and of no others, such as "
            "type:nvidia-tesla-t4;count:1;install-nvidia-driver",
        )
        parser.add_argument(
            "--encode_min_ram", metavar="SIZE", help="memory of a worker that encodes, such as 16GB"
        )
        parser.add_argument(
            "--partition_min_ram",
            metavar="SIZE",
            help="memory of a worker that builds or searches partitions, such as 32GB",
        )


def check(options: PipelineOptions) -> None:
    """Raises VisualMemoryError for hints that no runner would understand."""
    given = options.view_as(HintOptions)
    accelerator = given.encode_accelerator
    if accelerator and not ONE_ACCELERATOR.fullmatch(accelerator):
        raise VisualMemoryError(
            f"--encode_accelerator={accelerator}: it must be type:NAME;count:1 with further "
            "settings after semicolons. A worker's process uses one accelerator: for more of "
            "them take more workers"
        )
    for name in ("encode_min_ram", "partition_min_ram"):
        size = getattr(given, name)
        try:
            _ = size and MinRamHint.parse(size)
        except ValueError as error:
            raise VisualMemoryError(f"--{name}={size}: {error} Write for example 16GB") from None


def of_encoding(pipeline: beam.Pipeline) -> dict[str, str]:
    """Resource hints for the step that encodes images."""
    given = pipeline.options.view_as(HintOptions)
    return _given(accelerator=given.encode_accelerator, min_ram=given.encode_min_ram)


def of_partitions(pipeline: beam.Pipeline) -> dict[str, str]:
    """Resource hints for the steps that hold a partition of the index."""
    return _given(min_ram=pipeline.options.view_as(HintOptions).partition_min_ram)


def _given(**hints: str | None) -> dict[str, str]:
    return {name: value for name, value in hints.items() if value}
