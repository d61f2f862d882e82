"""Scores of built memories, through Beam."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.score import command, run
from tests.integration.harness import build_memory, configuration, files_below, table
from tests.integration.test_determinism import PROCESSES, THREADS
from vm_core import score_tables
from vm_core.leave_one_out import LeaveOneOutConfig
from vm_core.memory import Memory


@pytest.fixture(scope="module")
def several(few_photos, small_encoder, tmp_path_factory) -> Memory:
    """32 photos in several partitions, some of them twice; every query visits all."""
    root = tmp_path_factory.mktemp("several") / "memory"
    partitioning = {"rows": 24, "spill": "nearest", "probes": 4}
    settings = configuration(
        root, small_encoder, few_photos, index={"kind": "exact"}, partitioning=partitioning
    )
    memory = build_memory(settings)
    assert len(memory.manifest.partitions) > 1
    return memory


def score(memory: Memory, *beam_arguments: str, **settings) -> dict:
    settings = {"memory": memory.root, "ks": (3, 10), "shapley_k": 5, **settings}
    return run(LeaveOneOutConfig.model_validate(settings), beam_arguments)


def tables(memory: Memory, results: dict) -> dict[str, bytes]:
    folder = Path(memory.path(results["folder"]))
    return {path.name: path.read_bytes() for path in folder.glob("items-*")}


def test_one_partition_and_several_give_the_same_bytes(memory, several):
    assert len(memory.manifest.partitions) == 1
    one, more = score(memory), score(several)
    assert len(tables(memory, one)) == 3
    assert tables(memory, one) == tables(several, more)
    assert one["accuracy_of_nearest"] == more["accuracy_of_nearest"]
    assert one["queries"] == more["queries"] == 32


@pytest.mark.parametrize("workers", [THREADS, PROCESSES], ids=["threads", "processes"])
def test_several_workers_give_the_same_bytes(several, workers, tmp_path):
    expected = score(several, duplicate_distance=0.05)
    before = tables(several, expected)
    Path(several.path(expected["folder"]), "scores.json").unlink()
    assert score(several, *workers, duplicate_distance=0.05) == expected
    assert tables(several, expected) == before


def test_a_repeated_run_ends_at_once_and_leaves_nothing_behind(several):
    results = score(several)
    before = files_below(several.root)
    assert score(several) == results
    assert files_below(several.root) == before
    assert not [name for name in before if name.startswith("work/") or "incomplete" in name]


def test_the_command_prints_the_worst_items_and_the_scores_can_be_read(several, capsys):
    command(["--memory", several.root, "--k", "2", "12"])
    shown = capsys.readouterr().out
    (folder,) = (
        path.parent
        for path in Path(several.root).glob("scores/*/scores.json")
        if '"ks": [\n   2,\n   12' in path.read_text()
    )
    assert "wrong@12" in shown and "by the nearest other item" in shown
    read = pa.concat_tables(score_tables.read_scores(several, folder.name))
    assert read == table(f"{folder}/items-*.parquet")
    assert read.schema.names == [
        "row",
        "id",
        "label",
        "wrong_at_2",
        "wrong_at_12",
        "correct_at_2",
        "correct_at_12",
        "reliability",
        "shapley",
        "duplicate_group",
    ]
    # Each of 32 queries has 12 neighbours.
    counts = read.select(["wrong_at_12", "correct_at_12"]).to_pydict()
    assert sum(map(sum, counts.values())) == 32 * 12
