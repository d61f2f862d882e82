"""What the stages record, as Beam's metrics: passed on by workers, collected after a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Iterator
from functools import cache
from typing import Any

from apache_beam.metrics import Metrics
from apache_beam.metrics.metric import MetricsFilter
from apache_beam.runners.runner import PipelineResult

from pipelines.reporting import reporting
from vm_core import logs, progress
from vm_core.measure import Recorder
from vm_core.run_report import Distribution, RunMetrics

NAMESPACE = "visual_memory"


def measured(
    stage: str,
    function: Callable[..., Any],
    shard: Callable[..., int | str | None] | None = None,
) -> Callable[..., Any]:
    """The function, for Beam to call with an element, as a stage of a run.

    What it records while it works on an element becomes Beam's metrics when it is done
    with it: a few calls an element. If it yields its results, what others do with one
    before it goes on is not its work. A failed call passes nothing on; Beam repeats it.

    shard: says of a call's arguments which shard, partition or split it is, for the logs.
    Left out, it is the element if that is a number, or the first of its fields.
    """
    # A method, since of other callable objects Beam takes none with side inputs.
    return _Measured(stage, function, shard or _number).call


class _Measured:
    def __init__(self, stage: str, function: Callable[..., Any], shard: Callable[..., Any]):
        self._stage, self._function, self._shard = stage, function, shard
        self._log_format = logs.chosen()

    def call(self, *arguments: Any) -> Any:
        if self._log_format is not None and logs.chosen() is None:
            # In a worker's process. Beam's local runner drops what its processes log.
            logs.configure(self._log_format, terminal=progress.is_heard())
        recorder = Recorder(self._stage, self._shard(*arguments))
        with recorder.active(), reporting():
            result = self._function(*arguments)
        if isinstance(result, Generator):
            return _stepwise(recorder, result)
        _pass_on(recorder)
        return result


def _number(element: Any, *_: Any) -> int | None:
    if isinstance(element, tuple) and element:
        element = element[0]
    return element if isinstance(element, int) else None


def _stepwise(recorder: Recorder, results: Iterator[Any]) -> Iterator[Any]:
    while True:
        with recorder.active(), reporting():
            try:
                result = next(results)
            except StopIteration:
                break
        yield result
    _pass_on(recorder)


def _pass_on(recorder: Recorder) -> None:
    stage = recorder.stage
    _distribution(f"{stage}_work_ms").update(round(1e3 * recorder.seconds))
    for name, number in recorder.counters.items():
        _counter(f"{stage}_{name}").inc(round(number))
    for name, values in recorder.values.items():
        for value in values:
            _distribution(f"{stage}_{name}").update(value)


@cache
def _counter(name: str) -> Metrics.DelegatingCounter:
    return Metrics.counter(NAMESPACE, name)


@cache
def _distribution(name: str) -> Metrics.DelegatingDistribution:
    return Metrics.distribution(NAMESPACE, name)


def collect(result: PipelineResult) -> RunMetrics | None:
    """The metrics of a finished run, None where its runner keeps none.

    They count committed work alone where the runner knows it, else every attempt.
    """
    try:
        found = result.metrics().query(MetricsFilter().with_namespace(NAMESPACE))
    except Exception as error:  # each runner's own way to say that it has none
        logging.getLogger(__name__).info("the runner has no metrics: %s", error)
        return None
    totals: RunMetrics = {}
    for metric in found["counters"]:
        name = metric.key.metric.name
        value = metric.attempted if metric.committed is None else metric.committed
        totals[name] = totals.get(name, 0) + value
    for metric in found["distributions"]:
        name = metric.key.metric.name
        value = metric.attempted if metric.committed is None else metric.committed
        one = Distribution(value.count, value.sum, value.min, value.max)
        totals[name] = one.merged(totals[name]) if name in totals else one
    return dict(sorted(totals.items())) or None
