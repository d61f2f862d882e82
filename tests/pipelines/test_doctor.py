"""visual-memory doctor: options, exit status, output."""

import json
from importlib.metadata import version

import pytest

from pipelines import cli, doctor

BEAM = version("apache-beam")
JAR = "https://repo.maven.apache.org/maven2/beam-runners-flink-1.19-job-server-{}.jar"


@pytest.mark.parametrize(
    "flink, jar, state, text",
    [
        (None, None, "ok", f"Beam {BEAM}"),
        ("1.19.2", JAR.format(BEAM), "ok", "1.19"),
        ("1.8", None, "problem", "not 1.8"),
        (None, JAR.format("2.50.0"), "problem", "the job server is of Beam 2.50.0"),
        (None, "/opt/job-server.jar", "warning", "does not name a release"),
    ],
)
def test_flink(flink, jar, state, text):
    check = doctor.flink(flink, jar)
    assert check.state == state and text in check.found
    assert bool(check.remedy) == (state != "ok")
    if state == "problem" and jar:
        assert f"beam-runners-flink-1.19-job-server-{BEAM}.jar" in check.remedy


def test_a_fit_environment_has_status_0_and_an_unfit_one_1(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert cli.main(["doctor", "--memory", str(tmp_path / "memory"), "--json"]) == 0
    results = {check["name"]: check for check in json.loads(capsys.readouterr().out)}
    assert {check["state"] for check in results.values()} <= {"ok", "warning"}
    assert {"Python", "versions", "libraries", "GPU", "Java", "storage"} <= results.keys()
    assert list(tmp_path.iterdir()) == []

    assert cli.main(["doctor", "--memory", "/proc/memory", "--flink-version", "1.8"]) == 1
    out = capsys.readouterr().out
    assert "2 problems" in out and "cannot create" in out and "not 1.8" in out


def test_items_need_a_dimension(capsys):
    assert cli.main(["doctor", "--items", "1e6"]) == 2
    assert "--items and --dim belong together" in capsys.readouterr().err
