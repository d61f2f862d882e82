"""Every other store that fsspec knows: Amazon S3, Azure, HDFS, and its memory for tests."""

from __future__ import annotations

import contextlib
from typing import IO, Any

import fsspec

from vm_core.stores import FileInfo, timeout
from vm_core.stores.remote import RemoteStore


def _options(scheme: str) -> dict[str, Any]:
    """What makes a request of a file system end. Each has its own names for it."""
    seconds = timeout()
    if scheme in ("s3", "s3a"):
        config = {"connect_timeout": seconds / 6, "read_timeout": seconds / 2}
        return {"config_kwargs": {**config, "retries": {"total_max_attempts": 2}}}
    if scheme in ("az", "abfs", "abfss"):
        return {"timeout": seconds / 2, "connection_timeout": seconds / 6}
    return {}


class OtherStore(RemoteStore):
    """A store behind fsspec's file system of a scheme.

    ``swap`` only asks what is there before it writes: of two at the same time both may succeed.
    """

    def __init__(self, scheme: str):
        """Raises ImportError or ValueError if there is no such file system here."""
        kind = fsspec.get_filesystem_class(scheme)
        self._files = kind(use_listings_cache=False, **_options(scheme))

    def _name(self, path: str) -> str:
        return str(self._files._strip_protocol(path))

    def is_file(self, path: str) -> bool:
        return bool(self._files.isfile(self._name(path)))

    def is_directory(self, path: str) -> bool:
        return bool(self._files.isdir(self._name(path)))

    def exists(self, path: str) -> bool:
        return bool(self._files.exists(self._name(path)))

    def open_read(self, path: str) -> IO[bytes]:
        return self._files.open(self._name(path), "rb")

    def read_bytes(self, path: str, limit: int | None) -> bytes:
        return bytes(self._files.cat_file(self._name(path), end=limit))

    def list_files(self, pattern: str) -> list[FileInfo]:
        found = self._files.glob(self._name(pattern), detail=True).values()
        return sorted(
            remote_file(self._files.unstrip_protocol(details["name"]), details)
            for details in found
            if details["type"] == "file"
        )

    def walk(self, root: str) -> list[FileInfo]:
        name = self._name(root)
        found = self._files.find(name, detail=True)
        return sorted(
            remote_file(root.rstrip("/") + path.removeprefix(name.rstrip("/")), details)
            for path, details in found.items()
        )

    def write_bytes(self, path: str, data: bytes) -> None:
        self._files.pipe_file(self._name(path), data)

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        try:
            found: bytes | None = self.read_bytes(path, None)
        except FileNotFoundError:
            found = None
        if found == old:
            self.write_bytes(path, new)
        return found in (old, new)

    def upload(self, local: str, path: str) -> None:
        self._files.put_file(local, self._name(path))

    def download(self, path: str, local: str) -> None:
        self._files.get_file(self._name(path), local)

    def remove_file(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._name(path))


def remote_file(path: str, details: dict[str, Any]) -> FileInfo:
    """A file of a listing; each store has its own name for what changes with the content."""
    keys = ("etag", "ETag", "generation", "mtime", "LastModified", "last_modified", "created")
    version = next((details[key] for key in keys if details.get(key)), "")
    return FileInfo(path, details["size"], str(version))
