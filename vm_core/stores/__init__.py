"""Kinds of stores, one class each: a disk, Google Cloud Storage, whatever else fsspec knows.

``vm_core.storage`` picks the store of a path and is what the rest of the code calls.
"""

from __future__ import annotations

import abc
import errno
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import IO, NamedTuple

from vm_core.errors import MissingFileError, StorageError, VisualMemoryError

TIMEOUT_VARIABLE = "VISUAL_MEMORY_STORAGE_TIMEOUT"
DEFAULT_TIMEOUT = 60.0

INCOMPLETE = ".incomplete-"
"""Part of the names of files and folders that are being written."""


def timeout() -> float:
    """Seconds after which a store that does not answer is given up, retries included.

    From the environment variable VISUAL_MEMORY_STORAGE_TIMEOUT; 60 if it is not set. A
    request that is on its way then may take half as long again.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text) if text else DEFAULT_TIMEOUT
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise VisualMemoryError(
            f"{TIMEOUT_VARIABLE} is {text!r}. Give seconds, more than 0 and at most 3600"
        )
    return seconds


class FileInfo(NamedTuple):
    """A file as a listing shows it; ``version`` changes when the content does."""

    path: str
    size: int
    version: str


class Store(abc.ABC):
    """Files by their full paths, as users write them. Errors of the operating system escape.

    A file is written once and appears whole. What another process has written is seen at once.
    """

    @abc.abstractmethod
    def is_file(self, path: str) -> bool: ...

    @abc.abstractmethod
    def is_directory(self, path: str) -> bool: ...

    @abc.abstractmethod
    def exists(self, path: str) -> bool: ...

    @abc.abstractmethod
    def open_read(self, path: str) -> IO[bytes]:
        """A seekable file. Raises FileNotFoundError, or StorageError if it is no regular file."""

    @abc.abstractmethod
    def read_bytes(self, path: str, limit: int | None) -> bytes:
        """The content of a file, or its first ``limit`` bytes."""

    @abc.abstractmethod
    def list_files(self, pattern: str) -> list[FileInfo]: ...

    @abc.abstractmethod
    def walk(self, root: str) -> list[FileInfo]: ...

    @abc.abstractmethod
    def write_bytes(self, path: str, data: bytes) -> None: ...

    @abc.abstractmethod
    def write_atomic(self, path: str) -> AbstractContextManager[IO[bytes]]: ...

    @abc.abstractmethod
    def swap(self, path: str, old: bytes | None, new: bytes) -> bool: ...

    @abc.abstractmethod
    def temporary_directory(self, path: str) -> AbstractContextManager[str]: ...

    @abc.abstractmethod
    def move_directory(self, local: str, path: str) -> None: ...

    @abc.abstractmethod
    def local_copy(self, path: str, names: list[str] | None) -> AbstractContextManager[str]: ...

    @abc.abstractmethod
    def remove_file(self, path: str) -> None: ...

    @abc.abstractmethod
    def remove_directory(self, path: str) -> None: ...


_REMEDIES = {
    errno.ENOSPC: "Free some space there, or give another place",
    errno.EDQUOT: "Free some space there, or give another place",
    errno.EACCES: "Get the right to do that, or give another place",
    errno.EPERM: "Get the right to do that, or give another place",
    errno.EROFS: "Give a place that can be written to",
    errno.EMFILE: "Allow more open files: ulimit -n 65536",
    errno.ENFILE: "Allow more open files, for the whole system",
    errno.ENAMETOOLONG: "Give a shorter path",
    errno.EIO: "Check the disk",
}


@contextmanager
def explained(action: str, path: str) -> Iterator[None]:
    """Errors of the operating system become errors with a text for people.

    Of reading, those without a number stay: a library says so that the content is damaged.

    action: what was tried, such as "read". path: of the file, in the words of the user.
    """
    try:
        yield
    except VisualMemoryError:
        raise
    except FileNotFoundError as error:
        text = f"cannot {action} {path!r}: {os.strerror(errno.ENOENT)}"
        raise MissingFileError(errno.ENOENT, text, path) from error
    except OSError as error:
        if error.errno is None and action == "read" and type(error) is OSError:
            raise
        cause = os.strerror(error.errno) if error.errno else str(error) or type(error).__name__
        temporary = INCOMPLETE in str(error.filename or INCOMPLETE)
        place = path if temporary else str(error.filename)
        remedy = _REMEDIES.get(error.errno or 0, "")
        text = f"cannot {action} {place!r}: {cause}" + (f". {remedy}" if remedy else "")
        raise StorageError(error.errno, text, place) from error
    except ValueError as error:
        if "null byte" not in str(error) and not isinstance(error, UnicodeEncodeError):
            raise
        text = f"cannot {action} {path!r}: no file can have this name ({error})"
        raise StorageError(errno.EINVAL, text, path) from error
