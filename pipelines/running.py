"""Runs a pipeline: options, progress, errors."""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions, StandardOptions
from apache_beam.runners import create_runner
from apache_beam.runners.portability.fn_api_runner import worker_handlers

from vm_core import progress
from vm_core.errors import VisualMemoryError

# The DirectRunner tries to download and start Prism first and falls back to this one.
LOCAL_RUNNER = "FnApiRunner"

# Workers that are threads would send what they have encoded once a second, from another
# thread and without a lock: an element cut in two, which arrives as something else. At 0
# they send when a buffer is full or the bundle ends, as workers that are processes do.
worker_handlers.DATA_BUFFER_TIME_LIMIT_MS = 0


def pipeline_options(arguments: Sequence[str]) -> PipelineOptions:
    """Beam's options; without --runner the pipeline runs in this process."""
    options = PipelineOptions(list(arguments))
    if options.view_as(StandardOptions).runner is None:
        options.view_as(StandardOptions).runner = LOCAL_RUNNER
    options.view_as(SetupOptions).save_main_session = False
    return options


def check_beam_arguments(arguments: Sequence[str]) -> Sequence[str]:
    """Raises VisualMemoryError for options that nobody takes, and for values Beam refuses.

    Another runner may have options that only its job server knows; they pass.
    """
    parsers: list[argparse.ArgumentParser] = []
    with contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            options = PipelineOptions(list(arguments))
            options.get_all_options(add_extra_args_fn=parsers.append)
            _, unknown = parsers[0].parse_known_args(list(arguments))
        except SystemExit:  # what argparse does about an unusable value, after pages of usage
            reason = said.getvalue().rpartition("error: ")[2].strip()
            raise VisualMemoryError(f"{reason}. See Beam's documentation of this option") from None
    runner = options.view_as(StandardOptions).runner or LOCAL_RUNNER
    try:
        create_runner(runner)
    except (ImportError, ValueError) as error:
        raise VisualMemoryError(f"--runner={runner}: {error}") from error
    if runner not in ("DirectRunner", LOCAL_RUNNER):
        unknown = [argument for argument in arguments[:1] if not argument.startswith("-")]
    if unknown:
        name = unknown[0].partition("=")[0]
        if name.startswith("-"):
            raise VisualMemoryError(
                f"unknown option {name}: neither this command nor Beam has it. See --help"
            )
        raise VisualMemoryError(f"unexpected argument {unknown[0]!r}. See --help")
    return arguments


def run(
    define: Callable[[beam.Pipeline], object],
    arguments: Sequence[str],
    stages: Mapping[str, int | None],
) -> None:
    """Runs a pipeline to its end, with progress bars where a terminal is watching.

    An error that a worker raised for the user comes out as the VisualMemoryError it
    was; Beam would wrap it in the worker's traceback.
    """
    options = pipeline_options(arguments)
    with progress.display(stages):
        try:
            with beam.Pipeline(options=options) as pipeline:
                define(pipeline)
        except Exception as error:
            raise _for_the_user(error) or error from None


def _for_the_user(error: Exception) -> VisualMemoryError | None:
    """The VisualMemoryError inside what a runner made of it: itself, or a traceback's text."""
    text = str(error)
    if not isinstance(error, VisualMemoryError):
        found = re.findall(
            r"\bvm_core(?:\.\w+)+Error: (.*?)(?=\n\n|\nTraceback|\Z)", text, re.DOTALL
        )
        if not found:
            return None
        text = found[-1]
    return VisualMemoryError(re.sub(r" \[while running '[^']*'\]\s*$", "", text.strip()))
