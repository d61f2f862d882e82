"""Plans against sums done by hand, what must grow with what, and what cannot be planned."""

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vm_core.errors import VisualMemoryError
from vm_core.index import scann
from vm_core.partitioning import Partitioning
from vm_core.planning import calibration, estimates, worker_types
from vm_core.planning import summary as plan_summary
from vm_core.planning.calibration import Constants
from vm_core.planning.estimates import Estimate, rows_scored
from vm_core.planning.planner import plan
from vm_core.planning.worker_types import GB, Accelerator, Worker
from vm_core.planning.workload import Workload

ROUND = Constants(
    machine="a thought",
    measured=frozenset({"gflops", "build_s_per_row_dim"}),
    gflops=100.0,
    scaling=1.0,
    shard_write_s_per_row=0.0,
    shard_write_s_per_byte=1e-8,
    shard_read_s_per_row=0.0,
    shard_read_s_per_byte=1e-9,
    file_hash_bytes_per_s=1e9,
    sample_s_per_row=1e-6,
    assign_s_per_row=1e-5,
    assign_s_per_cell=0.0,
    move_s_per_byte=1e-9,
    build_s=1.0,
    build_s_per_sample_dim=1e-6,
    build_s_per_row_dim=1e-7,
    open_s_per_byte=1e-9,
    search_s=1e-5,
    search_s_per_dim=1e-7,
    search_s_per_row_dim=1e-10,
    exact_efficiency=0.5,
    gather_s_per_neighbor=1e-7,
    score_s_per_neighbor=3e-7,
    vote_s=1e-5,
    decode_bytes_per_s=5e7,
    encoder_images_per_s={"mine": 50.0},
    image_bytes=1e5,
    id_bytes=40.0,
    record_bytes=160.0,
    row_bytes=10.0,
    assigned_bytes=60.0,
    neighbor_bytes=10.0,
    process_bytes=1e9,
    working_bytes=0.0,
    python_row_bytes=160.0,
    build_copies=2.0,
    sample_copies=1.0,
)
ONE = Worker("one", 1, 100 * GB, 1.0, 1 * GB, 1 * GB, request_s=0.0)
SMALL = Workload(
    100_000, 100, encoder="mine", queries=1000, k=10, rows_per_shard=10_000, recall_queries=0
)
LARGE = dataclasses.replace(
    SMALL, items=1_000_000, partitioning=Partitioning(rows=150_000), probes=2
)


def stages(workload, constants=ROUND, worker=ONE):
    return {each.stage.name: each for each in plan(workload, constants, worker).stages}


def test_bytes_of_one_partition_by_hand():
    sizes = plan(SMALL, ROUND, ONE).sizes
    # A row: the vector of 100 numbers, 40 of id and 160 of the record.
    assert sizes.shards == {"float32": 60e6, "float16": 40e6, "bfloat16": 40e6}
    assert sizes.vectors == {"float32": 40e6, "float16": 20e6, "bfloat16": 20e6}
    assert sizes.reorder == {"float32": 40e6, "bfloat16": 20e6, "int8": 10e6}
    assert sizes.codes == 5e6
    assert sizes.rows == 5e6
    leaves = 8 * 100 * math.sqrt(100_000)
    assert sizes.other == pytest.approx(4e5 + leaves)
    assert sizes.index == pytest.approx(40e6 + 40e6 + 5e6 + 5e6 + 4e5 + leaves)
    assert sizes.work == 60e6  # checkpoints; one cell needs no files in between


def test_hours_of_one_partition_by_hand():
    found = stages(SMALL)
    assert list(found) == [
        "encode",
        "write shards",
        "build index",
        "encode queries",
        "evaluate 1,000 queries",
        "leave-one-out",
    ]
    encode = found["encode"].stage
    assert encode.core_seconds == pytest.approx(100_000 / 500 + 100_000 / 50 + 60e6 / 1e8)
    assert encode.read_bytes == 1e10 and encode.shuffle_bytes == 60e6
    assert found["encode"].worker_seconds == pytest.approx(encode.core_seconds + 10 + 0.06)
    assert found["write shards"].stage.core_seconds == pytest.approx(0.6)
    leaves = math.sqrt(100_000)
    sample = 100 * leaves  # more than the 20,000 rows of the least sample
    training = 2 * (100_000 + 10 * sample) * leaves * 100 / 50e9
    index = plan(SMALL, ROUND, ONE).sizes.index
    build = 0.06 + 0.06 + index / 1e9 + 1 + training + 20_000 * 100 * 1e-6 + 100_000 * 100 * 1e-7
    assert found["build index"].stage.core_seconds == pytest.approx(build)
    scored = 100_000 * 2 * math.sqrt(leaves) / leaves
    search = 1e-5 + 100 * (1e-7 + scored * 1e-10)
    each = search + 10 * 1e-7 + 1e-5
    # ScaNN's files: the vectors again, half a byte a number of codes, a leaf; and the leaves.
    opened = (100_000 * (450 + 4) + 8 * 100 * leaves) * 1e-9
    assert found["evaluate 1,000 queries"].stage.core_seconds == pytest.approx(1000 * each + opened)
    scoring = 100_000 * (search + 10 * 3e-7) + opened
    assert found["leave-one-out"].stage.core_seconds == pytest.approx(scoring)
    assert found["leave-one-out"].stage.written_bytes == 0  # nothing to merge


