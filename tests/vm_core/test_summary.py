"""What the terminal shows; names from the data are text, never markup."""

import io
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from vm_core import summary
from vm_core.classes import ClassTable
from vm_core.gallery import Example
from vm_core.recall import ClassRecall, Recall


def shown(renderable: Any) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(renderable)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture
def memory():
    """A memory of classes and sources whose names look like markup."""
    names = ("[red]roses", "[/bold]", "iris")
    counts = {"read": 1_234, "embedded": 1_200, "quarantined": 30, "duplicates": 4, "bytes": 5e9}
    manifest = SimpleNamespace(
        version="000003",
        created="today",
        dimension=16,
        dtype="float32",
        encoder=SimpleNamespace(path="[/]model"),
        encoder_fingerprint="0123",
        content_digest="d" * 64,
        shards=[1, 2],
        partitions=[
            SimpleNamespace(index=SimpleNamespace(kind=kind), count=count)
            for kind, count in (("scann", 1_100), ("exact", 100))
        ],
        probes=2,
        weights=SimpleNamespace(removed=12, weighted=1_034, base_version="000001"),
        recall=Recall(
            queries=9,
            at={10: 0.98765},
            worst_class=ClassRecall(labels=[1], queries=5, at={1: 1.0, 10: 0.5}),
            new_classes=ClassRecall(labels=[1, 2], queries=5, at={10: 0.5}, unmeasured=[2]),
            by_probes={},
        ),
        total=counts.__getitem__,
        class_counts={0: 700, 1: 400, 2: 100},
        source_counts=lambda: {"[/i]flowers": 1_200},
        reasons=lambda: {"[/i] damaged": 30},
    )
    return SimpleNamespace(
        root="/data/[/x]memory", manifest=manifest, classes=ClassTable(names, names, (0, 1, 2))
    )


def test_of_memory(memory):
    text = shown(summary.of_memory(memory, classes=2))
    assert "1,234 read = 1,200 embedded + 30 quarantined + 4 duplicates" in text
    assert "scann, exact; 2 partitions of 100 to 1,100 rows, 2 visited by a query" in text
    line = " ".join(text.split())
    assert "recall on 9 held-out queries @10 0.988; worst class @1 1.000, @10 0.500" in line
    assert "new classes @10 0.500 (1 of 2 without a query)" in line
    assert "12 items removed, 1,034 weigh otherwise than 1; made from version 000001" in text
    assert "5.0 GB" in text
    for name in ("[red]roses", "[/bold]", "[/i]flowers", "[/i] damaged", "[/x]memory", "[/]model"):
        assert name in text
    assert "(1 more classes)" in text and "iris" not in text


def test_of_build(memory):
    assert "/data/[/x]memory, version 000003" in shown(summary.of_build(memory))


def test_of_answer(memory):
    answer = Example(
        "[/i]photo.jpg", -2, 1, 0.75, ("[/i]a", "b"), (1, 0), (0.1, 0.2), (0.75, 0.25), None
    )
    text = shown(summary.of_answer(memory, answer))
    assert "[/i]photo.jpg: [/bold], confidence 75%" in text
    assert "[/i]a" in text and "0.1000" in text and "75.0%" in text


def test_of_evaluation():
    results = {
        "memory": {"path": "/m", "version": "000001"},
        "queries": {"test": 1_000, "tuning": 0, "quarantined": 3, "leaks": 7},
        "test": {"accuracy_at_k": {"rank": [0.5, 0.625], "plurality": [None, None]}},
        "fixed_k": [1, 2],
        "chosen_k": None,
    }
    text = shown(summary.of_evaluation(results, "/out"))
    assert "62.5%" in text and "1,000 test" in text and "/out/report.html" in text
    results["chosen_k"] = {"rank": {"k": 2, "accuracy": 0.625}}
    assert text.count("62.5%") < shown(summary.of_evaluation(results, "/out")).count("62.5%")


def test_of_analysis():
    results = {
        "accuracy_at_k": {"rank": [0.25, 0.75, 0.5]},
        "reliability_at_k": [0.2, 0.3, 0.1],
        "entropy_base2": {"q": 0.0},
        "excluded": ["a"],
        "soft_weights": {"a": 0.5, "b": 0.2},
    }
    text = shown(summary.of_analysis(results, "out"))
    assert "75.0%" in text and "1 items removed, 2 weighted" in text
