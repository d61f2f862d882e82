"""Runs a pipeline: options, progress, errors, and what it did."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
from collections.abc import Callable, Mapping, Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions, SetupOptions, StandardOptions
from apache_beam.runners import create_runner
from rich.console import Console

from pipelines import measuring
from vm_core import logs, progress, run_report
from vm_core.errors import VisualMemoryError

# The DirectRunner tries to download and start Prism first and falls back to this one.
LOCAL_RUNNER = "FnApiRunner"

_log = logging.getLogger(__name__)
# Of this process, by the file that tells of them: a command may run several pipelines.
_runs: dict[str, dict[str, run_report.RunMetrics]] = {}


class RunOptions(PipelineOptions):
    """The project's own options, among Beam's."""

    @classmethod
    def _add_argparse_args(cls, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--metrics-out",
            "--metrics_out",
            metavar="FILE",
            help="writes the metrics of the run: FILE.json, or FILE.prom for Prometheus",
        )


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
    if (metrics_out := options.view_as(RunOptions).metrics_out) is not None:
        run_report.check_path(metrics_out)
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
    name: str = "run",
) -> run_report.RunMetrics | None:
    """Runs a pipeline to its end, with progress bars where a terminal is watching.

    Tells on standard error what the stages did, writes it to the file of --metrics-out, and
    returns it: None where the runner keeps no metrics. name: of the run, there. stages: the
    bars, see progress.display. With JSON logs a line of the log stands for all of that.

    An error that a worker raised for the user comes out as the VisualMemoryError it was;
    Beam would wrap it in the worker's traceback.
    """
    options = pipeline_options(arguments)
    console = Console(stderr=True, quiet=logs.chosen() == "json")
    with progress.display(stages, console):
        try:
            with beam.Pipeline(options=options) as pipeline:
                define(pipeline)
        except Exception as error:
            raise _for_the_user(error) or error from None
    metrics = measuring.collect(pipeline.result)
    console.print(run_report.of_run(name, metrics))
    _log.info("%s is done", name, extra={"metrics": run_report.as_json(metrics or {})})
    if path := options.view_as(RunOptions).metrics_out:
        runs = _runs.setdefault(path, {})
        runs[name] = metrics or {}
        run_report.write(path, runs)
    return metrics


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
