"""Changes the code in small ways, one at a time, and sees whether a test notices.

python scripts/mutants.py [--seed 0] [--per-module 8] [--modules voting,search] [--out FILE]

Each mutant is a copy of the packages with one expression changed, in a temporary folder. The
tests named after its module run first, then the others that import it. A mutant is killed
if a test fails or hangs. Mutants that change nothing anyone could see are listed in
scripts/mutants_equivalent.txt, a line each: module, old and new source, reason.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
SECONDS = 120

_COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}
_OPERATORS = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.BitAnd: ast.BitOr}
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum"}
_NAMES |= {"maximum": "minimum", "left": "right", "right": "left"}


class Mutant(NamedTuple):
    module: str
    line: int
    old: str
    new: str
    source: str


def changed(node: ast.AST) -> ast.AST | None:
    """A copy of a node with one change, None if it is of no kind that is changed."""
    node = copy.deepcopy(node)
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _COMPARISONS:
        node.ops[0] = _COMPARISONS[type(node.ops[0])]()
    elif isinstance(node, ast.BoolOp):
        node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        node.op = _OPERATORS[type(node.op)]()
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.Invert | ast.USub):
        return node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        node.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int):
        node.value += 1
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        node.attr = _NAMES[node.attr]
    elif isinstance(node, ast.Name) and node.id in _NAMES:
        node.id = _NAMES[node.id]
    elif isinstance(node, ast.Call) and len(node.args) == 2 and not node.keywords:
        if ast.unparse(node.func).rpartition(".")[2] in ("min", "max", "minimum", "maximum"):
            return None  # the order is nothing
        node.args.reverse()
    elif isinstance(node, ast.Raise | ast.Expr | ast.Continue | ast.Break):
        return ast.Pass()
    elif isinstance(node, ast.Return) and node.value is not None:
        node.value = ast.Constant(None)
    elif isinstance(node, ast.FormattedValue):
        node.value = ast.Constant("")
    else:
        return None
    return node


def candidates(tree: ast.Module) -> Iterator[tuple[ast.AST, str, int | None]]:
    """Parents and places of what may be changed: code of functions, no text about it."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        for parent in (node for part in function.body for node in ast.walk(part)):
            if isinstance(parent, ast.FunctionDef | ast.AnnAssign | ast.JoinedStr):
                continue
            if isinstance(parent, ast.Call) and ast.unparse(parent.func).startswith("_log."):
                continue
            for name, value in ast.iter_fields(parent):
                for place, child in (
                    enumerate(value) if isinstance(value, list) else [(None, value)]
                ):
                    if isinstance(child, ast.AST) and not _is_text(child):
                        yield parent, name, place


def _is_text(node: ast.AST) -> bool:
    value = node.value if isinstance(node, ast.Expr) else node
    return isinstance(value, ast.Constant) and isinstance(value.value, str)


def mutants(path: Path, module: str, count: int, seed: int) -> list[Mutant]:
    """So many mutants of a module, the same for the same seed."""
    text = path.read_text()
    total = len(list(candidates(ast.parse(text))))
    order = random.Random(f"{seed} {module}").sample(range(total), total)
    found: dict[str, Mutant] = {}
    for number in order:
        tree = ast.parse(text)
        parent, name, place = list(candidates(tree))[number]
        value = getattr(parent, name)
        child = value if place is None else value[place]
        new = changed(child)
        if new is None:
            continue
        old_text = ast.unparse(child)
        if place is None:
            setattr(parent, name, new)
        else:
            value[place] = new
        source = ast.unparse(ast.fix_missing_locations(tree))
        line = getattr(child, "lineno", 0)
        found.setdefault(source, Mutant(module, line, old_text, ast.unparse(new), source))
        if len(found) == count:
            break
    return list(found.values())


def tests_of(module: str) -> tuple[list[str], list[str]]:
    """The tests named after a module, and the others below tests/ that import it."""
    stem = module.rpartition(".")[2].strip("_")
    package, _, name = module.rpartition(".")
    own, others = [], []
    for path in sorted(ROOT.glob("tests/*/**/test_*.py")):
        text = path.read_text()
        imports = re.search(rf"from {package} import [^\n]*\b{name}\b|{module}\b", text)
        inner = re.search(rf"from {package} import \(\n[^)]*\b{name},", text)
        relative = str(path.relative_to(ROOT))
        if re.fullmatch(rf"test_{stem}(_\w+)?", path.stem):
            own.append(relative)
        elif (imports or inner) and "integration" not in relative and "deploy" not in relative:
            others.append(relative)
    return own, others


