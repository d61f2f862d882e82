"""Log lines that say which stage and shard they are about, as text or as JSON."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime
from typing import Any

from vm_core import measure
from vm_core.errors import VisualMemoryError
from vm_core.terminal import printable

FORMATS = ("text", "json")
VARIABLE = "VISUAL_MEMORY_LOG_FORMAT"

_OURS = ("vm_core", "pipelines")
_chosen: str | None = None


def chosen() -> str | None:
    """The format that ``configure`` was last given in this process, None if it never was."""
    return _chosen


def configure(format: str, terminal: bool) -> None:
    """Sets up logging in this process, a command's or a worker's.

    text: warnings, one line each. json: one object a line, with the project's own events
    besides. terminal: also write to standard error. Handlers that are there, such as the one
    by which a worker sends its log to the runner, stay; with json they write JSON as well.
    Raises VisualMemoryError.
    """
    global _chosen
    if format not in FORMATS:
        raise VisualMemoryError(
            f"log format {format!r} is not known. Give --log-format={' or '.join(FORMATS)}"
        )
    _chosen = format
    root = logging.getLogger()
    if terminal:
        handler = logging.StreamHandler()
        handler.setFormatter(TextFormatter())
        handler.addFilter(_is_for_the_terminal)
        root.addHandler(handler)
    if format == "json":
        for each in root.handlers:
            each.setFormatter(JsonFormatter())
            each.addFilter(_is_worth_a_line)
        root.setLevel(logging.INFO)


def _is_for_the_terminal(record: logging.LogRecord) -> bool:
    # Beam logs a user's error with its traceback before it raises it.
    if record.name.startswith("apache_beam"):
        return record.levelno >= logging.CRITICAL
    return record.levelno >= logging.WARNING or _chosen == "json"


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.name.partition(".")[0] in _OURS


class TextFormatter(logging.Formatter):
    """``WARNING write 3: message``."""

    def format(self, record: logging.LogRecord) -> str:
        recorder = measure.current()
        if recorder is None:
            return f"{record.levelname} {printable(super().format(record))}"
        shard = "" if recorder.shard is None else f" {recorder.shard}"
        return f"{record.levelname} {recorder.stage}{shard}: {printable(super().format(record))}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, stage, shard, message.

    Where it applies also ``exception``, a traceback, and ``metrics`` of a finished run.
    """

    def format(self, record: logging.LogRecord) -> str:
        recorder = measure.current()
        time = datetime.fromtimestamp(record.created, UTC)
        fields: dict[str, Any] = {
            "time": time.isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "stage": recorder and recorder.stage,
            "shard": recorder and recorder.shard,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if hasattr(record, "metrics"):
            fields["metrics"] = record.metrics
        return json.dumps(fields)
