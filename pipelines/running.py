"""Runs a pipeline: options, progress, errors, and what it did."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    TestOptions,
)
from apache_beam.runners import create_runner
from apache_beam.runners.portability.fn_api_runner import worker_handlers

from pipelines import commands, hints, measuring, reporting
from vm_core import logs, progress, run_report, storage
from vm_core.errors import VisualMemoryError
from vm_core.terminal import console as make_console

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
    if options.view_as(hints.HintOptions).encode_accelerator:
        # Dataflow starts a process per core, and each would load a model into the same
        # accelerator. In one process the threads share it (embedding.LazyEncoder), and
        # decoding, encoding and searching run outside Python's lock.
        options.view_as(DebugOptions).add_experiment("no_use_multiple_sdk_containers")
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
    hints.check(options)
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


def check_reachable(arguments: Sequence[str], *paths: str) -> None:
    """Raises VisualMemoryError for local files where the workers are other machines."""
    if not _is_dataflow(pipeline_options(arguments)):
        return
    if local := [path for path in paths if storage.is_local(path)]:
        raise VisualMemoryError(
            f"--runner=DataflowRunner: its workers cannot reach the local path {local[0]!r}. Copy "
            "it to a bucket and give gs://BUCKET/PATH"
        )


def check_waits(arguments: Sequence[str]) -> None:
    """Raises VisualMemoryError for options that hand a pipeline over without waiting for it."""
    if remark := _handed_over(pipeline_options(arguments)):
        raise VisualMemoryError(
            "this command runs several pipelines and looks at each one's results, but with these "
            f"options {remark}. Leave out --template_location, --dry_run and "
            "--no_wait_until_finish"
        )


def _is_dataflow(options: PipelineOptions) -> bool:
    return str(options.view_as(StandardOptions).runner).lower().endswith("dataflowrunner")


def _handed_over(options: PipelineOptions) -> str | None:
    """What becomes of the pipeline, unless this process waits for its end."""
    if template := options.view_as(GoogleCloudOptions).template_location:
        return f"the job is written to {template} and runs when that is launched"
    if options.view_as(TestOptions).dry_run:
        return "the job is made and not run"
    if options.view_as(StandardOptions).no_wait_until_finish:
        return "the job runs elsewhere; when it is done, the same command shows its results"
    return None


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
    Beam would wrap it in the worker's traceback. Raises commands.HandedOver where the
    options say that the pipeline's end is not waited for.
    """
    options = pipeline_options(arguments)
    console = make_console(stderr=True, quiet=logs.chosen() == "json")
    shown: contextlib.AbstractContextManager[None] = progress.display(stages, console)
    if _is_dataflow(options):  # says itself where the job can be watched, and how it fares
        logging.getLogger("apache_beam.runners.dataflow").setLevel(logging.INFO)
        shown = contextlib.nullcontext()
    with shown:
        try:
            with _whole_elements(), beam.Pipeline(options=options) as pipeline:
                define(pipeline)
        except Exception as error:
            raise _for_the_user(error) or error from None
    if remark := _handed_over(options):
        raise commands.HandedOver(remark)
    metrics = measuring.collect(pipeline.result)
    console.print(run_report.of_run(name, metrics))
    _log.info("%s is done", name, extra={"metrics": run_report.as_json(metrics or {})})
    if path := options.view_as(RunOptions).metrics_out:
        runs = _runs.setdefault(path, {})
        runs[name] = metrics or {}
        run_report.write(path, runs)
    return metrics


@contextlib.contextmanager
def _whole_elements() -> Iterator[None]:
    """Workers that are threads send when a buffer is full or the bundle ends, during the block.

    Otherwise they send once a second as well, from another thread and without a lock: an
    element is cut in two and arrives as something else. Beam has no option for it.
    """
    before = worker_handlers.DATA_BUFFER_TIME_LIMIT_MS
    worker_handlers.DATA_BUFFER_TIME_LIMIT_MS = 0
    try:
        yield
    finally:
        worker_handlers.DATA_BUFFER_TIME_LIMIT_MS = before


def _for_the_user(error: Exception) -> VisualMemoryError | None:
    """The error for the user in what a runner raised, None if it is a bug."""
    if isinstance(error, VisualMemoryError):  # of this process
        return error
    text = reporting.find(str(error))
    return _given_up(error) if text is None else VisualMemoryError(text)


def _given_up(error: Exception) -> VisualMemoryError | None:
    """What a runner says that lost a worker, or that was lost itself; None for other errors."""
    if isinstance(error, grpc.RpcError):
        reason = str(error.details() if isinstance(error, grpc.Call) else error)
    else:
        found = re.match(r"Pipeline \S+ failed in state \w+: (.+)", str(error), re.DOTALL)
        if found is None or "Traceback" in found[1]:
            return None
        reason = found[1]
    return VisualMemoryError(
        f"the runner gave up: {' '.join(reason.split())}. Start the same command again: it goes "
        "on with what is finished"
    )
