"""The commands as a user types them: what they print, and how they end."""

import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from pipelines import cli
from tests.integration.harness import configuration, run_python, write_config
from vm_core.classification import classify
from vm_core.errors import VisualMemoryError


@pytest.fixture
def run(capsys, monkeypatch):
    """Runs a command: exit status, standard output, standard error without its line breaks."""
    monkeypatch.setenv("COLUMNS", "500")

    def run(*arguments):
        try:
            status = cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            status = stop.code
        out, err = capsys.readouterr()
        return status, out, err

    return run


@pytest.fixture(scope="module")
def photo(photos):
    """A rose that the memory does not hold."""
    return sorted(Path(photos, "rose").iterdir())[10]


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_usage_names_every_command(run, arguments):
    status, out, _ = run(*arguments)
    assert status == 0
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_of_each_command(run, name):
    status, out, _ = run(name, "--help")
    assert status == 0 and out.startswith(f"usage: visual-memory {name} ")


def test_unknown_command(run):
    status, out, err = run("biuld", "--config", "x")
    assert (status, out) == (2, "")
    assert err.startswith("error: there is no command 'biuld'") and "  build " in err


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["build", "--config", "none.yaml"], "error: configuration 'none.yaml' does not exist"),
        (["evaluate", "--config", "none.yaml"], "error: configuration 'none.yaml' does not exist"),
        (["build", "--config", "c", "--direct_num_worker=2"], "unknown option --direct_num_worker"),
        (["evaluate", "--memory", "m", "--qeries", "q"], "unknown option --qeries"),
        (["build", "--config", "c", "more"], "unexpected argument 'more'"),
        (["build", "--config", "c", "--runner=Flnk"], "--runner=Flnk: Unexpected pipeline runner"),
        (["evaluate", "--memory", "none", "--queries", "q"], "'none' is not a visual memory"),
        (["evaluate", "--memory", "none"], "give one of queries, embeddings and leave_one_out"),
        (["evaluate", "--memory", "none", "--leave-one-out", "--k", "0"], "k = 0"),
        (["inspect", "none"], "'none' is not a visual memory: it does not exist"),
        (["classify", "--memory", "none", "a.jpg"], "'none' is not a visual memory"),
        (["analyze", "none.json", "--out", "out"], "neighbour table 'none.json' does not exist"),
    ],
)
def test_errors_are_one_message_and_status_2(run, tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and text in err and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments", [["build"], ["classify", "x.jpg"], ["analyze"], ["classify", "--voter", "best"]]
)
def test_missing_and_wrong_arguments_show_the_usage(run, arguments):
    status, _, err = run(*arguments)
    assert status == 2 and err.startswith(f"usage: visual-memory {arguments[0]}")


@pytest.mark.parametrize(
    "override, text",
    [
        ("encoder.bach_size=3", "unknown key 'bach_size'"),
        ("shard=3", "unknown key 'shard'"),
        ("shards", "is not KEY=VALUE"),
        ("shards=many", "shards = 'many'"),
        ("shards=0", "shards = 0"),
        ("index.kind=hnsw", "kind 'hnsw' is unknown"),
        ("sources.1.path=x", "position from 0 to 0"),
        ("encoder.path=nowhere", "'nowhere' is not a SavedModel"),
        ("sources.0.path=nowhere", "'nowhere' is not a folder"),
    ],
)
def test_wrong_settings(run, few_photos, small_encoder, tmp_path, override, text):
    settings = configuration(tmp_path / "memory", small_encoder, few_photos)
    config = write_config(tmp_path / "config.yaml", settings)
    status, out, err = run("build", "--config", config, "--set", override)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and text in err and "Traceback" not in err
    assert not (tmp_path / "memory").exists()


def test_build_and_inspect(run, few_photos, small_encoder, tmp_path):
    settings = configuration("overridden", small_encoder, few_photos)
    config = write_config(tmp_path / "config.yaml", settings)
    memory = tmp_path / "memory"
    status, out, _ = run("build", "--config", config, "--set", f"memory={memory}")
    assert status == 0
    assert "32 read = 32 embedded + 0 quarantined + 0 duplicates" in out
    assert f"{memory}, version 000001" in out
    status, out, _ = run("inspect", memory)
    assert status == 0 and "index       exact" in out and small_encoder in out
    for species in ("iris", "peony", "rose", "viola"):
        assert re.search(rf"{species} +8 *\n", out)
    status, out, _ = run("inspect", memory, "--json")
    manifest = json.loads(out)
    assert manifest["version"] == "000001" and len(manifest["shards"]) == 3
    status, out, _ = run("inspect", memory, "--verify")
    assert (status, out) == (0, "12 files of version 000001 are as they were written\n")
    damaged, missing = manifest["shards"][1]["embeddings"], manifest["shards"][2]["quarantine"]
    data = (memory / damaged).read_bytes()
    (memory / damaged).write_bytes(data[:-8] + bytes(8))
    (memory / missing).unlink()
    status, out, err = run("inspect", memory, "--verify")
    assert (status, out) == (2, "")
    assert f"2 of 12 files of {memory}, version 000001, are missing or damaged:" in err
    assert f"  {damaged} is damaged: its SHA-256 is " in err and f"  {missing} is missing" in err
    assert "remove them and start the build again" in err
    status, _, err = run("inspect", memory, "--version", "000009")
    assert status == 2 and "has no version '000009'" in err