def test_several_partitions_by_hand():
    result = plan(LARGE, ROUND, ONE)
    assert (result.cells, result.mean_rows, result.largest_rows) == (10, 100_000, 150_000)
    found = {each.stage.name: each.stage for each in result.stages}
    assert found["sample"].core_seconds == pytest.approx(0.6 + 1.0)
    assert found["sample"].written_bytes == found["train partitioner"].read_bytes == 20_000 * 400
    assert found["sample"].tasks == 100  # a bundle of shards each, here of one
    each = 1e-5 + 10 * 2 * 100 / 50e9
    assert found["train partitioner"].core_seconds == pytest.approx(20 * 20_000 * each)
    assert found["assign"].core_seconds == pytest.approx(0.6 + 1e6 * each + 0.5)
    assert found["assign"].written_bytes == 500e6
    assert found["build index"].tasks == 10
    assert found["build index"].files_opened == 10 * 100 * 2  # rows and marker of each bundle
    loo = found["leave-one-out"]
    assert loo.written_bytes == 1e6 * 2 * 10 * 10 + 4e8  # neighbours; vectors of visitors
    assert loo.read_bytes == pytest.approx(2 * result.sizes.index + loo.written_bytes)
    assert found["evaluate 1,000 queries"].shuffle_bytes == 1000 * 2 * (440 + 10 * 172)


def test_memory_by_hand():
    result = plan(LARGE, ROUND, ONE)
    python = 150_000 * 200
    sample = 100 * math.sqrt(150_000)
    held = 150_000 * 400 + 400 * (2 * 150_000 + sample)
    assert result.build_memory_bytes == pytest.approx(1e9 + held + python)
    # All ten partitions are under 4 GiB, so they stay open.
    assert result.search_memory_bytes == pytest.approx(1e9 + 1e6 * (475 + 4 + 200))


def test_small_partitions_are_searched_exactly():
    workload = dataclasses.replace(SMALL, items=10_000)
    result = plan(workload, ROUND, ONE)
    assert result.index_kind == "exact"
    assert result.sizes.codes == 0 and set(result.sizes.reorder.values()) == {0}
    found = {each.stage.name: each.stage for each in result.stages}
    each = 1e-5 + 2 * 10_000 * 100 / 50e9 + 10 * 1e-7 + 1e-5
    assert found["evaluate 1,000 queries"].core_seconds == pytest.approx(1000 * each)


def test_fewer_leaves_are_searched_faster():
    few = stages(dataclasses.replace(SMALL, leaves_to_search=3))["leave-one-out"].stage
    leaves = math.sqrt(100_000)
    search = 1e-5 + 100 * (1e-7 + 100_000 * 3 / leaves * 1e-10)
    opened = (100_000 * (450 + 4) + 8 * 100 * leaves) * 1e-9
    assert few.core_seconds == pytest.approx(100_000 * (search + 10 * 3e-7) + opened)
    assert rows_scored(100_000, 10**6) == 100_000


def test_rows_scored_are_those_of_the_index():
    """The planner's copy of ScaNN's default, against the index's own."""
    for rows in (20_000, 100_000, 666_667, 1_000_000):
        leaves = round(math.sqrt(rows))
        searched = min(leaves, scann._leaves_to_search(leaves))
        assert rows_scored(rows) == pytest.approx(rows * searched / leaves, rel=0.03)


def test_the_slower_of_decoding_and_encoding_counts():
    gpu = dataclasses.replace(ONE, cores=10, accelerator=Accelerator("x", 1, 1), accelerators=2)
    workload = dataclasses.replace(SMALL, encoder=None, images_per_s=100.0)
    encode = stages(workload, worker=gpu)["encode"]
    assert encode.stage.accelerator_seconds == 1000
    assert encode.worker_seconds == 500
    fast = dataclasses.replace(workload, images_per_s=1e6)
    encode = stages(fast, worker=gpu)["encode"]
    assert encode.worker_seconds == pytest.approx((200 + 0.6) / 10 + 10 + 0.06)


