"""Commands as Dataflow's Flex Templates: what parameters one has, and how it is launched.

python -m pipelines.flex_template build      prints the metadata of a template

A template's parameters are the command's own options, so the two cannot differ. They are
single texts: several values of an option are separated by semicolons, a switch is true.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from apache_beam.options.pipeline_options import DebugOptions

from pipelines import build, commands, evaluate, score
from pipelines.hints import HintOptions

COMMANDS = {"build": build, "evaluate": evaluate, "score": score}
"""Those that run one pipeline: a template is one job."""

_BEAM = {"number_of_worker_harness_threads"}


def metadata(command: str) -> dict[str, Any]:
    """What the service and its console know of a template: every parameter and its help."""
    return {
        "name": f"Visual Memory: {command}",
        "description": COMMANDS[command].parser().description,
        "parameters": [_parameter(option) for option in _options(command).values()],
    }


def _parameter(option: argparse.Action) -> dict[str, Any]:
    text = option.help or ""
    if _is_list(option):
        text += "; several are separated by semicolons"
    described: dict[str, Any] = {
        "name": option.dest,
        "label": option.dest.replace("_", " ").capitalize(),
        "helpText": text[0].upper() + text[1:] + ".",
        "isOptional": not option.required,
    }
    if option.nargs == 0:
        described |= {"paramType": "BOOLEAN", "regexes": ["true|false"]}
    elif option.type is int and not _is_list(option):
        described |= {"paramType": "NUMBER", "regexes": ["[0-9]+"]}
    else:
        described |= {"paramType": "TEXT"}
    return described


def arguments(command: str, given: Sequence[str]) -> list[str]:
    """The command line for a template's parameters, each given as ``--name=value``.

    What is no option of the command goes to Beam as it is.
    """
    options = _options(command)
    line = []
    for argument in given:
        name, equals, value = argument.removeprefix("--").partition("=")
        option = options.get(name) if equals else None
        line += [argument] if option is None else _as_typed(option, value)
    return line


def _as_typed(option: argparse.Action, value: str) -> list[str]:
    flag = option.option_strings[0]
    if option.nargs == 0:
        return [flag] if value.strip().lower() == "true" else []
    if not _is_list(option):
        return [f"{flag}={value}"]
    values = [each.strip() for each in value.split(";") if each.strip()]
    if option.nargs == "+":
        return [flag, *values] if values else []
    return [f"{flag}={each}" for each in values]


def _is_list(option: argparse.Action) -> bool:
    # argparse has no public name for what action="append" makes.
    return option.nargs == "+" or isinstance(option, argparse._AppendAction)


def _options(command: str) -> dict[str, argparse.Action]:
    """The command's options by name, ours for Beam, and a few of Beam's own."""
    return {option.dest: option for option in _all_options(command)}


def _all_options(command: str) -> Iterator[argparse.Action]:
    of_beam = argparse.ArgumentParser(add_help=False)
    DebugOptions._add_argparse_args(of_beam)
    of_hints = argparse.ArgumentParser(add_help=False)
    HintOptions._add_argparse_args(of_hints)
    yield from (o for o in COMMANDS[command].parser()._actions if o.dest != "help")
    yield from of_hints._actions
    yield from (option for option in of_beam._actions if option.dest in _BEAM)


def launch(environment: Mapping[str, str], given: Sequence[str]) -> int:
    """Makes the job in a template's launcher; returns the exit status.

    The launcher's image says which command it is for, and which image its workers run.
    """
    command, image = environment["VISUAL_MEMORY_COMMAND"], environment["VISUAL_MEMORY_WORKER_IMAGE"]
    line = arguments(command, given)
    if not any(each.startswith("--sdk_container_image") for each in line):
        line += [f"--sdk_container_image={image}", "--sdk_location=container"]
    return commands.main(COMMANDS[command].command, line)


if __name__ == "__main__":
    print(json.dumps(metadata(sys.argv[1]), indent=2))