def test_classify(run, memory, photo):
    status, out, _ = run("classify", "--memory", memory.root, "--k", 5, photo)
    assert status == 0 and f"{photo}: " in out and "confidence" in out
    answers, rejected = classify(memory, [str(photo)], k=5)
    assert rejected == () and memory.classes.name(answers[0].prediction) in out
    assert all(id in out for id in answers[0].neighbor_ids)


def test_a_photo_of_the_memory_finds_itself(memory, few_photos):
    photos = sorted(Path(few_photos).glob("*/*"))
    answers, _ = classify(memory, [str(path) for path in photos], voter="plurality", k=1)
    assert [answer.neighbor_ids[0] for answer in answers] == [
        f"few/{path.parent.name}/{path.name}" for path in photos
    ]
    assert all(answer.distances[0] < 1e-6 and answer.confidence == 1 for answer in answers)
    assert [memory.classes.name(answer.prediction) for answer in answers] == [
        path.parent.name for path in photos
    ]


def test_classify_as_json(run, memory, photo):
    status, out, _ = run("classify", "--memory", memory.root, "--json", "--k", 40, photo, photo)
    first, second = (json.loads(line) for line in out.splitlines())
    assert status == 0 and first == second
    assert first["image"] == str(photo) and first["class"] in {"iris", "peony", "rose", "viola"}
    assert len(first["neighbors"]) == 32  # all there are
    assert [neighbor["rank"] for neighbor in first["neighbors"]] == list(range(32))
    distances = [neighbor["distance"] for neighbor in first["neighbors"]]
    assert distances == sorted(distances)
    assert sum(neighbor["weight"] for neighbor in first["neighbors"]) == pytest.approx(1)
    shares = [n["weight"] for n in first["neighbors"] if n["label"] == first["label"]]
    assert sum(shares) == pytest.approx(first["confidence"])


def test_classify_explains(run, memory, photo, tmp_path):
    page = tmp_path / "page.html"
    status, _, _ = run("classify", "--memory", memory.root, "--explain", page, photo)
    text = page.read_text()
    assert status == 0 and "What decided" in text and photo.name in text
    assert text.count("data:image/jpeg") == 11  # the photo and its ten neighbours


def test_classify_tells_of_images_that_fail(run, memory, photo, tmp_path):
    (tmp_path / "notes.jpg").write_text("no image")
    missing = tmp_path / "[missing].jpg"
    images = [tmp_path / "notes.jpg", photo, missing]
    status, out, err = run("classify", "--memory", memory.root, "--json", *images)
    assert status == 2 and [json.loads(line)["image"] for line in out.splitlines()] == [str(photo)]
    assert err.startswith("error: 2 of 3 images failed:") and "content is text" in err
    assert f"{missing}: the file cannot be read" in err


def test_k_must_count_something(memory, photo):
    with pytest.raises(VisualMemoryError, match="k = 0 is not from 1 to 10000"):
        classify(memory, [str(photo)], k=0)


def test_another_encoder_is_refused(run, memory, photo, small_encoder, encoder_path, tmp_path):
    other = ("classify", "--memory", memory.root, "--encoder", encoder_path, photo)
    status, out, err = run(*other)
    assert (status, out) == (2, "") and "their embeddings cannot be compared" in err
    status, _, err = run(
        *("evaluate", "--memory", memory.root, "--queries", photo.parents[1]),
        *("--out", tmp_path / "out", "--set", f"encoder_path={encoder_path}"),
    )
    assert status == 2 and "their embeddings cannot be compared" in err
    moved = shutil.copytree(small_encoder, tmp_path / "moved")
    status, _, _ = run("classify", "--memory", memory.root, "--encoder", moved, photo)
    assert status == 0


def test_evaluate_and_analyze(run, memory, tmp_path):
    out, table = tmp_path / "out", tmp_path / "neighbors.json"
    arguments = ["evaluate", "--memory", memory.root, "--leave-one-out", "--out", out]
    status, text, _ = run(*arguments, "--k", 9, "--export-neighbors", table)
    assert status == 0 and f"{out}/report.html" in text
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["k"] == 9 and metrics["leave_one_out"]
    status, text, _ = run(
        *("analyze", table, "--leave-one-out", table, "--out", tmp_path / "a"),
        *("--hard-threshold", 2),
    )
    assert status == 0 and "soft_rank" in text and "items removed" in text
    assert json.loads((tmp_path / "a" / "metrics.json").read_text())["excluded"]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_each_command_is_a_module(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    monkeypatch.delitem(sys.modules, f"pipelines.{name}", raising=False)
    with pytest.raises(SystemExit) as stop:
        runpy.run_module(f"pipelines.{name}", run_name="__main__")
    assert stop.value.code == 0
    assert f"usage: visual-memory {name}" in capsys.readouterr().out


def test_a_module_in_its_own_process_ends_with_the_status():
    done = run_python("-m", "pipelines.inspect", "nowhere", timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: 'nowhere' is not a visual memory")
