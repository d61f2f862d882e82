"""A disk. What is written survives a loss of power once the call has returned."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import stat
import uuid
from collections.abc import Callable, Iterator
from typing import IO

from vm_core.errors import StorageError
from vm_core.stores import INCOMPLETE, FileInfo, Store

_live: dict[str, int] = {}  # temporary files and folders, and the process that writes them


def remove_temporaries() -> None:
    """Removes what this process is writing, before it ends without finishing it."""
    for path, process in list(_live.items()):
        if process != os.getpid():  # this one was forked
            continue
        if os.path.isdir(path):
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                os.remove(path)


@contextlib.contextmanager
def removed_on_exit(path: str) -> Iterator[None]:
    """``remove_temporaries`` removes the path during the block; the caller does after it."""
    _live[path] = os.getpid()
    try:
        yield
    finally:
        _live.pop(path, None)


class LocalStore(Store):
    def is_file(self, path: str) -> bool:
        return os.path.isfile(_name(path))

    def is_directory(self, path: str) -> bool:
        return os.path.isdir(_name(path))

    def exists(self, path: str) -> bool:
        return os.path.exists(_name(path))

    def open_read(self, path: str) -> IO[bytes]:
        file = open(_name(path), "rb", opener=_open_without_waiting)  # noqa: SIM115
        mode = os.fstat(file.fileno()).st_mode
        if not stat.S_ISREG(mode):
            file.close()
            text = f"cannot read {path!r}: it is not a regular file"
            raise StorageError(errno.EINVAL, text, path)
        return file

    def read_bytes(self, path: str, limit: int | None) -> bytes:
        with self.open_read(path) as file:
            return file.read(-1 if limit is None else limit)

    def list_files(self, pattern: str) -> list[FileInfo]:
        paths = {p for p in glob.iglob(_name(pattern), recursive=True) if os.path.isfile(p)}
        return sorted(_info(path, os.stat(path)) for path in paths)

    def walk(self, root: str) -> list[FileInfo]:
        return sorted(walk(_name(root)))

    def write_bytes(self, path: str, data: bytes) -> None:
        with self.write_atomic(path) as file:
            file.write(data)

    @contextlib.contextmanager
    def write_atomic(self, path: str) -> Iterator[IO[bytes]]:
        name = _name(path)
        with _temporary_file(name) as temporary:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, name)
            sync(os.path.dirname(name))

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        """A lock on the folder, and an exclusive name where there was no file."""
        name = _name(path)
        with _temporary_file(name) as temporary, _locked(os.path.dirname(name)):
            found = self._content(name)
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
                    return self._content(name) == new
                except OSError:  # a file system without links
                    os.replace(temporary, name)
            else:
                os.replace(temporary, name)
            sync(os.path.dirname(name))
        return True

    def _content(self, name: str) -> bytes | None:
        try:
            return self.read_bytes(name, None)
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def temporary_directory(self, path: str) -> Iterator[str]:
        name = _name(path)
        _make_folders(os.path.dirname(name))
        temporary = _temporary_name(name)
        with removed_on_exit(temporary):
            os.mkdir(temporary)
            try:
                yield temporary
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def move_directory(self, local: str, path: str) -> None:
        name = _name(path)
        _sync_tree(local)
        while not _moved(local, name):  # a second attempt may be doing the same
            doomed = _temporary_name(name)
            with contextlib.suppress(FileNotFoundError):
                os.rename(name, doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        sync(os.path.dirname(name))

    @contextlib.contextmanager
    def local_copy(self, path: str, names: list[str] | None) -> Iterator[str]:
        yield _name(path)

    def remove_file(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            os.remove(_name(path))

    def remove_directory(self, path: str) -> None:
        name = _name(path)
        if os.path.islink(name):
            os.remove(name)  # what it leads to is not ours
            return
        while True:
            try:
                shutil.rmtree(name)
                return
            except FileNotFoundError:  # another process removes it, too
                if not os.path.exists(name):
                    return


def walk(root: str) -> Iterator[FileInfo]:
    """Every file under a folder. Links are followed, and each real folder is visited once.

    Folders that are reached without a link come first, so a link to one of them adds nothing.
    """
    seen: set[tuple[int, int]] = set()
    folders: list[tuple[str, os.stat_result]] = [(root, os.stat(root))]
    links: list[tuple[str, os.stat_result]] = []
    while folders or links:
        folder, status = folders.pop() if folders else links.pop(0)
        key = (status.st_dev, status.st_ino)
        if key in seen:
            continue
        seen.add(key)
        with os.scandir(folder) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                try:
                    status = entry.stat()
                except OSError:
                    yield FileInfo(entry.path, 0, "")
                    continue
                if stat.S_ISDIR(status.st_mode):
                    (links if entry.is_symlink() else folders).append((entry.path, status))
                elif stat.S_ISREG(status.st_mode):
                    yield _info(entry.path, status)


def _open_without_waiting(name: str, flags: int) -> int:
    """Opening a pipe waits for somebody who writes to it otherwise."""
    return os.open(name, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def locked(path: str, waiting: Callable[[], None]) -> Iterator[None]:
    """Holds a lock file during the block, which is gone afterwards.

    The lock goes with the process that holds it, however that ends. waiting: is called if
    somebody else holds it. A file system without locks lets everybody in.
    """
    name = _name(path)
    _make_folders(os.path.dirname(name))
    while True:
        descriptor = os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            if not _try_lock(descriptor):
                waiting()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Whoever held it has removed the file: the lock of a name that is gone is none.
            if _same_file(descriptor, name):
                try:
                    yield
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.remove(name)
                return
        finally:
            os.close(descriptor)


def is_locked(path: str) -> bool:
    """Whether a process holds a lock file."""
    try:
        descriptor = os.open(_name(path), os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        return not _try_lock(descriptor)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
    return True


def _same_file(descriptor: int, name: str) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(name))
    except FileNotFoundError:
        return False


def sync(folder: str) -> None:
    """Makes sure that the names in a folder survive a loss of power."""
    try:
        descriptor = os.open(folder or ".", os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # files can be written to a folder that cannot be listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems
            raise
    finally:
        os.close(descriptor)


def _sync_tree(folder: str) -> None:
    for path, _, files in os.walk(folder):
        for file in files:
            with open(os.path.join(path, file), "rb") as opened:
                os.fsync(opened.fileno())
        sync(path)


def _make_folders(folder: str) -> None:
    """Makes a folder and those above it, to last."""
    missing = []
    while folder and not os.path.isdir(folder):
        missing.append(folder)
        folder = os.path.dirname(folder)
    for each in reversed(missing):
        try:
            os.mkdir(each)
        except FileExistsError:  # another process was faster, or it is a file
            if not os.path.isdir(each):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), each) from None
        sync(os.path.dirname(each))


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
    _make_folders(os.path.dirname(name))
    temporary = _temporary_name(name)
    with removed_on_exit(temporary):
        try:
            yield temporary
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)


def _moved(folder: str, name: str) -> bool:
    """Renames a folder; False if there is one of that name with files in it."""
    try:
        os.rename(folder, name)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _info(path: str, status: os.stat_result) -> FileInfo:
    return FileInfo(path, status.st_size, str(status.st_mtime_ns))


def _temporary_name(name: str) -> str:
    return f"{name}{INCOMPLETE}{uuid.uuid4().hex[:12]}"


def _name(path: str) -> str:
    """The operating system's name of a path, absolute."""
    for scheme in ("file://", "local://"):
        path = path.removeprefix(scheme)
    return os.path.abspath(os.path.expanduser(path))
