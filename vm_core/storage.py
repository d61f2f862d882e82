"""All bytes go in and out through here: local paths and every URL that fsspec knows.

Paths are plain strings, local (``/data/memory``) or with a scheme
(``gs://bucket/memory``); the functions below do not care which. Files are written
once and appear whole: a reader sees the complete file or none. What another process has
written is seen at once. Raises UnreachableError where a store does not answer.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import posixpath
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, NamedTuple

import fsspec
from fsspec.implementations.local import LocalFileSystem

from vm_core.errors import VisualMemoryError
from vm_core.relative_paths import check_relative

_GOOGLE = ("gs://", "gcs://")
_REQUESTS = 16  # at a time
_INCOMPLETE = ".incomplete-"


class FileInfo(NamedTuple):
    """A file as a listing shows it; ``version`` changes when the content does."""

    path: str
    size: int
    version: str


def _filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    if "://" not in path:  # fsspec would split a local name at "::"
        return LocalFileSystem(), LocalFileSystem._strip_protocol(path)
    if re.match(r"gc?s://(/|$)", path):
        raise VisualMemoryError(f"{path!r} names no bucket. Write gs://BUCKET/FOLDER")
    try:
        if path.startswith(_GOOGLE):
            from vm_core import google_storage  # an extra of this package

            return google_storage.connect(), path.partition("://")[2]
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise VisualMemoryError(
            f"cannot open {path!r}: {error}. Install the file system's package "
            "(for gs:// run: pip install 'visual-memory[gcs]') or use a local path"
        ) from error


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
        real_root = os.path.realpath(_filesystem(root)[1])
        real = os.path.realpath(_filesystem(path)[1])
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
    filesystem, name = _filesystem(path)
    return bool(filesystem.exists(name))


def is_file(path: str) -> bool:
    """Whether there is a file of this name; the quickest question to a bucket."""
    filesystem, name = _filesystem(path)
    if path.startswith(_GOOGLE):
        return bool(filesystem.is_file(name))
    return bool(filesystem.isfile(name))


def is_directory(path: str) -> bool:
    filesystem, name = _filesystem(path)
    return bool(filesystem.isdir(name))


def open_read(path: str) -> IO[bytes]:
    filesystem, name = _filesystem(path)
    with _missing_as(path):
        return filesystem.open(name, "rb")


def read_bytes(path: str) -> bytes:
    filesystem, name = _filesystem(path)
    with _missing_as(path):
        return bytes(filesystem.cat_file(name))


@contextlib.contextmanager
def _missing_as(path: str) -> Iterator[None]:
    """A missing file is reported alike from every store: the text goes into quarantine tables."""
    try:
        yield
    except FileNotFoundError as error:
        raise _no_file(path) from error


def _no_file(path: str) -> FileNotFoundError:
    return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)


def read_if_exists(path: str) -> bytes | None:
    """The content of a file, None if there is no such file."""
    try:
        return read_bytes(path)
    except FileNotFoundError:
        return None


def list_files(pattern: str) -> list[FileInfo]:
    """Every file that matches a glob pattern (``**`` crosses folders), sorted by path."""
    filesystem, name = _filesystem(pattern)
    if isinstance(filesystem, LocalFileSystem):
        # fsspec's would leave out links to files.
        paths = {path for path in glob.iglob(name, recursive=True) if os.path.isfile(path)}
        return sorted(_local_file(path, os.stat(path)) for path in paths)
    found = filesystem.glob(name, detail=True).values()
    return sorted(
        _remote_file(filesystem.unstrip_protocol(details["name"]), details)
        for details in found
        if details["type"] == "file"
    )


def walk(root: str) -> list[FileInfo]:
    """Every file under a folder, links followed, sorted by path.

    The paths begin with ``root`` as it is given, made absolute. A link to nothing is
    listed as well, so that whoever reads it says why it cannot be.
    """
    filesystem, name = _filesystem(root)
    if isinstance(filesystem, LocalFileSystem):
        # Several times faster than fsspec's walk, which asks for each file's status twice.
        return sorted(_walk_local(name))
    found = filesystem.find(name, detail=True)
    return sorted(
        _remote_file(root.rstrip("/") + path.removeprefix(name.rstrip("/")), details)
        for path, details in found.items()
    )


def _walk_local(folder: str, above: frozenset[str] = frozenset()) -> Iterator[FileInfo]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder that we are inside of
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                is_folder, status = entry.is_dir(), entry.stat()
            except OSError:
                yield FileInfo(entry.path, 0, "")
                continue
            if is_folder:
                yield from _walk_local(entry.path, above | {real})
            elif entry.is_file():
                yield _local_file(entry.path, status)


def stamp(path: str) -> str:
    """Size and change time of a local file; empty if there is none, or it is not local."""
    if not is_local(path):
        return ""
    try:
        return "{0.st_size} {0.st_mtime_ns}".format(os.stat(_filesystem(path)[1]))
    except (OSError, ValueError):
        return ""


def _local_file(path: str, status: os.stat_result) -> FileInfo:
    return FileInfo(path, status.st_size, str(status.st_mtime_ns))


def _remote_file(path: str, details: dict) -> FileInfo:
    # Each store's own name for what changes when a file is written again.
    keys = ("etag", "ETag", "generation", "mtime", "LastModified", "last_modified", "created")
    version = next((details[key] for key in keys if details.get(key)), "")
    return FileInfo(path, details["size"], str(version))


@contextlib.contextmanager
def write_atomic(path: str) -> Iterator[IO[bytes]]:
    """Opens a file for writing that appears under its name only when complete.

    Runners start redundant and repeated attempts of the same work. Each attempt
    writes under a name of its own and the last step is a rename, so a reader or
    a second attempt never meets half a file. An object store gets the complete
    file in one upload: one given up halfway may still be published when its
    Python object is collected.
    """
    filesystem, name = _filesystem(path)
    if not isinstance(filesystem, LocalFileSystem):
        with tempfile.TemporaryDirectory() as folder:
            complete = os.path.join(folder, "file")
            with open(complete, "wb") as file:
                yield file
            filesystem.put_file(complete, name)
        return
    with _temporary_file(name) as temporary:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, name)


def write_bytes(path: str, data: bytes) -> None:
    filesystem, name = _filesystem(path)
    if not isinstance(filesystem, LocalFileSystem):
        filesystem.pipe_file(name, data)
        return
    with write_atomic(path) as file:
        file.write(data)


def swap(path: str, old: bytes | None, new: bytes) -> bool:
    """Replaces a file's content if it still is ``old``; None: if there is no such file.

    False if it is something else by now: another process was faster, and nothing is
    changed. Of several that swap the same ``old`` for different content one succeeds. On
    Google Cloud Storage the store sees to that by the object's generation; on a disk it is
    a lock on the folder while content is replaced, and an exclusive name where there was no
    file. Other stores are only asked what is there before it is written.
    """
    filesystem, name = _filesystem(path)
    if path.startswith(_GOOGLE):
        return bool(filesystem.swap(name, old, new))
    if isinstance(filesystem, LocalFileSystem):
        return _swap_local(name, old, new)
    found = read_if_exists(path)
    if found == old:
        write_bytes(path, new)
    return found in (old, new)


def _swap_local(name: str, old: bytes | None, new: bytes) -> bool:
    with _temporary_file(name) as temporary, _locked(os.path.dirname(name)):
        found = read_if_exists(name)
        if found != old:
            return found == new
        with open(temporary, "wb") as file:
            file.write(new)
            file.flush()
            os.fsync(file.fileno())
        if old is None:
            try:
                os.link(temporary, name)  # fails if there is one, locked or not
            except FileExistsError:
                return read_if_exists(name) == new
            except OSError:  # a file system without links
                os.replace(temporary, name)
        else:
            os.replace(temporary, name)
    return True


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    """One thread at a time, of all processes; the lock goes with whoever holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems lock no folders
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary_file(name: str) -> Iterator[str]:
    """The name of a file to be written beside another; removed if it is left behind."""
    os.makedirs(os.path.dirname(name), exist_ok=True)
    temporary = _temporary_name(name)
    try:
        yield temporary
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


