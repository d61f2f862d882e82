"""The command as a user types it."""

import json

import pytest

from pipelines import commands, plan
from vm_core.planning.calibration import DEFAULT, save


@pytest.fixture
def run(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments):
        status = commands.main(plan.command, [str(each) for each in arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_numbers_for_a_billion_items(run):
    status, out, _ = run(
        *("--items", "1e9", "--dim", 1024, "--dtype", "float16", "--accelerator", "t4")
    )
    assert status == 0
    assert "1,000,000,000 x 1,024 float16" in out
    assert "1,500 partitions (scann), 666,667 rows on average, at most 1,000,000" in out
    assert "n1-standard-8: 8 cores, 30.0 GB, 1 x t4" in out
    for line in ("embedding shards", "ScaNN, codes", "build index", "leave-one-out", "all"):
        assert line in out
    assert "measured" in out and "assumed" in out and DEFAULT.machine.split(" (")[0] in out
    assert "a core does 0.6 times the work" in out


def test_json_holds_what_the_tables_are_made_of(run):
    status, out, _ = run("--items", "2e6", "--dim", 384, "--worker", "c3-standard-22", "--json")
    assert status == 0
    result = json.loads(out)
    assert result["cells"] == 3 and result["workload"]["items"] == 2_000_000
    assert result["bytes"]["vectors"]["float32"] == 2e6 * 384 * 4
    assert result["workers"] >= 1 and result["seconds"] <= 24 * 3600
    build = next(each for each in result["stages"] if each["name"] == "build index")
    assert build["tasks"] == 3 and "build_s_per_row_dim" in build["measured"]


def test_without_a_deadline_and_with_a_calibration(run, tmp_path):
    path = tmp_path / "calibration.json"
    save(str(path), DEFAULT)
    status, out, _ = run(
        *("--items", 50_000, "--dim", 64, "--worker", "local", "--deadline-hours", 0),
        *("--calibration", path, "--encoder-images-per-s", 100, "--probes", 1),
    )
    assert status == 0
    assert "no deadline; one worker takes" in out
    assert "as given: 100.0 images/s per core" in out


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("--items", 0), "items = 0"),
        (("--worker", "cray"), "worker 'cray' is unknown. Known: local, n1-standard-2"),
        (("--accelerator", "abacus"), "accelerator 'abacus' is unknown. Known: t4"),
        (("--deadline-hours", 1e-3), "no number of workers"),
        (("--encoder", "eye"), "encoder 'eye' is unknown"),
        (("--rows-per-partition", 0), "rows = 0"),
        (("--calibration", "/nowhere.json"), "no such file"),
        (("--worker", "n1-standard-2", "--dim", 4096), "Take a worker with more memory"),
    ],
)
def test_errors_name_value_cause_and_remedy(run, arguments, text):
    status, out, err = run("--items", "1e7", "--dim", 1024, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and text in err


def test_items_must_be_whole(run, capsys):
    with pytest.raises(SystemExit):
        run("--items", "1.5", "--dim", 8)
    assert "1.5 is no whole number" in capsys.readouterr().err