def test_memory_limits_how_many_tasks_run_at_once():
    eight = dataclasses.replace(ONE, cores=8)
    need = plan(LARGE, ROUND, ONE).build_memory_bytes
    assert stages(LARGE, worker=eight)["build index"].at_once == 8
    tight = dataclasses.replace(eight, memory_bytes=3.5 * need)
    assert stages(LARGE, worker=tight)["build index"].at_once == 2
    wide = dataclasses.replace(LARGE, dimension=1000)
    need = plan(wide, ROUND, ONE).build_memory_bytes
    with pytest.raises(VisualMemoryError, match=r"build index needs .*fewer rows per partition"):
        plan(wide, ROUND, dataclasses.replace(eight, memory_bytes=need))


def test_too_many_partitions_to_train():
    workload = dataclasses.replace(LARGE, items=10**9, partitioning=Partitioning(rows=1000))
    with pytest.raises(VisualMemoryError, match=r"train partitioner needs .* more rows per part"):
        plan(workload, ROUND, ONE)
    huge = dataclasses.replace(ONE, memory_bytes=1e15)
    assert plan(workload, ROUND, huge).cells == 1_500_000


def test_the_workers_meet_the_deadline_and_one_fewer_do_not():
    workload = dataclasses.replace(LARGE, deadline_hours=1.5)
    result = plan(workload, ROUND, ONE)
    assert result.workers and result.workers > 1
    assert result.seconds(result.workers) <= 1.5 * 3600 < result.seconds(result.workers - 1)
    encode = result.stages[0]
    assert encode.workers == math.ceil(encode.worker_seconds / 5400)


def test_measured_and_assumed_are_told_apart():
    build = stages(SMALL)["build index"]
    assert set(build.measured) == {"gflops", "build_s_per_row_dim"}
    assert {"build_s", "move_s_per_byte"} <= set(build.assumed)


sizes_of = st.integers(1000, 10**11)


@given(items=sizes_of, more=sizes_of, dimension=st.integers(16, 4096))
def test_more_items_take_more(items, more, dimension):
    small, large = sorted((items, more))
    left, right = (
        Estimate(Workload(n, dimension, encoder="mine"), ROUND, ONE) for n in (small, large)
    )
    assert left.stored <= right.stored and left.cells <= right.cells
    assert left.build_memory() <= right.build_memory()
    assert left.encode("", small).core_seconds <= right.encode("", large).core_seconds
    assert left.assigned <= right.assigned


@given(
    items=sizes_of,
    dimension=st.integers(16, 2048),
    dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    probes=st.integers(1, 20),
    spill=st.sampled_from(["none", "soar"]),
)
def test_dimensions_probes_spilling_and_precision(items, dimension, dtype, probes, spill):
    workload = Workload(
        items, dimension, dtype, encoder="mine", probes=probes, partitioning=Partitioning()
    )
    huge = dataclasses.replace(ONE, memory_bytes=1e15)
    result = plan(workload, ROUND, huge)

    def seconds(**changes):
        return plan(dataclasses.replace(workload, **changes), ROUND, huge).seconds(1)

    assert result.sizes.index > 0 and all(stage.worker_seconds > 0 for stage in result.stages)
    assert seconds(dimension=dimension + 16) > result.seconds(1)
    assert seconds(probes=probes + 1) >= result.seconds(1)
    assert seconds(queries=100_000) > result.seconds(1)
    spilled = Partitioning(spill=spill)
    assert seconds(partitioning=spilled) >= result.seconds(1)
    assert result.seconds(2) <= result.seconds(1)
    json.dumps(plan_summary.as_json(result), allow_nan=False)