def run_tests(tree: Path, tests: Sequence[str]) -> str:
    """Runs tests on a copy of the code, in a forked process: killed, hangs or passes."""
    if not tests:
        return "passes"
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os.chdir(tree)
        sys.path.insert(0, str(tree))
        import pytest

        options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not cluster", "--no-header"]
        status = 1
        with contextlib.suppress(BaseException):
            status = int(pytest.main([*options, *tests]))
        os._exit(status)
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return "passes" if status == 0 else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "hangs"


@cache
def _passing(module: str, tree: Path) -> dict[str, list[str]]:
    """The tests of a module and the others; one that fails on the code as it is says nothing."""
    groups = dict(zip(("own", "others"), tests_of(module), strict=True))
    for who, tests in groups.items():
        if run_tests(tree, tests) != "passes":
            groups[who] = [each for each in tests if run_tests(tree, [each]) == "passes"]
    return groups


def judge(mutant: Mutant, tree: Path) -> str:
    """Whether a test notices a mutant: killed by its own tests, by others, or alive."""
    path = tree / (mutant.module.replace(".", "/") + ".py")
    if not path.exists():
        path = tree / mutant.module.replace(".", "/") / "__init__.py"
    before = path.read_text()
    passing = _passing(mutant.module, tree)
    path.write_text(mutant.source)
    try:
        for who, tests in passing.items():
            if run_tests(tree, tests) != "passes":
                return who
        return "alive"
    finally:
        path.write_text(before)


def equivalents() -> set[tuple[str, str, str]]:
    path = ROOT / "scripts" / "mutants_equivalent.txt"
    lines = path.read_text().splitlines() if path.exists() else []
    parts = [line.split(" | ") for line in lines if line and line[0] != "#"]
    return {(module, old, new) for module, old, new, *_ in parts}


def modules(wanted: str | None) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "vm_core").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if wanted is None or name.rpartition(".")[2] in wanted.split(","):
            found[name] = path
    return found


def worker(part: Sequence[Mutant], out: Path) -> None:
    """Judges some mutants on a copy of its own; a line of JSON each."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(
            ".git", ".venv", "__pycache__", ".cache", "out", "*.egg-info"
        )
        shutil.copytree(ROOT, tree, ignore=ignored, symlinks=True)
        os.symlink(ROOT / ".cache", tree / ".cache")
        with open(out, "a") as file:
            for mutant in part:
                result = judge(mutant, tree)
                file.write(json.dumps([*mutant[:4], result]) + "\n")
                file.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-module", type=int, default=8)
    parser.add_argument("--modules", help="names of modules, with commas; all if left out")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=Path("mutants.jsonl"))
    options = parser.parse_args()
    # Imported once: every test starts from a copy of this process.
    import hypothesis  # noqa: F401
    import numpy  # noqa: F401
    import pyarrow.parquet  # noqa: F401
    import pydantic  # noqa: F401
    import pytest  # noqa: F401
    import rich.table  # noqa: F401
    import scipy.sparse.csgraph  # noqa: F401
    from PIL import Image  # noqa: F401

    sys.path = [path for path in sys.path if Path(path or ".").resolve() != ROOT]
    everything = [
        mutant
        for name, path in modules(options.modules).items()
        for mutant in mutants(path, name, options.per_module, options.seed)
    ]
    options.out.unlink(missing_ok=True)
    children = []
    names = sorted({mutant.module for mutant in everything})
    for number in range(options.workers):
        if (child := os.fork()) == 0:
            mine = set(names[number :: options.workers])
            worker([each for each in everything if each.module in mine], options.out)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    results = [json.loads(line) for line in options.out.read_text().splitlines()]
    same = equivalents()
    alive = [r for r in results if r[4] == "alive" and (r[0], r[2], r[3]) not in same]
    equivalent = sum((r[0], r[2], r[3]) in same and r[4] == "alive" for r in results)
    for module, line, old, new, _ in sorted(alive):
        print(f"{module}:{line}: {old}  ->  {new}")
    killed = {how: sum(r[4] == how for r in results) for how in ("own", "others")}
    share = sum(killed.values()) / max(1, len(results) - equivalent)
    print(
        f"{len(results)} mutants: {killed['own']} killed by the module's own tests, "
        f"{killed['others']} by others, {equivalent} equivalent, {len(alive)} alive; "
        f"{share:.1%} killed without the equivalent ones"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
