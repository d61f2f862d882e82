"""The jobs of the commands: what Dataflow would be sent."""

from hashlib import md5
from typing import NamedTuple

import apache_beam as beam
import pytest

from pipelines import build, commands, evaluate, running, score
from tests.deploy.dataflow import (
    ACCELERATOR,
    HINTED,
    HINTS,
    IMAGE,
    OPTIONS,
    Job,
    fused,
    hints_of_steps,
    keys_of_groupings,
    make_job,
)
from tests.integration.harness import configuration, write_config
from vm_core import building, evaluation, leave_one_out, split_files
from vm_core.building import BuildConfig
from vm_core.errors import VisualMemoryError
from vm_core.evaluation import EvaluationConfig
from vm_core.leave_one_out import LeaveOneOutConfig
from vm_core.sources import Split

LIMIT = 10_000_000
"""Bytes of a job that Dataflow takes."""


@pytest.fixture(scope="module")
def build_plan(few_photos, small_encoder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("job")
    settings = configuration(folder / "memory", small_encoder, few_photos)
    return building.plan_build(BuildConfig.model_validate(settings))


class Jobs(NamedTuple):
    """A command, its job without options for its steps, and with all of them."""

    command: str
    plain: Job
    hinted: Job


@pytest.fixture(scope="module", params=["build", "evaluate", "evaluate embeddings", "score"])
def jobs(request, build_plan, memory, few_photos, tmp_path_factory):
    define = _pipeline(
        request.param, build_plan, memory, few_photos, str(tmp_path_factory.mktemp("job"))
    )
    hinted = make_job(
        define, *HINTED, "--experiments=one_more", "--number_of_worker_harness_threads=4"
    )
    return Jobs(request.param, make_job(define), hinted)


def _pipeline(command, build_plan, memory, photos, folder):
    if command == "build":
        plan, splits = build_plan
        files = split_files.write(folder, splits)
        return lambda root: build.define_pipeline(root, plan, files)
    if command == "score":
        config = LeaveOneOutConfig.model_validate({"memory": memory.root})
        plan = leave_one_out.plan_scores(memory, config)
        return lambda root: score.define_pipeline(root, plan)
    queries = {"queries": [{"kind": "folder", "path": photos}]}
    if command == "evaluate embeddings":
        queries = {"leave_one_out": True}
    settings = {"memory": memory.root, "output": folder, **queries}
    plan, work = evaluation.plan_evaluation(EvaluationConfig.model_validate(settings))
    files = split_files.write(folder, work) if plan.config.queries else work
    return lambda root: evaluate.define_pipeline(root, plan, files)


ENCODING = {"build": {"Embed"}, "evaluate": {"Embed"}}
PARTITIONS = {
    "build": {"Build", "SearchHeldOut"},
    "evaluate": {"SearchAndEvaluate"},
    "evaluate embeddings": {"SearchAndEvaluate"},
    "score": {"SearchHome", "SearchVisitors", "ScorePartition"},
}


def test_only_encoding_gets_the_accelerator(jobs):
    hints = hints_of_steps(jobs.hinted)
    encoding = ENCODING.get(jobs.command, set())
    assert hints.keys() == encoding | PARTITIONS[jobs.command]
    for step, found in hints.items():
        if step in encoding:
            assert found[HINTS.ACCELERATOR.urn] == ACCELERATOR.encode()
            assert found[HINTS.MIN_RAM_BYTES.urn] == b"8000000000"
        else:
            assert found == {HINTS.MIN_RAM_BYTES.urn: b"26000000000"}


def test_no_other_step_is_fused_with_encoding(jobs):
    """Or it would occupy the accelerator's worker, or the hint would be lost."""
    stages = fused(jobs.hinted)
    assert len(stages) > 3
    accelerated = [steps for steps, hints in stages if HINTS.ACCELERATOR.urn in hints]
    assert accelerated == ([{"Embed"}] if jobs.command in ENCODING else [])


def test_without_options_there_are_no_hints(jobs):
    assert hints_of_steps(jobs.plain) == {}


def test_keys_are_encoded_deterministically(jobs):
    """Equal keys with different bytes would be different groups."""
    keys = dict(keys_of_groupings(jobs.hinted))
    assert keys
    assert all(coder.is_deterministic() for coder in keys.values()), keys


def test_every_step_runs_in_the_image(jobs):
    images = jobs.hinted.environment.worker_pools[0].sdk_harness_container_images
    assert {each.container_image for each in images} == {IMAGE}


def test_one_process_a_worker_has_the_accelerator(jobs):
    """By default Dataflow starts one a core, each with a model of its own."""
    assert "use_multiple_sdk_containers" in jobs.plain.environment.experiments
    environment = jobs.hinted.environment
    assert "use_multiple_sdk_containers" not in environment.experiments
    assert {"no_use_multiple_sdk_containers", "one_more"} <= set(environment.experiments)
    assert environment.worker_pools[0].num_threads_per_worker == 4


@pytest.mark.slow
def test_the_job_of_a_million_images_is_small(build_plan, tmp_path):
    plan, few = build_plan
    names = [f"{md5(b'%d' % n).hexdigest()}.jpg".encode() for n in range(1_000_000)]
    many = [(0, Split(tuple(names[n : n + 512]), "0" * 64, 512)) for n in range(0, len(names), 512)]
    carried = beam.Pipeline(runner="FnApiRunner")
    _ = carried | beam.Create(many)
    assert carried.to_runner_api().ByteSize() > LIMIT

    def size(splits):
        files = split_files.write(str(tmp_path), splits)
        return make_job(lambda root: build.define_pipeline(root, plan, files)).pipeline.ByteSize()

    assert size(many) - size(few) < 20_000 and size(many) < LIMIT / 10


def test_a_build_that_goes_on_does_not_carry_what_is_done(build_plan, memory):
    """Finished shards travel as numbers: what they hold, class by class, would not fit."""
    plan, _ = build_plan
    job = make_job(lambda root: build.define_pipeline(root, plan, []))
    done = building.plan_build(BuildConfig.model_validate(memory.manifest.config))[0]
    assert len(building.finished_shards(done)) == 3
    again = make_job(lambda root: build.define_pipeline(root, done, []))
    assert abs(again.pipeline.ByteSize() - job.pipeline.ByteSize()) < 2_000


def test_a_command_makes_its_job_and_says_so(bucket, small_encoder, tmp_path, capsys):
    settings = configuration(f"{bucket}/memory", small_encoder, {"kind": "folder", "path": bucket})
    config = write_config(tmp_path / "config.yaml", settings)
    assert commands.main(build.command, ["--config", config, *OPTIONS]) == 0
    out, err = capsys.readouterr()
    assert (out, err) == ("", "the job is made and not run\n")


@pytest.mark.parametrize("local", ["memory", "sources.0.path"])
def test_local_files_are_refused(bucket, few_photos, small_encoder, tmp_path, capsys, local):
    settings = configuration(f"{bucket}/memory", small_encoder, {"kind": "folder", "path": bucket})
    config = write_config(tmp_path / "config.yaml", settings)
    arguments = ["--config", config, "--set", f"{local}={few_photos}", *OPTIONS]
    assert commands.main(build.command, arguments) == 2
    assert f"its workers cannot reach the local path '{few_photos}'" in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, text",
    [
        ("--template_location=gs://b/job", "the job is written to gs://b/job"),
        ("--dry_run=True", "the job is made and not run"),
        ("--no_wait_until_finish", "the job runs elsewhere"),
    ],
)
def test_a_command_of_several_pipelines_waits_for_each(option, text):
    with pytest.raises(VisualMemoryError, match=f"several pipelines .* {text}"):
        running.check_waits([*OPTIONS[:-1], option])
    running.check_waits(OPTIONS[:-1])
