"""What all stores of whole objects have in common. A folder is the prefix of its files."""

from __future__ import annotations

import abc
import contextlib
import errno
import os
import posixpath
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO

from vm_core.errors import MissingFileError, VisualMemoryError
from vm_core.relative_paths import check_relative
from vm_core.stores import Store, local

REQUESTS = 16
"""How many requests are made at a time: a store takes long to answer."""


class RemoteStore(Store):
    """Needs few methods of a kind of store, and builds the rest on them."""

    @abc.abstractmethod
    def upload(self, local: str, path: str) -> None: ...

    @abc.abstractmethod
    def download(self, path: str, local: str) -> None: ...

    @contextlib.contextmanager
    def write_atomic(self, path: str) -> Iterator[IO[bytes]]:
        """One upload of the complete file: one that is given up halfway may be published."""
        with _temporary_folder() as folder:
            complete = os.path.join(folder, "file")
            with open(complete, "wb") as file:
                yield file
            self.upload(complete, path)

    @contextlib.contextmanager
    def temporary_directory(self, path: str) -> Iterator[str]:
        with _temporary_folder() as folder:
            yield folder

    def move_directory(self, local_folder: str, path: str) -> None:
        earlier = [file.path for file in self.walk(path)]
        files = [file.path for file in local.walk(local_folder)]
        root = path.rstrip("/")
        written = [root + file.removeprefix(local_folder) for file in files]
        in_parallel(self.upload, files, written)
        in_parallel(self.remove_file, [file for file in earlier if file not in set(written)])

    @contextlib.contextmanager
    def local_copy(self, path: str, names: list[str] | None) -> Iterator[str]:
        """Downloads into a temporary folder. Names that lead out of it are refused."""
        root = path.rstrip("/")
        with _temporary_folder() as folder:
            target = os.path.join(folder, posixpath.basename(root))
            if names is None and self.is_file(path):
                self.download(path, target)
            else:
                if names is None:
                    names = [file.path[len(root) + 1 :] for file in self.walk(root)]
                if not names:
                    raise MissingFileError(errno.ENOENT, f"there is no file {path!r}", path)
                for name in names:
                    _check_below(root, name)
                copies = [os.path.join(target, name) for name in names]
                for parent in {os.path.dirname(copy) for copy in copies}:
                    os.makedirs(parent, exist_ok=True)
                in_parallel(self.download, [f"{root}/{name}" for name in names], copies)
            yield target

    def remove_directory(self, path: str) -> None:
        in_parallel(self.remove_file, [file.path for file in self.walk(path)])


def in_parallel(call: Callable[..., None], *arguments: Sequence[str]) -> None:
    """Calls a function for each file, several at a time."""
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(call, *arguments))


def _check_below(root: str, name: str) -> None:
    try:
        check_relative(name)
    except ValueError as error:
        raise VisualMemoryError(
            f"{root} has a file that would be copied to another place: {error}. Remove it"
        ) from None


@contextlib.contextmanager
def _temporary_folder() -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="visual-memory-") as folder:
        with local.removed_on_exit(folder):
            yield folder