@given(hours=st.floats(0.5, 1000), more=st.floats(0.5, 1000))
def test_more_time_needs_no_more_workers(hours, more):
    short, long = sorted((hours, more))
    counts = [
        plan(dataclasses.replace(LARGE, deadline_hours=each), ROUND, ONE).workers
        for each in (short, long)
    ]
    assert counts[0] >= counts[1]


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"items": 0}, "items = 0: give a number of at least 1"),
        ({"items": -5}, "items = -5"),
        ({"dimension": 0}, "dimension = 0"),
        ({"probes": 0}, "probes = 0"),
        ({"k": 0}, "k = 0"),
        ({"deadline_hours": -1}, "deadline_hours = -1: give a positive number"),
        ({"deadline_hours": math.nan}, "deadline_hours = nan"),
        ({"encoder": None, "images_per_s": 0}, "images_per_s = 0"),
        ({"dtype": "int4"}, "dtype 'int4' is unknown. Known: float32, float16, bfloat16"),
        ({"reorder": "int4"}, "reorder 'int4' is unknown. Known: float32, bfloat16, int8"),
        ({"images_per_s": 5.0}, "Give one of them"),
    ],
)
def test_what_is_no_workload(changes, text):
    with pytest.raises(VisualMemoryError) as error:
        dataclasses.replace(SMALL, **changes)
    assert text in str(error.value)


def test_an_unknown_encoder_lists_the_known():
    with pytest.raises(VisualMemoryError, match=r"'vgg' is unknown\. Known: .*dinov2-l14.*mine"):
        plan(dataclasses.replace(SMALL, encoder="vgg"), ROUND, ONE)


def test_a_deadline_that_cannot_be_met_says_why():
    workload = dataclasses.replace(LARGE, deadline_hours=1e-4)
    with pytest.raises(VisualMemoryError, match=r"no number of workers .* one task of '.+' takes"):
        plan(workload, ROUND, ONE)


def test_an_unknown_worker_or_accelerator_lists_the_known():
    with pytest.raises(VisualMemoryError, match=r"worker 'n9' is unknown\. Known: local, n1-st"):
        worker_types.find("n9")
    with pytest.raises(VisualMemoryError, match=r"accelerator 'k80' .* Known: t4, p100, v100"):
        worker_types.find("n1-standard-8", "k80")
    with pytest.raises(VisualMemoryError, match="accelerators = 0"):
        worker_types.find("n1-standard-8", "t4", 0)


def test_known_workers():
    worker = worker_types.find("n1-standard-8", "v100", 4)
    assert (worker.cores, worker.memory_bytes, worker.accelerators) == (8, 30 * GB, 4)
    local = worker_types.find("local")
    assert local.cores >= 1 and local.memory_bytes > 1e8


def test_a_calibration_comes_back_from_its_file(tmp_path):
    path = str(tmp_path / "calibration.json")
    calibration.save(path, ROUND)
    read = calibration.load(path)
    assert (read.machine, read.measured) == (ROUND.machine, ROUND.measured)
    assert (read.gflops, read.build_s_per_row_dim) == (100.0, 1e-7)
    assert read.vote_s == Constants("").vote_s  # not measured: the default


@pytest.mark.parametrize(
    "content, text",
    [
        ("nonsense", "is not what benchmarks.calibrate writes"),
        ("[1]", "is not what benchmarks.calibrate writes"),
        ('{"machine": "x", "measured": {"speed": 1}}', "unknown constants speed. Known: accel"),
        ('{"machine": "x", "measured": {"gflops": 0}}', "gflops = 0 is no positive number"),
        ('{"machine": "x", "measured": {"gflops": "9"}}', "gflops = '9' is no positive number"),
        ('{"machine": "x", "measured": {"vote_s": NaN}}', "vote_s = nan is no positive number"),
        ('{"machine": "x", "measured": {"encoder_images_per_s": 5}}', "is no table of rates"),
    ],
)
def test_a_file_that_is_no_calibration(tmp_path, content, text):
    path = tmp_path / "calibration.json"
    path.write_text(content)
    with pytest.raises(VisualMemoryError) as error:
        calibration.load(str(path))
    assert text in str(error.value)


def test_a_missing_calibration(tmp_path):
    with pytest.raises(VisualMemoryError, match=r"no such file. Measure one with python -m"):
        calibration.load(str(tmp_path / "none.json"))


def test_the_built_in_calibration_knows_what_it_measured():
    default = calibration.DEFAULT
    assert default.measured > {"gflops", "build_s_per_row_dim", "search_s", "vote_s"}
    assert "core" in default.machine
    assert default.encoder_images_per_s.keys() <= estimates.ENCODER_GFLOP.keys()


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1500, "1.5 KB"),
        (2.5e12, "2.5 TB"),
        (3e18, "3,000.0 PB"),
    ],
)
def test_sizes_in_words(value, text):
    assert plan_summary.size(value) == text


@pytest.mark.parametrize(
    "value, text", [(5, "5 s"), (600, "10 min"), (7200, "2 h"), (864_000, "10.0 days")]
)
def test_durations_in_words(value, text):
    assert plan_summary.duration(value) == text
