"""What runs say of themselves: the metrics that are documented, and the same in every mode."""

import json
import re
import shutil
from pathlib import Path

import apache_beam as beam
import pytest

from pipelines import running, score
from pipelines.build import build
from pipelines.evaluate import evaluate
from pipelines.measuring import measured
from tests.integration.harness import REPOSITORY, configuration, run_python, write_config
from vm_core import measure
from vm_core.building import BuildConfig
from vm_core.errors import VisualMemoryError
from vm_core.evaluation import EvaluationConfig
from vm_core.leave_one_out import LeaveOneOutConfig
from vm_core.run_report import STAGES, Distribution, split_name

MODES = [
    ["--direct_running_mode=in_memory"],
    ["--direct_running_mode=multi_threading", "--direct_num_workers=3"],
]


@pytest.fixture(scope="module")
def images(few_photos, tmp_path_factory):
    """32 photos, an empty file and a text."""
    folder = shutil.copytree(few_photos, tmp_path_factory.mktemp("images") / "few")
    (folder / "iris" / "empty.png").write_bytes(b"")
    (folder / "iris" / "text.png").write_text("no image")
    return folder


@pytest.fixture(scope="module", params=MODES, ids=["in_memory", "multi_threading"])
def runs(request, images, small_encoder, tmp_path_factory):
    """The metrics of a build in several partitions, two evaluations and scores."""
    folder = tmp_path_factory.mktemp("runs")
    found = {}

    def arguments(name):
        return [*request.param, f"--metrics-out={folder}/{name}.json"]

    def read(name):
        (metrics,) = json.loads((folder / f"{name}.json").read_text()).values()
        found[name] = metrics

    settings = configuration(
        folder / "memory",
        small_encoder,
        images,
        index={"kind": "exact"},
        partitioning={"rows": 24, "spill": "nearest"},
        max_failure_share=0.2,
    )
    evaluation = {"memory": f"{folder}/memory", "k": 10, "max_failure_share": 0.2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vm_core.sources.folder.IMAGES_PER_SPLIT", 5)
        build(BuildConfig.model_validate(settings), arguments("build"))
        queries = [{"kind": "folder", "path": str(images)}]
        for name, given in {
            "images": {"queries": queries},
            "self": {"leave_one_out": True},
        }.items():
            config = evaluation | given | {"output": f"{folder}/{name}"}
            evaluate(EvaluationConfig.model_validate(config), arguments(name))
        score.run(LeaveOneOutConfig(memory=f"{folder}/memory"), arguments("score"))
    for name in ("build", "images", "self", "score"):
        read(name)
    return found


def documented() -> dict[str, list[str]]:
    rows = re.findall(
        r"^\| `(\w+)` \| (\w+) \| (\w+) \| (\w+) \|",
        (REPOSITORY / "docs" / "observability.md").read_text(),
        re.MULTILINE,
    )
    assert len({name for name, *_ in rows}) == len(rows)
    return {name: rest for name, *rest in rows}


def test_what_runs_emit_is_what_is_documented(runs):
    emitted = {name: value for metrics in runs.values() for name, value in metrics.items()}
    known = documented()
    assert emitted.keys() == known.keys()
    for name, (kind, unit, stage) in known.items():
        assert (split_name(name)[0], split_name(name)[2]) == (stage, unit)
        assert stage in STAGES
        assert isinstance(emitted[name], dict) == (kind == "distribution"), name


def test_the_counts_add_up_however_many_threads_there_are(runs):
    build, images, scores = runs["build"], runs["images"], runs["score"]
    assert build["embed_done_images"] == build["write_done_rows"] == 32
    assert build["embed_quarantined_images"] == 2
    kinds = {name: n for name, n in build.items() if "_quarantined_" in name and n}
    assert kinds.pop("embed_quarantined_images") == 2
    assert kinds == {
        "embed_quarantined_empty_images": 1,
        "embed_quarantined_unrecognised_images": 1,
    }
    assert build["embed_work_ms"]["count"] == build["embed_fresh_splits"] == 7
    assert build["embed_batch_images"]["sum"] == 32
    assert build["embed_batch_images"]["max"] <= 5
    assert build["write_work_ms"]["count"] == 3
    partitions = build["index_fresh_partitions"]
    assert partitions == build["index_work_ms"]["count"] == build["recall_work_ms"]["count"] > 1
    assert build["index_done_rows"] == 64  # spilled: each row is in two partitions
    assert images["gather_done_queries"] == images["evaluate_done_queries"] == 32
    assert images["search_done_queries"] == images["route_batch_queries"]["sum"]
    searches = images["search_reused_partitions"] + images["search_fresh_partitions"]
    assert searches == images["search_work_ms"]["count"]
    assert images["search_reused_partitions"] > 0
    assert runs["self"]["read_done_rows"] == 32 and "embed_done_images" not in runs["self"]
    assert scores["home_done_rows"] == scores["score_done_rows"] == scores["items_done_rows"] == 32
    assert scores["home_fresh_partitions"] == scores["home_work_ms"]["count"] == partitions


def test_read_bytes_are_those_of_the_files(runs, images):
    read = runs["build"]["embed_read_bytes"]
    assert read == sum(path.stat().st_size for path in Path(images).rglob("*.png"))


def test_an_error_in_a_stage_comes_out_as_it_was():
    def work(number):
        measure.count("done_rows")
        if number == 3:
            raise VisualMemoryError("number 3")

    def define(root):
        return root | beam.Create(range(5)) | beam.Map(measured("write", work))

    with pytest.raises(VisualMemoryError, match="^number 3$"):
        running.run(define, [], {})


@pytest.mark.parametrize("arguments", MODES, ids=["in_memory", "multi_threading"])
def test_a_stage_that_yields_is_not_charged_for_what_follows_it(arguments):
    """The runner calls the next stage for each result, before it asks for another."""

    def numbers(count):
        for number in range(count):
            measure.count("done_rows")
            yield number

    def more(number):
        measure.count("done_rows", 100)
        return number

    metrics = running.run(
        lambda root: (
            root
            | beam.Create([2, 3])
            | beam.FlatMap(measured("read", numbers))
            | beam.Map(measured("write", more))
        ),
        arguments,
        {},
    )
    assert metrics["read_done_rows"] == 5 and metrics["write_done_rows"] == 500
    assert isinstance(metrics["read_work_ms"], Distribution)
    assert (metrics["read_work_ms"].count, metrics["write_work_ms"].count) == (2, 5)


def test_the_summary_is_on_standard_error_after_the_bars(capsys):
    def publish(number):
        measure.count("done_rows", number)

    running.run(
        lambda root: root | beam.Create([3]) | beam.Map(measured("publish", publish)),
        [],
        {"write": 1},
    )
    out, err = capsys.readouterr()
    assert out == "" and err.index("write ") < err.index("What run did") < err.index("publish")
    assert "3 rows" in err


def test_a_runner_that_keeps_no_metrics_says_so_and_the_run_counts(capsys, monkeypatch, tmp_path):
    def none(self):
        raise NotImplementedError

    monkeypatch.setattr(
        "apache_beam.runners.portability.fn_api_runner.fn_runner.RunnerResult.metrics", none
    )
    path = tmp_path / "m.json"

    def define(root):
        return root | beam.Create([1]) | beam.Map(measured("publish", str))

    assert running.run(define, [f"--metrics-out={path}"], {}, "build") is None
    assert "build: this runner keeps no metrics" in capsys.readouterr().err
    assert json.loads(path.read_text()) == {"build": {}}


def test_json_logs_of_processes(images, small_encoder, tmp_path):
    """Every line on standard error is one object, the workers' lines among them."""
    settings = configuration(tmp_path / "memory", small_encoder, images, max_failure_share=0.2)
    config = write_config(tmp_path / "memory.yaml", settings)
    processes = ["--direct_running_mode=multi_processing", "--direct_num_workers=2"]
    built = run_python("-m", "pipelines.build", "--config", config, "--log-format=json", *processes)
    assert built.returncode == 0, built.stderr
    lines = [json.loads(line) for line in built.stderr.splitlines()]
    told = {(line["stage"], line["shard"]): line["message"] for line in lines}
    assert {shard for stage, shard in told if stage == "write"} == {0, 1, 2}
    assert told["write", 1].startswith("wrote shard 1: ")
    assert told["index", 0].startswith("built partition 0 (exact): 32 rows")
    assert told["publish", None].startswith("published version 000001")
    assert lines[-1]["metrics"]["write_done_rows"] == 32

    failing = run_python(
        *("-m", "pipelines.build", "--config", config, "--set", f"memory={tmp_path / 'other'}"),
        *("--set", "max_failure_share=0"),
        VISUAL_MEMORY_LOG_FORMAT="json",
    )
    assert failing.returncode == 2
    last = json.loads(failing.stderr.splitlines()[-1])
    assert last["level"] == "ERROR" and "2 of 34 images" in last["message"]


@pytest.mark.parametrize(
    "arguments, text",
    [
        (["--metrics-out=m.txt"], "--metrics-out m.txt: the name says the format"),
        (["--log-format=xml"], "log format 'xml' is not known"),
    ],
)
def test_options_that_cannot_be(arguments, text):
    done = run_python("-m", "pipelines.build", "--config", "c", *arguments)
    assert done.returncode == 2 and text in done.stderr
