"""The demo: fetches an encoder and images, builds a memory, evaluates it.

python -m demo [--images DIR] [--set KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from demo.fetch import DEFAULT_CACHE, describe, fetch
from pipelines import commands
from pipelines.build import build
from pipelines.evaluate import evaluate
from vm_core import config, storage, summary
from vm_core.building import BuildConfig
from vm_core.errors import VisualMemoryError
from vm_core.evaluation import EvaluationConfig
from vm_core.plugins import Settings

_CONFIGS = Path(__file__).parents[1] / "configs"

C = TypeVar("C", bound=Settings)


def command(arguments: Sequence[str]) -> None:
    """make demo"""
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument("--images", metavar="DIR", help="your own images, one folder per class")
    commands.add_set_option(parser)
    options = parser.parse_args(arguments)
    console = Console()
    console.rule("Encoder and images")
    fetch(DEFAULT_CACHE, report=lambda outcome: console.print(describe(outcome)))
    build_options: dict[str, Any] = {}
    evaluation_options: dict[str, Any] = {}
    if options.images:
        path = storage.absolute(options.images).rstrip("/")
        output = storage.absolute(f"out/{path.rpartition('/')[2]}")
        memory = {"memory": f"{output}/memory"}
        source = {"kind": "folder", "path": path}
        build_options = {**memory, "sources": [{**source, "share": (0.0, 0.6)}]}
        evaluation_options = {**memory, "queries": [{**source, "share": (0.6, 1.0)}]}
        evaluation_options["output"] = f"{output}/evaluation"
    _check_keys(options.set)
    console.rule("Memory: encode, write shards, index, publish")
    build_config = _load(BuildConfig, "demo.yaml", options.set, build_options)
    console.print(summary.of_build(build(build_config)))
    console.rule("Evaluation: encode the queries, search, vote")
    evaluation_config = _load(
        EvaluationConfig, "demo-evaluate.yaml", options.set, evaluation_options
    )
    plan, results = evaluate(evaluation_config)
    console.print(summary.of_evaluation(results, plan.output))


def _load(model: type[C], name: str, overrides: Sequence[str], options: dict[str, Any]) -> C:
    """The demo's configuration with the overrides that this model has a key for."""
    own = [each for each in overrides if _key(each) in model.model_fields]
    return config.load(model, str(_CONFIGS / name), own, options)


def _check_keys(overrides: Sequence[str]) -> None:
    known = {*BuildConfig.model_fields, *EvaluationConfig.model_fields}
    for each in overrides:
        if _key(each) not in known:
            raise VisualMemoryError(
                f"--set {each}: unknown key. Known keys: {', '.join(sorted(known))}"
            )


def _key(override: str) -> str:
    return override.partition("=")[0].partition(".")[0]


if __name__ == "__main__":
    sys.exit(commands.main(command))
