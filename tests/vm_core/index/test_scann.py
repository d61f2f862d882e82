"""ScaNN on clustered data: round trip, recall, tuning, and where its leaves run dry."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from benchmarks.mixture import HELD_OUT, Mixture
from vm_core import index
from vm_core.errors import DamagedError, VisualMemoryError
from vm_core.exact import top_k
from vm_core.index import _tuning, auto, exact, scann

MIXTURE = Mixture(32, classes=50, intrinsic=12)


@pytest.fixture(scope="module")
def vectors():
    return MIXTURE.block(0, 4_000)[0]


@pytest.fixture(scope="module")
def queries():
    return MIXTURE.block(HELD_OUT, 200)[0]


def build(vectors, folder, **settings):
    """The search and what its build settled on, from a folder that has gone since."""
    os.makedirs(folder)
    plugin = scann.Plugin(**settings)
    plugin.build(vectors, str(folder))
    tuned = json.loads((folder / "tuned.json").read_text())
    search = plugin.open(vectors, str(folder))
    shutil.rmtree(folder)
    return search, tuned


@pytest.fixture(scope="module")
def search(vectors, tmp_path_factory):
    return build(vectors, tmp_path_factory.mktemp("default") / "index")[0]


def recall(found, expected):
    hits = [len(np.intersect1d(a, b)) for a, b in zip(found, expected, strict=True)]
    return np.mean(hits) / expected.shape[1]


def true_distances(queries, vectors, rows):
    wide = vectors[rows].astype(np.float64)
    return 1 - np.vecdot(queries[:, None].astype(np.float64), wide)


def test_a_moved_index_finds_what_exact_search_finds(vectors, queries, tmp_path):
    scann.Plugin().build(vectors, str(tmp_path))
    moved = shutil.move(tmp_path, tmp_path.with_name("elsewhere"))
    assert not [name for _, _, names in os.walk(moved) for name in names if name.endswith(".pkl")]
    search = scann.Plugin().open(vectors, str(moved))
    found, distances = search(queries, 10)
    expected, expected_distances = top_k(queries, vectors, 10)
    assert found.dtype == np.int64 and distances.dtype == np.float32
    assert recall(found, expected) > 0.95
    same = found == expected
    np.testing.assert_allclose(distances[same], expected_distances[same], atol=2e-6)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_one_query_and_no_query(search, vectors):
    assert search(vectors[17:18], 5)[0][0, 0] == 17
    assert search(vectors[:0], 5)[0].shape == (0, 5)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_leaves_that_hold_fewer_than_k_rows_give_padding_and_no_false_neighbour(
    dtype, vectors, queries, tmp_path
):
    settings = {"leaves": 400, "leaves_to_search": 1, "reorder_dtype": dtype}
    search, _ = build(vectors, tmp_path / "index", **settings)
    found, distances = search(queries, 100)
    missing = found < 0
    assert missing.any(axis=1).mean() > 0.9
    assert np.isinf(distances[missing]).all() and np.isfinite(distances[~missing]).all()
    # Padding stands at the end, and no row comes twice, row 0 not either.
    assert (np.diff(missing.astype(int), axis=1) >= 0).all()
    for row in found:
        real = row[row >= 0]
        assert len(set(real)) == len(real)
    exact_distances = true_distances(queries, vectors, found)
    np.testing.assert_allclose(distances[~missing], exact_distances[~missing], atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_more_neighbours_than_rows(dtype, vectors, tmp_path):
    few = vectors[:1_000]
    settings = {"leaves": 4, "leaves_to_search": 4, "reorder_dtype": dtype}
    search, _ = build(few, tmp_path / "index", **settings)
    found, distances = search(few[:3], 1_200)
    for row in found:
        np.testing.assert_array_equal(np.sort(row[:1_000]), np.arange(1_000))
    assert (found[:, 1_000:] == -1).all() and np.isinf(distances[:, 1_000:]).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_equal_distances_are_tied_by_row(dtype, vectors, tmp_path):
    twice = np.repeat(vectors[::2], 2, axis=0)
    search, _ = build(twice, tmp_path / "index", reorder_dtype=dtype)
    found, distances = search(twice[:50], 8)
    tied = np.diff(distances, axis=1) == 0
    assert tied.any() and (np.diff(found, axis=1)[tied] > 0).all()


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_distances_and_order_are_exact_however_rough_the_re_ranking(
    dtype, stored, vectors, queries, tmp_path
):
    kept = vectors.astype(stored)
    search, tuned = build(kept, tmp_path / "index", reorder_dtype=dtype)
    assert tuned["reorder_dtype"] == dtype
    expected, _ = top_k(queries, kept, 10)
    for k in (1, 10):
        found, distances = search(queries, k)
        np.testing.assert_allclose(distances, true_distances(queries, kept, found), atol=2e-6)
        assert (np.diff(distances, axis=1) >= 0).all()
        assert recall(found, expected[:, :k]) > 0.97


def test_a_target_is_reached_and_a_higher_one_searches_more(vectors, queries, tmp_path):
    expected, _ = top_k(queries, vectors, 100)
    work = []
    for target in (0.8, 0.97):
        search, tuned = build(vectors, tmp_path / "index", leaves=200, target_recall=target)
        assert tuned["recall"] >= target and tuned["milliseconds"] > 0
        assert recall(search(queries, 100)[0], expected) > target - 0.05
        work.append(tuned["leaves_to_search"])
    assert 1 <= work[0] < work[1] <= 200


def test_a_target_out_of_reach_names_the_best_that_was_found(vectors, tmp_path):
    settings = scann.Plugin(dimensions_per_block=32, target_recall=1)
    best = r"target_recall = 1.0 is not reached.*best found has recall@100 0\.\d{4} .*"
    with pytest.raises(VisualMemoryError, match=best + r"reorder=1000\. Lower the target"):
        settings.build(vectors, str(tmp_path))
    assert not os.listdir(tmp_path)


def test_the_time_a_query_may_take_is_spent_on_recall(vectors, tmp_path):
    _, tuned = build(vectors, tmp_path / "index", maximum_milliseconds=1000)
    # Of settings that find the same the quicker is taken, which may be any of the last.
    assert tuned["leaves_to_search"] > 25 and tuned["recall"] > 0.99
    for target, text in ((None, "quickest"), (0.5, "0.5 is not reached.* within maximum_mill")):
        settings = scann.Plugin(maximum_milliseconds=1e-9, target_recall=target)
        with pytest.raises(VisualMemoryError, match=text):
            settings.build(vectors, str(tmp_path))


def test_within_its_bytes_an_index_is_as_precise_as_it_can_be(vectors, tmp_path):
    count, dimension = vectors.shape
    sizes = {}
    for dtype in ("float32", "bfloat16", "int8"):
        folder = tmp_path / dtype
        folder.mkdir()
        scann.Plugin(reorder_dtype=dtype).build(vectors, str(folder))
        files = [file for file in (folder / "scann").iterdir() if file.is_file()]
        sizes[dtype] = sum(file.stat().st_size for file in files)
    for dtype, size in sizes.items():
        # The rule leaves out the codebook, 64 bytes a dimension, and some headers.
        fitting = scann.Plugin(maximum_bytes=size)._fitting(count, dimension, 63)
        assert fitting == (dtype, 2)
        assert scann.Plugin(maximum_bytes=size - 9_000)._fitting(count, dimension, 63) != fitting
    with pytest.raises(VisualMemoryError, match=r"maximum_bytes = 9,999: .* takes 176,128 bytes"):
        scann.Plugin(maximum_bytes=9_999).build(vectors, str(tmp_path))
    _, tuned = build(vectors, tmp_path / "index", maximum_bytes=sizes["int8"] - 9_000)
    assert (tuned["reorder_dtype"], tuned["dimensions_per_block"]) == ("int8", 4)


def test_the_ladder_goes_up_to_all_leaves():
    assert list(_tuning._ladder(30)) == [1, 2, 3, 5, 8, 12, 18, 27, 30]
    assert list(_tuning._ladder(1)) == [1]


@pytest.mark.parametrize(
    "rows, leaves", [(1_000, 25), (20_000, 25), (100_000, 36), (1_000_000, 64)]
)
def test_leaves_searched_by_default(rows, leaves):
    assert scann._leaves_to_search(round(rows**0.5)) == leaves


SEARCHING = """
import sys
import numpy as np
from vm_core.index import scann
vectors, folder = np.load(sys.argv[1]), sys.argv[2]
search = scann.Plugin().open(vectors, folder)
assert "tensorflow" not in sys.modules
before = search(vectors[:50], 10)
from scann import scann_ops_pybind
loaded = scann_ops_pybind.load_searcher(folder + "/scann").searcher
after = scann.searching(loaded, vectors, scann.load(folder)[1])(vectors[:50], 10)
np.testing.assert_array_equal(before, after)
"""


def test_searching_imports_no_tensorflow_and_leaves_scann_importable(vectors, tmp_path):
    scann.Plugin().build(vectors, str(tmp_path))
    np.save(tmp_path / "vectors.npy", vectors)
    arguments = [sys.executable, "-c", SEARCHING, tmp_path / "vectors.npy", tmp_path]
    result = subprocess.run(arguments, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_a_missing_scann_is_named_when_it_is_opened(vectors, tmp_path, monkeypatch):
    scann.Plugin().build(vectors, str(tmp_path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(VisualMemoryError, match=r"cannot import scann.*pip install 'scann\[tf\]"):
        scann.Plugin().open(vectors, str(tmp_path))


def test_exact_or_scann_is_chosen_by_the_number_of_rows():
    assert auto.Plugin().choose(19_999) == exact.Plugin()
    assert auto.Plugin().choose(20_000) == scann.Plugin()
    tuned = scann.Plugin(target_recall=0.95)
    earlier = index.parse({"kind": "auto", "exact_below": 5, "scann": {"target_recall": 0.95}})
    for asked in (tuned, earlier):
        assert asked.choose(999) == exact.Plugin()  # ScaNN cannot learn from so few
        assert asked.choose(1_000) == tuned


def test_unknown_kinds_and_settings_are_named():
    with pytest.raises(VisualMemoryError, match="'hnsw' is unknown. Known: auto, exact, scann"):
        index.parse({"kind": "hnsw"})
    with pytest.raises(VisualMemoryError, match="unknown key 'leafs'.*leaves_to_search"):
        index.parse({"kind": "scann", "leafs": 3})
    with pytest.raises(VisualMemoryError, match=r"unknown key 'scann.leafs'"):
        index.parse({"kind": "auto", "scann": {"leafs": 3}})
    with pytest.raises(VisualMemoryError, match="follow from target_recall.*Leave out"):
        index.parse({"kind": "scann", "leaves_to_search": 3, "target_recall": 0.9})


@pytest.mark.parametrize(
    "old, new",
    [
        ("dataset.npy", "/etc/passwd"),
        ("dataset.npy", "../../outside.npy"),
        ("dataset.npy", ".."),
        ("dataset.npy", "linked.npy"),
        ("dataset.npy", "none.npy"),
        ('asset_path: "dataset.npy"', "asset_path: 'dataset.npy'"),
        ('asset_path: "dataset.npy"', 'asset_path: "dataset.npy" asset_path: "/etc/passwd"'),
        ("DATASET_NPY", 'DATASET_NPY asset_path: "/etc/passwd"'),
    ],
)
def test_scann_opens_files_of_its_folder_only(vectors, tmp_path, old, new):
    """Its list of files may come from a stranger."""
    folder = str(tmp_path)
    index.parse({"kind": "scann"}).build(vectors[:1_500], folder)
    os.symlink("/etc/hostname", tmp_path / "scann" / "linked.npy")
    path = tmp_path / "scann" / "scann_assets.pbtxt"
    whole = path.read_text()
    scann.load(folder)
    path.write_text(whole.replace(old, new))
    with pytest.raises(DamagedError, match="names other files than ScaNN's own"):
        scann.load(folder)


@pytest.mark.parametrize("data", ["{}", "[]", "x", '{"reorder": "many"}', "[" * 100_000])
def test_a_damaged_record_of_the_tuning(vectors, tmp_path, data):
    index.parse({"kind": "scann"}).build(vectors[:1_500], str(tmp_path))
    (tmp_path / "tuned.json").write_text(data)
    with pytest.raises(DamagedError, match="tuned.json is damaged"):
        scann.load(str(tmp_path))
