"""The bucket's own: requests, other processes, and what goes wrong on the way to it."""

from __future__ import annotations

import http.server
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from requests import Session

from vm_core import batch_files, encoders, storage
from vm_core.embedding import BatchedEncoder, ImageSettings, embed_records
from vm_core.errors import UnreachableError, VisualMemoryError
from vm_core.records import ImageRecord
from vm_core.stores.remote import in_parallel


@pytest.fixture
def requests(monkeypatch) -> list[tuple[str, int]]:
    """Grows by the method and the length of the answer of every request of this process."""
    made: list[tuple[str, int]] = []
    send = Session.send

    def counted(self, request, **options):
        answer = send(self, request, **options)
        made.append((request.method, int(answer.headers.get("Content-Length") or 0)))
        return answer

    monkeypatch.setattr(Session, "send", counted)
    return made


def test_one_request_where_one_will_do(bucket, requests):
    path = f"{bucket}/a"

    def count(call: Callable, *arguments: object) -> list[str]:
        requests.clear()
        call(*arguments)
        return [method for method, _ in requests]

    assert count(storage.write_bytes, path, b"x") == ["POST"]
    assert count(storage.read_bytes, path) == ["GET"]
    assert count(storage.read_if_exists, f"{bucket}/none") == ["GET"]
    assert count(storage.is_file, path) == ["GET"]
    assert count(storage.is_file, f"{bucket}/none") == ["GET"]
    assert count(storage.exists, path) == ["GET"]
    assert count(storage.is_directory, bucket) == ["GET"]
    assert count(storage.walk, bucket) == ["GET"]
    assert count(storage.swap, f"{bucket}/new", None, b"x") == ["POST"]
    assert count(storage.swap, path, b"x", b"y") == ["GET", "POST"]


def test_a_batch_is_read_without_the_rest_of_its_file(bucket, requests):
    batches = {key: np.random.default_rng(key).normal(size=(500, 100)) for key in range(30)}
    with batch_files.writing(f"{bucket}/batches") as file:
        for key, values in batches.items():
            file.write(key, {"values": values})
    opened = batch_files.BatchFile(f"{bucket}/batches")
    requests.clear()
    (found,) = opened.read(17)
    assert (found["values"] == batches[17]).all()
    assert sum(size for _, size in requests) < 1.1 * batches[17].nbytes
    assert len(requests) <= 4


def test_more_files_than_a_listing_shows_at_once(bucket):
    in_parallel(lambda number: storage.write_bytes(f"{bucket}/many/{number}", b"x"), range(1100))
    assert len(storage.walk(f"{bucket}/many")) == 1100
    storage.remove_directory(f"{bucket}/many")
    assert storage.walk(bucket) == []


def in_another_process(code: str, *arguments: str) -> None:
    command = [sys.executable, "-c", "import os, sys\nfrom vm_core import storage\n" + code]
    subprocess.run([*command, *arguments], check=True, timeout=60)


def test_what_another_process_writes_is_seen_at_once(bucket):
    storage.write_bytes(f"{bucket}/a/0", b"0")
    assert len(storage.walk(f"{bucket}/a")) == 1 and not storage.exists(f"{bucket}/a/1")
    assert storage.list_files(f"{bucket}/a/1*") == [] and not storage.is_directory(f"{bucket}/b")
    in_another_process(
        "for name in ('a/0', 'a/1', 'b/2'): storage.write_bytes(f'{sys.argv[1]}/{name}', b'new')",
        bucket,
    )
    assert storage.read_bytes(f"{bucket}/a/0") == b"new"
    assert storage.exists(f"{bucket}/a/1") and storage.is_directory(f"{bucket}/b")
    assert len(storage.walk(f"{bucket}/a")) == len(storage.list_files(f"{bucket}/a/*")) == 2


def test_a_forked_process_makes_its_own_connection(bucket):
    in_another_process(
        """
path = sys.argv[1] + "/a"
storage.write_bytes(path, b"parent")
child = os.fork()
if not child:
    storage.write_bytes(path + "2", storage.read_bytes(path))
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert storage.read_bytes(path + "2") == b"parent"
""",
        bucket,
    )
    assert len(storage.walk(bucket)) == 2


@pytest.mark.parametrize(
    "call",
    [
        lambda path: storage.write_bytes(path, b"x"),
        lambda path: storage.swap(path, None, b"x"),
        storage.check_writable,
        storage.walk,
        storage.exists,
    ],
)
def test_a_bucket_that_does_not_exist(make_bucket, call):
    with pytest.raises(VisualMemoryError, match=r"the bucket gs://nowhere does not exist\. Create"):
        call("gs://nowhere/a/b")


