"""Google Cloud Storage: gcsfs with one request where one will do, and errors for people.

With STORAGE_EMULATOR_HOST in the environment everything goes to that emulator, without
credentials. Otherwise gcsfs finds them as Google's tools do.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import aiohttp
import requests
from gcsfs.core import GCSFileSystem, quote
from gcsfs.retry import HttpError
from google.auth.exceptions import GoogleAuthError

from vm_core.errors import UnreachableError, VisualMemoryError

_EMULATOR = "STORAGE_EMULATOR_HOST"
_UNREACHABLE = (
    aiohttp.ClientError,
    asyncio.TimeoutError,
    requests.RequestException,
)


def connect() -> GoogleStorage:
    """The file system of this process. fsspec would make one for every thread.

    Its requests run in one thread of their own, so any thread may use it. A process that
    was forked makes its own.
    """
    return _connect(os.getpid(), os.environ.get(_EMULATOR))


@lru_cache(maxsize=4)
def _connect(process: int, emulator: str | None) -> GoogleStorage:
    # It logs with its traceback what it also raises.
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    with _explained():
        return GoogleStorage(
            # Looking for credentials that an emulator does not need takes 20 seconds.
            token="anon" if emulator else None,
            # Other processes write too: a listing is never remembered.
            use_listings_cache=False,
            skip_instance_cache=True,
        )


class GoogleStorage(GCSFileSystem):
    """The plain file system of gcsfs: its extended one asks for the kind of every bucket."""

    async def _request(self, method: str, path: str, *args: Any, **options: Any) -> Any:
        with _explained():
            try:
                return await super()._request(method, path, *args, **options)
            except FileNotFoundError as error:
                # Of these two nothing else can be missing.
                if path == "b/{}/o" or (method == "POST" and "/upload/" in path):
                    bucket = args[0] if args else path.partition("/b/")[2].partition("/")[0]
                    raise VisualMemoryError(
                        f"the bucket gs://{bucket} does not exist. Create it, for example with "
                        f"gcloud storage buckets create gs://{bucket}, or correct its name"
                    ) from error
                raise

    async def _get_file(self, rpath: str, lpath: str, **options: Any) -> None:
        with _explained():
            await super()._get_file(rpath, lpath, **options)

    async def _info(self, path: str, generation: str | None = None, **options: Any) -> Any:
        # A file's details in one request; gcsfs looks for a file and a folder every time.
        path = self._strip_protocol(path).rstrip("/")
        bucket, key, _ = self.split_path(path)
        if not key:
            return await super()._info(path, generation, **options)
        try:
            return await self._get_object(path)
        except FileNotFoundError:
            inside, prefixes = await self._do_list_objects(path, max_results=1)
            if not inside and not prefixes:
                raise
            return {"bucket": bucket, "name": path, "size": 0, "type": "directory"}

    def is_file(self, path: str) -> bool:
        """Whether there is an object of this very name."""
        try:
            self.call("GET", "b/{}/o/{}", *self.split_path(path)[:2], fields="name")
        except FileNotFoundError:
            return False
        return True

    def swap(self, path: str, old: bytes | None, new: bytes) -> bool:
        """As ``storage.swap``; the store itself sees to it that only one of several succeeds."""
        generation = "0"  # of what does not exist
        if old is not None:
            try:
                headers, found = self.call("GET", self.url(path))
            except FileNotFoundError:
                return False
            if found != old:
                return bool(found == new)
            generation = headers["X-Goog-Generation"]
        try:
            self._upload(path, new, generation)
        except FileExistsError:
            # Another writer was faster; or this one, whose answer was lost on its way here.
            return bool(self.cat_file(path) == new)
        return True

    def _upload(self, path: str, data: bytes, generation: str) -> None:
        bucket, key, _ = self.split_path(path)
        # Objects that everybody may read are cached on their way for an hour otherwise.
        details = json.dumps({"name": key, "cacheControl": "no-store"}).encode()
        boundary = uuid.uuid4().hex.encode()
        self.call(
            "POST",
            f"{self._location}/upload/storage/v1/b/{quote(bucket)}/o",
            uploadType="multipart",
            ifGenerationMatch=generation,
            headers={"Content-Type": f'multipart/related; boundary="{boundary.decode()}"'},
            data=b"".join(
                [
                    *(b"--", boundary, b"\r\nContent-Type: application/json\r\n\r\n", details),
                    *(b"\r\n--", boundary, b"\r\nContent-Type: application/octet-stream\r\n\r\n"),
                    *(data, b"\r\n--", boundary, b"--\r\n"),
                ]
            ),
        )


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Errors of the network, of credentials and of rights as texts that say what to do."""
    try:
        yield
    except GoogleAuthError as error:
        raise _no_rights(error) from error
    except HttpError as error:
        if error.code in (401, 403):
            raise _no_rights(error) from error
        raise _unreachable(error) from error
    except _UNREACHABLE as error:
        raise _unreachable(error) from error
    except OSError as error:
        if str(error).startswith("Forbidden"):
            raise _no_rights(error) from error
        raise


def _no_rights(error: Exception) -> VisualMemoryError:
    return VisualMemoryError(
        f"Google Cloud Storage refuses: {_one_line(error)}. Log in with gcloud auth "
        "application-default login, or name a service account's key file in "
        "GOOGLE_APPLICATION_CREDENTIALS; it needs the role Storage Object User on the bucket"
    )


def _unreachable(error: Exception) -> UnreachableError:
    emulator = os.environ.get(_EMULATOR)
    remedy = (
        f"{_EMULATOR} is {emulator!r}: start an emulator there, or unset it"
        if emulator
        else "Check the network and start again: what is done is kept"
    )
    return UnreachableError(f"Google Cloud Storage does not answer: {_one_line(error)}. {remedy}")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
