"""Storage: nothing appears by halves, on a disk, in a bucket, or in fsspec's memory for others."""

from __future__ import annotations

import errno
import hashlib
import os
import tempfile
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest

from vm_core import storage
from vm_core.errors import MissingFileError, StorageError, VisualMemoryError
from vm_core.stores.other import remote_file


@pytest.fixture(params=["local", "bucket", "memory"])
def root(request, tmp_path) -> str:
    """A folder that is not there yet; the code under test does not know which kind it is."""
    if request.param == "local":
        return str(tmp_path / "root")
    if request.param == "bucket":
        return request.getfixturevalue("bucket") + "/root"
    return f"memory://root-{uuid.uuid4().hex}"


def opened(path: str) -> bytes:
    with storage.open_read(path) as file:
        return file.read()


def listed(root: str) -> list[str]:
    return [file.path.removeprefix(root) for file in storage.walk(root)]


def test_what_is_written_is_read(root):
    path = storage.join(root, "a", "b.bin")
    assert not storage.exists(path)
    storage.write_bytes(path, b"one")
    storage.write_bytes(path, b"three")
    assert storage.read_bytes(path) == b"three"
    assert storage.exists(path)
    assert storage.is_directory(storage.join(root, "a"))
    assert not storage.is_directory(path)
    assert storage.sha256_file(path) == hashlib.sha256(b"three").hexdigest()


def test_what_is_there(root):
    path = storage.join(root, "a", "b")
    assert storage.read_if_exists(path) is None and not storage.is_file(path)
    storage.write_bytes(path, b"")
    assert storage.read_if_exists(path) == b"" and storage.is_file(path)
    assert storage.exists(storage.join(root, "a")) and not storage.is_file(storage.join(root, "a"))
    with storage.open_read(path) as file:
        assert file.read() == b""


def test_a_missing_file_is_reported_alike(root):
    path = storage.join(root, "none")
    for read in (storage.read_bytes, opened):
        with pytest.raises(MissingFileError) as raised:
            read(path)
        assert str(raised.value) == f"cannot read {path!r}: No such file or directory"
        assert str(raised.value.filename) == path


def test_swap(root):
    path = storage.join(root, "a", "pointer")
    assert not storage.swap(path, b"1", b"2") and not storage.exists(path)
    assert storage.swap(path, None, b"1")
    assert not storage.swap(path, None, b"2")
    assert not storage.swap(path, b"0", b"2")
    assert storage.read_bytes(path) == b"1"
    assert storage.swap(path, b"1", b"2")
    # A repeated attempt finds its own work done.
    assert storage.swap(path, b"1", b"2") and storage.swap(path, None, b"2")
    assert storage.read_bytes(path) == b"2" and listed(root) == ["/a/pointer"]


@pytest.mark.parametrize("kind", ["local", "bucket"])
def test_of_many_that_swap_one_succeeds(kind, request, tmp_path):
    root = str(tmp_path / "root") if kind == "local" else request.getfixturevalue("bucket")
    path = storage.join(root, "pointer")
    start = threading.Barrier(6)
    content: bytes | None = None

    def attempt(new: bytes) -> bytes:
        start.wait()
        return new if storage.swap(path, content, new) else b""

    with ThreadPoolExecutor(6) as pool:
        for turn in range(10):
            tried = [f"{turn} {number}".encode() for number in range(6)]
            won = [new for new in pool.map(attempt, tried) if new]
            assert len(won) == 1 and storage.read_bytes(path) == won[0]
            content = won[0]


