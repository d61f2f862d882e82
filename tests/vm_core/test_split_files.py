"""Splits on their way to the workers."""

from hypothesis import given, settings
from hypothesis import strategies as st

from vm_core import split_files
from vm_core.sources import Split

VALUES = st.recursive(
    st.text() | st.binary() | st.integers() | st.none(), lambda some: st.lists(some).map(tuple)
)
SPLITS = st.builds(Split, st.lists(VALUES).map(tuple), st.text(), st.none() | st.integers(0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), SPLITS)))
def test_what_is_read_is_what_was_written(tmp_path_factory, splits):
    """To the last bit: a checkpoint is found again by a split's ``repr``."""
    paths = split_files.write(str(tmp_path_factory.mktemp("splits")), splits)
    found = [each for path in paths for each in split_files.read(path)]
    assert repr(found) == repr(splits)
    assert all(isinstance(split, Split) for _, split in found)


def test_many_splits_go_to_several_files_in_order(tmp_path, monkeypatch):
    monkeypatch.setattr(split_files, "SPLITS_PER_FILE", 2)
    splits = [(0, Split((b"\xff.png", f"{i}"), "v", 1)) for i in range(5)]
    paths = split_files.write(str(tmp_path), splits)
    found = [split_files.read(path) for path in paths]
    assert found == [splits[:2], splits[2:4], splits[4:]]
    assert split_files.write(str(tmp_path), []) == []
