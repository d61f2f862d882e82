"""All bytes go in and out through here: local paths and every URL that a store knows.

Paths are plain strings, local (``/data/memory``) or with a scheme
(``gs://bucket/memory``); the functions below do not care which. Files are written
once and appear whole: a reader sees the complete file or none. What another process has
written is seen at once, and what is written to a disk survives a loss of power.

Raises MissingFileError where there is no file, StorageError where a disk or a store
refuses (both are OSErrors with a text for people), and UnreachableError where a store does
not answer.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import posixpath
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import IO, Any

from vm_core.errors import DamagedError, StorageError, VisualMemoryError
from vm_core.relative_paths import check_relative
from vm_core.stores import INCOMPLETE, FileInfo, Store, explained, local
from vm_core.stores.local import LocalStore, locked, remove_temporaries

__all__ = ["FileInfo", "remove_temporaries"]

_log = logging.getLogger(__name__)

_LOCAL = LocalStore()
_THREADS = 16
_TEMPORARY = re.compile(re.escape(INCOMPLETE) + "[0-9a-f]{12}$")


def _store(path: str) -> Store:
    scheme, separator, _ = path.partition("://")
    if not separator or scheme in ("file", "local"):
        return _LOCAL
    if re.match(r"gc?s://(/|$)", path):
        raise VisualMemoryError(f"{path!r} names no bucket. Write gs://BUCKET/FOLDER")
    try:
        if scheme in ("gs", "gcs"):
            from vm_core.stores import google  # an extra of this package

            return google.connect()
        return _other_store(scheme, os.getpid())
    except (ImportError, ValueError) as error:
        raise VisualMemoryError(
            f"cannot open {path!r}: {error}. Install the file system's package "
            "(for gs:// run: pip install 'visual-memory[gcs]') or use a local path"
        ) from error


@lru_cache(maxsize=8)
def _other_store(scheme: str, process: int) -> Store:
    from vm_core.stores.other import OtherStore  # fsspec takes a while to import

    return OtherStore(scheme)


def is_local(path: str) -> bool:
    """Whether the path is on this machine; asks no store, which may look for credentials."""
    return "://" not in path or path.startswith(("file://", "local://"))


def join(root: str, *parts: str) -> str:
    """Joins path pieces with ``/``, whatever the scheme of ``root``."""
    return posixpath.join(root, *parts)


def inside(root: str, relative: str) -> str:
    """The path of a file below ``root`` whose relative path comes from data.

    Raises VisualMemoryError if it leads outside, by its text or by a symbolic link.
    """
    try:
        path = join(root, check_relative(relative))
    except ValueError as error:
        raise VisualMemoryError(f"{root!r} names a file outside of it: {error}") from None
    if is_local(path):
        real_root = os.path.realpath(absolute(root))
        real = os.path.realpath(absolute(path))
        if os.path.commonpath([real_root, real]) != real_root:
            raise VisualMemoryError(
                f"{path} is a link to {real!r}, outside of {root!r}: it is not followed. Replace "
                "the link by what it leads to"
            )
    return path


def absolute(path: str) -> str:
    """The path as every process sees it: local paths made absolute, URLs untouched.

    Raises VisualMemoryError for a URL that has lost one of its slashes.
    """
    if re.match(r"(gs|gcs|s3|az|abfs|https?):/[^/]", path):
        raise VisualMemoryError(
            f"{path!r} is no URL, and hardly a local path. Write {path.replace(':/', '://', 1)!r}"
        )
    return os.path.abspath(os.path.expanduser(path)) if is_local(path) else path


def exists(path: str) -> bool:
    """Whether there is a file or a folder of this name."""
    with explained("read", path):
        return _store(path).exists(path)


def is_file(path: str) -> bool:
    """Whether there is a file of this name; the quickest question to a bucket."""
    with explained("read", path):
        return _store(path).is_file(path)


def is_directory(path: str) -> bool:
    with explained("read", path):
        return _store(path).is_directory(path)


@contextlib.contextmanager
def open_read(path: str) -> Iterator[IO[bytes]]:
    """Opens a regular file, seekable. Errors of reading it in the block are explained."""
    with explained("read", path), _store(path).open_read(path) as file:
        yield file


def read_bytes(path: str, limit: int | None = None) -> bytes:
    """The content of a regular file. Raises StorageError if it has more than ``limit`` bytes."""
    with explained("read", path):
        data = _store(path).read_bytes(path, None if limit is None else limit + 1)
        if limit is not None and len(data) > limit:
            text = f"cannot read {path!r}: it has more than {limit:,} bytes"
            raise StorageError(errno.EFBIG, text, path)
        return data


def read_verified(path: str, sha256: str, remedy: str) -> bytes:
    """The content of a file. Raises DamagedError, with the remedy, if it is not as it was."""
    try:
        data = read_bytes(path)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing. {remedy}") from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise DamagedError(f"{path} is damaged: it is not what was written. {remedy}")
    return data


def read_if_exists(path: str) -> bytes | None:
    """The content of a file, None if there is no such file."""
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return None


def list_files(pattern: str) -> list[FileInfo]:
    """Every file that matches a glob pattern (``**`` crosses folders), sorted by path."""
    with explained("list", pattern):
        return _store(pattern).list_files(pattern)


def walk(root: str) -> list[FileInfo]:
    """Every file under a folder, sorted by path; links are followed, each real folder once.

    The paths begin with ``root`` as it is given, made absolute. A link to nothing is
    listed as well, so that whoever reads it says why it cannot be.
    """
    with explained("list", root):
        return _store(root).walk(root)


def stamp(path: str) -> str:
    """Size and change time of a local file; empty if there is none, or it is not local."""
    if not is_local(path):
        return ""
    try:
        return "{0.st_size} {0.st_mtime_ns}".format(os.stat(absolute(path)))
    except (OSError, ValueError):
        return ""


@contextlib.contextmanager
def write_atomic(path: str) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears under its name only when complete.

    Runners start redundant and repeated attempts of the same work. Each attempt
    writes under a name of its own and the last step is a rename, so a reader or
    a second attempt never meets half a file.
    """
    with explained("write", path), _store(path).write_atomic(path) as file:
        yield file


