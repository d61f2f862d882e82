"""Google Cloud Storage, by Google's own client, with timeouts on every request.

With STORAGE_EMULATOR_HOST in the environment everything goes to that emulator, without
credentials. Otherwise Google's client finds credentials as all of Google's tools do.
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import os
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import IO, Any

import requests
from google.api_core.exceptions import (
    Forbidden,
    GoogleAPICallError,
    NotFound,
    PreconditionFailed,
    RetryError,
    Unauthorized,
)
from google.api_core.retry import Retry
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud.storage import Blob, Client
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse
from google.cloud.storage.retry import DEFAULT_RETRY
from requests.adapters import HTTPAdapter

from vm_core.errors import UnreachableError, VisualMemoryError
from vm_core.stores import FileInfo, timeout
from vm_core.stores.remote import REQUESTS, RemoteStore

_EMULATOR = "STORAGE_EMULATOR_HOST"
_WINDOW = 8 << 10
_LARGEST_WINDOW = 8 << 20


def connect() -> GoogleStore:
    """The store as this process sees it. A process that was forked makes its own."""
    return _connect(os.getpid(), os.environ.get(_EMULATOR), timeout())


@lru_cache(maxsize=4)
def _connect(process: int, emulator: str | None, seconds: float) -> GoogleStore:
    # Otherwise the client asks for each bucket's place, for traces; that takes more rights.
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")
    with _explained():
        client = Client.create_anonymous_client() if emulator else Client()
    # Threads share the client, as those of its own transfer manager do.
    pool = HTTPAdapter(pool_connections=REQUESTS, pool_maxsize=4 * REQUESTS)
    for scheme in ("http://", "https://"):
        client._http.mount(scheme, pool)
    return GoogleStore(client, seconds)


class GoogleStore(RemoteStore):
    """Paths are gs://BUCKET/NAME. Every object is read and written by a single request."""

    def __init__(self, client: Client, seconds: float):
        self._client = client
        retry: Retry = DEFAULT_RETRY.with_timeout(seconds)
        # What is written twice is the same: a write may be repeated, like a read.
        self._limits: dict[str, Any] = {"retry": retry, "timeout": (seconds / 6, seconds / 2)}

    def _blob(self, path: str) -> Blob:
        bucket, name = _split(path)
        return self._client.bucket(bucket).blob(name)

    def is_file(self, path: str) -> bool:
        with _explained(path):
            return bool(_split(path)[1]) and self._blob(path).exists(**self._limits)

    def is_directory(self, path: str) -> bool:
        bucket, name = _split(path)
        prefix = name.rstrip("/") + "/" if name else ""
        with _explained(path):
            found = self._client.list_blobs(
                bucket, prefix=prefix, max_results=1, fields="items(name)", **self._limits
            )
            return any(True for _ in found)

    def exists(self, path: str) -> bool:
        return self.is_file(path) or self.is_directory(path)

    def open_read(self, path: str) -> IO[bytes]:
        blob = self._blob(path)
        with _explained(path):
            blob.reload(**self._limits)
        return io.BufferedReader(_ObjectFile(self, path, blob), _WINDOW)

    def read_bytes(self, path: str, limit: int | None) -> bytes:
        if limit == 0:
            return b""
        return self.read_range(self._blob(path), path, None if limit is None else (0, limit))

    def read_range(self, blob: Blob, path: str, span: tuple[int, int] | None) -> bytes:
        """The bytes of an object from a position to another, all of them if ``span`` is None."""
        start, end = (None, None) if span is None else (span[0], span[1] - 1)
        with _explained(path):
            try:
                return bytes(blob.download_as_bytes(start=start, end=end, **self._limits))
            except GoogleAPICallError as error:
                if error.code == 416:  # a range of nothing: the object is empty
                    return b""
                raise

    def list_files(self, pattern: str) -> list[FileInfo]:
        fixed = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
        matches = re.compile(_expression(pattern)).fullmatch
        return [file for file in self.walk(fixed) if matches(file.path)]

    def walk(self, root: str) -> list[FileInfo]:
        bucket, name = _split(root)
        prefix = name.rstrip("/") + "/" if name else ""
        fields = "items(name,size,generation),nextPageToken"
        with _explained(root):
            found = self._client.list_blobs(bucket, prefix=prefix, fields=fields, **self._limits)
            top = root.rstrip("/") + "/"
            return sorted(
                FileInfo(top + blob.name[len(prefix) :], blob.size, str(blob.generation))
                for blob in found
                if not blob.name.endswith("/")  # stands for an empty folder
            )

    def write_bytes(self, path: str, data: bytes) -> None:
        self._write(path, data, None)

    def _write(self, path: str, data: bytes, generation: int | None) -> None:
        blob = self._blob(path)
        # Objects that everybody may read are cached on their way for an hour otherwise.
        blob.cache_control = "no-store"
        with _explained(path, writes=True):
            blob.upload_from_string(
                data,
                content_type="application/octet-stream",
                if_generation_match=generation,
                **self._limits,
            )

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        """The store itself sees to it that only one of several succeeds."""
        generation: int | None = 0  # of what does not exist
        if old is not None:
            blob = self._blob(path)
            try:
                found = self.read_range(blob, path, None)
            except FileNotFoundError:
                return False
            if found != old:
                return found == new
            generation = blob.generation
        try:
            self._write(path, new, generation)
        except PreconditionFailed:
            # Another writer was faster; or this one, whose answer was lost on its way here.
            return self.read_bytes(path, None) == new
        return True

    def upload(self, local: str, path: str) -> None:
        blob = self._blob(path)
        blob.cache_control = "no-store"
        with _explained(path, writes=True):
            blob.upload_from_filename(
                local, content_type="application/octet-stream", **self._limits
            )

    def download(self, path: str, local: str) -> None:
        with _explained(path):
            self._blob(path).download_to_filename(local, **self._limits)

    def remove_file(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError), _explained(path):
            self._blob(path).delete(**self._limits)