def test_a_file_system_without_links(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    path = str(tmp_path / "pointer")
    assert storage.swap(path, None, b"1") and not storage.swap(path, None, b"2")
    assert storage.read_bytes(path) == b"1" and listed(str(tmp_path)) == ["/pointer"]


def test_check_writable(root, tmp_path):
    storage.check_writable(storage.join(root, "a"))
    assert listed(root) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(VisualMemoryError, match=r"cannot write to '.*file/x': Not a directory"):
        storage.check_writable(str(tmp_path / "file" / "x"))


def test_a_failed_write_leaves_nothing_behind(root):
    path = storage.join(root, "table")
    storage.write_bytes(path, b"old")
    for name in ("table", "new"):
        with pytest.raises(KeyboardInterrupt), storage.write_atomic(storage.join(root, name)) as f:
            f.write(b"half of the n")
            raise KeyboardInterrupt
    assert listed(root) == ["/table"]
    assert storage.read_bytes(path) == b"old"


def test_nothing_is_visible_until_the_write_is_complete(root):
    path = storage.join(root, "table")
    with storage.write_atomic(path) as file:
        file.write(b"x")
        file.flush()
        assert not storage.exists(path)
    assert storage.read_bytes(path) == b"x"


def test_concurrent_writers_leave_one_whole_file(root):
    path = storage.join(root, "table")
    contents = [bytes([65 + i]) * 300_000 for i in range(8)]
    writers = [
        threading.Thread(target=storage.write_bytes, args=(path, content)) for content in contents
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert storage.read_bytes(path) in contents
    assert listed(root) == ["/table"]


def fill(folder: str, **files: str) -> None:
    for name, text in files.items():
        path = Path(folder, name.replace("__", "/"))
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)


def test_a_folder_replaces_the_one_before(root):
    path = storage.join(root, "index")
    with storage.write_directory_atomic(path) as folder:
        fill(folder, a="1", b="2", deep__c="3")
    assert listed(path) == ["/a", "/b", "/deep/c"]
    with storage.write_directory_atomic(path) as folder:
        fill(folder, b="20", deep__d="40")
    assert listed(path) == ["/b", "/deep/d"]
    assert storage.read_bytes(storage.join(path, "b")) == b"20"
    assert listed(root) == ["/index/b", "/index/deep/d"]


def test_a_failed_folder_leaves_the_one_before(root):
    path = storage.join(root, "index")
    with storage.write_directory_atomic(path) as folder:
        fill(folder, a="1")
    with pytest.raises(ZeroDivisionError), storage.write_directory_atomic(path) as folder:
        fill(folder, a="2", b="2")
        1 / 0  # noqa: B018
    assert listed(root) == ["/index/a"]
    assert storage.read_bytes(storage.join(path, "a")) == b"1"


def test_attempts_that_write_one_folder_at_once_all_succeed(tmp_path):
    path = str(tmp_path / "index")
    start = threading.Barrier(6)
    failures = []

    def attempt(number: int) -> None:
        try:
            for _ in range(20):
                with storage.write_directory_atomic(path) as folder:
                    fill(folder, a=str(number), b=str(number))
                    start.wait()
        except Exception as error:
            failures.append(error)
            start.abort()

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert listed(str(tmp_path)) == ["/index/a", "/index/b"]
    assert Path(path, "a").read_text() == Path(path, "b").read_text()


def test_a_folder_does_not_replace_a_file(tmp_path):
    path = tmp_path / "index"
    path.write_text("important")
    with pytest.raises(StorageError, match="Not a directory"):
        with storage.write_directory_atomic(str(path)) as folder:
            fill(folder, a="1")
    assert path.read_text() == "important"


def test_walk_is_sorted_and_knows_sizes(root):
    for name in ("b/2", "a", "b/10", "c/d/e"):
        storage.write_bytes(storage.join(root, name), name.encode())
    files = storage.walk(root)
    assert [file.path for file in files] == [f"{root}/{n}" for n in ("a", "b/10", "b/2", "c/d/e")]
    assert [file.size for file in files] == [1, 4, 3, 5]
    assert [storage.read_bytes(file.path) for file in files][3] == b"c/d/e"
    assert storage.walk(root + "/")[0].path == f"{root}/a"


def test_list_files_matches_a_pattern(root):
    for name in ("train-0", "train-1", "test-0", "deep/train-2"):
        storage.write_bytes(storage.join(root, name), b"x")
    found = storage.list_files(storage.join(root, "train-*"))
    assert [file.path.rpartition("/")[2] for file in found] == ["train-0", "train-1"]
    assert storage.read_bytes(found[0].path) == b"x"
    everywhere = storage.list_files(storage.join(root, "**", "train-*"))
    assert "train-2" in [file.path.rpartition("/")[2] for file in everywhere]
    assert storage.list_files(storage.join(root, "none-*")) == []


@pytest.mark.parametrize("list_them", [storage.walk, lambda root: storage.list_files(f"{root}/*")])
def test_the_version_changes_with_the_file(root, list_them):
    path = storage.join(root, "file")
    storage.write_bytes(path, b"one")
    (first,) = list_them(root)
    assert list_them(root) == [first]
    storage.write_bytes(path, b"two")
    (second,) = list_them(root)
    assert (first.path, first.size) == (second.path, second.size)
    assert first.version != second.version


@pytest.mark.parametrize(
    "details",
    [
        {"etag": "CJ+"},
        {"ETag": '"9b2"', "LastModified": "today"},
        {"generation": "17"},
        {"last_modified": "today"},
    ],
)
def test_each_store_has_its_own_name_for_the_version(details):
    found = remote_file("s3://bucket/x", {"size": 3, **details})
    assert found == ("s3://bucket/x", 3, next(iter(details.values())))


def test_stamp_follows_size_and_time(tmp_path):
    file = tmp_path / "a"
    file.write_text("x")
    first = storage.stamp(str(file))
    assert first == storage.stamp(str(file)) != ""
    os.utime(file, (1, 1))
    assert storage.stamp(str(file)) != first
    assert storage.stamp(str(tmp_path / "none")) == ""
    assert storage.stamp("memory://x/a") == ""


def test_walk_follows_links_and_survives_loops(tmp_path):
    (tmp_path / "data" / "a").mkdir(parents=True)
    (tmp_path / "data" / "a" / "1").write_text("one")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "2").write_text("second")
    for name, target in {
        "linked": tmp_path / "elsewhere",
        "a/up": tmp_path / "data",
        "a/self": "self",
        "file": "a/1",
        "gone": "nowhere",
    }.items():
        (tmp_path / "data" / name).symlink_to(target)
    files = {
        file.path.removeprefix(f"{tmp_path}/data/"): file
        for file in storage.walk(str(tmp_path / "data"))
    }
    assert sorted(files) == ["a/1", "a/self", "file", "gone", "linked/2"]
    assert [files[name].size for name in ("a/1", "file", "linked/2")] == [3, 3, 6]
    assert files["file"].version == files["a/1"].version != ""
    assert files["gone"][1:] == files["a/self"][1:] == (0, "")