@contextmanager
def server(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A server on this machine; ``answer`` has each request."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        do_POST = do_GET

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def reply(handler: http.server.BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    handler.rfile.read(int(handler.headers.get("Content-Length") or 0))
    handler.send_response(status)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


@pytest.fixture
def no_waiting(monkeypatch) -> None:
    """Gives up a store after a second; a minute passes otherwise."""
    monkeypatch.setenv("VISUAL_MEMORY_STORAGE_TIMEOUT", "1")


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("call", [storage.read_if_exists, storage.walk, storage.check_writable])
def test_without_rights(monkeypatch, call, status, no_waiting):
    body = b'{"error": {"message": "Anonymous caller has no access"}}'
    with server(lambda handler: reply(handler, status, body)) as host:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
        with pytest.raises(VisualMemoryError, match="refuses: .*application-default"):
            call("gs://bucket/a")


def test_a_server_that_does_not_answer(monkeypatch, no_waiting):
    with server(lambda handler: reply(handler, 200, b"")) as host:
        pass
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
    with pytest.raises(UnreachableError, match=f"does not answer.*HOST is '{host}': start an"):
        storage.exists("gs://bucket/a")


def test_an_image_is_not_to_blame_for_a_store_that_does_not_answer(monkeypatch, no_waiting):
    with server(lambda handler: reply(handler, 200, b"")) as host:
        pass
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
    encoder = encoders.parse({"kind": "saved_model", "path": "never loaded"})
    image = ImageRecord("a", 0, "source", "gs://bucket/a.png")
    with pytest.raises(UnreachableError):
        embed_records([image], BatchedEncoder, encoder, ImageSettings())


def test_a_busy_server_is_asked_again(bucket, monkeypatch):
    """The first answer to a write is lost, though it is done."""
    real = os.environ["STORAGE_EMULATOR_HOST"]
    lost: list[str] = []

    def pass_on(handler: http.server.BaseHTTPRequestHandler) -> None:
        data = handler.rfile.read(int(handler.headers.get("Content-Length") or 0)) or None
        headers = {"Content-Type": handler.headers.get("Content-Type", "")}
        request = urllib.request.Request(real + handler.path, data, headers)
        try:
            with urllib.request.urlopen(request) as response:
                status, body = response.status, response.read()
        except urllib.error.HTTPError as error:
            status, body = error.code, error.read()
        if handler.command == "POST" and handler.path not in lost:
            lost.append(handler.path)
            status, body = 503, b"busy"
        handler.headers.replace_header("Content-Length", "0") if data else None
        reply(handler, status, body)

    with server(pass_on) as host:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
        storage.write_bytes(f"{bucket}/a", b"x")
        assert storage.read_bytes(f"{bucket}/a") == b"x"
        # The repeated attempt meets what the first has written.
        assert storage.swap(f"{bucket}/pointer", None, b"1")
        assert storage.read_bytes(f"{bucket}/pointer") == b"1"
    assert len(lost) == 2


def test_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vm_core.stores.google", None)
    monkeypatch.delattr("vm_core.stores.google", raising=False)
    with pytest.raises(VisualMemoryError, match=r"cannot open 'gs://b/x': .*visual-memory\[gcs\]"):
        storage.read_bytes("gs://b/x")


def stall(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Accepts and never answers."""
    time.sleep(30)


def stall_midway(handler: http.server.BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.wfile.flush()
    time.sleep(30)


def drop(handler: http.server.BaseHTTPRequestHandler) -> None:
    """Closes the connection after a part of the answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b"{")
    handler.close_connection = True


def busy(handler: http.server.BaseHTTPRequestHandler) -> None:
    reply(handler, 503, b"busy")


@pytest.mark.parametrize("answer", [stall, stall_midway, drop, busy])
@pytest.mark.parametrize(
    "call",
    [
        storage.read_bytes,
        storage.exists,
        storage.walk,
        storage.sha256_file,
        storage.remove_file,
        lambda path: storage.write_bytes(path, b"x"),
        lambda path: storage.swap(path, None, b"x"),
        lambda path: storage.local_copy(path).__enter__(),
    ],
)
def test_every_request_ends(monkeypatch, no_waiting, answer, call):
    with server(answer) as host:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", host)
        start = time.monotonic()
        with pytest.raises(UnreachableError, match="does not answer"):
            call("gs://bucket/a")
        assert time.monotonic() - start < 6


def test_the_timeout_is_a_number(monkeypatch):
    for text in ("soon", "0", "-1", "nan", "1e9"):
        monkeypatch.setenv("VISUAL_MEMORY_STORAGE_TIMEOUT", text)
        with pytest.raises(VisualMemoryError, match=f"TIMEOUT is '{text}'. Give seconds"):
            storage.read_bytes("gs://bucket/a")


def test_a_file_is_read_in_any_order(bucket):
    data = np.random.default_rng(0).bytes(300_000)
    storage.write_bytes(f"{bucket}/a", data)
    random = np.random.default_rng(1)
    with storage.open_read(f"{bucket}/a") as file:
        for _ in range(200):
            start, length = random.integers(0, 310_000), int(10 ** random.uniform(0, 5.5))
            file.seek(start)
            assert file.read(length) == data[start : start + length]
        assert file.seek(-10, os.SEEK_END) == 299_990 and file.read() == data[-10:]
        file.seek(0)
        assert file.read() == data


def test_patterns_are_those_of_a_disk(bucket, tmp_path):
    names = ["a-1", "a-2", "b/a-3", "b/c/a-4", "a[1]", "ab"]
    for root in (bucket, str(tmp_path)):
        for name in names:
            storage.write_bytes(f"{root}/{name}", b"x")
    for pattern in ("a-*", "a-?", "*", "**/a-*", "b/**", "a[[]1]", "a[b-]*", "*/*", "b/*/a-*"):
        found = [
            [file.path.removeprefix(root) for file in storage.list_files(f"{root}/{pattern}")]
            for root in (bucket, str(tmp_path))
        ]
        assert found[0] == found[1], pattern
