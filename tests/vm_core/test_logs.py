"""Log lines with stage and shard."""

from __future__ import annotations

import json
import logging
import sys

import pytest

from vm_core import logs
from vm_core.errors import VisualMemoryError
from vm_core.logs import JsonFormatter, TextFormatter
from vm_core.measure import Recorder


def record(message="two\nlines of %s", *arguments, **extra) -> logging.LogRecord:
    made = logging.LogRecord("vm_core.x", logging.WARNING, "x.py", 1, message, arguments, None)
    made.__dict__.update(extra)
    return made


def test_json_is_one_object_on_one_line():
    with Recorder("write", 3).active():
        line = JsonFormatter().format(record("two\nlines of %s", "\u2028text", metrics={"a": 1}))
    assert len(line.splitlines()) == 1
    fields = json.loads(line)
    assert fields.pop("time").endswith("+00:00")
    assert fields == {
        "level": "WARNING",
        "logger": "vm_core.x",
        "stage": "write",
        "shard": 3,
        "message": "two\nlines of \u2028text",
        "metrics": {"a": 1},
    }


def test_json_outside_of_stages_and_with_a_traceback():
    try:
        raise ValueError("the cause")
    except ValueError:
        line = JsonFormatter().format(record("failed", exc_info=sys.exc_info()))
    fields = json.loads(line)
    assert (fields["stage"], fields["shard"]) == (None, None)
    assert "ValueError: the cause" in fields["exception"]


def test_text():
    assert TextFormatter().format(record("failed")) == "WARNING failed"
    with Recorder("write", 0).active():
        assert TextFormatter().format(record("failed")) == "WARNING write 0: failed"
    with Recorder("publish").active():
        assert TextFormatter().format(record("failed")) == "WARNING publish: failed"


def test_an_unknown_format():
    with pytest.raises(VisualMemoryError, match=r"'xml' is not known.*--log-format=text or json"):
        logs.configure("xml", terminal=False)
