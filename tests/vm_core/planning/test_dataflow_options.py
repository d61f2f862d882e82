"""A plan as options of Dataflow."""

import pytest

from vm_core.errors import VisualMemoryError
from vm_core.partitioning import Partitioning
from vm_core.planning import calibration, dataflow_options, worker_types
from vm_core.planning.planner import Plan, plan
from vm_core.planning.workload import Workload


def planned(worker="n1-standard-8", accelerator="t4", count=1, **workload) -> Plan:
    settings = {"items": 10_000_000, "dimension": 384, "deadline_hours": 24.0, **workload}
    found = worker_types.find(worker, accelerator, count)
    return plan(Workload(**settings), calibration.DEFAULT, found)


def options(*arguments, **settings) -> dict[str, str]:
    lines = dataflow_options.of_plan(planned(*arguments, **settings))
    return dict(line.removeprefix("--").split("=", 1) for line in lines)


def test_the_planners_numbers():
    made, found = planned(), options()
    assert found["machine_type"] == "n1-standard-8"
    assert found["max_num_workers"] == str(made.workers)
    assert found["encode_accelerator"] == "type:nvidia-tesla-t4;count:1;install-nvidia-driver"
    assert found["experiments"] == "no_use_multiple_sdk_containers"
    assert "max_num_workers" not in options(deadline_hours=None)
    assert "encode_accelerator" not in options("n2-standard-8", None)


@pytest.mark.parametrize(
    "worker", ["n1-standard-4", "n1-standard-8", "n2-highmem-8", "a2-highgpu-1g"]
)
@pytest.mark.parametrize("rows", [100_000, 1_000_000])
def test_every_thread_has_its_memory_and_its_disk(worker, rows):
    partitioning = Partitioning(rows=rows)
    made = planned(worker, "a100", partitioning=partitioning)
    found = options(worker, "a100", partitioning=partitioning)
    threads = int(found["number_of_worker_harness_threads"])
    assert 1 <= threads <= made.worker.cores
    largest = max(made.build_memory_bytes, made.search_memory_bytes)
    memory = int(found["partition_min_ram"].removesuffix("GB")) * 1e9
    assert threads * largest <= 0.85 * memory and memory <= made.worker.memory_bytes
    disk = (int(found["disk_size_gb"]) - 50) * 1e9
    assert disk >= threads * made.largest_rows * 384 * 4


def test_smaller_partitions_leave_room_for_more_threads():
    threads = [
        int(options(partitioning=Partitioning(rows=rows))["number_of_worker_harness_threads"])
        for rows in (100_000, 1_000_000, 2_000_000)
    ]
    assert threads == sorted(threads, reverse=True) and threads[0] > threads[-1]


def test_machines_with_an_accelerator_are_for_encoding_alone():
    found = options("g2-standard-8", "l4")
    assert found["machine_type"] == "n2-standard-8"
    assert found["encode_accelerator"] == (
        "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver"
    )
    large = worker_types.WORKERS[options("a2-highgpu-1g", "a100")["machine_type"]]
    assert large.cores >= 12 and large.memory_bytes >= 85e9


@pytest.mark.parametrize(
    "arguments, text",
    [
        (
            ("local", None),
            "worker 'local' is no machine type of Google's. Choose one with --worker",
        ),
        (("n1-standard-8", "h200"), "accelerator 'h200': Dataflow has none. It has: t4, "),
        (("n1-standard-8", "t4", 2), "accelerators = 2: .* Plan with --accelerators 1"),
    ],
)
def test_what_dataflow_does_not_have(arguments, text):
    with pytest.raises(VisualMemoryError, match=text):
        options(*arguments)
