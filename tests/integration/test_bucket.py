"""Everything in a bucket: images, encoder, memory and results. The bytes are those of a disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from pipelines import cli
from pipelines.evaluate import evaluate
from tests.integration.harness import build_memory, configuration
from vm_core import storage, tfrecord
from vm_core.evaluation import EvaluationConfig
from vm_core.example_proto import Example
from vm_core.memory import Memory

PROCESSES = ("--direct_num_workers=2", "--direct_running_mode=multi_processing")
PARTITIONS = {"rows": 20, "spill": "nearest", "probes": 2}


@pytest.fixture(scope="module")
def here(few_photos, photos, small_encoder, tmp_path_factory) -> str:
    """A folder with every kind of source, queries and the encoder."""
    root = tmp_path_factory.mktemp("bucket") / "here"
    shutil.copytree(few_photos, root / "few")
    shutil.copytree(small_encoder, root / "encoder")
    (root / "listed").mkdir()
    rows = ["path,label"]
    for number, path in enumerate(sorted(Path(photos, "phlox").iterdir())[:6]):
        shutil.copy(path, root / "listed" / f"{number}.png")
        rows.append(f"{number}.png,phlox")
    (root / "listed" / "list.csv").write_text("\n".join([*rows, "none.png,phlox"]))
    (root / "records").mkdir()
    for shard in range(2):
        with open(root / "records" / f"train-{shard}.tfrecord", "wb") as file:
            images = sorted(Path(photos, "iris").iterdir())[8 + 3 * shard :][:3]
            tfrecord.write_records(file, [_example(path) for path in images])
    for species in ("iris", "rose"):
        (root / "queries" / species).mkdir(parents=True)
        for path in sorted(Path(photos, species).iterdir())[14:18]:
            shutil.copy(path, root / "queries" / species)
    (root / "classes.txt").write_text("iris\npeony\nphlox\nrose\nviola\n")
    return str(root)


def _example(path: Path) -> bytes:
    example = Example()
    features = example.features.feature
    features["image/encoded"].bytes_list.value.append(path.read_bytes())
    features["image/class/label"].int64_list.value.append(0)
    features["image/filename"].bytes_list.value.append(path.name.encode())
    return bytes(example.SerializeToString())


@pytest.fixture(scope="module")
def there(here, make_bucket) -> str:
    """The same in a bucket."""
    root = f"{make_bucket()}/there"
    with storage.write_directory_atomic(root) as folder:
        shutil.copytree(here, folder, dirs_exist_ok=True)
    return root


def settings(root: str, memory: str) -> dict:
    sources = (
        {"kind": "folder", "path": f"{root}/few"},
        {"kind": "manifest", "path": f"{root}/listed/list.csv"},
        {
            "kind": "tfrecord",
            "path": f"{root}/records/train-*",
            "class_list": f"{root}/classes.txt",
        },
    )
    return configuration(
        storage.join(root, memory),
        f"{root}/encoder",
        *sources,
        max_failure_share=0.1,
        partitioning=PARTITIONS,
    )


def evaluation(root: str, memory: str) -> EvaluationConfig:
    return EvaluationConfig.model_validate(
        {
            "memory": storage.join(root, memory),
            "queries": [{"kind": "folder", "path": f"{root}/queries"}],
            "output": storage.join(root, memory + "-evaluation"),
            "k": 5,
            "query_shards": 2,
            "tuning_share": 0.5,
        }
    )


def contents(folder: str, *names: str) -> dict[str, bytes]:
    """Name to bytes of the files whose names begin as given."""
    files = [file.path for file in storage.walk(folder)]
    chosen = {path.removeprefix(folder): path for path in files}
    return {
        name: storage.read_bytes(path)
        for name, path in chosen.items()
        if name.lstrip("/").startswith(names)
    }


@pytest.fixture(scope="module")
def local(here) -> Memory:
    memory = build_memory(settings(here, "memory"))
    evaluate(evaluation(here, "memory"))
    return memory


def test_a_build_and_an_evaluation_give_the_bytes_of_a_disk(local, here, there):
    memory = build_memory(settings(there, "memory"))
    manifest = memory.manifest
    assert memory.root == f"{there}/memory"
    assert manifest.total("embedded") == 32 + 6 + 6 and manifest.total("quarantined") == 1
    assert len(manifest.partitions) > 1 and manifest.centroids is not None
    assert manifest.content_digest == local.manifest.content_digest
    kinds = ("embeddings-", "thumbnails-", "classes")
    build = contents(memory.path(f"builds/{manifest.build}"), *kinds)
    assert len(build) == 7
    assert build == contents(local.path(f"builds/{local.manifest.build}"), *kinds)
    evaluate(evaluation(there, "memory"))
    tables = ("neighbors-", "predictions-", "accuracy.csv", "per_class.csv")
    found = contents(f"{there}/memory-evaluation", *tables)
    assert len(found) == 6 and found == contents(f"{here}/memory-evaluation", *tables)
    assert b"<html" in storage.read_bytes(f"{there}/memory-evaluation/report.html")


@pytest.mark.slow
def test_two_processes_share_nothing_but_the_bucket(local, here, there, tmp_path, monkeypatch):
    monkeypatch.setattr("vm_core.sources.folder.IMAGES_PER_SPLIT", 8)
    monkeypatch.chdir(tmp_path)
    memory = build_memory(settings(there, "shared"), *PROCESSES)
    assert memory.manifest.content_digest == local.manifest.content_digest
    evaluate(evaluation(there, "shared"), PROCESSES)
    tables = ("neighbors-", "predictions-", "accuracy.csv", "per_class.csv")
    found = contents(f"{there}/shared-evaluation", *tables)
    assert found == contents(f"{here}/memory-evaluation", *tables)
    assert os.listdir(tmp_path) == []  # a URL is not taken for a folder
    assert not any("/work/" in file.path for file in storage.walk(f"{there}/shared"))
    assert not any("/work/" in file.path for file in storage.walk(f"{there}/shared-evaluation"))


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")

    def run(*arguments: str) -> str:
        status = cli.main(arguments)
        out, err = capsys.readouterr()
        assert status == 0, err
        return str(out)

    return run


def test_commands(run, local, here, there):
    root = f"{there}/commands"
    with storage.write_directory_atomic(root) as folder:
        shutil.copytree(local.root, folder, dirs_exist_ok=True)
    copied = Memory(root).manifest
    assert copied.content_digest == local.manifest.content_digest
    assert copied.content_digest in run("inspect", root)
    memory = ("--memory", root)
    assert f"{root}/scores/" in run("score", *memory, "--set", "ks=[3,10]")
    run("score", "--memory", local.root, "--set", "ks=[3,10]")
    scores = contents(f"{root}/scores", "")
    items = [name for name in scores if "/items-" in name]
    assert len(items) == 3
    assert {name: scores[name] for name in items} == {
        name: data for name, data in contents(f"{local.root}/scores", "").items() if name in items
    }
    run("prune", *memory, "--method", "soft", "--queries", f"{there}/queries")
    assert Memory(root).manifest.version == "000002"
    run("prune", *memory, "--undo")
    assert Memory(root).manifest.content_digest == copied.content_digest
    query = sorted(file.path for file in storage.walk(f"{there}/queries/rose"))[0]
    encoder = ("--encoder", f"{there}/encoder")
    page = f"{root}-why.html"
    answer = json.loads(run("classify", *memory, query, *encoder, "--json", "--explain", page))
    where = query.replace(there, here)
    same = json.loads(run("classify", "--memory", local.root, where, "--json"))
    assert answer | {"image": ""} == same | {"image": ""}
    assert b"<html" in storage.read_bytes(page)


def test_a_missing_bucket_is_noticed_before_any_work(make_bucket, here, capsys, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings(here, "x") | {"memory": "gs://nowhere/memory"}))
    assert cli.main(["build", "--config", str(config)]) == 2
    assert "error: the bucket gs://nowhere does not exist. Create it" in capsys.readouterr().err
    assert cli.main(["inspect", "gs://nowhere/memory"]) == 2
    assert "error: the bucket gs://nowhere does not exist. Create it" in capsys.readouterr().err
