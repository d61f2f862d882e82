"""Every runner gives the same: digest, tables, neighbours, scores and weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import prune, score
from pipelines.evaluate import evaluate
from tests.integration import clusters
from tests.integration.harness import build_memory, configuration, shard_contents
from tests.integration.test_determinism import PROCESSES, THREADS
from vm_core.evaluation import EvaluationConfig
from vm_core.leave_one_out import LeaveOneOutConfig
from vm_core.memory import Memory
from vm_core.pruning import PruneConfig


@pytest.fixture(scope="module", autouse=True)
def small_splits() -> Iterator[None]:
    """So that there are some for several workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vm_core.sources.folder.IMAGES_PER_SPLIT", 4)
        yield


@pytest.fixture(scope="module")
def queries(photos, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("queries") / "held-out"
    for species in ("iris", "peony", "rose", "viola"):
        (folder / species).mkdir(parents=True)
        for photo in sorted(Path(photos, species).iterdir())[8:12]:
            shutil.copy(photo, folder / species)
    return folder


@pytest.fixture(scope="module")
def settings(few_photos, small_encoder):
    """Exact search in several partitions, of which every query visits two."""
    partitioning = {"rows": 12, "spill": "nearest", "probes": 2}
    return configuration(
        "",
        small_encoder,
        few_photos,
        index={"kind": "exact"},
        partitioning=partitioning,
        minimum_recall=0.5,
    )


def everything(root: Path, settings: dict, queries: Path, *options: str) -> dict[str, bytes]:
    """Builds, evaluates, scores and prunes; what that leaves, without where it is."""
    memory = build_memory({**settings, "memory": str(root / "memory")}, *options)
    assert len(memory.manifest.partitions) > 2
    source = {"kind": "folder", "path": str(queries)}
    asked = {"queries": [source], "output": str(root / "evaluation"), "k": 8, "fixed_k": [1, 5]}
    evaluate(EvaluationConfig.model_validate({"memory": memory.root, **asked}), options)
    scored = score.run(LeaveOneOutConfig(memory=memory.root, ks=(3, 10)), options)
    soft = {"memory": memory.root, "method": "soft", "evaluation": {"queries": [source], "k": 8}}
    prune.prune(PruneConfig.model_validate(soft), options)
    pruned = Memory(memory.root).manifest
    assert pruned.weights is not None and pruned.weights.weighted
    found = shard_contents(memory)
    for pattern in (
        f"memory/{scored['folder']}/items-*",
        f"memory/{pruned.weights.folder}/*.parquet",
        "evaluation/*.parquet",
        "evaluation/*.csv",
    ):
        files = sorted(root.glob(pattern))
        assert files, pattern
        found |= {f"{pattern}: {path.name}": path.read_bytes() for path in files}
    metrics = json.loads((root / "evaluation/metrics.json").read_text())
    del metrics["memory"], metrics["fingerprint"], metrics["sha256"]  # they know the path
    found["metrics"] = json.dumps(metrics, sort_keys=True).encode()
    for name, manifest in (("digest", memory.manifest), ("pruned digest", pruned)):
        found[name] = manifest.content_digest.encode()
    return found


@pytest.fixture(scope="module")
def reference(settings, queries, tmp_path_factory) -> dict[str, bytes]:
    """One thread of this process."""
    return everything(tmp_path_factory.mktemp("reference"), settings, queries)


def assert_same(found: dict[str, bytes], reference: dict[str, bytes]) -> None:
    assert found.keys() == reference.keys()
    assert [name for name in found if found[name] != reference[name]] == []


@pytest.mark.slow
@pytest.mark.parametrize("options", [THREADS, PROCESSES], ids=["threads", "processes"])
def test_several_workers(options, settings, queries, reference, tmp_path):
    assert_same(everything(tmp_path, settings, queries, *options), reference)


@pytest.mark.cluster
def test_prism(settings, queries, reference, tmp_path):
    options = clusters.prism()
    assert_same(everything(tmp_path, settings, queries, *options), reference)


@pytest.mark.cluster
def test_prism_with_workers_that_are_processes(settings, queries, reference, pool, tmp_path):
    options = [*clusters.prism(), *pool.options]
    assert_same(everything(tmp_path, settings, queries, *options), reference)


@pytest.mark.cluster
def test_flink(settings, queries, reference, tmp_path):
    with clusters.flink_cluster(tmp_path / "flink") as cluster:
        options = clusters.flink(int(cluster["REST_PORT"]))
        options += ["--environment_type=EXTERNAL"]
        options += [f"--environment_config=localhost:{cluster['POOL_PORT']}"]
        assert_same(everything(tmp_path, settings, queries, *options), reference)
