"""Errors that a user is meant to read: they are shown without a traceback."""

from __future__ import annotations

import os


class VisualMemoryError(Exception):
    """Something the user can mend. The text names the value, the cause and the remedy."""


class DamagedError(VisualMemoryError):
    """A file does not hold what was written to it. The text names the file."""


class UnreachableError(VisualMemoryError):
    """A store does not answer. It says nothing about the file that was asked for."""


class StorageError(VisualMemoryError, OSError):
    """A disk or a store refuses: it is full, read-only, or the user lacks the right.

    It is an OSError too, with ``errno``, ``strerror`` (the cause alone) and ``filename``.
    """

    def __init__(self, errno: int | None, text: str, path: str | None = None):
        super().__init__(errno, os.strerror(errno) if errno else text, path)
        self.text = text

    def __str__(self) -> str:
        return self.text

    def __reduce__(self) -> tuple:
        return type(self), (self.errno, self.text, self.filename)


class MissingFileError(StorageError, FileNotFoundError):
    """There is no file of this name."""
