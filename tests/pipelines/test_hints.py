"""Options for what some steps need of a worker."""

import pytest
from apache_beam.options.pipeline_options import DebugOptions

from pipelines import running
from vm_core.errors import VisualMemoryError


@pytest.mark.parametrize(
    "argument, text",
    [
        ("--encode_accelerator=nvidia-tesla-t4", "it must be type:NAME;count:1"),
        ("--encode_accelerator=type:nvidia-l4", "it must be type:NAME;count:1"),
        ("--encode_accelerator=type:nvidia-l4;count:2", "take more workers"),
        ("--encode_min_ram=16", "Write for example 16GB"),
        ("--partition_min_ram=much", "Write for example 16GB"),
        ("--partition_min_ram=16XB", "--partition_min_ram=16XB"),
    ],
)
def test_hints_that_no_runner_understands(argument, text):
    with pytest.raises(VisualMemoryError, match=text):
        running.check_beam_arguments([argument])


def test_hints_that_pass():
    hint = "type:nvidia-l4;count:1;machine_type:g2-standard-8;install-nvidia-driver:5xx"
    arguments = [f"--encode_accelerator={hint}", "--encode_min_ram=7.5GB"]
    assert running.check_beam_arguments(arguments) == arguments


def experiments(*arguments):
    return running.pipeline_options(arguments).view_as(DebugOptions).experiments


def test_an_accelerator_means_one_process_a_worker():
    assert experiments() is None
    one = "--encode_accelerator=type:nvidia-l4;count:1"
    assert experiments(one) == ["no_use_multiple_sdk_containers"]
    assert experiments(one, "--experiments=no_use_multiple_sdk_containers,other") == [
        *("no_use_multiple_sdk_containers", "other")
    ]