def test_list_files_follows_links(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "0").write_text("zero")
    (tmp_path / "train-0").symlink_to("real/0")
    (tmp_path / "train-1").symlink_to("nowhere")
    (tmp_path / "train-2").symlink_to("real")
    (found,) = storage.list_files(str(tmp_path / "train-*"))
    assert (found.path, found.size) == (str(tmp_path / "train-0"), 4)


@pytest.mark.parametrize("name", ["a b", "ä::b.jpg", "#1", "100%", "a:b", "写真"])
def test_names_are_taken_as_they_are(tmp_path, name):
    path = str(tmp_path / name)
    storage.write_bytes(path, b"x")
    assert os.listdir(tmp_path) == [name]
    assert storage.exists(path)
    assert storage.read_bytes(path) == b"x"
    assert [file.path for file in storage.walk(str(tmp_path))] == [path]


def test_local_copy_of_a_local_path_is_the_path(tmp_path):
    with storage.local_copy(str(tmp_path)) as path:
        assert path == str(tmp_path)
    assert tmp_path.exists()


@pytest.mark.parametrize("root", ["bucket", "memory"], indirect=True)
def test_local_copy_from_a_bucket(root):
    storage.write_bytes(f"{root}/index/a", b"1")
    storage.write_bytes(f"{root}/index/deep/b", b"2")
    with storage.local_copy(f"{root}/index") as folder:
        assert [file.path.removeprefix(folder) for file in storage.walk(folder)] == [
            "/a",
            "/deep/b",
        ]
        assert Path(folder, "deep", "b").read_bytes() == b"2"
    assert not os.path.exists(folder)
    with storage.local_copy(f"{root}/index/a") as file:
        assert Path(file).read_bytes() == b"1"
    with pytest.raises(FileNotFoundError), storage.local_copy(f"{root}/none"):
        pass


@pytest.mark.parametrize("kind", ["local", "bucket", "memory"])
def test_a_name_is_no_pattern(kind, request, tmp_path):
    roots = {"local": str(tmp_path), "memory": f"memory://{uuid.uuid4().hex}"}
    root = roots[kind] if kind in roots else request.getfixturevalue("bucket")
    for folder in ("a[1]", "a1"):
        storage.write_bytes(f"{root}/{folder}/b", folder.encode())
    with storage.local_copy(f"{root}/a[1]") as folder:
        assert Path(folder, "b").read_bytes() == b"a[1]"
    with storage.write_directory_atomic(f"{root}/a[1]") as folder:
        fill(folder, c="1")
    assert listed(root) == ["/a1/b", "/a[1]/c"]
    storage.remove_directory(f"{root}/a[1]")
    assert listed(root) == ["/a1/b"]