def write_bytes(path: str, data: bytes) -> None:
    with explained("write", path):
        _store(path).write_bytes(path, data)


def swap(path: str, old: bytes | None, new: bytes) -> bool:
    """Replaces a file's content if it still is ``old``; None: if there is no such file.

    False if it is something else by now: another process was faster, and nothing is
    changed. Of several that swap the same ``old`` for different content one succeeds, on a
    disk and on Google Cloud Storage. Other stores are only asked what is there before it
    is written.
    """
    with explained("write", path):
        return _store(path).swap(path, old, new)


def check_writable(folder: str) -> None:
    """Writes and removes a file in a folder, before hours of work that would end in it.

    Raises VisualMemoryError if that fails.
    """
    path = join(folder, f".writable{INCOMPLETE}{uuid.uuid4().hex[:12]}")
    try:
        write_bytes(path, b"")
        remove_file(path)
    except OSError as error:
        cause = os.strerror(error.errno) if error.errno else str(error)
        raise StorageError(
            error.errno,
            f"cannot write to {folder!r}: {cause}. Give another place, or get the right to "
            "write, and remove, files there",
            folder,
        ) from error


@contextlib.contextmanager
def write_directory_atomic(path: str) -> Iterator[str]:
    """Yields a local folder to fill; on success it replaces the folder at ``path``.

    For libraries that can only write a folder of files. On an object store the
    files are uploaded one by one: write a marker beside them afterwards.
    """
    with temporary_directory(path) as folder:
        yield folder
        move_directory(folder, path)


@contextlib.contextmanager
def temporary_directory(path: str) -> Iterator[str]:
    """Yields a local folder to fill, for ``move_directory`` to a place beside ``path``."""
    with explained("write", path), _store(path).temporary_directory(path) as folder:
        yield folder


def move_directory(folder: str, path: str) -> None:
    """Puts a local folder in the place of the one at ``path``, if there is one.

    On a disk by a rename; on an object store file by file.
    """
    with explained("write", path):
        _store(path).move_directory(folder, path)


