"""The report: complete, escaped, offline, the same bytes for the same input."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from vm_core.classes import ClassTable
from vm_core.gallery import KINDS, Example, Gallery
from vm_core.metrics import EvaluationMetrics
from vm_core.neighbors import Neighbors
from vm_core.records import UNKNOWN, EmbeddingBlock, strings
from vm_core.report import plots, render_evaluation, render_explanations, views

# Not a picture that decodes, but bytes that must arrive in the page.
JPEG = b"\xff\xd8\xff\xe0 picture of "


def jpeg(id: str) -> bytes:
    return JPEG + id.encode()


def uri(id: str) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(id)).decode()


def class_table(count: int, name: str = "class {}") -> ClassTable:
    keys = tuple(f"n{i:04d}" for i in range(count))
    return ClassTable(keys, tuple(name.format(i) for i in range(count)), tuple(range(count)))


def evaluation(classes: int = 3, queries: int = 60, k: int = 12, tuning: int = 20):
    """Results, gallery examples and thumbnails of a made-up evaluation."""
    random = np.random.default_rng(7)
    labels = random.integers(0, classes, queries)
    drawn = random.integers(0, classes, (queries, k))
    found = Neighbors(
        query_ids=strings([f"queries/q{i}.jpg" for i in range(queries)]),
        query_labels=labels,
        ids=strings([f"memory/m{i}.jpg" for i in range(queries * k)]).reshape(queries, k),
        labels=np.where(random.random((queries, k)) < 0.5, labels[:, None], drawn),
        distances=np.sort(random.random((queries, k)).astype(np.float32), axis=1),
    )
    is_tuning = np.arange(queries) < tuning
    metrics = [EvaluationMetrics(k, range(classes)) for _ in range(2)]
    metrics[0].add(found.take(is_tuning))
    metrics[1].add(found.take(~is_tuning))
    chose, test = (each.result() for each in metrics)
    shown = found.take(~is_tuning)
    gallery = Gallery(*metrics[1].headline, metrics[1].parameters)
    pictures = strings([""] * len(shown))
    pictures[:] = [jpeg(id) for id in shown.query_ids]
    vectors = np.zeros((len(shown), 1), np.float32)
    gallery.add(
        shown,
        EmbeddingBlock(shown.query_ids, shown.query_labels, shown.query_ids, vectors, pictures),
    )
    examples = {kind: gallery.examples(kind) for kind in KINDS}
    chosen = {
        voter: {"k": best, "accuracy": test["accuracy_at_k"][voter][best - 1]}
        for voter, best in chose["best_k"].items()
    }
    results = {
        "fingerprint": "0123456789abcdef",
        "memory": {
            "path": "gs://bucket/memory",
            "version": "000001",
            "content_digest": "d" * 64,
            "rows": queries * k,
            "classes": classes,
            "encoder": "encoders/some",
            "encoder_fingerprint": "f" * 16,
            "index": ["scann", "scann"],
        },
        "queries": {
            "read": queries + 3,
            "embedded": queries,
            "quarantined": 2,
            "duplicates": 1,
            "tuning": tuning,
            "test": queries - tuning,
        },
        "leave_one_out": False,
        "k": k,
        "fixed_k": [each for each in (1, 10, 50) if each <= k],
        "chosen_k": chosen if tuning else None,
        "test": test,
        "tuning": chose if tuning else None,
    }
    ids = {id for kind in KINDS for example in examples[kind] for id in example.neighbor_ids}
    return results, examples, {id: jpeg(id) for id in ids}


EXAMPLE = Example(
    query_id="queries/a.jpg",
    label=1,
    prediction=0,
    confidence=0.6,
    neighbor_ids=("memory/b.jpg", "memory/c.jpg"),
    neighbor_labels=(0, 1),
    distances=(0.1, 0.2),
    weights=(0.6, 0.4),
    thumbnail=jpeg("queries/a.jpg"),
)


class _Page(HTMLParser):
    """Tags, attributes and text as a browser would see them."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._unread = 0
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self._unread += tag in ("style", "script")

    def handle_endtag(self, tag):
        self._unread -= tag in ("style", "script")

    def handle_data(self, data):
        if not self._unread:
            self.text += data

    def values(self, *attributes: str) -> list[str]:
        return [
            value or ""
            for _, found in self.tags
            for name, value in found.items()
            if name in attributes
        ]

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


def page(results, examples, thumbnails, classes: ClassTable | None = None) -> _Page:
    classes = classes or class_table(results["memory"]["classes"])
    return _Page(render_evaluation(results, examples, classes, thumbnails))


def test_says_what_was_evaluated():
    text = page(*evaluation()).text
    assert "63 read = 60 embedded + 2 quarantined + 1 duplicates" in text
    assert "20 to choose k, 40 to test" in text
    assert "scann, 2 partitions" in text
    for word in ("gs://bucket/memory", "plurality", "distance", "softmax", "rank", "class 2"):
        assert word in text


def test_same_input_same_bytes():
    results, examples, thumbnails = evaluation()
    read_back = json.loads(json.dumps(results))
    first = render_evaluation(results, examples, class_table(3), thumbnails)
    assert render_evaluation(read_back, examples, class_table(3), thumbnails) == first


