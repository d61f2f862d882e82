"""What stages record: from all their threads, and never into each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from vm_core import measure
from vm_core.measure import Recorder


def test_nothing_is_recorded_where_nobody_listens():
    measure.count("read_bytes", 3)
    measure.observe("batch_images", 3)
    with measure.timed("model_ms"):
        pass
    recorder = Recorder("embed")
    with recorder.active():
        pass
    assert measure.current() is None
    assert (recorder.counters, recorder.values) == ({}, {})


def test_counts_values_and_times():
    recorder = Recorder("embed", 3)
    with recorder.active():
        measure.count("read_bytes", 3)
        measure.count("read_bytes", 4)
        measure.count_reuse("splits", True)
        measure.count_reuse("splits", False)
        measure.observe("batch_images", 8)
        measure.observe("batch_images", 2)
        with pytest.raises(ValueError), measure.timed("model_ms"):
            raise ValueError
        assert measure.current() is recorder
    assert recorder.counters.pop("model_ms") >= 0
    assert recorder.counters == {"read_bytes": 7, "reused_splits": 1, "fresh_splits": 1}
    assert recorder.values == {"batch_images": [8, 2]}


def test_an_inner_stage_keeps_its_own():
    """A runner may call one stage in the middle of another, when that yields."""
    outer, inner = Recorder("outer"), Recorder("inner")
    with outer.active():
        measure.count("calls")
        with inner.active():
            measure.count("calls", 10)
        measure.count("calls")
    assert (outer.counters, inner.counters) == ({"calls": 2}, {"calls": 10})


def test_threads_of_a_pool_record_for_the_stage_that_sent_them_work():
    """Two stages at once share a pool; each gets just what was done for it."""
    stages = {name: Recorder(name) for name in ("one", "two")}
    together = threading.Barrier(2)

    def work(number: int) -> None:
        measure.count("items")
        measure.count("sum", number)

    def run(name: str, number: int) -> None:
        with stages[name].active():
            together.wait()
            list(pool.map(measure.carried(work), [number] * 2000))

    with ThreadPoolExecutor(4) as pool:
        callers = [threading.Thread(target=run, args=pair) for pair in (("one", 1), ("two", 7))]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
        assert set(pool.map(lambda _: measure.current(), range(100))) == {None}
    assert stages["one"].counters == {"items": 2000, "sum": 2000}
    assert stages["two"].counters == {"items": 2000, "sum": 14000}
