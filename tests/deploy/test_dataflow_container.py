"""The workers' image: its Dockerfile, its packages, and what is installed in it of ours."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from pipelines import flex_template
from tests.integration.harness import REPOSITORY

FOLDER = REPOSITORY / "deploy" / "dataflow"
DOCKERFILE = (FOLDER / "Dockerfile").read_text()
BIN = Path(sys.executable).parent


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)(?:\[.*?\])?==(\S+)", path.read_text(), re.MULTILINE))


def run(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    options = {"cwd": REPOSITORY, "timeout": 600, **options}
    return subprocess.run([str(a) for a in arguments], capture_output=True, text=True, **options)


def test_the_dockerfile_has_no_fault_that_its_linter_knows():
    result = run(BIN / "hadolint", FOLDER / "Dockerfile")
    assert result.returncode == 0, result.stdout


def test_the_linter_finds_a_fault(tmp_path):
    faulty = tmp_path / "Dockerfile"
    faulty.write_text(DOCKERFILE.replace("setuptools==80.9.0", "setuptools"))
    result = run(BIN / "hadolint", faulty)
    assert result.returncode == 1 and "DL3013" in result.stdout


def test_the_image_has_the_versions_that_are_tested():
    tested, installed = pins(REPOSITORY / "requirements.lock"), pins(FOLDER / "requirements.lock")
    assert {name: installed[name] for name in installed.keys() & tested.keys()} == {
        name: tested[name] for name in installed.keys() & tested.keys()
    }
    assert all(name.startswith("nvidia-") for name in installed.keys() - tested.keys())
    assert installed["apache-beam"] == re.search("ARG BEAM_VERSION=(.*)", DOCKERFILE)[1]
    assert f"{sys.version_info[0]}.{sys.version_info[1]}" == "3.11"
    assert set(re.findall(r"python(?::|)(3\.?\d+)", DOCKERFILE)) == {"3.11", "311"}
    uv = re.search("UV := (.*)", (REPOSITORY / "Makefile").read_text())[1]
    assert f"uv=={uv} " in DOCKERFILE


def test_what_the_dockerfile_copies_is_there_and_sent_to_the_builder():
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)
    names = [name for line in copied for name in line.split()]
    assert len(names) > 6
    sent = (FOLDER / "Dockerfile.dockerignore").read_text().splitlines()
    allowed = [line[1:] for line in sent if line.startswith("!")]
    for name in names:
        assert (REPOSITORY / name).exists(), name
        assert any(name == path or name.startswith(f"{path}/") for path in allowed), name


def test_every_template_has_its_image():
    build = yaml.safe_load((FOLDER / "cloudbuild.yaml").read_text())
    commands = " ".join(flex_template.COMMANDS)
    assert f"for command in {commands}; do" in build["steps"][1]["args"][-1]
    assert f"for command in {commands}; do" in (REPOSITORY / "scripts" / "dataflow").read_text()
    names = [image.rpartition("/")[2].partition(":")[0] for image in build["images"]]
    assert names == ["worker", *flex_template.COMMANDS]


def test_the_script_explains_itself_and_asks_for_what_it_lacks():
    script = REPOSITORY / "scripts" / "dataflow"
    assert run("bash", "-n", script).returncode == 0
    shown = run(script, "--help")
    assert shown.returncode == 0 and "scripts/dataflow submit build" in shown.stdout
    assert run(script, "nonsense").returncode == 1
    bare = {"PATH": os.environ["PATH"]}
    asked = run(script, "submit", "build", env=bare)
    assert asked.returncode == 1 and "set PROJECT to the id" in asked.stderr


@pytest.mark.slow
def test_the_package_is_complete_where_nothing_else_is_installed(tmp_path):
    """The sdist, installed as in the image, beside the image's packages and no others.

    CUDA's libraries are left out: three gigabytes that only an accelerator needs.
    """
    built = run(
        *(sys.executable, "setup.py", "--quiet", "egg_info", "--egg-base", tmp_path),
        *("sdist", "--dist-dir", tmp_path),
    )
    assert built.returncode == 0, built.stderr
    (package,) = tmp_path.glob("visual_memory-*.tar.gz")
    wanted = tmp_path / "requirements.txt"
    wanted.write_text(
        "".join(
            f"{name}=={version}\n"
            for name, version in pins(FOLDER / "requirements.lock").items()
            if not name.startswith("nvidia-")
        )
    )
    python = tmp_path / "venv" / "bin" / "python"
    uv = BIN / "uv"
    for step in (
        (uv, "venv", "--quiet", "--python", sys.executable, tmp_path / "venv"),
        (uv, "pip", "install", "--quiet", "--no-deps", "--python", python, "-r", wanted),
        (
            *(uv, "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"),
            *("--python", python, package),
        ),
    ):
        result = run(*step)
        assert result.returncode == 0, result.stderr
    script = """
        import importlib, pkgutil
        import pipelines, vm_core
        from vm_core.report import page

        for package in (pipelines, vm_core):
            assert "site-packages" in package.__file__, package.__file__
            for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
                importlib.import_module(module.name)
                print(module.name)
        templates = page.__file__.removesuffix("page.py")
        import os
        print(*(name for name in os.listdir(templates) if name.endswith(".j2")))
    """
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    imported = run(python, "-c", textwrap.dedent(script), cwd=tmp_path, env=environment)
    assert imported.returncode == 0, imported.stderr
    found = set(imported.stdout.split())
    for source in sorted(path for name in ("pipelines", "vm_core") for path in _modules(name)):
        assert source in found, source
    templates = {path.name for path in (REPOSITORY / "vm_core" / "report").glob("*.j2")}
    assert len(templates) > 5 and templates <= found


def _modules(package: str) -> list[str]:
    paths = (path.relative_to(REPOSITORY) for path in (REPOSITORY / package).rglob("*.py"))
    names = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return [name for name in names if name != package]