def test_remove_directory(root):
    storage.write_bytes(storage.join(root, "a", "b"), b"1")
    storage.write_bytes(storage.join(root, "c"), b"1")
    storage.remove_directory(storage.join(root, "a"))
    storage.remove_directory(storage.join(root, "a"))
    assert listed(root) == ["/c"]


def test_two_attempts_remove_one_folder(monkeypatch):
    root = "memory://removed"
    for name in ("a", "b", "c"):
        storage.write_bytes(f"{root}/{name}", b"1")
    filesystem = fsspec.filesystem("memory")
    found = filesystem.find("/removed", detail=True)
    filesystem.rm_file("/removed/b")  # by the other one, after the folder was listed
    monkeypatch.setattr(type(filesystem), "find", lambda *_, **__: found)
    storage.remove_directory(root)
    monkeypatch.undo()
    assert not filesystem.find("/removed")


def test_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert storage.absolute("a/../b") == f"{tmp_path}/b"
    assert storage.absolute("~/b") == "/home/me/b"
    assert storage.absolute("memory://a/b") == "memory://a/b"


def test_unknown_scheme_names_the_remedy():
    with pytest.raises(VisualMemoryError, match=r"cannot open 'nfs9://x/y': .* use a local path"):
        storage.exists("nfs9://x/y")


def test_a_url_that_is_not_quite_one():
    with pytest.raises(VisualMemoryError, match=r"'gs:/b/x' is no URL.* Write 'gs://b/x'"):
        storage.absolute("gs:/b/x")
    for path in ("gs://", "gs:///folder"):
        with pytest.raises(VisualMemoryError, match=f"'{path}' names no bucket"):
            storage.read_bytes(path)


def test_the_stand_in_for_a_bucket_is_not_local():
    assert not storage.is_local("memory://x")
    assert storage.is_local("/x")
    assert fsspec.filesystem("memory").protocol == "memory"


def test_a_failed_write_names_the_file_the_cause_and_the_remedy(tmp_path):
    path = str(tmp_path / "table")
    refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(StorageError, match="No space left on device. Free some") as raised:
        with storage.write_atomic(path) as file:
            file.write(b"x")
            raise refused
    assert str(raised.value).startswith(f"cannot write {path!r}: ")
    assert raised.value.errno == errno.ENOSPC and raised.value.filename == path
    assert listed(str(tmp_path)) == []


def test_an_error_about_another_file_names_that_file(tmp_path):
    with pytest.raises(MissingFileError), storage.write_atomic(str(tmp_path / "a")) as file:
        file.write(storage.read_bytes(str(tmp_path / "none")))
    with pytest.raises(StorageError, match=r"cannot write '.*/readable': Permission denied. Get"):
        with storage.write_directory_atomic(str(tmp_path / "a")):
            raise PermissionError(errno.EACCES, "", str(tmp_path / "readable"))


@pytest.mark.parametrize(
    "call",
    [
        storage.read_bytes,
        storage.walk,
        storage.remove_file,
        lambda path: storage.write_bytes(path, b"x"),
        lambda path: storage.swap(path, None, b"x"),
    ],
)
def test_a_name_that_no_file_can_have(tmp_path, call):
    with pytest.raises(StorageError, match="no file can have this name"):
        call(f"{tmp_path}/a\0b")


@pytest.mark.parametrize("read", [storage.read_bytes, opened, storage.sha256_file])
def test_only_regular_files_are_read(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "linked").symlink_to(tmp_path / "pipe")
    for path in (f"{tmp_path}/pipe", f"{tmp_path}/linked", "/dev/zero"):
        with pytest.raises(StorageError, match="it is not a regular file"):
            read(path)
    with pytest.raises(StorageError, match="Is a directory"):
        read(str(tmp_path))


def test_a_limit_of_bytes(root):
    path = storage.join(root, "a")
    storage.write_bytes(path, b"12345")
    assert storage.read_bytes(path, limit=5) == b"12345"
    with pytest.raises(StorageError, match="it has more than 4 bytes"):
        storage.read_bytes(path, limit=4)
    storage.write_bytes(path, b"")
    assert storage.read_bytes(path, limit=0) == b""


