"""What holds for the code as a whole, by reading it."""

from __future__ import annotations

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = sorted((ROOT / "vm_core").rglob("*.py"))
SOURCES = sorted(
    path
    for name in ("vm_core", "pipelines", "demo", "benchmarks")
    for path in ROOT.glob(f"{name}/**/*.py")
)
MAX_LINES = 500


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, wherever in the file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: relative import"
            yield node.module or ""


def test_there_is_something_to_look_at():
    assert len(CORE) > 20
    assert {"numpy", "pyarrow"} <= {name for path in CORE for name in imported(path)}


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_the_core_knows_nothing_of_beam_or_what_is_built_on_it(path):
    """pipelines -> vm_core: a worker, a notebook or another engine can use it without Beam."""
    outer = {"apache_beam", "pipelines", "demo", "benchmarks", "tests"}
    assert not outer & {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", CORE, ids=name_of)
def test_nothing_stored_is_executable(path):
    """No module of the core can read or write a pickle, or run text as code."""
    executing = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
    assert not executing & {name.partition(".")[0] for name in imported(path)}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "yaml.load", "yaml.unsafe_load")
            allowed = [k for k in node.keywords if k.arg == "allow_pickle" and k.value.value]
            assert not allowed, f"{name_of(path)}:{node.lineno} allows pickles"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_are_of_a_size_to_read(path):
    assert len(path.read_text().splitlines()) <= MAX_LINES


def run(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=ROOT,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_core_runs_where_beam_is_not_installed():
    """Nor does any module that it imports ask for it. TensorFlow waits until it is used."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in CORE
        if path.stem != "_tensorflow"
    ]
    loaded = run(
        f"""
        import importlib, sys
        sys.modules["apache_beam"] = None
        for module in {modules!r}:
            importlib.import_module(module)
        print(*(name for name in ("tensorflow", "keras", "scann") if name in sys.modules))
        """
    )
    assert loaded.split() == []


def test_the_command_line_starts_without_tensorflow():
    loaded = run(
        """
        import sys
        import pipelines.cli
        assert pipelines.cli.main(["--help"]) == 0
        print(*(name for name in ("tensorflow", "keras", "scann") if name in sys.modules))
        """
    )
    assert loaded.splitlines()[-1] == ""
