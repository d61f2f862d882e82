"""Class tables: which integer a class is, and what it is called."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_core.classes import ClassTable, add_counts, pack_counts, read_class_list
from vm_core.errors import VisualMemoryError
from vm_core.records import PADDING, UNKNOWN

KEYS = st.lists(st.text(min_size=1, max_size=5) | st.from_regex(r"\A[0-9]{1,3}\Z"), max_size=12)


@given(st.lists(KEYS, min_size=1, max_size=3), st.randoms())
def test_labels_do_not_depend_on_the_order_of_keys_or_sources(sources, random):
    table = ClassTable.from_keys(sources, {})
    assert sorted(table.keys) == sorted({key for keys in sources for key in keys})
    assert list(table.labels) == sorted(set(table.labels))
    shuffled = [random.sample(keys, len(keys)) for keys in sources]
    random.shuffle(shuffled)
    assert ClassTable.from_keys(shuffled, {}) == table
    for key, label in zip(table.keys, table.labels, strict=True):
        assert table.label(key) == label


def test_named_classes_are_counted_from_zero():
    table = ClassTable.from_keys([["rose", "iris"], ["7", "iris"]], {"iris": "Schwertlilie"})
    assert table == ClassTable(("7", "iris", "rose"), ("7", "Schwertlilie", "rose"), (0, 1, 2))
    assert table.label("7") == 0
    assert table.label("tulip") == UNKNOWN
    assert table.name(1) == "Schwertlilie"


def test_integers_are_their_own_labels():
    table = ClassTable.from_keys([["10", "9", "0"]], {"9": "nine"})
    assert (table.labels, table.names) == ((0, 9, 10), ("0", "nine", "10"))
    assert table.label("9") == 9
    assert table.label("1") == UNKNOWN


@pytest.mark.parametrize("key", ["007", "-1", "1.0", "²", "+1", "1_0", "9" * 19, "9" * 5000, " 1"])
def test_what_is_no_plain_integer_is_a_name(key):
    table = ClassTable.from_keys([[key, "1"]], {})
    assert sorted(table.labels) == [0, 1]
    assert ClassTable().label(key) == UNKNOWN


def test_plain_integer_labels_need_no_table():
    table = ClassTable.from_keys([None, ["3", "5"]], {})
    assert table == ClassTable()
    assert table.label("12") == 12
    assert table.name(12) == "12"


def test_integers_and_names_do_not_mix():
    with pytest.raises(VisualMemoryError, match=r"named classes \('iris'.*option class_list"):
        ClassTable.from_keys([None, ["rose", "iris"]], {})


def test_names_of_what_is_no_class():
    assert ClassTable().name(PADDING) == "(no neighbour)"
    assert ClassTable().name(UNKNOWN) == "(class not in the memory)"


@given(KEYS)
def test_parquet_round_trip(tmp_path_factory, keys):
    table = ClassTable.from_keys([keys], {key: key * 2 for key in keys})
    path = tmp_path_factory.mktemp("classes") / "classes.parquet"
    path.write_bytes(table.to_parquet())
    assert ClassTable.parse(str(path), path.read_bytes()) == table


def test_class_list(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffn01440764 tench, Tinca tinca\n\n n02 \tgoldfish \r\nplain\n".encode())
    names = {"n01440764": "tench, Tinca tinca", "n02": "goldfish", "plain": "plain"}
    assert read_class_list(str(path)) == names
    assert list(read_class_list(str(path))) == list(names)


def test_class_list_errors(tmp_path):
    path = tmp_path / "classes.txt"
    path.write_text("a one\nb two\n\na three\n")
    with pytest.raises(VisualMemoryError, match="line 4: the class key 'a' stands there twice"):
        read_class_list(str(path))
    path.write_bytes(b"a \xff\xfe\n")
    with pytest.raises(VisualMemoryError, match=r"cannot be read: .* Give a UTF-8 text file"):
        read_class_list(str(path))
    with pytest.raises(VisualMemoryError, match=r"cannot be read: .*No such file"):
        read_class_list(str(tmp_path / "none.txt"))


@given(st.lists(st.lists(st.integers(-2, 2**40) | st.integers(0, 9), max_size=30), max_size=4))
def test_packed_counts_add_up(shards):
    packed = [pack_counts(np.array(labels, np.int64)) for labels in shards]
    total = add_counts(packed)
    assert total == Counter(label for labels in shards for label in labels)
    assert list(total) == sorted(total)


def test_packed_counts_are_small():
    labels = np.random.default_rng(0).integers(21_000, size=50_000)
    assert len(pack_counts(labels)) < 21_000
