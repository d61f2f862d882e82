"""Options, errors from workers, and what workers send each other."""

import time

import apache_beam as beam
import pytest

from pipelines import running
from pipelines.reporting import reported
from vm_core.errors import VisualMemoryError
from vm_core.tfrecord import CorruptRecordError

MODES = [
    ["--direct_running_mode=in_memory"],
    ["--direct_running_mode=multi_threading", "--direct_num_workers=2"],
]


def failing(error):
    def work(number):
        if number == 3:
            raise error
        return number

    return lambda root: root | beam.Create(range(8)) | beam.Reshuffle() | beam.Map(reported(work))


@pytest.mark.parametrize("arguments", MODES, ids=["in_memory", "multi_threading"])
@pytest.mark.parametrize("kind", [VisualMemoryError, CorruptRecordError])
def test_an_error_for_the_user_comes_out_as_it_was(arguments, kind):
    text = "3 of 9 images are unusable:\n      2  empty\n      1  a 'quoted' [reason]\nMend them"
    with pytest.raises(VisualMemoryError) as raised:
        running.run(failing(kind(text)), arguments, {"encode": 8})
    assert str(raised.value) == text


@pytest.mark.parametrize("arguments", MODES, ids=["in_memory", "multi_threading"])
def test_another_error_keeps_what_it_says(arguments):
    with pytest.raises(Exception, match="a fault of the program") as raised:
        running.run(failing(ZeroDivisionError("a fault of the program")), arguments, {})
    assert not isinstance(raised.value, VisualMemoryError)


class SlowToPickle:
    """Takes longer to encode than Beam's threads would leave a buffer unsent."""

    def __reduce__(self):
        time.sleep(1.1)
        return SlowToPickle, ()


def test_an_element_that_takes_long_to_encode_arrives_whole(tmp_path):
    def join(key, values):
        (tmp_path / key).write_text(" ".join(f"{a} {type(b).__name__} {c}" for a, b, c in values))

    def define(root):
        element = ("key", ("head", SlowToPickle(), "tail"))
        made = root | beam.Create([0]) | beam.Map(lambda _: element)
        return made | beam.GroupByKey() | beam.MapTuple(join)

    running.run(define, MODES[1], {})
    assert (tmp_path / "key").read_text() == "head SlowToPickle tail"


def test_a_pipeline_that_succeeds():
    running.run(lambda root: root | beam.Create([1, 2]) | beam.Map(print), [], {"encode": None})


def test_options():
    options = running.pipeline_options([]).get_all_options()
    assert options["runner"] == running.LOCAL_RUNNER and not options["save_main_session"]
    options = running.pipeline_options(["--runner=FlinkRunner", "--parallelism=3"])
    assert options.get_all_options()["runner"] == "FlinkRunner"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--direct_num_workers=2", "--direct_running_mode=multi_threading"],
        ["--direct_num_workers", "2"],
        ["--runner=DirectRunner", "--job_name=build"],
        ["--runner=FlinkRunner", "--an_option_of_the_job_server=1"],
    ],
)
def test_options_that_beam_knows(arguments):
    assert running.check_beam_arguments(arguments) == arguments


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--direct_num_worker_s=2"], "unknown option --direct_num_worker_s"),
        (["--sett", "a=b"], "unknown option --sett"),
        (["--job_name=a", "--confg=x"], "unknown option --confg"),
        (["stray"], "unexpected argument 'stray'"),
        (["--direct_num_workers=2", "stray"], "unexpected argument 'stray'"),
        (["-x"], "-x"),
        (["--runner=NoSuchRunner"], "NoSuchRunner"),
        (["--direct_num_workers=two"], "direct_num_workers"),
        (["--direct_running_mode=sideways"], "direct_running_mode"),
    ],
)
def test_options_that_nobody_has(arguments, text):
    with pytest.raises(VisualMemoryError, match=text):
        running.check_beam_arguments(arguments)
