import time

import pytest

from vm_core import config
from vm_core.errors import VisualMemoryError
from vm_core.evaluation import EvaluationConfig
from vm_core.untrusted import MAX_DEPTH, parse_json, parse_yaml


def bomb(levels: int) -> str:
    """Each line has ten aliases of the one before."""
    lines = ["a0: &a0 [x]"]
    for level in range(1, levels + 1):
        lines.append(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "text, cause",
    [
        (bomb(30), "more than 100,000 values"),
        ("[" * 100_000, "nested"),
        ("a: " + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1), "nested more than"),
        ("&a [*a]", "contains itself"),
        ("a: [", "expected"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
    ],
)
def test_yaml_that_is_refused_at_once(text, cause, tmp_path):
    start = time.monotonic()
    with pytest.raises(ValueError, match=cause):
        parse_yaml(text)
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(VisualMemoryError, match=f"config.yaml' is not valid YAML: .*{cause}"):
        config.load(EvaluationConfig, str(path))
    with pytest.raises(VisualMemoryError, match=f"not valid YAML: .*{cause}"):
        config.load(EvaluationConfig, None, [f"memory={text}"])
    assert time.monotonic() - start < 5


def test_usual_yaml_passes():
    assert parse_yaml("") is None
    assert parse_yaml("a: &x {b: 1}\nc: *x\nd: {<<: *x, e: 2}") == {
        "a": {"b": 1},
        "c": {"b": 1},
        "d": {"b": 1, "e": 2},
    }
    assert parse_yaml("[" * MAX_DEPTH + "]" * MAX_DEPTH)[0][0]


def test_deep_json_is_refused():
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json("[" * 100_000)
    assert parse_json(b'{"a": [1]}') == {"a": [1]}
