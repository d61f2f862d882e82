"""Errors of workers, on their way to the user.

A runner passes on the text of a worker's exception, wrapped in tracebacks of its own. So an
error that is meant for the user carries its text once more, encoded, behind a mark that
can be found in whatever the runner makes of it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any

from vm_core.errors import VisualMemoryError

_MARK = "visual-memory-error:"


class WorkerError(Exception):
    """An error for the user, raised in a worker."""

    def __init__(self, text: str):
        encoded = base64.urlsafe_b64encode(text.encode(errors="backslashreplace")).decode()
        super().__init__(f"{text} [{_MARK}{encoded}]")


def find(text: str) -> str | None:
    """The text of the first WorkerError in what a runner reports, None if there is none."""
    _, mark, rest = text.partition(_MARK)
    encoded = rest.partition("]")[0]
    try:
        return base64.urlsafe_b64decode(encoded).decode() if mark else None
    except (binascii.Error, UnicodeDecodeError):  # cut off on its way
        return None


@contextmanager
def reporting() -> Iterator[None]:
    """What a user can do something about is raised as a WorkerError, a bug as it is."""
    try:
        yield
    except VisualMemoryError as error:
        raise WorkerError(str(error)) from error
    except OSError as error:
        place = f" ({error.filename})" if error.filename else ""
        text = f"a worker failed: {error.strerror or error}{place}. Start the same command again"
        raise WorkerError(text) from error
    except MemoryError as error:
        text = "a worker ran out of memory. Give workers more, or make smaller partitions"
        raise WorkerError(text) from error


def reported(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, for Beam to call, with its errors reported."""
    # A method, since of other callable objects Beam takes none with side inputs.
    return _Reported(function).call


class _Reported:
    def __init__(self, function: Callable[..., Any]):
        self._function = function

    def call(self, *arguments: Any) -> Any:
        with reporting():
            result = self._function(*arguments)
        return _stepwise(result) if isinstance(result, Generator) else result


def _stepwise(results: Iterator[Any]) -> Iterator[Any]:
    while True:
        with reporting():
            try:
                result = next(results)
            except StopIteration:
                return
        yield result