class _ObjectFile(io.RawIOBase):
    """Reads ranges of an object. They grow while the file is read in sequence."""

    def __init__(self, store: GoogleStore, path: str, blob: Blob):
        self.name = path
        self._store, self._blob = store, blob
        self._at, self._size = 0, int(blob.size)
        self._start, self._data, self._window = 0, b"", _WINDOW

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._at)
        if wanted <= 0:
            return 0
        end = self._start + len(self._data)
        if not self._start <= self._at < end:
            self._fetch(wanted, follows=self._at == end)
        place = self._at - self._start
        part = self._data[place : place + wanted]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)

    def _fetch(self, wanted: int, follows: bool) -> None:
        self._window = min(2 * self._window, _LARGEST_WINDOW) if follows else _WINDOW
        # The ends of Arrow and Parquet files are read backwards, piece by piece.
        self._start = max(0, min(self._at, self._size - _WINDOW))
        end = min(self._size, self._at + max(wanted, self._window))
        self._data = self._store.read_range(self._blob, self.name, (self._start, end))
        if len(self._data) != end - self._start:
            raise UnreachableError(
                f"Google Cloud Storage sent {len(self._data):,} bytes of {self.name} instead of "
                f"{end - self._start:,}. Start again: what is done is kept"
            )


def _split(path: str) -> tuple[str, str]:
    bucket, _, name = path.partition("://")[2].partition("/")
    if not bucket:
        raise VisualMemoryError(f"{path!r} names no bucket. Write gs://BUCKET/FOLDER")
    return bucket, name


def _expression(pattern: str) -> str:
    """A regular expression for a glob pattern, of which only ``**`` crosses folders."""
    *folders, last = pattern.split("/")
    parts = []
    for part in [*folders, last]:
        if part == "**":
            parts.append(".*" if part is last else "(?:.*/)?")
        else:
            whole = fnmatch.translate(part).removeprefix("(?s:").removesuffix(r")\Z")
            parts.append(whole.replace(".*", "[^/]*") + "/")
    return "".join(parts).removesuffix("/")


@contextlib.contextmanager
def _explained(path: str = "", writes: bool = False) -> Iterator[None]:
    """Errors of the network, of credentials and of rights as texts that say what to do."""
    try:
        yield
    except NotFound as error:
        # Of these two nothing else can be missing.
        if writes or "/o/" not in str(error):
            bucket = _split(path)[0]
            raise VisualMemoryError(
                f"the bucket gs://{bucket} does not exist. Create it, for example with "
                f"gcloud storage buckets create gs://{bucket}, or correct its name"
            ) from error
        raise FileNotFoundError(2, os.strerror(2), path) from error
    except PreconditionFailed:
        raise
    except (Forbidden, Unauthorized) as error:
        raise _no_rights(error) from error
    except TransportError as error:
        raise _unreachable(error) from error
    except GoogleAuthError as error:
        raise _no_rights(error) from error
    except RetryError as error:
        raise _unreachable(error.cause or error) from error
    except (GoogleAPICallError, InvalidResponse, DataCorruption) as error:
        raise _unreachable(error) from error
    except (requests.RequestException, ConnectionError, TimeoutError) as error:
        raise _unreachable(error) from error


def _no_rights(error: Exception) -> VisualMemoryError:
    return VisualMemoryError(
        f"Google Cloud Storage refuses: {_one_line(error)}. Log in with gcloud auth "
        "application-default login, or name a service account's key file in "
        "GOOGLE_APPLICATION_CREDENTIALS; it needs the role Storage Object User on the bucket"
    )


def _unreachable(error: BaseException) -> UnreachableError:
    emulator = os.environ.get(_EMULATOR)
    remedy = (
        f"{_EMULATOR} is {emulator!r}: start an emulator there, or unset it"
        if emulator
        else "Check the network and start again: what is done is kept"
    )
    return UnreachableError(f"Google Cloud Storage does not answer: {_one_line(error)}. {remedy}")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
