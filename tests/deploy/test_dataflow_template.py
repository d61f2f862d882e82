"""Flex Templates: metadata that the service takes, parameters that the commands take."""

import re

import pytest
from google.cloud.dataflow_v1beta3 import TemplateMetadata
from google.protobuf import json_format

from pipelines import flex_template, running
from tests.deploy.dataflow import OPTIONS
from tests.integration.harness import configuration, write_config

COMMANDS = list(flex_template.COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_service_knows_every_field(command):
    metadata = flex_template.metadata(command)
    message = json_format.ParseDict(metadata, TemplateMetadata.pb()())
    names = [parameter.name for parameter in message.parameters]
    assert len(set(names)) == len(names) >= 6
    for parameter in message.parameters:
        assert re.fullmatch("[a-zA-Z][a-zA-Z0-9_]*", parameter.name)
        assert parameter.label and len(parameter.help_text) > 20, parameter.name


def sample(parameter):
    if "regexes" not in parameter:
        return {"encode_accelerator": "type:nvidia-l4;count:1"}.get(parameter["name"], "16GB")
    return "true" if parameter["paramType"] == "BOOLEAN" else "7"


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_takes_every_parameter(command):
    parameters = flex_template.metadata(command)["parameters"]
    values = {each["name"]: sample(each) for each in parameters}
    if command == "score":
        values["k"] = "5; 20"
    for each in parameters:
        if "regexes" in each:
            assert re.fullmatch(each["regexes"][0], values[each["name"]])
    given = [f"--{name}={value}" for name, value in values.items()]
    line = flex_template.arguments(command, given)
    options, rest = flex_template.COMMANDS[command].parser().parse_known_args(line)
    running.check_beam_arguments(rest)  # raises for what neither the command nor Beam has
    of_beam = running.pipeline_options(rest).get_all_options()
    for name in values:
        found = getattr(options, name) if hasattr(options, name) else of_beam[name]
        assert found not in (None, [], False), name
        if name == "k":
            assert found == ([5, 20] if command == "score" else 7)


@pytest.mark.parametrize("command", COMMANDS)
def test_what_the_command_requires_is_required(command):
    parameters = flex_template.metadata(command)["parameters"]
    required = {each["name"] for each in parameters if not each["isOptional"]}
    assert required == ({"config"} if command == "build" else set())


def test_switches_and_lists():
    given = [
        "--queries=gs://b/a.csv; gs://b/c",
        "--leave_one_out=false",
        "--set=k=3;tuning_share=0",
    ]
    line = flex_template.arguments("evaluate", [*given, "--job_name=a=b", "--output=gs://b/o"])
    assert line == [
        *("--queries=gs://b/a.csv", "--queries=gs://b/c", "--set=k=3", "--set=tuning_share=0"),
        *("--job_name=a=b", "--output=gs://b/o"),
    ]
    assert flex_template.arguments("evaluate", ["--leave_one_out=True"]) == ["--leave-one-out"]
    assert flex_template.arguments("score", ["--k=5; 20"]) == ["--k", "5", "20"]


def test_a_launch_makes_a_job(bucket, small_encoder, tmp_path, capsys):
    settings = configuration(f"{bucket}/memory", small_encoder, {"kind": "folder", "path": bucket})
    config = write_config(tmp_path / "config.yaml", settings)
    environment = {"VISUAL_MEMORY_COMMAND": "build", "VISUAL_MEMORY_WORKER_IMAGE": "a/worker:1"}
    given = [each for each in OPTIONS if "sdk" not in each]
    given += [f"--config={config}", "--set=shards=2;dtype=float16"]
    assert flex_template.launch(environment, given) == 0
    assert capsys.readouterr().err == "the job is made and not run\n"


def test_the_workers_image_is_the_launchers_own_unless_another_is_given(monkeypatch):
    lines = []
    monkeypatch.setattr(flex_template.commands, "main", lambda command, line: lines.append(line))
    environment = {"VISUAL_MEMORY_COMMAND": "score", "VISUAL_MEMORY_WORKER_IMAGE": "a/worker:1"}
    flex_template.launch(environment, [])
    flex_template.launch(environment, ["--sdk_container_image=mine"])
    assert lines == [
        ["--sdk_container_image=a/worker:1", "--sdk_location=container"],
        ["--sdk_container_image=mine"],
    ]