def test_every_picture_is_there():
    results, examples, thumbnails = evaluation()
    pictures = set(page(results, examples, thumbnails).values("src"))
    shown = [example for kind in KINDS for example in examples[kind]]
    assert shown
    for example in shown:
        assert uri(example.query_id) in pictures
        assert {uri(id) for id in example.neighbor_ids} <= pictures


def test_a_missing_picture_is_named():
    results, examples, _ = evaluation()
    found = page(results, examples, {})
    example = examples["right"][0]
    assert example.neighbor_ids[0].removeprefix("memory/") in found.text
    queries = {uri(each.query_id) for kind in KINDS for each in examples[kind]}
    assert set(found.values("src")) == queries


def test_a_query_of_the_memory_takes_its_picture_from_there():
    example = replace(EXAMPLE, thumbnail=None)
    html = render_explanations(
        [example], class_table(2), {"queries/a.jpg": jpeg("queries/a.jpg")}, "t", {}
    )
    assert uri("queries/a.jpg") in html


def test_nothing_is_fetched():
    results, examples, thumbnails = evaluation()
    html = render_evaluation(results, examples, class_table(3), thumbnails)
    found = _Page(html)
    assert all(value.startswith("data:image/jpeg;base64,") for value in found.values("src"))
    assert found.values("href") == ["https://arxiv.org/abs/2408.08172"]
    assert not re.search(r"@import|url\(|<link|<iframe|srcset", html)
    (policy,) = [value for value in found.values("content") if "default-src" in value]
    assert "default-src 'none'; img-src data:" in policy


HOSTILE = "</script><script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}&amp;\u202e"


def test_hostile_names_are_text():
    results, examples, thumbnails = evaluation()
    results["memory"]["path"] = HOSTILE
    examples = {
        kind: [
            replace(
                example,
                query_id=HOSTILE + example.query_id,
                neighbor_ids=tuple(HOSTILE + id for id in example.neighbor_ids),
            )
            for example in examples[kind]
        ]
        for kind in KINDS
    }
    plain = page(*evaluation())
    classes = ClassTable(("a", "b", "c"), (HOSTILE,) * 3, (0, 1, 2))
    hostile = page(results, examples, thumbnails, classes)
    assert hostile.count("script") == plain.count("script") == 1
    assert not hostile.values("onerror")
    assert HOSTILE in hostile.text
    assert "x" not in hostile.values("src")


def test_hostile_explanations_are_text():
    hostile = replace(EXAMPLE, query_id=HOSTILE, neighbor_ids=(HOSTILE, HOSTILE))
    names = ClassTable(("a", "b"), (HOSTILE, HOSTILE), (0, 1))
    found = _Page(render_explanations([hostile], names, {}, HOSTILE, {HOSTILE: HOSTILE}))
    assert found.count("script") == 1
    assert found.count("img") == 1  # the query's own
    assert found.text.count(HOSTILE) > 5


@pytest.mark.parametrize(
    "shape",
    [
        {"classes": 1},
        {"k": 1},
        {"tuning": 0},
        {"queries": 20, "tuning": 20},  # none left to test on
        {"queries": 1, "tuning": 0, "k": 1, "classes": 1},
        {"queries": 0, "tuning": 0},
        {"classes": 1000, "queries": 2000},
        {"k": 2000, "queries": 8, "tuning": 4},
    ],
    ids=str,
)
def test_any_shape(shape):
    found = page(*evaluation(**shape))
    assert "Accuracy" in found.text
    assert not any(word in " ".join(found.values("d", "x", "y", "cx")) for word in ("nan", "inf"))
    assert "None" not in found.text
    assert "nan" not in found.text


def test_without_tuning_says_why_no_k_was_chosen():
    assert "No k was chosen" in page(*evaluation(tuning=0)).text
    assert "No k was chosen" not in page(*evaluation()).text


def test_without_fixed_k_and_tuning_shows_the_headline():
    results, _, _ = evaluation(tuning=0)
    results["fixed_k"] = []
    table = views.accuracy_table(results)
    assert table.columns == ["k = 10"]
    assert {row[0]: row[2][0][0] for row in table.rows}["rank"] == (
        results["test"]["headline"]["accuracy"]
    )


def test_the_best_of_a_column_is_marked_unless_all_are_equal():
    results, _, _ = evaluation(tuning=0)
    results["fixed_k"] = [1, 2]
    for voter, values in results["test"]["accuracy_at_k"].items():
        values[:2] = [0.5, 0.75 if voter == "softmax" else 0.25]
    marks = {
        voter: [best for _, best in cells] for voter, _, cells in views.accuracy_table(results).rows
    }
    assert marks["softmax"] == [False, True]
    assert marks["rank"] == marks["plurality"] == [False, False]


def test_many_classes_are_cut_and_it_says_so():
    results, examples, thumbnails = evaluation(classes=300, queries=4000)
    classes = class_table(300)
    table = views.class_table(results["test"], classes)
    accuracies = [row.accuracy["rank"] for row in [*table.worst, *table.best]]
    assert (len(table.worst), len(table.best)) == (100, 20)
    assert accuracies == sorted(accuracies)
    total = len(results["test"]["per_class"])
    assert table.left_out == total - 120
    assert f"{total - 120} classes between" in page(results, examples, thumbnails, classes).text