@contextlib.contextmanager
def local_copy(path: str, names: Sequence[str] | None = None) -> Iterator[str]:
    """A local path with the content of a file or folder: itself, or a temporary download.

    names: the files below the folder that are needed, all if None. Raises FileNotFoundError
    if the store has not got them; of a local path nothing is looked at. Raises
    VisualMemoryError if a file's name leads out of the folder.
    """
    listed = None if names is None else list(names)
    with contextlib.ExitStack() as stack:
        with explained("read", path):
            copy = stack.enter_context(_store(path).local_copy(path, listed))
        yield copy


def remove_file(path: str) -> None:
    """Removes a file; one that is not there is no error."""
    with explained("remove", path):
        _store(path).remove_file(path)


def remove_directory(path: str) -> None:
    """Removes a folder and all in it; a folder that is not there is no error."""
    with explained("remove", path):
        _store(path).remove_directory(path)


@contextlib.contextmanager
def exclusive(path: str, what: str) -> Iterator[None]:
    """Lets one run at a time, of all processes of a machine, into the block; others wait.

    path: of a lock file, gone afterwards. what: is going on, for the log. On an object store
    nobody waits: there runs do the same work side by side, and all of it is the same.
    """

    def waiting() -> None:
        _log.warning("another run is %s: waiting for it to end (%s)", what, path)

    with contextlib.ExitStack() as stack:
        if is_local(path):
            with explained("lock", path):
                stack.enter_context(locked(path, waiting))
        yield


def is_locked(path: str) -> bool:
    """Whether a run is inside a block of ``exclusive``; changes nothing."""
    with explained("lock", path):
        return is_local(path) and local.is_locked(path)


def leftovers(folder: str, seconds: float = 0.0) -> list[FileInfo]:
    """What killed processes left below a local folder under temporary names.

    seconds: how long ago it was last written, at least. size: in bytes, of all that is in it.
    On an object store there is nothing of the kind.
    """
    if not is_local(folder):
        return []
    found = []
    for path, folders, files in os.walk(absolute(folder)):
        for name in filter(_TEMPORARY.search, [*folders, *files]):
            left = os.path.join(path, name)
            inner = [left, *(os.path.join(p, f) for p, _, fs in os.walk(left) for f in fs)]
            with contextlib.suppress(FileNotFoundError):  # finished or removed meanwhile
                statuses = [os.lstat(each) for each in inner]
                changed = max(status.st_mtime for status in statuses)
                if time.time() - changed >= seconds:
                    size = sum(s.st_size for s in statuses[1 if name in folders else 0 :])
                    found.append(FileInfo(left, size, str(changed)))
        folders[:] = [each for each in folders if not _TEMPORARY.search(each)]
    return sorted(found)


def remove_leftovers(folder: str, seconds: float = 0.0) -> None:
    """Removes what ``leftovers`` finds."""
    for left in leftovers(folder, seconds):
        if os.path.isdir(left.path) and not os.path.islink(left.path):
            shutil.rmtree(left.path, ignore_errors=True)
        else:
            remove_file(left.path)


class HashingWriter(io.RawIOBase):
    """Passes bytes on to a file, counting and hashing them."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.bytes = 0
        self.sha256 = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.bytes += memoryview(data).nbytes
        self.sha256.update(data)
        return self._file.write(data)


def sha256_file(path: str) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with open_read(path) as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def damaged(root: str, files: Mapping[str, str]) -> dict[str, str]:
    """Which files are not as they were written, by name, and what is the matter with them.

    files: the SHA-256 of each by its path below ``root``.
    """

    def examine(name: str) -> str:
        try:
            digest = sha256_file(inside(root, name))
        except FileNotFoundError:
            return "is missing"
        except StorageError as error:
            return f"cannot be read: {error}"
        right = files[name]
        return "" if digest == right else f"is damaged: its SHA-256 is {digest}, not {right}"

    with ThreadPoolExecutor(_THREADS) as pool:
        found = dict(zip(files, pool.map(examine, files), strict=True))
    return {name: said for name, said in found.items() if said}
