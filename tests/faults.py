"""Damages every kind of file of a memory and of unfinished work, and looks at what comes of it.

python -m tests.faults [--count 2000] [--seed 1]

The steps of a build are called one after another, with an encoder that needs no TensorFlow,
so that a damage and what follows take a fraction of a second.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from vm_core import building, indexing, leave_one_out, pruning, recall, score_tables
from vm_core.building import BuildConfig
from vm_core.embedding import BatchedEncoder, by_shard, embed_split
from vm_core.errors import VisualMemoryError
from vm_core.leave_one_out import LeaveOneOutConfig
from vm_core.memory import Memory
from vm_core.records import EmbeddingBlock, strings

SHARDS = 3
SECONDS = 60


def make_images(folder: Path, count: int, side: int = 8) -> None:
    """Small pictures of noise in three classes, and one that is no picture."""
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"class {number % 3}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (side, side, 3), np.uint8)
        Image.fromarray(pixels).save(path)
    (folder / "class 0" / "broken.png").write_bytes(b"no picture")


def embed(pixels: np.ndarray) -> np.ndarray:
    """(B, 8, 8, 3) to (B, 16): a fixed projection of the pixels."""
    matrix = np.random.default_rng(7).normal(size=(192, 16))
    return (pixels.reshape(len(pixels), -1) / 255.0 - 0.5) @ matrix


def make_settings(root: Path, images: Path, **settings: Any) -> dict[str, Any]:
    model = images.parent / "model"
    model.mkdir(exist_ok=True)
    (model / "saved_model.pb").write_bytes(b"any")
    return {
        "memory": str(root),
        "sources": [{"kind": "folder", "path": str(images)}],
        "encoder": {
            "kind": "saved_model",
            "path": str(model),
            "batch_size": 16,
            "preprocessing": {"resize": 8, "crop": 8},
        },
        "shards": SHARDS,
        "max_failure_share": 0.5,
        "minimum_recall": 0.1,
        "recall_queries": 20,
        **settings,
    }


class Stopped(Exception):
    """A build that ends before its last step."""


def build(settings: dict[str, Any], until: str = "") -> Memory:
    """The steps of a build in this process, as pipelines.build strings them together.

    until: the step before which it stops, with Stopped.
    """

    def reach(step: str) -> None:
        if step == until:
            raise Stopped

    plan, splits = building.plan_build(BuildConfig.model_validate(settings))
    if building.is_published(plan):
        return Memory(plan.root)
    finished = building.finished_shards(plan)
    missing = set(range(SHARDS)) - finished.keys()
    encoder = BatchedEncoder(embed, 16)
    parts: dict[int, list[Any]] = {shard: [] for shard in missing}
    for split in splits if missing else []:
        for shard, part in by_shard(embed_split(plan.embedding, split, lambda: encoder), SHARDS):
            if shard in missing:
                parts[shard].append(part)
    reach("shards")
    entries = [building.read_entry(plan, shard) for shard in sorted(finished)]
    for shard in sorted(missing):
        entries.append(building.write_shard_files(plan, shard, parts[shard]))
        reach("some shards")
    index = building.plan_index(plan, entries)
    for bundle in range(index.bundles):
        indexing.sample_shards(index, bundle)
    reach("train")
    indexing.train(index)
    counts = [indexing.assign_shards(index, bundle) for bundle in range(index.bundles)]
    reach("partitions")
    tasks = indexing.plan_partitions(index, counts)
    built = []
    for task in tasks:
        built.append(indexing.build_partition(index, task))
        reach("some partitions")
    reach("publish")
    hits = None
    if indexing.needs_recall(index):
        ordered = sorted(built, key=lambda entry: entry.folder)
        queries = indexing.read_held_out(index, ordered)
        cells = [entry.cell for entry in ordered]
        for entry in ordered:
            more = indexing.search_held_out(index, queries, cells, entry)
            hits = more if hits is None else recall.merge(hits, more)
    building.publish(plan, entries, built, hits)
    return Memory(plan.root)


def score(memory: Memory, until: str = "") -> dict[str, Any]:
    """The steps of leave-one-out scores."""
    config = LeaveOneOutConfig(memory=memory.root, ks=(2, 5), shapley_k=2)
    plan = leave_one_out.plan_scores(memory, config)
    done = score_tables.finished_scores(plan)
    if done is not None:
        return done
    homes = {number: leave_one_out.search_home(plan, number) for number in range(plan.partitions)}
    for number in range(plan.partitions):
        sources = [source for source, others in homes.items() if number in others]
        leave_one_out.search_visitors(plan, number, sources)
    if until == "sums":
        raise Stopped
    for number in range(plan.partitions):
        leave_one_out.score_partition(plan, number, homes[number])
    score_tables.group_duplicates(plan)
    for bundle in range(plan.bundles):
        score_tables.write_scores(plan, bundle)
    if until == "finish":
        raise Stopped
    return score_tables.finish(plan)


# What must stay the same -------------------------------------------------------------


def answers(memory: Memory) -> str:
    """A digest of all that a version answers: neighbours, names, pictures, rows, weights."""
    digest = hashlib.sha256()
    generator = np.random.default_rng(3)
    vectors = generator.normal(size=(40, memory.manifest.dimension)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    names = strings([f"q{number}" for number in range(40)])
    queries = EmbeddingBlock(names, np.zeros(40, np.int64), names, vectors)
    found = memory.searcher()(queries, 10)
    parts: list[Any] = [found.ids.tolist(), found.labels.tolist(), found.distances.tolist()]
    parts += [None if found.weights is None else found.weights.tolist()]
    parts += [memory.classes.keys, memory.classes.names]
    ids: list[str] = []
    for number, shard in enumerate(memory.manifest.shards):
        if shard.embedded:
            block = memory.read_shard(number)
            ids += block.ids.tolist()
            parts += [block.labels.tolist(), block.vectors.tolist(), block.sources.tolist()]
    pictures = memory.thumbnails(ids)
    parts += [sorted((id, data.hex()) for id, data in pictures.items()), ids]
    for number in range(len(memory.manifest.partitions)):
        parts.append(memory.rows(number).to_pydict())
    parts.append(sorted(set(memory.removed_ids().to_pylist())))
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()


def scores(memory: Memory) -> str:
    results = score(memory)
    tables = pa.concat_tables(list(score_tables.read_scores(memory, results["fingerprint"])))
    return repr((tables.to_pydict(), results["queries"], results["worst"]))


# Damage ------------------------------------------------------------------------------


def flip(data: bytes, chance: random.Random) -> bytes:
    if not data:
        return b"x"
    place = chance.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << chance.randrange(8)]) + data[place + 1 :]


def digit(data: bytes, chance: random.Random) -> bytes:
    """Another digit in a text, which stays valid JSON."""
    places = [match.start() for match in re.finditer(rb"[0-9]", data)]
    if not places:
        return flip(data, chance)
    place = chance.choice(places)
    other = (data[place] - 48 + chance.randrange(1, 10)) % 10 + 48
    return data[:place] + bytes([other]) + data[place + 1 :]


def cut_record(data: bytes, chance: random.Random) -> bytes:
    """A TFRecord file without its last records; half of any other file."""
    ends, at = [0], 0
    while at + 12 <= len(data):
        at += 16 + int.from_bytes(data[at : at + 8], "little")
        if at > len(data):
            return data[: len(data) // 2]
        ends.append(at)
    return data[: chance.choice(ends[:-1])] if len(ends) > 1 else b""


CHANGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flip": flip,
    "digit": digit,
    "cut": lambda data, chance: data[: chance.randrange(len(data))] if data else b"x",
    "cut at a record": cut_record,
    "empty": lambda data, chance: b"" if data else b"x",
    "append": lambda data, chance: data + bytes(chance.randrange(1, 50)),
    "zero": lambda data, chance: bytes(len(data)) if data.strip(b"\0") else b"x",
}
OTHERS = ("remove", "swap", "folder", "link")


def damage(path: Path, how: str, chance: random.Random, same_kind: list[Path]) -> bool:
    """Damages a file; False if that changes nothing."""
    before = path.read_bytes()
    if how in CHANGES:
        after = CHANGES[how](before, chance)
        path.write_bytes(after)
        return after != before
    if how == "swap":
        other = chance.choice([each for each in same_kind if each != path] or [path])
        theirs = other.read_bytes()
        path.write_bytes(theirs)
        other.write_bytes(before)
        return theirs != before
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to("/etc/hostname")
    return True


def kind_of(path: str) -> str:
    """What a file is, without its numbers and fingerprints."""
    path = re.sub(r"[0-9a-f]{12,}", "*", path)
    return re.sub(r"[0-9]{5,}", "*", path)


# Cases -------------------------------------------------------------------------------


class Case:
    """A folder to damage, and commands whose answers must stay or become errors."""

    def __init__(self, name: str, template: Path, commands: list[str], expected: dict[str, str]):
        self.name, self.template, self.commands, self.expected = name, template, commands, expected

    def files(self) -> list[str]:
        found = (str(path.relative_to(self.template)) for path in self.template.rglob("*"))
        return sorted(name for name in found if (self.template / name).is_file())


def run(command: str, settings: dict[str, Any]) -> str:
    """The answer of a command."""
    if command == "use":
        return answers(Memory(settings["memory"]))
    if command == "build":
        return answers(build(settings))
    if command == "verify":
        return str(Memory(settings["memory"]).check_files())
    return scores(Memory(settings["memory"]))


def make_cases(folder: Path, rows: int = 60) -> tuple[list[Case], dict[str, Any]]:
    """The cases, and the settings of their builds; all work on ``folder``/memory."""
    images, root = folder / "images", folder / "memory"
    make_images(images, rows)
    base = make_settings(root, images, partitioning={"rows": 25, "probes": 2})
    base |= {"index": {"kind": "exact"}, "dtype": "float16"}
    cases = []

    def keep(name: str, commands: list[str], expected: dict[str, str]) -> None:
        shutil.copytree(root, folder / name, symlinks=True)
        cases.append(Case(name, folder / name, commands, expected))

    for step in ("shards", "some shards", "train", "partitions", "some partitions", "publish"):
        shutil.rmtree(root, ignore_errors=True)
        try:
            build(base, step)
        except Stopped:
            keep(f"build before {step}", ["build"], {})
    memory = build(base)
    expected = {command: run(command, base) for command in ("use", "verify")}
    expected["build"] = expected["use"]
    for case in cases:
        case.expected = expected
    keep("published", ["use", "verify", "build"], expected)
    for step in ("sums", "finish"):
        try:
            score(memory, step)
        except Stopped:
            keep(f"scores before {step}", ["score"], {})
    scored = run("score", base)
    for case in cases[-2:]:
        case.expected = {"score": scored}
    keep("scored", ["score"], {"score": scored})
    table = pa.table(
        {"row": pa.array([1, 7, 20], pa.int64()), "weight": pa.array([0.0, 0.5, 0.0])},
        schema=pruning.ROW_WEIGHTS_SCHEMA,
    )
    staged = pruning.stage(memory, table, {"method": "test"})
    pruning.publish_staged(staged, memory.manifest.version)
    expected = {command: run(command, base) for command in ("use", "verify")}
    keep("pruned", ["use", "verify"], expected)
    return cases, base


def outcome(case: Case, name: str, how: str, seed: int, settings: dict[str, Any]) -> dict[str, str]:
    """What each command makes of one damage: same, error, or what must not be."""
    chance = random.Random(seed)
    root = Path(settings["memory"])
    found = {}
    for command in case.commands:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(case.template, root, symlinks=True)
        chance = random.Random(seed)
        alike = [root / each for each in case.files() if kind_of(each) == kind_of(name)]
        if not damage(root / name, how, chance, alike):
            continue
        found[command] = _judge(partial(run, command, settings), case.expected[command], name)
        if found[command].startswith("error") and command in ("build", "score"):
            # Started again, as the error says, it heals or says the same.
            again = _judge(partial(run, command, settings), case.expected[command], name)
            if again not in ("same", found[command]):
                found[command] = f"second attempt: {again}"
    return found


def _judge(call: Callable[[], str], expected: str, name: str) -> str:
    def stop(*_: Any) -> None:
        raise TimeoutError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        return "same" if call() == expected else "SILENT: another answer"
    except TimeoutError:
        return "HANG"
    except VisualMemoryError as error:
        text = str(error)
        names = [name.rpartition("/")[2], name.rpartition("/")[0].rpartition("/")[2]]
        return "error" if any(each in text for each in names) else f"error of no file: {text[:200]}"
    except Exception:
        return f"TRACEBACK: {traceback.format_exc(limit=-3)}"
    finally:
        signal.alarm(0)


def damages(cases: list[Case], count: int, seed: int) -> Iterator[tuple[Case, str, str, int]]:
    """Each kind of file in turn, damaged in each way in turn."""
    chance = random.Random(seed)
    kinds: dict[tuple[str, str], list[tuple[Case, str]]] = {}
    for case in cases:
        for name in case.files():
            kinds.setdefault((case.name, kind_of(name)), []).append((case, name))
    ways = [*CHANGES, *OTHERS]
    for number in range(count):
        key = list(kinds)[number % len(kinds)]
        case, name = chance.choice(kinds[key])
        yield case, name, ways[number // len(kinds) % len(ways)], chance.randrange(2**32)


BAD = ("SILENT", "TRACEBACK", "HANG", "second", "error of")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    totals: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        cases, settings = make_cases(Path(folder))
        for case, name, how, seed in damages(cases, options.count, options.seed):
            for command, what in outcome(case, name, how, seed, settings).items():
                totals[what.partition(":")[0]] += 1
                if what.startswith(BAD):
                    print(f"{case.name} | {command} | {kind_of(name)} | {how} | {what}", flush=True)
    print(json.dumps(totals))
    return int(any(what.startswith(BAD) for what in totals))


if __name__ == "__main__":
    os.environ.setdefault("VISUAL_MEMORY_TRUSTED_ENCODERS", os.devnull)
    logging.disable()  # damage that is healed is logged
    sys.exit(main())