def test_confusions_are_counted_per_class_of_the_truth():
    results, _, _ = evaluation()
    test = results["test"]
    test["confusion"] = [[0, 0, 5], [0, 1, 2], [1, 0, 3], [UNKNOWN, 2, 4]]
    test["per_class"]["1"]["queries"], test["unknown"] = 6, 16
    found = views.confusions(test, class_table(3))
    assert found.mistakes == 9
    assert [(row.predicted, row.count, row.share) for row in found.rows[:2]] == [
        ("class 2", 4, 0.25),
        ("class 0", 3, 0.5),
    ]


def test_without_a_truth_none_is_shown():
    unknown = replace(EXAMPLE, label=UNKNOWN)
    found = _Page(render_explanations([unknown], class_table(2), {}, "One image", {"k": "2"}))
    assert "truth" not in found.text
    assert "not in the memory" not in found.text
    card = views.card(unknown, class_table(2), {}, labelled=False)
    assert (card.truth, card.right) == (None, None)
    assert [neighbor.agrees for neighbor in card.neighbors] == [True, False]


def test_in_an_evaluation_a_class_not_in_the_memory_is_the_truth():
    card = views.card(replace(EXAMPLE, label=UNKNOWN), class_table(2), {}, labelled=True)
    assert (card.truth, card.right) == ("(class not in the memory)", False)
    assert not any(neighbor.agrees for neighbor in card.neighbors)


def test_votes_are_summed_by_class_and_the_rest_is_counted():
    example = replace(
        EXAMPLE,
        neighbor_ids=tuple(f"m{i}" for i in range(25)),
        neighbor_labels=(0, 1, 0, 2, 3, 4, 5, *[6] * 18),
        distances=(0.5,) * 25,
        weights=(0.04,) * 25,
    )
    card = views.card(example, class_table(7), {}, labelled=True)
    assert (card.shares[0].name, len(card.neighbors), card.hidden) == ("class 0", 20, 5)
    assert card.shares[1].name == "class 6"
    shown = sum(share.weight for share in card.shares) + card.other_weight
    assert shown == pytest.approx(1.0)
    assert card.hidden_weight == pytest.approx(0.2)


def test_curves_keep_the_chosen_k_and_their_labels_apart():
    voters = {f"v{i}": [0.5 + 0.001 * (k % 3) for k in range(5000)] for i in range(4)}
    chart = plots.accuracy_over_k(voters, {name: {"k": 4321} for name in voters})
    assert all(len(curve.marks) == 1 for curve in chart.curves)
    assert all(len(curve.points) < 300 for curve in chart.curves)
    heights = sorted(curve.label[1] for curve in chart.curves if curve.label)
    assert min(b - a for a, b in pairwise(heights)) >= 15
    assert heights[0] >= 0
    assert heights[-1] <= chart.frame.bottom


def test_a_gap_breaks_the_curve():
    (curve,) = plots.reliability_by_rank([0.9, None, 0.7, 0.6]).curves
    assert curve.path.count("M") == 2
    assert len(curve.points) == 3


@pytest.mark.parametrize(
    "values", [[0.5], [0.0, 1.0], [1.0, 1.0], [0.97312, 0.97313], [0.0], [None, None]]
)
def test_ticks_cover_the_values(values):
    ticks = plots.reliability_by_rank(values).frame.y_ticks
    numbers = [float(label.rstrip("%")) / 100 for _, label in ticks]
    assert len({label for _, label in ticks}) == len(ticks) >= 2
    known = [value for value in values if value is not None]
    assert all(numbers[0] <= value + 1e-4 and value - 1e-4 <= numbers[-1] for value in known)
    assert 0 <= numbers[0] < numbers[-1] <= 1


def test_a_gallery_of_usual_size_stays_small():
    results, examples, _ = evaluation(queries=200, k=10)
    picture = bytes(3500)
    thumbnails = {id: picture for each in examples.values() for e in each for id in e.neighbor_ids}
    html = render_evaluation(results, examples, class_table(3), thumbnails)
    assert len(html) < 2_000_000


@pytest.mark.slow
def test_in_a_browser(tmp_path: Path):
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("chromium is not installed")
    results, examples, _ = evaluation(classes=250, queries=3000)
    path = tmp_path / "report.html"
    path.write_text(render_evaluation(results, examples, class_table(250), {}), encoding="utf-8")
    run = subprocess.run(
        [
            browser,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--enable-logging=stderr",
            "--dump-dom",
            path.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "CONSOLE" not in run.stderr
    dom = _Page(run.stdout)
    for section in ("accuracy", "neighbours", "classes", "gallery", *KINDS):
        assert section in dom.values("id")
    assert not any("hidden" in attributes for tag, attributes in dom.tags if tag == "p")
    # The script has run: it shows the filter and makes the heads of the class table buttons.
    assert dom.count("button") == 6
