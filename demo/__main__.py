"""The demo: fetches an encoder and images, builds a memory, evaluates it.

python -m demo [--images DIR] [--root FOLDER_OR_BUCKET] [--set KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from demo.fetch import DEFAULT_CACHE, DemoAssets, describe, fetch
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
    parser.add_argument(
        "--root",
        metavar="PATH",
        help="folder or bucket prefix (gs://BUCKET/PREFIX) for everything: images, encoder, "
        "memory, results",
    )
    commands.add_set_option(parser)
    options = parser.parse_args(arguments)
    console = Console()
    console.rule("Encoder and images")
    root = storage.absolute(options.root).rstrip("/") if options.root else None
    if root:
        storage.check_writable(root)
    assets = fetch(
        storage.join(root, "cache") if root else DEFAULT_CACHE,
        report=lambda outcome: console.print(describe(outcome)),
    )
    settings = [*(_places(root, assets, bool(options.images)) if root else []), *options.set]
    build_options: dict[str, Any] = {}
    evaluation_options: dict[str, Any] = {}
    if options.images:
        path = storage.absolute(options.images).rstrip("/")
        output = root or storage.absolute(f"out/{path.rpartition('/')[2]}")
        memory = {"memory": f"{output}/memory"}
        source = {"kind": "folder", "path": path}
        build_options = {**memory, "sources": [{**source, "share": (0.0, 0.6)}]}
        evaluation_options = {**memory, "queries": [{**source, "share": (0.6, 1.0)}]}
        evaluation_options["output"] = f"{output}/evaluation"
    _check_keys(options.set)
    console.rule("Memory: encode, write shards, index, publish")
    build_config = _load(BuildConfig, "demo.yaml", settings, build_options)
    console.print(summary.of_build(build(build_config)))
    console.rule("Evaluation: encode the queries, search, vote")
    evaluation_config = _load(EvaluationConfig, "demo-evaluate.yaml", settings, evaluation_options)
    plan, results = evaluate(evaluation_config)
    console.print(summary.of_evaluation(results, plan.output))


def _load(model: type[C], name: str, overrides: Sequence[str], options: dict[str, Any]) -> C:
    """The demo's configuration with the overrides that this model has a key for."""
    own = [each for each in overrides if _key(each) in model.model_fields]
    return config.load(model, str(_CONFIGS / name), own, options)


def _places(root: str, assets: DemoAssets, own_images: bool) -> list[str]:
    """What says in the demo's configurations that everything is under one root."""
    places = {
        "memory": storage.join(root, "memory"),
        "output": storage.join(root, "evaluation"),
        "encoder.path": assets.encoder,
    }
    if not own_images:
        for number, name in enumerate(("flowers", "textiles")):
            for sources in ("sources", "queries"):
                places[f"{sources}.{number}.path"] = storage.join(assets.images, name)
    return [f"{key}={json.dumps(place)}" for key, place in places.items()]


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