def check_writable(folder: str) -> None:
    """Writes and removes a file in a folder, before hours of work that would end in it.

    Raises VisualMemoryError if that fails.
    """
    path = join(folder, f".writable-{uuid.uuid4().hex[:12]}")
    try:
        write_bytes(path, b"")
        filesystem, name = _filesystem(path)
        filesystem.rm_file(name)
    except OSError as error:
        raise VisualMemoryError(
            f"cannot write to {folder!r}: {error.strerror or error}. Give another place, or get "
            "the right to write, and remove, files there"
        ) from error


@contextlib.contextmanager
def write_directory_atomic(path: str) -> Iterator[str]:
    """Yields a local folder to fill; on success it replaces the folder at ``path``.

    For libraries that can only write a folder of files. On an object store the
    files are uploaded one by one: write a marker beside them afterwards.
    """
    with temporary_directory(path) as local:
        yield local
        move_directory(local, path)


@contextlib.contextmanager
def temporary_directory(path: str) -> Iterator[str]:
    """Yields a local folder to fill, for ``move_directory`` to a place beside ``path``."""
    filesystem, name = _filesystem(path)
    if not isinstance(filesystem, LocalFileSystem):
        with tempfile.TemporaryDirectory() as local:
            yield local
        return
    os.makedirs(os.path.dirname(name), exist_ok=True)
    temporary = _temporary_name(name)
    os.mkdir(temporary)
    try:
        yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def move_directory(local: str, path: str) -> None:
    """Puts a local folder in the place of the one at ``path``, if there is one.

    On a disk by a rename; on an object store file by file.
    """
    filesystem, name = _filesystem(path)
    if not isinstance(filesystem, LocalFileSystem):
        earlier = filesystem.find(name)
        files = [file.path for file in _walk_local(local)]
        written = [name + file.removeprefix(local) for file in files]
        _each(filesystem.put_file, files, written)
        _each(filesystem.rm_file, [file for file in earlier if file not in set(written)])
        return
    while not _moved(local, name):  # a second attempt may be doing the same
        doomed = _temporary_name(name)
        with contextlib.suppress(FileNotFoundError):
            os.rename(name, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _moved(folder: str, name: str) -> bool:
    """Renames a folder; False if there is one of that name with files in it."""
    try:
        os.rename(folder, name)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


@contextlib.contextmanager
def local_copy(path: str, names: Sequence[str] | None = None) -> Iterator[str]:
    """A local path with the content of a file or folder: itself, or a temporary download.

    names: the files below the folder that are needed, all if None. Raises FileNotFoundError
    if the store has not got them; of a local path nothing is looked at.
    """
    filesystem, name = _filesystem(path)
    if isinstance(filesystem, LocalFileSystem):
        yield name
        return
    with tempfile.TemporaryDirectory() as local:
        target = os.path.join(local, posixpath.basename(name))
        if names is not None:
            files = [join(name, each) for each in names]
        else:
            files = [name] if is_file(path) else filesystem.find(name)
        if not files:
            raise _no_file(path)
        copies = [target + file.removeprefix(name) for file in files]
        for folder in {os.path.dirname(copy) for copy in copies}:
            os.makedirs(folder, exist_ok=True)
        _each(filesystem.get_file, files, copies)
        yield target


def remove_file(path: str) -> None:
    """Removes a file; one that is not there is no error."""
    filesystem, name = _filesystem(path)
    with contextlib.suppress(FileNotFoundError):
        filesystem.rm_file(name)


def remove_directory(path: str) -> None:
    """Removes a folder and all in it; a folder that is not there is no error."""
    filesystem, name = _filesystem(path)
    if isinstance(filesystem, LocalFileSystem):
        with contextlib.suppress(FileNotFoundError):
            filesystem.rm(name, recursive=True)
    else:  # fsspec's would take brackets in the name for a pattern

        def remove(file: str) -> None:
            with contextlib.suppress(FileNotFoundError):  # another attempt may do the same
                filesystem.rm_file(file)

        _each(remove, filesystem.find(name))


def remove_leftovers(folder: str) -> None:
    """Removes what attempts that were killed left below a folder under temporary names.

    On an object store there is nothing of the kind.
    """
    filesystem, name = _filesystem(folder)
    if not isinstance(filesystem, LocalFileSystem):
        return
    for path, folders, files in os.walk(name):
        for left in [each for each in folders if _INCOMPLETE in each]:  # an empty one as well
            shutil.rmtree(os.path.join(path, left), ignore_errors=True)
            folders.remove(left)
        for left in (each for each in files if _INCOMPLETE in each):
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(path, left))


def _each(call: Callable[..., None], *arguments: Sequence[str]) -> None:
    """Calls a function for each file, several at a time: a bucket takes long to answer."""
    with ThreadPoolExecutor(_REQUESTS) as pool:
        list(pool.map(call, *arguments))


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
            digest = sha256_file(join(root, name))
        except FileNotFoundError:
            return "is missing"
        right = files[name]
        return "" if digest == right else f"is damaged: its SHA-256 is {digest}, not {right}"

    with ThreadPoolExecutor(_REQUESTS) as pool:
        found = dict(zip(files, pool.map(examine, files), strict=True))
    return {name: said for name, said in found.items() if said}


def _temporary_name(name: str) -> str:
    return f"{name}{_INCOMPLETE}{uuid.uuid4().hex[:12]}"