def test_a_folder_that_two_links_lead_to_is_walked_once(tmp_path):
    (tmp_path / "data" / "z").mkdir(parents=True)
    (tmp_path / "data" / "z" / "1").write_text("one")
    (tmp_path / "data" / "a").symlink_to("z")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "2").write_text("two")
    (tmp_path / "other" / "back").symlink_to(tmp_path / "data")
    for name in ("b", "c"):
        (tmp_path / "data" / name).symlink_to(tmp_path / "other")
    # Where there is a way without a link it is taken, otherwise the first by name.
    assert listed(str(tmp_path / "data")) == ["/b/2", "/z/1"]


def test_what_is_written_is_synced_with_its_folders(tmp_path, monkeypatch):
    """Everything that a reader needs is on the disk before the call returns."""
    synced: set[str] = set()
    fsync = os.fsync

    def record(descriptor: int) -> None:
        synced.add(os.readlink(f"/proc/self/fd/{descriptor}").partition(".incomplete-")[0])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", record)
    storage.write_bytes(f"{tmp_path}/new/folder/file", b"x")
    new = [f"{tmp_path}{name}" for name in ("", "/new", "/new/folder", "/new/folder/file")]
    assert synced == set(new)
    synced.clear()
    storage.swap(f"{tmp_path}/new/pointer", None, b"x")
    assert synced == {f"{tmp_path}/new", f"{tmp_path}/new/pointer"}
    synced.clear()
    with storage.write_directory_atomic(f"{tmp_path}/new/index") as folder:
        fill(folder, a="1", deep__b="2")
        local = folder
    assert {f"{tmp_path}/new", f"{tmp_path}/new/index"} <= synced
    with storage.write_directory_atomic(f"{tmp_path}/new/index2") as folder:
        local, seen = folder, set()
        monkeypatch.setattr(os, "fsync", lambda d: seen.add(os.readlink(f"/proc/self/fd/{d}")))
        fill(folder, a="1", deep__b="2")
    below = {f"{local}{name}" for name in ("", "/a", "/deep", "/deep/b")}
    assert below | {f"{tmp_path}/new"} == seen


def test_leftovers_by_age(tmp_path):
    storage.write_bytes(f"{tmp_path}/a/kept", b"x")
    (tmp_path / "a" / "table.incomplete-000000000001").write_text("12345")
    (tmp_path / "index.incomplete-000000000002").mkdir()
    (tmp_path / "index.incomplete-000000000002" / "part").write_text("123")
    found = storage.leftovers(str(tmp_path))
    assert [(file.path.rpartition("/")[2], file.size) for file in found] == [
        ("table.incomplete-000000000001", 5),
        ("index.incomplete-000000000002", 3),
    ]
    os.utime(tmp_path / "a" / "table.incomplete-000000000001", (1, 1))
    storage.remove_leftovers(str(tmp_path), seconds=3600)
    assert not (tmp_path / "a" / "table.incomplete-000000000001").exists()
    storage.remove_leftovers(str(tmp_path))
    assert listed(str(tmp_path)) == ["/a/kept"]


def test_temporary_files_of_a_process_that_ends_early(tmp_path):
    with storage.temporary_directory(str(tmp_path / "index")) as folder:
        fill(folder, a="1")
        with storage.write_atomic(str(tmp_path / "table")) as file:
            file.write(b"x")
            file.flush()
            assert len(storage.leftovers(str(tmp_path))) == 2
            storage.remove_temporaries()
            assert os.listdir(tmp_path) == []
            storage.write_bytes(str(tmp_path / "table"), b"")
            with open(file.name, "wb"):  # for the end of the block
                pass


@pytest.mark.parametrize("name", ["../x", "a/../../x", "a//x", "/x"])
def test_a_download_stays_in_its_folder(make_bucket, name, tmp_path, monkeypatch):
    bucket = make_bucket()
    storage.write_bytes(f"{bucket}/memory/good", b"1")
    storage.write_bytes(f"{bucket}/memory/{name}", b"stranger")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for names in (None, ["good", name]):
        with pytest.raises(VisualMemoryError, match="copied to another place"):
            with storage.local_copy(f"{bucket}/memory", names):
                pass
    assert listed(str(tmp_path)) == []
