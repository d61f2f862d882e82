import pickle

import pytest

from vm_core import storage
from vm_core.errors import MissingFileError, StorageError, VisualMemoryError
from vm_core.relative_paths import check_name, check_relative

OUTSIDE = [
    *("", "/etc/passwd", "../x", "a/../x", "a/..", "./a", "a//b", "a/", "~/x", "a\\b"),
    *("file:///etc/passwd", "gs://bucket/x", "zip://a::file:///b", "a\0b", "a\nb", "a\x1b[31m"),
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_that_are_not_below_the_root_are_refused(path, tmp_path):
    with pytest.raises(ValueError, match="the path"):
        check_relative(path)
    with pytest.raises(VisualMemoryError, match="outside of it"):
        storage.inside(str(tmp_path), path)


def test_plain_names_and_paths_pass(tmp_path):
    for path in ("a", "a/b-c.d", "é/ü", "..a", "a..b", "[x]", "a b"):
        assert check_relative(path) == path
        assert storage.inside(str(tmp_path), path) == f"{tmp_path}/{path}"
        assert storage.inside("gs://bucket/m", path) == f"gs://bucket/m/{path}"
    assert check_name("a b") == "a b"
    with pytest.raises(ValueError, match="single name"):
        check_name("a/b")


def test_links_out_of_the_root_are_not_followed(tmp_path):
    root, other = tmp_path / "root", tmp_path / "root2"
    root.mkdir()
    other.mkdir()
    (other / "secret").write_text("x")
    (root / "file").symlink_to(other / "secret")
    (root / "folder").symlink_to(other)
    (root / "inner").mkdir()
    (root / "alias").symlink_to(root / "inner")
    (tmp_path / "linked").symlink_to(root)
    for name in ("file", "folder/secret", "folder"):
        with pytest.raises(VisualMemoryError, match="is a link to .*outside"):
            storage.inside(str(root), name)
    assert storage.inside(str(root), "alias/x") == f"{root}/alias/x"
    # The memory's own folder may be a link.
    assert storage.inside(str(tmp_path / "linked"), "inner") == f"{tmp_path}/linked/inner"


def test_storage_errors_are_os_errors_with_a_text_of_their_own():
    error = MissingFileError(2, "there is no file 'x'", "x")
    assert isinstance(error, StorageError) and isinstance(error, FileNotFoundError)
    for same in (error, pickle.loads(pickle.dumps(error))):
        assert (str(same), same.errno, same.filename) == ("there is no file 'x'", 2, "x")
        assert same.strerror == "No such file or directory"
